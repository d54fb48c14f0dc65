//! The yardstick: a tonic server that does nothing but answer.

use std::path::Path;
use std::pin::Pin;

use futures_util::stream::{self, Stream};
use tbot::pb::workload_api::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse,
    ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse,
    X509svid, X509svidRequest, X509svidResponse,
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// No attestation, no cache, one message of a usual size each.
struct Bare {
    svid: X509svidResponse,
    jwt: JwtsvidResponse,
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Bare {
    type FetchX509SVIDStream = Messages<X509svidResponse>;
    type FetchX509BundlesStream = Messages<X509BundlesResponse>;
    type FetchJWTBundlesStream = Messages<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        _request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let message = self.svid.clone();
        let first = stream::once(async move { Ok(message) });
        let stream = futures_util::StreamExt::chain(first, stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn fetch_x509_bundles(
        &self,
        _request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwtsvid(
        &self,
        _request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        Ok(Response::new(self.jwt.clone()))
    }

    async fn fetch_jwt_bundles(
        &self,
        _request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn validate_jwtsvid(
        &self,
        _request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

pub(crate) async fn serve(socket: &Path) {
    let svid = X509svidResponse {
        svids: vec![X509svid {
            spiffe_id: "spiffe://quickstart.local/svc/hello".to_owned(),
            x509_svid: vec![0; 600].into(),
            x509_svid_key: vec![0; 138].into(),
            bundle: vec![0; 560].into(),
            hint: String::new(),
        }],
        crl: vec![vec![0; 280].into()],
        ..X509svidResponse::default()
    };
    let jwt = JwtsvidResponse {
        svids: vec![Jwtsvid {
            spiffe_id: "spiffe://quickstart.local/svc/hello".to_owned(),
            svid: "x".repeat(700),
            hint: String::new(),
        }],
    };
    let listener = UnixListener::bind(socket).expect("a socket");
    Server::builder()
        .add_service(SpiffeWorkloadApiServer::new(Bare { svid, jwt }))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await
        .expect("serving");
}
