//! Issuing certificates: a bot's own (joined or renewed), and those of its outputs.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use uuid::Uuid;

use super::certificate::{Identity, PublicKeys, logins};
use super::instance::{self, Authentication, Decision, Enforced, Presented};
use super::locks::{self, Targets};
use super::roles::{RoleSet, may_impersonate};
use super::served::Routes;
use super::{Auth, authorize};
use crate::crypto::{spki_from_pem, ssh};
use crate::embedded::ClusterState;
use crate::embedded::caller::{Caller, TlsIdentity};
use crate::embedded::instant::from_wire;
use crate::embedded::resources::bot_user_name;
use crate::embedded::store::{Resource, Tx};
use crate::pb::proto::{Certs, UserCertsRequest};
use crate::refusal::Refusal;

/// The life of a certificate whose request names none.
const DEFAULT_TTL: Duration = Duration::from_hours(1);
/// No certificate of a bot lives longer.
pub(super) const MAX_TTL: Duration = Duration::from_hours(7 * 24);
/// The smallest SubjectPublicKeyInfo of an RSA key with 2048 bits, in bytes.
const RSA_2048: usize = 290;
/// The longest public key, in bytes of its text: RSA keys with 16384 bits have 3 KiB.
const MAX_KEY: usize = 8 * 1024;

/// Reads the keys of a request, both optional: PEM for TLS, an `authorized_keys` line for SSH.
pub(super) fn public_keys(tls: &[u8], ssh: &[u8]) -> Result<PublicKeys, Refusal> {
    let bad = |which: &str| Refusal::bad_parameter(format!("cannot read the {which} public key"));
    if tls.len().max(ssh.len()) > MAX_KEY {
        let text = format!("a public key has more than {MAX_KEY} bytes");
        return Err(Refusal::bad_parameter(text));
    }
    let tls = match tls {
        [] => None,
        pem => {
            let text = std::str::from_utf8(pem).map_err(|_source| bad("TLS"))?;
            Some(spki_from_pem(text).map_err(|_source| bad("TLS"))?)
        }
    };
    let ssh = match ssh {
        [] => None,
        line => {
            let text = std::str::from_utf8(line).map_err(|_source| bad("SSH"))?;
            Some(ssh::spki_of_public_line(text).map_err(|_source| bad("SSH"))?)
        }
    };
    for spki in tls.iter().chain(&ssh) {
        let line = ssh::public_line_of_spki(spki).map_err(|_source| {
            Refusal::bad_parameter("public keys must be RSA, ECDSA P-256 or Ed25519")
        })?;
        if line.starts_with("ssh-rsa ") && spki.len() < RSA_2048 {
            return Err(Refusal::bad_parameter(
                "RSA keys must have 2048 bits or more",
            ));
        }
    }
    if tls.is_none() && ssh.is_none() {
        return Err(Refusal::bad_parameter("must provide a public key"));
    }
    Ok(PublicKeys { tls, ssh })
}

fn traits_of(user: &Resource) -> BTreeMap<String, Vec<String>> {
    let traits = user.spec.get("traits").and_then(Value::as_object);
    traits
        .into_iter()
        .flatten()
        .map(|(name, _)| (name.clone(), user.spec_texts(&format!("/traits/{name}"))))
        .collect()
}

/// A bot's own certificate, to be issued with its place in the generation counter.
#[derive(Debug)]
pub(super) struct Issue<'a> {
    /// The cluster.
    pub(super) state: &'a ClusterState,
    /// The bot.
    pub(super) bot: &'a str,
    /// What the caller's certificate says, if it has one of a bot.
    pub(super) presented: Option<Presented>,
    /// Whom a wrong generation locks. A certificate that locks the user may renew itself.
    pub(super) enforced: Enforced,
    /// The requested end of validity.
    pub(super) requested: Option<SystemTime>,
    /// The keys to be certified.
    pub(super) keys: &'a PublicKeys,
    /// What the join proved, as JSON text.
    pub(super) join_attributes: &'a str,
    /// The address that asks.
    pub(super) client_ip: String,
    /// The token that is used, or was used for the certificate that is renewed; empty if its name
    /// is not known any more.
    pub(super) join_token: &'a str,
    /// The client's program.
    pub(super) user_agent: &'a str,
    /// Now.
    pub(super) now: SystemTime,
}

/// What a transaction ends with: locking a bot must be written although the call is refused.
enum Outcome {
    Issued { certs: Box<Certs>, event: Value },
    Stolen { event: Value, refusal: Refusal },
}

impl Issue<'_> {
    /// Issues in one transaction. `authentication` makes the record's entry from the record so
    /// far and the end of validity, `spend` uses up for an instance what it joins with.
    pub(super) fn run(
        &self,
        authentication: impl FnOnce(Option<&Resource>, SystemTime) -> Authentication,
        spend: impl FnOnce(&Tx<'_>, &str) -> Result<(), Refusal>,
    ) -> Result<Certs, Refusal> {
        let outcome = self
            .state
            .store
            .transaction(|tx| self.in_transaction(tx, authentication, spend))?;
        match outcome {
            Outcome::Issued { certs, event } => {
                self.state.audit.emit(event);
                Ok(*certs)
            }
            Outcome::Stolen { event, refusal } => {
                self.state.audit.emit(event);
                Err(refusal)
            }
        }
    }

    fn in_transaction(
        &self,
        tx: &Tx<'_>,
        authentication: impl FnOnce(Option<&Resource>, SystemTime) -> Authentication,
        spend: impl FnOnce(&Tx<'_>, &str) -> Result<(), Refusal>,
    ) -> Result<Outcome, Refusal> {
        let name = bot_user_name(self.bot);
        let user = tx
            .get("user", &name)?
            .ok_or_else(|| Refusal::denied("access denied"))?;
        let traits = traits_of(&user);
        let roles = RoleSet::load(tx, &user.spec_texts("/roles"), &traits)?;
        let presented_id = self
            .presented
            .as_ref()
            .map_or("", |presented| &presented.id);
        let targets = Targets {
            user: &name,
            roles: &roles.names,
            bot_instance: presented_id,
            join_token: self.join_token,
        };
        locks::check(tx, &targets)?;
        let expires = self
            .requested
            .unwrap_or(self.now + DEFAULT_TTL)
            .min(self.now + MAX_TTL)
            .min(self.now + roles.max_session_ttl);
        let existing = match &self.presented {
            Some(presented) => instance::find(tx, self.bot, &presented.id)?,
            None => None,
        };
        let by = authentication(existing.as_ref(), expires);
        let stored = existing
            .as_ref()
            .map(|record| instance::last(record, &by.public_key));
        let decision = instance::decide(
            self.presented
                .as_ref()
                .map(|presented| presented.generation),
            stored,
            instance::label(&user),
            self.enforced,
        );
        let (id, generation) = match decision {
            Decision::New(generation) => (Uuid::new_v4().to_string(), generation),
            Decision::Next(generation) | Decision::Again(generation) => {
                (presented_id.to_owned(), generation)
            }
            Decision::Missing => {
                return Err(Refusal::denied(
                    "a current identity generation must be provided",
                ));
            }
            Decision::Stolen { stored, known } => return self.stolen(tx, &name, stored, known),
        };
        spend(tx, &id)?;
        // A key that can be copied gets the answer again, and nothing more by it.
        let first = match (&decision, &existing) {
            (Decision::Again(_), Some(record)) if self.enforced == Enforced::Token => {
                instance::certified_until(record)
            }
            _ => None,
        };
        let expires = first.map_or(expires, |first| expires.min(first));
        if let (Decision::Next(_), Some(presented), Some((stored, _))) =
            (&decision, &self.presented, stored)
            && presented.generation != stored
        {
            tracing::warn!(
                bot = self.bot,
                instance = id,
                stored,
                presented = presented.generation,
                "a bot joined again with an older certificate than its last one"
            );
        }
        let identity = Identity {
            user: &name,
            roles: &roles,
            logins: &logins(&roles),
            traits: &traits,
            cluster: &self.state.name,
            routes: &Routes::default(),
            client_ip: self.client_ip.clone(),
            renewable: self.renewable(),
            generation,
            bot_name: self.bot,
            bot_instance: &id,
            disallow_reissue: false,
            impersonator: "",
            join_attributes: self.join_attributes,
            expires,
        };
        let certs = identity.sign(&self.state.authorities, self.keys, true, self.now)?;
        match (decision, existing) {
            (Decision::Again(_), Some(record)) => instance::prolong(tx, record, expires)?,
            _ => instance::record(tx, self.bot, &id, generation, &by, self.now)?,
        }
        if self.renewable() {
            instance::raise_label(tx, user, generation)?;
        }
        Ok(Outcome::Issued {
            certs: Box::new(certs),
            event: identity.event(self.user_agent),
        })
    }

    fn renewable(&self) -> bool {
        self.enforced == Enforced::User
    }

    fn stolen(
        &self,
        tx: &Tx<'_>,
        user: &str,
        stored: u32,
        known: bool,
    ) -> Result<Outcome, Refusal> {
        let kind = if self.enforced == Enforced::Token {
            let why = "a certificate of it was used again that was replaced before";
            locks::copied(tx, self.join_token, self.bot, why, self.now)?;
            "cert"
        } else {
            locks::stolen(tx, user, self.now)?;
            "renewable cert"
        };
        let (id, presented) = self.presented.as_ref().map_or(("", 0), |presented| {
            (presented.id.as_str(), presented.generation)
        });
        let whose = if known {
            format!(" for bot {}/{id}", self.bot)
        } else {
            String::new()
        };
        Ok(Outcome::Stolen {
            event: json!({
                "event": "cert.generation_mismatch",
                "code": "TCB00W",
                "user": user,
                "bot_name": self.bot,
                "bot_instance_id": id,
                "stored_generation": stored,
                "presented_generation": presented,
                "addr.remote": self.client_ip,
            }),
            refusal: Refusal::denied(format!(
                "{kind} generation mismatch{whose}: stored={stored}, presented={presented}"
            )),
        })
    }
}

impl Auth {
    /// `GenerateUserCerts`: a renewal, or a certificate with other roles.
    pub(super) fn user_certs(
        &self,
        caller: &Caller,
        user_agent: &str,
        request: &UserCertsRequest,
    ) -> Result<Certs, Refusal> {
        let state = self.state.as_ref();
        let identity = authorize(state, caller)?;
        check(&identity, request, &state.name)?;
        let now = state.clock.now();
        let requested = request
            .expires
            .and_then(from_wire)
            .filter(|expires| *expires > now)
            .ok_or_else(|| {
                Refusal::denied("access denied: client credentials have expired, please relogin.")
            })?;
        let keys = public_keys(&request.tls_public_key, &request.ssh_public_key)?;
        let client_ip = caller.addr.ip().to_string();
        if identity.renewable && request.role_requests.is_empty() {
            let issue = Issue {
                state,
                bot: &identity.bot_name,
                presented: Some(Presented {
                    id: identity.bot_instance_id.clone(),
                    generation: identity.generation,
                }),
                enforced: Enforced::User,
                requested: Some(requested),
                keys: &keys,
                join_attributes: &identity.join_attributes_text,
                client_ip,
                join_token: identity.join_token(),
                user_agent,
                now,
            };
            let key = match request.tls_public_key.as_slice() {
                [] => request.ssh_public_key.clone(),
                tls => tls.to_vec(),
            };
            let nobody = Resource::default();
            return issue.run(
                |record, expires| instance::inherited(record.unwrap_or(&nobody), key, expires),
                |_tx, _instance| Ok(()),
            );
        }
        let (certs, events) = state.store.transaction(|tx| {
            derived(
                state, tx, &identity, request, &keys, requested, user_agent, now,
            )
        })?;
        for event in events {
            state.audit.emit(event);
        }
        Ok(certs)
    }
}

/// What can be refused without looking at roles.
fn check(identity: &TlsIdentity, request: &UserCertsRequest, cluster: &str) -> Result<(), Refusal> {
    if identity.disallow_reissue {
        return Err(Refusal::denied(
            "access denied: identity is not allowed to reissue certificates",
        ));
    }
    if request.username != identity.user {
        return Err(Refusal::denied(format!(
            "access denied: {:?} may not ask for certificates of {:?}",
            identity.user, request.username
        )));
    }
    let roles = !request.role_requests.is_empty();
    if request.use_role_requests && !roles {
        return Err(Refusal::bad_parameter(
            "at least one role request is required",
        ));
    }
    if roles && !identity.impersonator.is_empty() {
        return Err(Refusal::denied(
            "access denied: impersonated roles can not request other roles",
        ));
    }
    if !request.access_requests.is_empty() {
        return Err(Refusal::bad_parameter(
            "this cluster has no access requests",
        ));
    }
    if !request.route_to_cluster.is_empty() && request.route_to_cluster != cluster {
        let text = format!("remote cluster {:?} not found", request.route_to_cluster);
        return Err(Refusal::not_found(text));
    }
    if request.usage != 0 {
        return Err(Refusal::unimplemented(
            "certificates of limited use are not made here",
        ));
    }
    Ok(())
}

/// A certificate that does not renew itself: with other roles, or once more with the same.
#[expect(
    clippy::too_many_arguments,
    reason = "one call, after the checks that gather them"
)]
fn derived(
    state: &ClusterState,
    tx: &Tx<'_>,
    caller: &TlsIdentity,
    request: &UserCertsRequest,
    keys: &PublicKeys,
    requested: SystemTime,
    user_agent: &str,
    now: SystemTime,
) -> Result<(Certs, Vec<Value>), Refusal> {
    let user = tx
        .get("user", &caller.user)?
        .ok_or_else(|| Refusal::denied("access denied"))?;
    let traits = traits_of(&user);
    let impersonates = !request.role_requests.is_empty();
    let roles = if impersonates {
        let own = user.spec_texts("/roles");
        let own: Vec<Resource> = own
            .iter()
            .filter_map(|name| tx.get("role", name).transpose())
            .collect::<Result<_, _>>()?;
        if !request
            .role_requests
            .iter()
            .all(|role| may_impersonate(&own, role))
        {
            return Err(Refusal::denied(format!(
                "user {:?} has requested role impersonation for [{}]",
                caller.user,
                request.role_requests.join(" ")
            )));
        }
        RoleSet::load(tx, &request.role_requests, &traits)?
    } else {
        RoleSet::load(tx, &caller.roles, &traits)?
    };
    let targets = Targets {
        user: &caller.user,
        roles: &roles.names,
        bot_instance: &caller.bot_instance_id,
        join_token: caller.join_token(),
    };
    locks::check(tx, &targets)?;
    let mut expires = requested
        .min(now + MAX_TTL)
        .min(now + roles.max_session_ttl);
    if !impersonates {
        expires = expires.min(caller.expires);
    }
    let routes = Routes::of(state, tx, &roles, request)?;
    let identity = Identity {
        user: &caller.user,
        roles: &roles,
        logins: &logins(&roles),
        traits: &traits,
        cluster: &state.name,
        routes: &routes,
        client_ip: caller.client_ip.clone(),
        renewable: false,
        generation: 0,
        bot_name: &caller.bot_name,
        bot_instance: &caller.bot_instance_id,
        disallow_reissue: impersonates && !request.reissuable_role_impersonation,
        impersonator: if impersonates {
            &caller.user
        } else {
            &caller.impersonator
        },
        join_attributes: &caller.join_attributes_text,
        expires,
    };
    let certs = identity.sign(&state.authorities, keys, false, now)?;
    let mut events = vec![identity.event(user_agent)];
    events.extend(identity.session_event());
    Ok((certs, events))
}
