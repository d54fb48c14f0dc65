//! The calls of the SPIFFE Workload API (`SPIFFE_Workload_API.md`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::feed::{Content, Messages, PATIENCE};
use super::message::{claims, entry, federated, not_issued};
use super::source::Source;
use crate::clock::Clock;
use crate::pb::workload_api::spiffe_workload_api_server::SpiffeWorkloadApi;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse,
    ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse,
    X509svidRequest, X509svidResponse,
};
use crate::spiffe::{SpiffeId, jwt};
use crate::workload::{Bundles, MAX_HINT, State, Subscription};

/// The metadata that every call carries (`SPIFFE_Workload_Endpoint.md` 6), so that a browser or a
/// proxied request cannot reach the API by accident.
const HEADER: &str = "workload.spiffe.io";

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

/// The server.
#[derive(Debug)]
pub(super) struct SpiffeApi(pub(super) Arc<Source>);

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
        let local = (bundles.trust_domain(), bundles.jwt());
        Ok(Some(JwtBundlesResponse {
            bundles: bundles
                .federated_jwt()
                .chain([local])
                .map(|(domain, keys)| (domain.id(), keys.jwks()))
                .collect(),
        }))
    }

    fn missing(&self) -> &'static str {
        "the trust bundle"
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for SpiffeApi {
    type FetchX509SVIDStream = Messages<X509svidResponse>;
    type FetchX509BundlesStream = Messages<X509BundlesResponse>;
    type FetchJWTBundlesStream = Messages<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let (caller, permit) = self.0.admit(&request).map_err(|status| *status)?;
        let attributes = self.0.attributes(&caller).await?;
        let subscription = self.0.subscribe(&attributes);
        let stream = self.0.feed(Svids(subscription), caller, permit);
        self.0.answered(stream.start().await, &attributes)
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let (caller, permit) = self.0.admit(&request).map_err(|status| *status)?;
        self.0.feed(X509Bundles, caller, permit).start().await
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let (caller, _permit) = self.0.admit(&request).map_err(|status| *status)?;
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
        let attributes = self.0.attributes(&caller).await?;
        let source = &self.0;
        let issuing = source
            .jwt
            .issue(&source.selector, source.ttl, &attributes, &audience);
        let issued = tokio::select! {
            issued = issuing => source.answered(issued.map_err(not_issued), &attributes)?,
            () = self.0.clock.sleep(PATIENCE) => {
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
                // Hints are short, and unique within a response; the first keeps it.
                hint: if svid.hint.len() <= MAX_HINT && hints.insert(svid.hint.clone()) {
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
        let (caller, permit) = self.0.admit(&request).map_err(|status| *status)?;
        self.0.feed(JwtBundles, caller, permit).start().await
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        let (_caller, _permit) = self.0.admit(&request).map_err(|status| *status)?;
        let ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        if audience.is_empty() || svid.is_empty() {
            return Err(Status::invalid_argument(
                "audience and svid must be specified",
            ));
        }
        let Some(bundles) = self.0.bundles.borrow().clone() else {
            return Err(Status::unavailable(
                "not ready yet: waiting for the trust bundle",
            ));
        };
        let valid = jwt::validate(&svid, &audience, self.0.clock.now(), |domain| {
            bundles.jwt_of(domain)
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
