//! One attempt to join, whatever the protocol and the method: the token that is named, what was
//! proved, the certificates, and the line in the audit log.

mod bound_keypair;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit};

pub(super) use self::bound_keypair::Known;
use super::Refusal;
use super::certificate::PublicKeys;
use super::instance::{Authentication, Enforced, Presented};
use super::join::Joined;
use super::user_certs::{Issue, public_keys};
use crate::embedded::ClusterState;
use crate::embedded::caller::{Caller, Listener};
use crate::embedded::instant::from_wire;
use crate::embedded::resources::{bot_user_name, safe_name, spent};
use crate::embedded::store::{Put, Resource, Tx};
use crate::join::bound_keypair::verify::Kind;
use crate::join::verify::{self, Seen};
use crate::pb::proto::Certs;
use crate::pb::types::RegisterUsingTokenRequest;

/// The longest name of a token or of a machine, in bytes; resources cannot have longer names.
const MAX_NAME: usize = 256;

/// How many joins there may be at a time, so that a flood of them cannot exhaust the process.
#[derive(Debug)]
pub(super) struct Joins {
    /// Joins that are known at all, those that wait included.
    pub(super) known: Semaphore,
    /// Joins that sign, write, or wait for AWS.
    pub(super) working: Semaphore,
}

impl Default for Joins {
    /// A thousand agents that come back at once wait in line; each holds a few KiB.
    fn default() -> Self {
        Self {
            known: Semaphore::new(1024),
            working: Semaphore::new(32),
        }
    }
}

impl Joins {
    /// Lets one more join in, until what comes back is dropped.
    ///
    /// # Errors
    /// Unavailable, if too many wait already; trying again later helps.
    pub(super) fn enter(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.known.try_acquire().map_err(|_full| busy())
    }

    /// Waits for a turn at the disk.
    ///
    /// # Errors
    /// Never, as long as the cluster runs.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.working.acquire().await.map_err(|_closed| busy())
    }
}

fn busy() -> Refusal {
    Refusal::unavailable("too many bots are joining at once, try again")
}

/// One attempt to join, and what is known of it for the audit log.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) request: RegisterUsingTokenRequest,
    /// What its proof says about who joins.
    pub(super) seen: Seen,
    state: Arc<ClusterState>,
    caller: Caller,
    user_agent: String,
    token: Option<Resource>,
}

impl Attempt {
    pub(super) fn new(
        state: &Arc<ClusterState>,
        caller: Caller,
        user_agent: String,
        request: RegisterUsingTokenRequest,
    ) -> Self {
        Self {
            request,
            seen: Seen::default(),
            state: Arc::clone(state),
            caller,
            user_agent,
            token: None,
        }
    }

    pub(super) fn now(&self) -> SystemTime {
        self.state.clock.now()
    }

    /// The address that the caller connects from.
    pub(super) fn address(&self) -> IpAddr {
        self.caller.addr.ip()
    }

    pub(super) fn method(&self) -> &str {
        self.token
            .as_ref()
            .map_or("", |token| token.spec_text("/join_method"))
    }

    pub(super) fn bot(&self) -> &str {
        self.token
            .as_ref()
            .map_or("", |token| token.spec_text("/bot_name"))
    }

    /// The token's `spec`.
    pub(super) fn spec(&self) -> &Value {
        self.token
            .as_ref()
            .map_or(&Value::Null, |token| &token.spec)
    }

    /// The token's `status`.
    pub(super) fn status(&self) -> &Value {
        self.token
            .as_ref()
            .map_or(&Value::Null, |token| &token.status)
    }

    /// The request's form, then the token, then whether it lets a bot in.
    pub(super) fn look_up(&mut self) -> Result<(), Refusal> {
        let request = &self.request;
        for (what, text) in [
            ("token", &request.token),
            ("node name", &request.node_name),
            ("role", &request.role),
        ] {
            if text.len() > MAX_NAME {
                let text = format!("the {what} has more than {MAX_NAME} bytes");
                return Err(Refusal::bad_parameter(text));
            }
        }
        if request.token.is_empty() {
            return Err(Refusal::bad_parameter("missing parameter Token"));
        }
        if request.role != "Bot" {
            let text = format!(
                "role {:?} is not registered: only bots join here",
                request.role
            );
            return Err(Refusal::bad_parameter(text));
        }
        let found = self.state.store.get("token", &request.token)?;
        self.token = Some(found.ok_or_else(|| unknown_token(request))?);
        let allowed = self
            .token
            .as_ref()
            .is_some_and(|token| token.spec_texts("/roles").iter().any(|role| role == "Bot"));
        if !allowed {
            return Err(Refusal::bad_parameter(format!(
                "node {:?} [] can not join the cluster, the token does not allow \"Bot\" role",
                request.node_name
            )));
        }
        Ok(())
    }

    /// Issues the certificates, in one transaction with the end of the token and the record.
    pub(super) fn issue(&self) -> Result<Joined, Refusal> {
        let now = self.now();
        let method = self.method().to_owned();
        let keys = public_keys(&self.request.public_tls_key, &self.request.public_ssh_key)?;
        let safe = safe_name(&self.request.token, &method);
        let attributes = self.attributes();
        let requested = match self.request.expires {
            None => None,
            Some(time) => Some(from_wire(time).filter(|time| *time > now).ok_or_else(|| {
                Refusal::bad_parameter(
                    "the requested expiry is past or no point in time; check the clocks",
                )
            })?),
        };
        let issue = Issue {
            state: &self.state,
            bot: self.bot(),
            presented: self.presented(),
            enforced: match method.as_str() {
                "token" => Enforced::User,
                "bound_keypair" => Enforced::Token,
                _ => Enforced::No,
            },
            requested,
            keys: &keys,
            join_attributes: &attributes,
            client_ip: self.caller.addr.ip().to_string(),
            join_token: &self.request.token,
            user_agent: &self.user_agent,
            now,
        };
        let by = Authentication {
            method: method.clone(),
            token: safe,
            public_key: first_key(&self.request, &keys),
            metadata: self.seen.metadata.clone(),
            join_attributes: serde_json::from_str(&attributes).unwrap_or_default(),
            expires: now,
            previous: self.previous(),
        };
        let mut joined_as = String::new();
        let certs = issue.run(
            |_record, expires| Authentication {
                expires,
                ..by.clone()
            },
            |tx, instance| {
                instance.clone_into(&mut joined_as);
                self.spend(tx, &method, instance)
            },
        )?;
        Ok(Joined {
            certs,
            bound_keypair: self.result(&joined_as)?,
        })
    }

    /// What the join proved, as certificates carry it: JSON with the members in the order that a
    /// Teleport 18.0.0 cluster writes.
    fn attributes(&self) -> String {
        let method = json!(self.method());
        let mut text = if self.method() == "token" {
            format!("{{\"meta\":{{\"join_method\":{method}}}")
        } else {
            let name = json!(self.request.token);
            format!("{{\"meta\":{{\"join_token_name\":{name},\"join_method\":{method}}}")
        };
        if let (Some(found), Some(verifier)) =
            (&self.seen.attributes, verify::method(self.method()))
        {
            let members = found
                .iter()
                .map(|(key, value)| format!("{}:{value}", json!(key)));
            let members: Vec<_> = members.collect();
            text += &format!(",\"{}\":{{{}}}", verifier.attributes(), members.join(","));
        }
        text + "}"
    }

    /// Uses up a `token` token for `instance`, or binds the key of a bound one to it: only one of two
    /// that come at once finds the token as it was.
    fn spend(&self, tx: &Tx<'_>, method: &str, instance: &str) -> Result<(), Refusal> {
        let name = &self.request.token;
        // The very token that was verified: one that was replaced meanwhile has other rules.
        let verified = self.token.as_ref().map(|token| &token.revision);
        let found = tx.get("token", name)?;
        let found = found.filter(|token| Some(&token.revision) == verified);
        let found = match (found, &self.seen.bound) {
            (Some(found), _) => found,
            (None, Some(bound)) => return Err(Self::overtaken(bound)),
            (None, None) => return Err(unknown_token(&self.request)),
        };
        if let Some(bound) = &self.seen.bound {
            return Self::bind(tx, found, bound, instance);
        }
        if method == "token" {
            tx.delete("token", name)?;
            let mut used = spent(name);
            used.spec = json!({"bot_instance_id": instance});
            tx.put(used, &Put::Upsert)?;
        }
        Ok(())
    }

    /// The instance that the caller's own certificate names. What the request says of it counts
    /// for nothing.
    pub(super) fn presented(&self) -> Option<Presented> {
        if let Some(bound) = &self.seen.bound
            && bound.kind == Kind::Again
        {
            return Some(Presented {
                id: bound.status.bound_bot_instance_id.clone(),
                generation: 0,
            });
        }
        self.caller
            .identity
            .as_ref()
            .filter(|identity| {
                self.caller.listener == Listener::Auth && self.now() <= identity.expires
            })
            .filter(|identity| !identity.bot_instance_id.is_empty())
            // Another bot's instance says nothing about this one.
            .filter(|identity| identity.bot_name == self.bot())
            .map(|identity| Presented {
                id: identity.bot_instance_id.clone(),
                generation: identity.generation,
            })
    }

    /// Writes how it ended into the audit log and passes it on.
    pub(super) fn finish(&self, result: Result<Joined, Refusal>) -> Result<Joined, Refusal> {
        match &result {
            Ok(joined) => self.joined(&joined.certs),
            Err(refusal) => self.refused(refusal),
        }
        result
    }

    /// Writes the failure into the audit log.
    fn refused(&self, refusal: &Refusal) {
        let method = self.method();
        // The name of an unknown token may be a secret with a typing error in it, of any length.
        let shown = match &self.token {
            Some(token) => safe_name(&token.name, method),
            None if self.request.token.len() > MAX_NAME => String::new(),
            None => safe_name(&self.request.token, "token"),
        };
        self.state.audit.emit(json!({
            "event": "bot.join",
            "code": "TJ001E",
            "success": false,
            "error": refusal.to_string(),
            "method": method,
            "token_name": shown,
            "bot_name": self.bot(),
            "addr.remote": self.caller.addr.ip().to_string(),
            "attributes": self.seen.metadata,
            "nearest_rule": self.seen.near,
        }));
    }

    /// Writes the success into the audit log.
    fn joined(&self, certs: &Certs) {
        self.tell_bound();
        let instance = std::str::from_utf8(&certs.tls)
            .ok()
            .and_then(|pem| crate::crypto::x509::Certificate::from_pem(pem).ok())
            .and_then(|certificate| {
                let oid = crate::embedded::caller::oid::BOT_INSTANCE;
                certificate.subject(oid).into_iter().next()
            });
        self.state.audit.emit(json!({
            "event": "bot.join",
            "code": "TJ001I",
            "success": true,
            "method": self.method(),
            "token_name": safe_name(&self.request.token, self.method()),
            "bot_name": self.bot(),
            "user_name": bot_user_name(self.bot()),
            "bot_instance_id": instance,
            "addr.remote": self.caller.addr.ip().to_string(),
            "attributes": self.seen.metadata,
        }));
    }
}

fn unknown_token(request: &RegisterUsingTokenRequest) -> Refusal {
    Refusal::denied(format!(
        "{:?} can not join the cluster with role \"Bot\", token expired or not found",
        request.node_name
    ))
}

/// The key as it goes into the record: exactly what was sent, the TLS one if there are two.
fn first_key(request: &RegisterUsingTokenRequest, keys: &PublicKeys) -> Vec<u8> {
    if keys.tls.is_some() {
        request.public_tls_key.clone()
    } else {
        request.public_ssh_key.clone()
    }
}
