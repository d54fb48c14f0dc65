use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::name::RdnSequence;

use super::*;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::embedded::ca::mint::{self, CLIENT_AUTH, Issuer, SERVER_AUTH, Subject, Template};
use crate::embedded::caller::oid;

const ID: &str = "spiffe://friend.example/endpoint";

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)
}

struct Authority {
    name: RdnSequence,
    key: PrivateKey,
    der: Vec<u8>,
}

/// What is odd about an SVID.
#[derive(Default, Clone, Copy)]
struct Odd {
    authority: bool,
    signs: bool,
    over: bool,
}

fn key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
}

impl Authority {
    fn new() -> Self {
        let (serial, key) = (mint::serial(), key());
        let number = hex::encode(serial);
        let name = Subject::default().one(oid::SERIAL_NUMBER, &number).unwrap();
        let name = name.finish();
        let issuer = Issuer {
            name: &name,
            key_id: None,
            key: &key,
        };
        let der = Template {
            serial,
            subject: name.clone(),
            not_before: now() - Duration::from_hours(1),
            not_after: now() + Duration::from_hours(1),
            spki: &key.public_spki(),
            key_usage: KeyUsages::KeyCertSign.into(),
            extended: &[],
            authority: true,
            names: vec![mint::uri("spiffe://friend.example").unwrap()],
        }
        .sign(issuer)
        .unwrap();
        Self { name, key, der }
    }

    fn svid(&self, ids: &[&str], odd: Odd) -> (Vec<u8>, PrivateKey) {
        let key = key();
        let end = if odd.over { 0 } else { 2 };
        let mut key_usage = KeyUsages::DigitalSignature.into();
        if odd.signs {
            key_usage |= KeyUsages::KeyCertSign;
        }
        let der = Template {
            serial: mint::serial(),
            subject: Subject::default().finish(),
            not_before: now() - Duration::from_hours(1),
            not_after: now() + Duration::from_hours(1) * end - Duration::from_mins(1),
            spki: &key.public_spki(),
            key_usage,
            extended: &[SERVER_AUTH, CLIENT_AUTH],
            authority: odd.authority,
            names: ids.iter().map(|id| mint::uri(id).unwrap()).collect(),
        };
        let issuer = Issuer {
            name: &self.name,
            key_id: None,
            key: &self.key,
        };
        (der.sign(issuer).unwrap(), key)
    }
}

/// Answers connections one after the other; returns the port, and what it was asked.
async fn serve(
    (svid, key): (Vec<u8>, PrivateKey),
    answers: Vec<String>,
) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
    let key = PrivatePkcs8KeyDer::from(key.pkcs8_der().expose().clone());
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![svid.into()], key.into())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let mut asked = Vec::new();
        for answer in answers {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            asked.push(String::from_utf8(request).unwrap());
            drop(stream.write_all(answer.as_bytes()).await);
            drop(stream.shutdown().await);
        }
        asked
    });
    (port, server)
}

async fn fetch(port: u16, authorities: &[&Authority]) -> Result<String, String> {
    let endpoint = Endpoint::parse(&format!("https://localhost:{port}/bundle?x")).unwrap();
    let profile = Profile::Spiffe {
        id: ID.parse().unwrap(),
        authorities: authorities.iter().map(|one| one.der.clone()).collect(),
        now: now(),
    };
    let fetched = Network.fetch(endpoint, profile).await;
    fetched.map_err(|error| error.to_string())
}

fn ok(body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn to(location: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n")
}

#[tokio::test]
async fn only_the_svid_of_the_endpoint_is_believed() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (port, asked) = serve(authority.svid(&[ID], Odd::default()), vec![ok("{}")]).await;
    assert_eq!(
        fetch(port, &[&other, &authority]).await.as_deref(),
        Ok("{}")
    );
    let asked = asked.await.unwrap().remove(0).to_lowercase();
    assert!(asked.starts_with("get /bundle?x http/1.1\r\n"), "{asked}");
    assert!(
        asked.contains(&format!("host: localhost:{port}\r\n")),
        "{asked}"
    );

    let stranger = "spiffe://friend.example/other";
    let web = Odd::default();
    for (what, ids, odd) in [
        ("another workload", &[stranger][..], web),
        (
            "another trust domain",
            &["spiffe://foe.example/endpoint"],
            web,
        ),
        ("two names", &[ID, stranger], web),
        ("no name", &[], web),
        ("case", &["spiffe://friend.example/Endpoint"], web),
        (
            "an authority",
            &[ID],
            Odd {
                authority: true,
                ..web
            },
        ),
        ("a signer", &[ID], Odd { signs: true, ..web }),
        ("over", &[ID], Odd { over: true, ..web }),
    ] {
        let (port, _server) = serve(authority.svid(ids, odd), vec![ok("{}")]).await;
        assert!(fetch(port, &[&authority]).await.is_err(), "{what}");
    }
    let (port, _server) = serve(authority.svid(&[ID], web), vec![ok("{}")]).await;
    assert!(fetch(port, &[&other]).await.is_err(), "somebody else's");
    let nobody = fetch(port, &[]).await.unwrap_err();
    assert!(nobody.contains("initial_bundle"), "{nobody}");
    let mut damaged = Authority::new();
    damaged.der.truncate(20);
    let unusable = fetch(port, &[&damaged]).await.unwrap_err();
    assert!(unusable.contains("cannot be used"), "{unusable}");
}

#[tokio::test]
async fn redirects_are_followed_a_few_times_to_endpoints_that_prove_the_same() {
    let authority = Authority::new();
    let svid = || authority.svid(&[ID], Odd::default());
    let (port, asked) = serve(svid(), vec![to("/elsewhere"), ok("{}")]).await;
    assert_eq!(fetch(port, &[&authority]).await.as_deref(), Ok("{}"));
    assert!(asked.await.unwrap()[1].starts_with("GET /elsewhere "));

    let (second, _server) = serve(svid(), vec![ok("there")]).await;
    let there = format!("https://127.0.0.1:{second}/");
    let (port, _server) = serve(svid(), vec![to(&there)]).await;
    assert_eq!(fetch(port, &[&authority]).await.as_deref(), Ok("there"));

    let stranger = authority.svid(&["spiffe://friend.example/other"], Odd::default());
    let (second, _server) = serve(stranger, vec![ok("there")]).await;
    let there = format!("https://127.0.0.1:{second}/");
    let (port, _server) = serve(svid(), vec![to(&there)]).await;
    assert!(fetch(port, &[&authority]).await.is_err());

    for location in ["http://127.0.0.1:1/", "https://u@127.0.0.1/", "x"] {
        let (port, _server) = serve(svid(), vec![to(location)]).await;
        let error = fetch(port, &[&authority]).await.unwrap_err();
        assert!(error.contains("a redirect leads nowhere"), "{error}");
    }
    let (port, server) = serve(svid(), vec![to("/again"); REDIRECTS + 1]).await;
    let error = fetch(port, &[&authority]).await.unwrap_err();
    assert!(error.contains("redirects"), "{error}");
    assert_eq!(server.await.unwrap().len(), REDIRECTS + 1);
}

#[tokio::test]
async fn answers_are_whole_documents_of_a_bounded_size() {
    let authority = Authority::new();
    let error = "HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}".to_owned();
    let length = MAX_DOCUMENT + 1;
    let long = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}".to_owned();
    for (answer, expected) in [
        (error, "answered 503"),
        (long + &" ".repeat(length), "no usable answer"),
        (cut, "no usable answer"),
        ("nonsense\r\n\r\n".to_owned(), "no usable answer"),
    ] {
        let svid = authority.svid(&[ID], Odd::default());
        let (port, _server) = serve(svid, vec![answer]).await;
        let error = fetch(port, &[&authority]).await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
