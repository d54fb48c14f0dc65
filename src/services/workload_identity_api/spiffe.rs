//! The calls of the SPIFFE Workload API (`SPIFFE_Workload_API.md`).

mod streams;

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tonic::Status;
use tonic::body::Body;

use self::streams::{JwtBundles, Svids, X509Bundles};
use super::feed::{Content, Feed, PATIENCE};
use super::followed::Followed;
use super::grpc;
use super::incoming::Caller;
use super::message::{claims, not_issued, token};
use super::source::Source;
use super::wanted::WantedTokens;
use crate::attest::Permit;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509svidRequest,
};
use crate::spiffe::jwt;

/// The metadata that every call carries (`SPIFFE_Workload_Endpoint.md` 6), so that a browser or a
/// proxied request cannot reach the API by accident.
const HEADER: &str = "workload.spiffe.io";

/// The server. Cloning shares it.
#[derive(Debug, Clone)]
pub(super) struct SpiffeApi(pub(super) Arc<Source>);

impl SpiffeApi {
    /// Answers one call.
    pub(super) async fn answer(
        self,
        caller: Caller,
        request: Request<impl hyper::body::Body<Data = Bytes>>,
    ) -> Response<Body> {
        let call = Call { source: self.0 };
        let answer = call.answer(caller, request).await;
        answer.unwrap_or_else(Status::into_http)
    }
}

/// Refuses calls without the security header, or with it more than once.
fn require_header(headers: &HeaderMap) -> Result<(), Status> {
    let mut values = headers.get_all(HEADER).iter();
    match (values.next(), values.next()) {
        (Some(value), None) if value.as_bytes() == b"true" => Ok(()),
        _ => Err(Status::invalid_argument(
            "security header missing from request",
        )),
    }
}

/// One call.
struct Call {
    source: Arc<Source>,
}

impl Call {
    async fn answer(
        self,
        caller: Caller,
        request: Request<impl hyper::body::Body<Data = Bytes>>,
    ) -> Result<Response<Body>, Status> {
        require_header(request.headers())?;
        let (head, body) = request.into_parts();
        let permit = self.source.count(&caller).map_err(|status| *status)?;
        match head.uri.path() {
            "/SpiffeWorkloadAPI/FetchX509SVID" => {
                let X509svidRequest {} = self.read(body).await?;
                let attested = self.source.attest(&caller).await?;
                let source = Arc::clone(&self.source);
                let svids =
                    Followed::new(Arc::clone(&source), caller.clone(), Arc::clone(&attested));
                let stream = self.stream(Svids(svids), caller, permit).await;
                source.answered(stream, &attested)
            }
            "/SpiffeWorkloadAPI/FetchX509Bundles" => {
                let X509BundlesRequest {} = self.read(body).await?;
                self.stream(X509Bundles, caller, permit).await
            }
            "/SpiffeWorkloadAPI/FetchJWTBundles" => {
                let JwtBundlesRequest {} = self.read(body).await?;
                self.stream(JwtBundles, caller, permit).await
            }
            "/SpiffeWorkloadAPI/FetchJWTSVID" => {
                let request = self.read(body).await?;
                let packet = self.tokens(request, &caller).await?;
                Ok(grpc::one(packet))
            }
            "/SpiffeWorkloadAPI/ValidateJWTSVID" => {
                let request = self.read(body).await?;
                let answer = self.validate(&request)?;
                Ok(grpc::one(grpc::packet(&answer)))
            }
            _ => Err(Status::unimplemented("the Workload API has no such call")),
        }
    }

    /// The request, which does not take for ever to arrive.
    async fn read<M: prost::Message + Default>(
        &self,
        body: impl hyper::body::Body<Data = Bytes>,
    ) -> Result<M, Status> {
        tokio::select! {
            biased;
            request = grpc::request(body) => request,
            () = self.source.clock.sleep(PATIENCE) => {
                Err(Status::deadline_exceeded("the request did not arrive"))
            }
        }
    }

    async fn stream<C: Content>(
        self,
        content: C,
        caller: Caller,
        permit: Permit,
    ) -> Result<Response<Body>, Status> {
        let feed = Feed::new(self.source, content, caller, permit);
        feed.start().await.map(grpc::many)
    }

    /// `FetchJWTSVID`.
    async fn tokens(&self, request: JwtsvidRequest, caller: &Caller) -> Result<Bytes, Status> {
        let wanted = WantedTokens::new(request).map_err(|status| *status)?;
        let attested = self.source.attest(caller).await?;
        let source = &self.source;
        let issued = tokio::select! {
            biased;
            issued = source.tokens.get(&attested, wanted.audiences) => {
                source.answered(issued.map_err(not_issued), &attested)?
            }
            () = source.clock.sleep(PATIENCE) => {
                return Err(Status::unavailable(
                    "not ready yet: waiting for the cluster to issue the JWT-SVID",
                ));
            }
        };
        let Some(id) = wanted.id else {
            return Ok(issued.message(|svids| {
                let svids = svids.iter().map(token).collect();
                grpc::packet(&JwtsvidResponse { svids })
            }));
        };
        // Two resources may give the same identity; it was asked for one.
        match issued.svids.iter().find(|svid| svid.id == id) {
            Some(svid) => Ok(grpc::packet(&JwtsvidResponse {
                svids: vec![token(svid)],
            })),
            None => Err(Status::permission_denied(
                "no identity issued: the workload is not entitled to the requested identity",
            )),
        }
    }

    /// `ValidateJWTSVID`.
    fn validate(
        &self,
        request: &ValidateJwtsvidRequest,
    ) -> Result<ValidateJwtsvidResponse, Status> {
        let ValidateJwtsvidRequest { audience, svid } = request;
        if audience.is_empty() || svid.is_empty() {
            return Err(Status::invalid_argument(
                "audience and svid must be specified",
            ));
        }
        let Some(bundles) = self.source.view.bundles() else {
            return Err(Status::unavailable(
                "not ready yet: waiting for the trust bundle",
            ));
        };
        let valid = jwt::validate(svid, audience, self.source.clock.now(), |domain| {
            bundles.jwt_of(domain)
        })
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let fields = valid.claims.into_iter();
        Ok(ValidateJwtsvidResponse {
            spiffe_id: valid.id.to_string(),
            claims: Some(prost_types::Struct {
                fields: fields.map(|(name, value)| (name, claims(value))).collect(),
            }),
        })
    }
}
