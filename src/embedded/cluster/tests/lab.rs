//! A cluster in simulated time, and connections to it without sockets.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::super::*;
use crate::crypto::pem;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::embedded::ca::AuthorityType;
use crate::pb::proto::Certs;
use crate::pb::proto::join_service_client::JoinServiceClient;
use crate::pb::types::RegisterUsingTokenRequest;

pub(super) const AUTH: &str = "teleport-auth@726f6f74.teleport.cluster.local";
pub(super) struct Lab {
    pub(super) dir: TempDir,
    pub(super) cluster: Cluster,
    pub(super) clock: Clock,
}

/// A connection and the task that serves it.
pub(super) struct Line {
    pub(super) stream: TlsStream<DuplexStream>,
    pub(super) served: JoinHandle<io::Result<()>>,
}

impl Lab {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::simulated(Clock::system().now());
        let mut config = Config::local(dir.path().join("c"), clock.clone());
        config.cluster_name = Some("root".to_owned());
        let cluster = Cluster::open(config).await.unwrap();
        let resources = "kind: bot\nversion: v1\nmetadata: {name: b}\nspec: {roles: []}\n---\n\
            kind: token\nversion: v2\nmetadata: {name: a-token-of-a-bot}\n\
            spec: {roles: [Bot], bot_name: b, join_method: token}\n";
        cluster.create("file", resources).await.unwrap();
        Self {
            dir,
            cluster,
            clock,
        }
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        self.dir.path().join("c")
    }

    pub(super) async fn connect(
        &self,
        protocols: &[&str],
        certs: Option<(&Certs, &PrivateKey)>,
    ) -> Line {
        let authorities = &self.cluster.state.authorities;
        let host = authorities.trusted_tls(AuthorityType::Host);
        self.connect_trusting(host, protocols, certs).await.unwrap()
    }

    /// As [`Lab::connect`], for a client that trusts these authorities (DER) on the auth side.
    pub(super) async fn connect_trusting(
        &self,
        host: Vec<Vec<u8>>,
        protocols: &[&str],
        certs: Option<(&Certs, &PrivateKey)>,
    ) -> io::Result<Line> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let server = Arc::clone(&self.cluster.server);
        let peer = SocketAddr::from(([192, 0, 2, 1], 1));
        let served = tokio::spawn(async move {
            let forever = CancellationToken::new();
            server.connection(far, peer, Port::Shared, forever).await
        });
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(host.into_iter().map(CertificateDer::from));
        let web = fs::read_to_string(self.cluster.web_ca().unwrap()).unwrap();
        let web = pem::certificates(&web).unwrap();
        roots.add_parsable_certificates(web.into_iter().map(CertificateDer::from));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certs {
            None => builder.with_no_client_auth(),
            Some((certs, key)) => {
                let chain = pem::certificates(std::str::from_utf8(&certs.tls).unwrap()).unwrap();
                let chain = chain.into_iter().map(CertificateDer::from).collect();
                let key = PrivatePkcs8KeyDer::from(key.pkcs8_der().expose().clone());
                builder.with_client_auth_cert(chain, key.into()).unwrap()
            }
        };
        config.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        let name = match protocols.first() {
            Some(&AUTH) => "teleport.cluster.local",
            _ => "localhost",
        };
        let name = ServerName::try_from(name).unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, near).await?;
        Ok(Line { stream, served })
    }

    pub(super) async fn joined(&self) -> (Certs, PrivateKey) {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let expires = self.clock.now() + Duration::from_hours(1);
        let request = RegisterUsingTokenRequest {
            role: "Bot".to_owned(),
            token: "a-token-of-a-bot".to_owned(),
            public_tls_key: key.public_pem().into_bytes(),
            expires: Some(expires.into()),
            ..RegisterUsingTokenRequest::default()
        };
        let line = self.connect(&["teleport-proxy-grpc", "h2"], None).await;
        let mut client = JoinServiceClient::new(channel(line.stream).await);
        let certs = client.register_using_token(request).await.unwrap();
        (certs.into_inner(), key)
    }

    /// Seconds until the server has ended the connection.
    pub(super) async fn seconds(&self, served: JoinHandle<io::Result<()>>) -> u64 {
        let begun = self.clock.now();
        drop(tokio::time::timeout(Duration::from_hours(24), served).await);
        self.clock.now().duration_since(begun).unwrap().as_secs()
    }
}

/// gRPC on a connection that is there already; it answers pings by itself.
pub(super) async fn channel(stream: TlsStream<DuplexStream>) -> Channel {
    let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
    Endpoint::from_static("https://cluster")
        .connect_with_connector(tower::service_fn(move |_uri: http::Uri| {
            let stream = stream.take();
            async move { stream.ok_or_else(|| io::Error::other("one connection only")) }
        }))
        .await
        .unwrap()
}
