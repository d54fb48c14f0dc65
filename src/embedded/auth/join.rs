//! Joining: a token, the proof its method asks for, and the bot's first or next certificate.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::certificate::PublicKeys;
use super::instance::{Authentication, Presented};
use super::user_certs::{Issue, public_keys};
use super::{Auth, Refusal, blocking, caller, user_agent};
use crate::embedded::ClusterState;
use crate::embedded::caller::{Caller, Listener};
use crate::embedded::instant::from_wire;
use crate::embedded::resources::{safe_name, spent};
use crate::embedded::store::{Put, Resource, Tx};
use crate::join::iam::verify::{self as iam, AwsIdentity, IamError, StsRequest};
use crate::join::token::verify as token;
use crate::pb::proto::join_service_server::JoinService;
use crate::pb::proto::{Certs, RegisterUsingIamMethodRequest, RegisterUsingIamMethodResponse};
use crate::pb::types::RegisterUsingTokenRequest;

/// The longest that a join with a challenge may take.
const STREAM: Duration = Duration::from_mins(1);

/// What a method's proof says about who joins.
#[derive(Debug, Clone, Default)]
struct Proof {
    /// Names of the audit event, for example `Account`.
    metadata: Value,
    /// The method's part of the join attributes, with its name.
    attributes: Option<(&'static str, Value)>,
}

/// One attempt to join, and what is known of it for the audit log.
#[derive(Debug)]
struct Attempt {
    state: Arc<ClusterState>,
    caller: Caller,
    user_agent: String,
    request: RegisterUsingTokenRequest,
    token: Option<Resource>,
    proof: Proof,
}

impl Attempt {
    fn new(
        state: &Arc<ClusterState>,
        caller: Caller,
        user_agent: String,
        request: RegisterUsingTokenRequest,
    ) -> Self {
        Self {
            state: Arc::clone(state),
            caller,
            user_agent,
            request,
            token: None,
            proof: Proof::default(),
        }
    }

    fn now(&self) -> SystemTime {
        self.state.clock.now()
    }

    fn method(&self) -> &str {
        self.token
            .as_ref()
            .map_or("", |token| token.spec_text("/join_method"))
    }

    fn bot(&self) -> &str {
        self.token
            .as_ref()
            .map_or("", |token| token.spec_text("/bot_name"))
    }

    /// The request's form, then the token, then whether it lets a bot in.
    fn look_up(&mut self) -> Result<(), Refusal> {
        let request = &self.request;
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
    fn issue(&self) -> Result<Certs, Refusal> {
        let now = self.now();
        let method = self.method().to_owned();
        let keys = public_keys(&self.request.public_tls_key, &self.request.public_ssh_key)?;
        let safe = safe_name(&self.request.token, &method);
        let mut meta = serde_json::Map::new();
        // The text that certificates carry is ordered as recorded; the record is not.
        let mut text = String::from("{\"meta\":{");
        if method != "token" {
            meta.insert("join_token_name".to_owned(), safe.clone().into());
            text += &format!("\"join_token_name\":{},", json!(safe));
        }
        meta.insert("join_method".to_owned(), method.clone().into());
        text += &format!("\"join_method\":{}}}", json!(method));
        let mut attributes = json!({"meta": meta});
        if let Some((name, value)) = &self.proof.attributes {
            text += &format!(",\"{name}\":{value}");
            if let Some(members) = attributes.as_object_mut() {
                members.insert((*name).to_owned(), value.clone());
            }
        }
        text.push('}');
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
            renewable: method == "token",
            requested,
            keys: &keys,
            join_attributes: &text,
            client_ip: self.caller.addr.ip().to_string(),
            join_token: &self.request.token,
            user_agent: &self.user_agent,
            now,
        };
        let by = Authentication {
            method: method.clone(),
            token: safe,
            public_key: first_key(&self.request, &keys),
            metadata: self.proof.metadata.clone(),
            join_attributes: attributes,
            expires: now,
        };
        issue.run(
            |_record, expires| Authentication {
                expires,
                ..by.clone()
            },
            |tx| self.spend(tx, &method),
        )
    }

    /// Uses up a `token` token: only one of two that come at once finds it.
    fn spend(&self, tx: &Tx<'_>, method: &str) -> Result<(), Refusal> {
        let name = &self.request.token;
        // The very token that was verified: one that was replaced meanwhile has other rules.
        let verified = self.token.as_ref().map(|token| &token.revision);
        let found = tx.get("token", name)?;
        if found.as_ref().map(|token| &token.revision) != verified || verified.is_none() {
            return Err(unknown_token(&self.request));
        }
        if method == "token" {
            tx.delete("token", name)?;
            tx.put(spent(name), &Put::Upsert)?;
        }
        Ok(())
    }

    /// The instance that the caller's own certificate names. What the request says of it counts
    /// for nothing.
    fn presented(&self) -> Option<Presented> {
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

    /// Writes the failure into the audit log and passes it on.
    fn refused(&self, refusal: Refusal) -> Refusal {
        let method = self.method();
        // The name of an unknown token may be a secret with a typing error in it.
        let shown = if self.token.is_some() {
            method
        } else {
            "token"
        };
        self.state.audit.emit(json!({
            "event": "bot.join",
            "code": "TJ001E",
            "success": false,
            "error": refusal.to_string(),
            "method": method,
            "token_name": safe_name(&self.request.token, shown),
            "bot_name": self.bot(),
            "addr.remote": self.caller.addr.ip().to_string(),
            "attributes": self.proof.metadata,
        }));
        refusal
    }

    /// Writes the success into the audit log.
    fn joined(&self, certs: &Certs) {
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
            "user_name": crate::embedded::resources::bot_user_name(self.bot()),
            "bot_instance_id": instance,
            "addr.remote": self.caller.addr.ip().to_string(),
            "attributes": self.proof.metadata,
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

fn by_token(mut attempt: Attempt) -> Result<Certs, Refusal> {
    let run = |attempt: &mut Attempt| {
        attempt.look_up()?;
        token::check(attempt.method()).map_err(|error| Refusal::denied(error.to_string()))?;
        attempt.issue()
    };
    match run(&mut attempt) {
        Ok(certs) => {
            attempt.joined(&certs);
            Ok(certs)
        }
        Err(refusal) => Err(attempt.refused(refusal)),
    }
}

/// The status of a failed proof, with the contexts of an 18.0 cluster.
fn iam_refusal(error: &IamError, token: &str) -> Refusal {
    let text = match error {
        IamError::NoRule(_) => format!("{error} in token {token}"),
        _ => error.to_string(),
    };
    let (refusal, doing) = match error {
        IamError::NoRule(_) => (Refusal::denied(text), "checking allow rules"),
        IamError::Refused { .. } => (Refusal::denied(text), "executing STS request"),
        IamError::Empty => (Refusal::bad_parameter(text), "executing STS request"),
        IamError::Answer => (Refusal::unknown(text), "executing STS request"),
        IamError::Malformed(_) => (Refusal::unknown(text), "parsing STS request"),
        IamError::Authorization(_) | IamError::Body => {
            (Refusal::bad_parameter(text), "validating STS request")
        }
        IamError::Target(_)
        | IamError::Method(_)
        | IamError::Host(_)
        | IamError::Challenge
        | IamError::Unsigned
        | IamError::Header(_)
        | IamError::Skew { .. } => (Refusal::denied(text), "validating STS request"),
    };
    refusal.context(doing).context("checking iam request")
}

impl Auth {
    async fn by_iam(
        &self,
        attempt: Attempt,
        challenge: &str,
        sts_request: Vec<u8>,
    ) -> Result<Certs, Refusal> {
        let mut attempt = attempt;
        let found = blocking(move || {
            let result = attempt.look_up().and_then(|()| match attempt.method() {
                "iam" => Ok(()),
                _ => Err(Refusal::denied(
                    "this token does not support the IAM join method",
                )),
            });
            Ok((attempt, result))
        })
        .await?;
        attempt = found.0;
        let result = match found.1 {
            Ok(()) => self.confirm(&attempt, challenge, &sts_request).await,
            Err(refusal) => Err(refusal),
        };
        blocking(move || {
            let certs = result.and_then(|identity| {
                attempt.proof = Proof {
                    metadata: json!({"Account": identity.account, "Arn": identity.arn}),
                    attributes: Some((
                        "iam",
                        json!({"account": identity.account, "arn": identity.arn}),
                    )),
                };
                let allow = attempt
                    .token
                    .as_ref()
                    .and_then(|token| token.spec.get("allow"));
                identity
                    .check(allow.unwrap_or(&Value::Null))
                    .map_err(|error| iam_refusal(&error, &attempt.request.token))?;
                attempt.issue()
            });
            match certs {
                Ok(certs) => {
                    attempt.joined(&certs);
                    Ok(certs)
                }
                Err(refusal) => Err(attempt.refused(refusal)),
            }
        })
        .await
    }

    /// Has AWS confirm who signed the request.
    async fn confirm(
        &self,
        attempt: &Attempt,
        challenge: &str,
        request: &[u8],
    ) -> Result<AwsIdentity, Refusal> {
        let token = &attempt.request.token;
        let refuse = |error: IamError| iam_refusal(&error, token);
        let request = StsRequest::parse(request, challenge, attempt.now()).map_err(refuse)?;
        let answer = self.sts.send(&request).await.map_err(|error| {
            Refusal::unavailable(error.to_string())
                .context("executing STS request")
                .context("checking iam request")
        })?;
        AwsIdentity::read(&answer.status, answer.ok, &answer.body).map_err(refuse)
    }

    /// The whole exchange of a challenge and its answer.
    pub(super) async fn iam_exchange(
        &self,
        caller: Caller,
        user_agent: String,
        requests: impl Stream<Item = Result<RegisterUsingIamMethodRequest, Status>>,
        responses: &tokio::sync::mpsc::Sender<Result<RegisterUsingIamMethodResponse, Status>>,
    ) -> Result<(), Status> {
        tokio::pin!(requests);
        let challenge = iam::challenge();
        let gone = |_closed| Status::cancelled("the client went away");
        let first = RegisterUsingIamMethodResponse {
            challenge: challenge.clone(),
            certs: None,
        };
        responses.send(Ok(first)).await.map_err(gone)?;
        let Some(request) = requests.next().await else {
            return Err(Status::cancelled("the client went away"));
        };
        let request = request?;
        let join = request
            .register_using_token_request
            .ok_or_else(|| Refusal::bad_parameter("missing parameter RegisterUsingTokenRequest"))?;
        if request.sts_identity_request.is_empty() {
            return Err(Refusal::bad_parameter("missing parameter StsIdentityRequest").into());
        }
        let attempt = Attempt::new(&self.state, caller, user_agent, join);
        let certs = self
            .by_iam(attempt, &challenge, request.sts_identity_request)
            .await?;
        let last = RegisterUsingIamMethodResponse {
            challenge: String::new(),
            certs: Some(certs),
        };
        responses.send(Ok(last)).await.map_err(gone)
    }
}

#[tonic::async_trait]
impl JoinService for Auth {
    type RegisterUsingIAMMethodStream =
        ReceiverStream<Result<RegisterUsingIamMethodResponse, Status>>;

    async fn register_using_iam_method(
        &self,
        request: Request<tonic::Streaming<RegisterUsingIamMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingIAMMethodStream>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let (responses, stream) = tokio::sync::mpsc::channel(2);
        let auth = self.clone();
        tokio::spawn(async move {
            let exchange = auth.iam_exchange(caller, agent, request.into_inner(), &responses);
            let ended = tokio::select! {
                ended = tokio::time::timeout(STREAM, Box::pin(exchange)) => ended,
                () = responses.closed() => return,
            };
            let status = match ended {
                Ok(Ok(())) => return,
                Ok(Err(status)) => status,
                Err(_elapsed) => Refusal::limit(
                    "iam join method timed out after 1m0s, terminating the stream on the server",
                )
                .into(),
            };
            // Nobody to tell if the client has gone.
            drop(responses.send(Err(status)).await);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn register_using_token(
        &self,
        request: Request<RegisterUsingTokenRequest>,
    ) -> Result<Response<Certs>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let attempt = Attempt::new(&self.state, caller, agent, request.into_inner());
        let certs = blocking(move || by_token(attempt)).await?;
        Ok(Response::new(certs))
    }
}
