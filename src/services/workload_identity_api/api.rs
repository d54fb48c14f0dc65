//! The calls of the SPIFFE Workload API (`SPIFFE_Workload_API.md`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::incoming::Caller;
use super::limits::{Limit, Permit};
use crate::attest::Attestors;
use crate::clock::Clock;
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::pb::workload_api::spiffe_workload_api_server::SpiffeWorkloadApi;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse,
    ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse,
    X509svid, X509svidRequest, X509svidResponse,
};
use crate::spiffe::{SpiffeId, jwt};
use crate::workload::{
    Bundles, Cache, Crl, IssueError, JwtIssuer, Selector, State, Subscription, Svid,
};

/// The metadata that every call carries (`SPIFFE_Workload_Endpoint.md` 6), so that a browser or a
/// proxied request cannot reach the API by accident.
const HEADER: &str = "workload.spiffe.io";
/// The longest a call waits for its first message, attestation aside.
const PATIENCE: Duration = Duration::from_secs(10);
/// Calls that one user may have open.
const CALLS_PER_USER: usize = 16_384;

/// Refuses calls without the security header, or with it more than once.
pub(super) fn require_header(request: Request<()>) -> Result<Request<()>, Status> {
    let mut values = request.metadata().get_all(HEADER).iter();
    match (values.next(), values.next()) {
        (Some(value), None) if value.as_bytes() == b"true" => Ok(request),
        _ => Err(Status::invalid_argument(
            "security header missing from request",
        )),
    }
}

/// Where answers come from.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) cache: Cache,
    pub(super) jwt: JwtIssuer,
    pub(super) bundles: watch::Receiver<Option<Arc<Bundles>>>,
    pub(super) crl: watch::Receiver<Crl>,
}

/// The server.
#[derive(Debug)]
pub(super) struct Api {
    sources: Sources,
    attestors: Attestors,
    selector: Selector,
    ttl: Duration,
    clock: Clock,
    shutdown: CancellationToken,
    calls: Limit,
}

impl Api {
    pub(super) fn new(
        sources: Sources,
        attestors: Attestors,
        selector: Selector,
        ttl: Duration,
        clock: Clock,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            sources,
            attestors,
            selector,
            ttl,
            clock,
            shutdown,
            calls: Limit::new(CALLS_PER_USER),
        }
    }

    /// Who calls, counted.
    fn admit<T>(&self, request: &Request<T>) -> Result<(Caller, Permit), Box<Status>> {
        let caller = request
            .extensions()
            .get::<Caller>()
            .cloned()
            .unwrap_or(Caller::Unknown);
        let permit = self.calls.take(caller.user()).ok_or_else(|| {
            Status::unavailable(format!(
                "this user has {CALLS_PER_USER} calls open: close some"
            ))
        })?;
        Ok((caller, permit))
    }

    async fn attributes(&self, caller: &Caller) -> Result<Arc<WorkloadAttrs>, Status> {
        match caller {
            Caller::Process(peer) => self
                .attestors
                .attest(peer)
                .await
                .map_err(|gone| Status::aborted(gone.to_string())),
            Caller::Unknown => Ok(Arc::default()),
        }
    }

    fn feed<F: Content>(&self, content: F, caller: Caller, permit: Permit) -> Feed<F> {
        Feed {
            content,
            bundles: self.sources.bundles.clone(),
            crl: self.sources.crl.clone(),
            caller,
            clock: self.clock.clone(),
            shutdown: self.shutdown.clone(),
            _permit: permit,
        }
    }
}

/// What one kind of stream adds to bundles and revocations.
trait Content: Send + 'static {
    type Message: Send;
    /// Whether the message holds the revocation list: it is sent anew with the list, and the first
    /// waits for the list a moment.
    const REVOCATIONS: bool = true;
    /// Resolves when the content changed.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
    /// The message for the current state; `None` while there is none to send.
    fn message(
        &mut self,
        bundles: &Bundles,
        crl: Vec<Bytes>,
        clock: &Clock,
    ) -> Result<Option<Self::Message>, Box<Status>>;
    /// What is missing while [`Content::message`] gives none.
    fn missing(&self) -> &'static str;
}

/// A stream of messages, each the whole state.
struct Feed<C> {
    content: C,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    crl: watch::Receiver<Crl>,
    caller: Caller,
    clock: Clock,
    shutdown: CancellationToken,
    _permit: Permit,
}

type Messages<M> = BoxStream<'static, Result<M, Status>>;

impl<C: Content> Feed<C> {
    /// Waits a while for the first message, and gives the stream that begins with it.
    async fn start(mut self) -> Result<Response<Messages<C::Message>>, Status> {
        let clock = self.clock.clone();
        let first = tokio::select! {
            first = self.first() => first?,
            () = clock.sleep(PATIENCE) => return Err(Status::unavailable(self.what_is_missing())),
        };
        let rest = stream::unfold(Some(self), |feed| async move {
            let mut feed = feed?;
            match feed.next().await {
                Some(Ok(message)) => Some((Ok(message), Some(feed))),
                Some(Err(status)) => Some((Err(*status), None)),
                None => None,
            }
        });
        let first = stream::once(async move { Ok(first) });
        Ok(Response::new(first.chain(rest).boxed()))
    }

    fn what_is_missing(&self) -> String {
        let missing = if self.bundles.borrow().is_none() {
            "the trust bundle: the agent is still joining, or cannot reach its cluster"
        } else {
            self.content.missing()
        };
        format!("not ready yet: waiting for {missing}")
    }

    async fn first(&mut self) -> Result<C::Message, Status> {
        loop {
            if let Some(message) = self.message().map_err(|status| *status)? {
                if !self.caller.is_alive() {
                    return Err(Status::aborted("the calling process has ended"));
                }
                return Ok(message);
            }
            self.change().await.map_err(|status| *status)?;
        }
    }

    /// The next message; `None` when the caller is gone.
    async fn next(&mut self) -> Option<Result<C::Message, Box<Status>>> {
        loop {
            let caller = self.caller.clone();
            tokio::select! {
                biased;
                () = caller.gone() => return None,
                changed = self.change() => if let Err(status) = changed {
                    return Some(Err(status));
                },
            }
            if let Some(message) = self.message().transpose() {
                return Some(message);
            }
        }
    }

    fn message(&mut self) -> Result<Option<C::Message>, Box<Status>> {
        let Some(bundles) = self.bundles.borrow_and_update().clone() else {
            return Ok(None);
        };
        let crl = match &*self.crl.borrow_and_update() {
            Crl::Pending if C::REVOCATIONS => return Ok(None),
            crl => crl.der().cloned().into_iter().collect(),
        };
        self.content.message(&bundles, crl, &self.clock)
    }

    /// Waits for any change.
    async fn change(&mut self) -> Result<(), Box<Status>> {
        let stopping = || Box::new(Status::unavailable("the agent is stopping"));
        tokio::select! {
            changed = self.bundles.changed() => changed.map_err(|_closed| stopping()),
            changed = self.crl.changed(), if C::REVOCATIONS => changed.map_err(|_closed| stopping()),
            () = self.content.changed() => Ok(()),
            () = self.shutdown.cancelled() => Err(stopping()),
        }
    }
}

/// `FetchX509SVID`.
struct Svids(Subscription);

impl Content for Svids {
    type Message = X509svidResponse;

    async fn changed(&mut self) {
        if self.0.state().changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn message(
        &mut self,
        bundles: &Bundles,
        crl: Vec<Bytes>,
        clock: &Clock,
    ) -> Result<Option<X509svidResponse>, Box<Status>> {
        let state = self.0.state().borrow_and_update().clone();
        match state {
            state if !state.is_answer(clock.now()) => Ok(None),
            State::Ready(svids) => Ok(Some(X509svidResponse {
                svids: svids.iter().map(|svid| entry(svid, bundles)).collect(),
                crl,
                federated_bundles: federated(bundles).collect(),
            })),
            State::Refused(why) => {
                let text = format!("no identity issued: {why}");
                Err(Box::new(Status::permission_denied(text)))
            }
            State::Unavailable(why) => Err(Box::new(Status::unavailable(&*why))),
            State::Pending => Ok(None),
        }
    }

    fn missing(&self) -> &'static str {
        "the cluster to issue the SVID"
    }
}

/// `FetchX509Bundles`.
struct X509Bundles;

impl Content for X509Bundles {
    type Message = X509BundlesResponse;

    async fn changed(&mut self) {
        std::future::pending::<()>().await;
    }

    fn message(
        &mut self,
        bundles: &Bundles,
        crl: Vec<Bytes>,
        _clock: &Clock,
    ) -> Result<Option<X509BundlesResponse>, Box<Status>> {
        // The own trust domain wins over a federated one of the same name.
        let local = (bundles.trust_domain().id(), bundles.local().clone());
        Ok(Some(X509BundlesResponse {
            crl,
            bundles: federated(bundles).chain([local]).collect::<HashMap<_, _>>(),
        }))
    }

    fn missing(&self) -> &'static str {
        "the revocation list"
    }
}

fn entry(svid: &Svid, bundles: &Bundles) -> X509svid {
    X509svid {
        spiffe_id: svid.id.to_string(),
        x509_svid: svid.chain.clone(),
        x509_svid_key: svid.key.clone(),
        bundle: bundles.local().clone(),
        hint: svid.hint.clone(),
    }
}

/// Federated bundles by the ID of their trust domain, without the own one.
fn federated(bundles: &Bundles) -> impl Iterator<Item = (String, Bytes)> {
    let own = bundles.trust_domain();
    bundles
        .federated()
        .iter()
        .filter(move |(domain, _)| *domain != own)
        .map(|(domain, bundle)| (domain.id(), bundle.clone()))
}

/// `FetchJWTBundles`.
struct JwtBundles;

impl Content for JwtBundles {
    type Message = JwtBundlesResponse;
    const REVOCATIONS: bool = false;

    async fn changed(&mut self) {
        std::future::pending::<()>().await;
    }

    fn message(
        &mut self,
        bundles: &Bundles,
        _crl: Vec<Bytes>,
        _clock: &Clock,
    ) -> Result<Option<JwtBundlesResponse>, Box<Status>> {
        let local = (bundles.trust_domain().id(), bundles.jwt().jwks());
        Ok(Some(JwtBundlesResponse {
            bundles: HashMap::from([local]),
        }))
    }

    fn missing(&self) -> &'static str {
        "the trust bundle"
    }
}

/// A refusal or a failure to issue, as the standard wants it answered.
fn not_issued(error: IssueError) -> Status {
    match error {
        IssueError::Refused(why) => Status::permission_denied(format!("no identity issued: {why}")),
        IssueError::Unavailable(why) | IssueError::Answer(why) => Status::unavailable(why),
    }
}

/// JSON claims as protobuf.
fn claims(value: serde_json::Value) -> prost_types::Value {
    use prost_types::value::Kind;
    use serde_json::Value;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(values) => Kind::ListValue(prost_types::ListValue {
            values: values.into_iter().map(claims).collect(),
        }),
        Value::Object(fields) => Kind::StructValue(prost_types::Struct {
            fields: fields
                .into_iter()
                .map(|(name, value)| (name, claims(value)))
                .collect(),
        }),
    };
    prost_types::Value { kind: Some(kind) }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Api {
    type FetchX509SVIDStream = Messages<X509svidResponse>;
    type FetchX509BundlesStream = Messages<X509BundlesResponse>;
    type FetchJWTBundlesStream = Messages<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let (caller, permit) = self.admit(&request).map_err(|status| *status)?;
        let attributes = self.attributes(&caller).await?;
        let subscription = self
            .sources
            .cache
            .subscribe(&self.selector, self.ttl, &attributes);
        self.feed(Svids(subscription), caller, permit).start().await
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let (caller, permit) = self.admit(&request).map_err(|status| *status)?;
        self.feed(X509Bundles, caller, permit).start().await
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let (caller, _permit) = self.admit(&request).map_err(|status| *status)?;
        let JwtsvidRequest {
            audience,
            spiffe_id,
        } = request.into_inner();
        if audience.is_empty() || audience.iter().any(String::is_empty) {
            return Err(Status::invalid_argument("audience must be specified"));
        }
        if !spiffe_id.is_empty() && spiffe_id.parse::<SpiffeId>().is_err() {
            return Err(Status::invalid_argument("spiffe_id is no SPIFFE ID"));
        }
        let attributes = self.attributes(&caller).await?;
        let issuing = self
            .sources
            .jwt
            .issue(&self.selector, self.ttl, &attributes, &audience);
        let issued = tokio::select! {
            issued = issuing => issued.map_err(not_issued)?,
            () = self.clock.sleep(PATIENCE) => {
                return Err(Status::unavailable("not ready yet: waiting for the cluster to issue the JWT-SVID"));
            }
        };
        if !caller.is_alive() {
            return Err(Status::aborted("the calling process has ended"));
        }
        let mut hints = HashSet::new();
        let svids: Vec<Jwtsvid> = issued
            .into_iter()
            .filter(|svid| spiffe_id.is_empty() || svid.id.to_string() == spiffe_id)
            .map(|svid| Jwtsvid {
                spiffe_id: svid.id.to_string(),
                // Hints are unique within a response; the first keeps it.
                hint: if hints.insert(svid.hint.clone()) {
                    svid.hint
                } else {
                    String::new()
                },
                svid: svid.token,
            })
            .collect();
        if svids.is_empty() {
            return Err(Status::permission_denied(
                "no identity issued: the workload is not entitled to the requested identity",
            ));
        }
        Ok(Response::new(JwtsvidResponse { svids }))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        let (caller, permit) = self.admit(&request).map_err(|status| *status)?;
        self.feed(JwtBundles, caller, permit).start().await
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        let (_caller, _permit) = self.admit(&request).map_err(|status| *status)?;
        let ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        if audience.is_empty() || svid.is_empty() {
            return Err(Status::invalid_argument(
                "audience and svid must be specified",
            ));
        }
        let Some(bundles) = self.sources.bundles.borrow().clone() else {
            return Err(Status::unavailable(
                "not ready yet: waiting for the trust bundle",
            ));
        };
        let valid = jwt::validate(&svid, &audience, self.clock.now(), |domain| {
            (domain == bundles.trust_domain()).then(|| bundles.jwt())
        })
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(ValidateJwtsvidResponse {
            spiffe_id: valid.id.to_string(),
            claims: Some(prost_types::Struct {
                fields: valid
                    .claims
                    .into_iter()
                    .map(|(name, value)| (name, claims(value)))
                    .collect(),
            }),
        }))
    }
}
