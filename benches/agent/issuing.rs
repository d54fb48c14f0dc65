//! The cluster's work: X.509-SVIDs issued to an agent, beside the signatures that one core can make.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tbot::crypto::{KeyAlgorithm, PrivateKey};
use tbot::pb::teleport::workloadidentity::v1::issue_workload_identity_request::Credential;
use tbot::pb::teleport::workloadidentity::v1::workload_identity_issuance_service_client::WorkloadIdentityIssuanceServiceClient;
use tbot::pb::teleport::workloadidentity::v1::{IssueWorkloadIdentityRequest, X509svidParams};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// How long a rate is taken.
const SPAN: Duration = Duration::from_secs(3);
/// Requests in flight.
const CALLERS: usize = 16;
/// The name in every cluster's certificate.
const CLUSTER: &str = "teleport.cluster.local";

/// SVIDs per second, for the bot whose identity output is in `dir`.
pub(crate) async fn issued(address: &str, dir: &Path) -> f64 {
    let channel = connect(address, &dir.join("identity")).await;
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).expect("a key");
    let request = IssueWorkloadIdentityRequest {
        name: "quickstart".to_owned(),
        credential: Some(Credential::X509SvidParams(X509svidParams {
            public_key: key.public_spki(),
            use_issuer_overrides: true,
        })),
        ..IssueWorkloadIdentityRequest::default()
    };
    let begun = Instant::now();
    let mut callers: JoinSet<u32> = JoinSet::new();
    for _ in 0..CALLERS {
        let mut client = WorkloadIdentityIssuanceServiceClient::new(channel.clone());
        let request = request.clone();
        callers.spawn(async move {
            let mut count = 0;
            while begun.elapsed() < SPAN {
                let issued = client.issue_workload_identity(request.clone()).await;
                issued.expect("an SVID");
                count += 1;
            }
            count
        });
    }
    let count: u32 = callers.join_all().await.into_iter().sum();
    f64::from(count) / begun.elapsed().as_secs_f64()
}

/// Signatures per second of one core.
pub(crate) fn signed() -> f64 {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).expect("a key");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.pkcs8_der().expose());
    let pair = pair.expect("a key pair");
    let random = SystemRandom::new();
    let message = [7; 600];
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < SPAN {
        pair.sign(&random, &message).expect("a signature");
        count += 1;
    }
    f64::from(count) / begun.elapsed().as_secs_f64()
}

async fn connect(address: &str, identity: &Path) -> Channel {
    let mut roots = RootCertStore::empty();
    let authorities = CertificateDer::pem_file_iter(identity.join("teleport-host-ca.crt"));
    for authority in authorities.expect("authorities") {
        let authority = authority.expect("an authority");
        roots.add(authority).expect("an authority");
    }
    let chain = CertificateDer::pem_file_iter(identity.join("tlscert"))
        .expect("a certificate")
        .collect::<Result<Vec<_>, _>>()
        .expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(identity.join("key")).expect("a key");
    let mut config = ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .expect("protocol versions")
    .with_root_certificates(roots)
    .with_client_auth_cert(chain, key)
    .expect("a client certificate");
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsConnector::from(Arc::new(config));
    let address = address.to_owned();
    let connector = service_fn(move |_| {
        let (tls, address) = (tls.clone(), address.clone());
        async move {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from(CLUSTER).expect("a name");
            tls.connect(name, tcp).await.map(TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(connector).await;
    channel.expect("a connection to the cluster")
}
