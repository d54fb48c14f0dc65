//! Against a registry that keeps what cosign writes, and against those that lead astray.

use super::*;
use crate::crypto::sha256_hex;
use crate::pb::dev::sigstore::bundle::v1::Bundle;
use crate::pb::teleport::workloadidentity::v1::{
    WorkloadAttrsDocker, WorkloadAttrsDockerContainer, WorkloadAttrsKubernetes,
    WorkloadAttrsKubernetesContainer,
};
use prost::Message as _;
use std::collections::HashMap;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const DIGEST: &str = "sha256:4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6";
const TAG: &str = "sha256-4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6";

/// Answers by path, whole answers as they go over the wire; and every request.
#[derive(Default)]
struct Shelf {
    answers: HashMap<String, Vec<u8>>,
    requests: Vec<String>,
    /// What `authorization` has to be, if anything, and where a token for it is to be had.
    locked: Option<(String, String)>,
}

struct Registry {
    host: String,
    shelf: Arc<Mutex<Shelf>>,
}

async fn registry() -> Registry {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let shelf = Arc::new(Mutex::new(Shelf::default()));
    let served = Arc::clone(&shelf);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let served = Arc::clone(&served);
            tokio::spawn(async move {
                let mut request = vec![0; 16 * 1024];
                let length = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                // Whoever begins with TLS is sent away.
                let answer = match request.split(' ').nth(1) {
                    Some(path) if request.starts_with(['G', 'P']) => {
                        served.lock().unwrap().answer(path, &request)
                    }
                    _ => Vec::new(),
                };
                drop(stream.write_all(&answer).await);
            });
        }
    });
    let registry = Registry { host, shelf };
    registry.put("/v2/", b"{}");
    registry
}

impl Shelf {
    fn answer(&mut self, path: &str, request: &str) -> Vec<u8> {
        self.requests.push(request.to_owned());
        let authorization = request.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("authorization").then_some(value)
        });
        if let Some((expected, challenge)) = &self.locked
            && path.starts_with("/v2/")
            && authorization != Some(expected)
        {
            let headers = format!("www-authenticate: {challenge}\r\n");
            return http("401 Unauthorized", &headers, b"");
        }
        let missing = || http("404 Not Found", "", b"{}");
        self.answers.get(path).cloned().unwrap_or_else(missing)
    }
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut answer =
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n").into_bytes();
    answer.extend_from_slice(body);
    answer
}

impl Registry {
    fn put(&self, path: &str, body: &[u8]) {
        self.raw(path, http("200 OK", "", body));
    }

    fn raw(&self, path: &str, answer: Vec<u8>) {
        self.shelf
            .lock()
            .unwrap()
            .answers
            .insert(path.to_owned(), answer);
    }

    /// Puts a blob and gives the descriptor of a layer.
    fn layer(&self, kind: &str, body: &[u8], annotations: &str) -> String {
        let digest = format!("sha256:{}", sha256_hex(body));
        self.put(&format!("/v2/team/app/blobs/{digest}"), body);
        format!(
            r#"{{"mediaType": "{kind}", "digest": "{digest}", "size": {}, "annotations": {{{annotations}}}}}"#,
            body.len()
        )
    }

    /// Puts what cosign keeps in a tag, with these layers.
    fn signed(&self, layers: &[String]) {
        let manifest = format!(
            r#"{{"schemaVersion": 2, "layers": [{}]}}"#,
            layers.join(",")
        );
        self.put(
            &format!("/v2/team/app/manifests/{TAG}.sig"),
            manifest.as_bytes(),
        );
    }

    /// Puts a bundle that refers to the image, and gives its entry of an index.
    fn referring(&self, kind: &str, layers: &[String]) -> String {
        let manifest = format!(
            r#"{{"schemaVersion": 2, "layers": [{}]}}"#,
            layers.join(",")
        );
        let digest = format!("sha256:{}", sha256_hex(manifest.as_bytes()));
        self.put(
            &format!("/v2/team/app/manifests/{digest}"),
            manifest.as_bytes(),
        );
        format!(r#"{{"artifactType": "{kind}", "digest": "{digest}", "size": 1}}"#)
    }

    fn index(&self, path: &str, artifacts: &[String]) {
        let index = format!(
            r#"{{"schemaVersion": 2, "manifests": [{}]}}"#,
            artifacts.join(",")
        );
        self.put(path, index.as_bytes());
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.shelf.lock().unwrap().requests)
    }

    fn lock(&self, authorization: &str, challenge: &str) {
        let locked = (authorization.to_owned(), challenge.to_owned());
        self.shelf.lock().unwrap().locked = Some(locked);
    }

    async fn found(&self, sigstore: &Sigstore) -> Vec<(Bundle, Option<Vec<u8>>)> {
        let name = format!("{}/team/app:1", self.host);
        let image = Image {
            name: &name,
            digest: DIGEST,
        };
        let payloads = sigstore.found(&image).await.unwrap().payloads;
        let decoded = payloads.into_iter().map(|payload| {
            let bundle = Bundle::decode(&*payload.bundle).unwrap();
            (bundle, payload.simple_signing_envelope)
        });
        decoded.collect()
    }
}

/// One that may ask this machine.
fn sigstore(more: &str) -> Sigstore {
    let source = format!("allowed_private_network_prefixes: [127.0.0.0/8]\n{more}\n");
    let node = crate::yaml::parse(&source).unwrap();
    let problems = crate::yaml::Problems::new();
    let mut fields = Fields::new(&node, "", &problems).unwrap();
    let settings = Settings::parse(&mut fields).unwrap();
    Sigstore::new(settings, &Env::default(), Clock::system())
}

const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const V03: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const SIGNED: &str = r#""dev.cosignproject.cosign/signature": "c2ln""#;
const JSON: &str = r#"{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
    "verificationMaterial": {"publicKey": {"hint": "k"}},
    "dsseEnvelope": {"payload": "cGF5", "payloadType": "x", "signatures": [{"sig": "c2ln"}]}}"#;

#[tokio::test]
async fn both_ways_of_signing_are_found() {
    let registry = registry().await;
    let layer = registry.layer(SIMPLE, b"{\"critical\":{}}", SIGNED);
    let other = registry.layer("application/octet-stream", b"x", "");
    registry.signed(&[other, layer]);
    let json = registry.layer(V03, JSON.as_bytes(), "");
    let artifacts = [
        registry.referring("application/spdx+json", &[]),
        registry.referring(V03, &[json]),
    ];
    registry.index(&format!("/v2/team/app/referrers/{DIGEST}"), &artifacts);
    let sigstore = sigstore("");
    let found = registry.found(&sigstore).await;
    assert_eq!(found.len(), 2);
    assert!(found[0].0.media_type.ends_with("version=0.1"));
    assert_eq!(found[0].1.as_deref(), Some(&b"{\"critical\":{}}"[..]));
    assert!(found[1].0.media_type.ends_with("v0.3+json"));
    assert_eq!(found[1].1, None);
    // The second one to ask costs nothing.
    assert!(!registry.requests().is_empty());
    assert_eq!(registry.found(&sigstore).await, found);
    assert_eq!(registry.requests(), Vec::<String>::new());
}

#[tokio::test]
async fn what_refers_may_be_a_tag() {
    let registry = registry().await;
    let json = registry.layer(V03, JSON.as_bytes(), "");
    let artifact = registry.referring(V03, &[json]);
    registry.index(&format!("/v2/team/app/manifests/{TAG}"), &[artifact]);
    assert_eq!(registry.found(&sigstore("")).await.len(), 1);
}

#[tokio::test]
async fn an_image_without_signatures_is_an_answer_too() {
    let registry = registry().await;
    let sigstore = sigstore("");
    assert_eq!(registry.found(&sigstore).await, []);
    registry.requests();
    assert_eq!(registry.found(&sigstore).await, []);
    assert_eq!(registry.requests(), Vec::<String>::new());
    // After nothing was issued it is looked up again, in a while.
    let attributes = WorkloadAttrs {
        docker: Some(WorkloadAttrsDocker {
            attested: true,
            container: Some(WorkloadAttrsDockerContainer {
                image: format!("{}/team/app", registry.host),
                image_digest: DIGEST.to_owned(),
                ..WorkloadAttrsDockerContainer::default()
            }),
        }),
        ..WorkloadAttrs::default()
    };
    sigstore.nothing_issued(&attributes);
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(30)).await;
    tokio::time::resume();
    assert_eq!(registry.found(&sigstore).await, []);
    assert!(!registry.requests().is_empty());
}

#[tokio::test]
async fn additional_registries_are_asked_and_failing_ones_left_out() {
    let (registry, mirror) = (registry().await, registry().await);
    registry.put(&format!("/v2/team/app/manifests/{TAG}.sig"), b"<html>");
    let layer = mirror.layer(SIMPLE, b"{}", SIGNED);
    mirror.signed(&[layer]);
    let more = format!("additional_registries: [{{host: '{}'}}]", mirror.host);
    assert_eq!(registry.found(&sigstore(&more)).await.len(), 1);
}

#[tokio::test]
async fn tokens_are_fetched_with_the_credentials_of_the_registry() {
    let registry = registry().await;
    let layer = registry.layer(SIMPLE, b"{}", SIGNED);
    registry.signed(&[layer]);
    let realm = format!("http://{}/token", registry.host);
    let challenge = format!(r#"Bearer realm="{realm}",service="the registry",scope="x""#);
    registry.lock("Bearer t0k", &challenge);
    let scope = "/token?service=the%20registry&scope=repository%3Ateam%2Fapp%3Apull";
    registry.put(scope, br#"{"token": "t0k", "access_token": "t0k"}"#);
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = format!(
        r#"{{"auths": {{"{}": {{"auth": "dTpw"}}}}}}"#,
        registry.host
    );
    std::fs::write(file.path(), config).unwrap();
    let more = format!("credentials_path: {}", file.path().display());
    assert_eq!(registry.found(&sigstore(&more)).await.len(), 1);
    let requests = registry.requests();
    let token = requests
        .iter()
        .find(|request| request.contains("/token?"))
        .unwrap();
    assert!(
        token.to_lowercase().contains("authorization: basic dtpw"),
        "{token}"
    );

    // A token that is exchanged.
    let config = format!(
        r#"{{"auths": {{"{}": {{"identitytoken": "i+d"}}}}}}"#,
        registry.host
    );
    std::fs::write(file.path(), config).unwrap();
    registry.put("/token", br#"{"access_token": "t0k"}"#);
    assert_eq!(registry.found(&sigstore(&more)).await.len(), 1);
    let requests = registry.requests();
    let token = requests
        .iter()
        .find(|request| request.starts_with("POST /token"))
        .unwrap();
    assert!(token.ends_with("&refresh_token=i%2Bd"), "{token}");

    // A registry that wants a password each time.
    registry.lock("Basic dTpw", "Basic realm=x");
    let config = format!(
        r#"{{"auths": {{"{}": {{"auth": "dTpw"}}}}}}"#,
        registry.host
    );
    std::fs::write(file.path(), config).unwrap();
    assert_eq!(registry.found(&sigstore(&more)).await.len(), 1);
    assert_eq!(
        registry.found(&sigstore("")).await,
        [],
        "there is no password"
    );
}

#[tokio::test]
async fn blobs_may_be_elsewhere_and_see_no_credentials_there() {
    let (registry, store) = (registry().await, registry().await);
    let layer = registry.layer(SIMPLE, b"{}", SIGNED);
    registry.signed(&[layer]);
    let path = format!("/v2/team/app/blobs/sha256:{}", sha256_hex(b"{}"));
    let location = format!("location: http://{}/bucket?sig=x\r\n", store.host);
    registry.raw(&path, http("307 Temporary Redirect", &location, b""));
    registry.lock("Basic dTpw", "Basic realm=x");
    store.put("/bucket?sig=x", b"{}");
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = format!(
        r#"{{"auths": {{"{}": {{"auth": "dTpw"}}}}}}"#,
        registry.host
    );
    std::fs::write(file.path(), config).unwrap();
    let more = format!("credentials_path: {}", file.path().display());
    assert_eq!(registry.found(&sigstore(&more)).await.len(), 1);
    for request in store.requests() {
        assert!(
            !request.to_lowercase().contains("authorization"),
            "{request}"
        );
    }
}

#[tokio::test]
async fn nothing_that_is_wrong_is_taken() {
    let big = "x".repeat(10 * 1024 * 1024 + 1);
    let registry = registry().await;
    let digest = format!("sha256:{}", sha256_hex(b"{}"));
    let blob = format!("/v2/team/app/blobs/{digest}");
    let layer = registry.layer(SIMPLE, b"{}", SIGNED);
    let claimed = layer.replace("\"size\": 2", "\"size\": 10485761");
    let location = |to: &str| http("302 Found", &format!("location: {to}\r\n"), b"");
    for (name, layer, answer) in [
        ("another content", &layer, http("200 OK", "", b"{ }")),
        (
            "a layer that says it is too long",
            &claimed,
            http("200 OK", "", b"{}"),
        ),
        (
            "a layer that is too long",
            &layer,
            http("200 OK", "", big.as_bytes()),
        ),
        ("nothing", &layer, http("404 Not Found", "", b"")),
        ("a refusal", &layer, http("500 X", "", b"")),
        ("a circle", &layer, location(&blob)),
        (
            "another machine of this network",
            &layer,
            location("http://10.255.255.1/x"),
        ),
        (
            "the metadata of the cloud",
            &layer,
            location("http://169.254.169.254/latest"),
        ),
        ("another protocol", &layer, location("ftp://127.0.0.1/x")),
        ("a file", &layer, location("file:///etc/passwd")),
        ("no address", &layer, location("//")),
    ] {
        registry.signed(std::slice::from_ref(layer));
        registry.raw(&blob, answer);
        assert_eq!(registry.found(&sigstore("")).await, [], "{name}");
    }
    registry.put(&blob, b"{}");
    registry.signed(std::slice::from_ref(&layer));
    assert_eq!(
        registry.found(&sigstore("")).await.len(),
        1,
        "the test tells them apart"
    );

    // Two layers where one belongs; a digest that leads elsewhere; not a bundle.
    registry.signed(&[]);
    let json = registry.layer(V03, JSON.as_bytes(), "");
    let text = registry.layer(V03, b"text", "");
    for artifact in [
        registry.referring(V03, &[json.clone(), json.clone()]),
        registry.referring(V03, &[]),
        registry.referring(V03, &[text]),
        format!(r#"{{"artifactType": "{V03}", "digest": "../../../x"}}"#),
        format!(r#"{{"artifactType": "{V03}", "digest": "{DIGEST}"}}"#),
    ] {
        registry.index(
            &format!("/v2/team/app/referrers/{DIGEST}"),
            std::slice::from_ref(&artifact),
        );
        assert_eq!(registry.found(&sigstore("")).await, [], "{artifact}");
    }
}

#[tokio::test]
async fn no_more_payloads_are_taken_than_25_each() {
    let registry = registry().await;
    let layer = registry.layer(SIMPLE, b"{}", SIGNED);
    registry.signed(&vec![layer; 30]);
    let json = registry.layer(V03, JSON.as_bytes(), "");
    let artifact = registry.referring(V03, &[json]);
    registry.index(
        &format!("/v2/team/app/referrers/{DIGEST}"),
        &vec![artifact; 30],
    );
    assert_eq!(registry.found(&sigstore("")).await.len(), 50);
}

#[tokio::test]
async fn private_registries_are_not_asked_unless_allowed() {
    let registry = registry().await;
    let layer = registry.layer(SIMPLE, b"{}", SIGNED);
    registry.signed(&[layer]);
    let sigstore = Sigstore::new(Settings::default(), &Env::default(), Clock::system());
    assert_eq!(registry.found(&sigstore).await, []);
    assert_eq!(registry.requests(), Vec::<String>::new());
}

#[tokio::test]
async fn images_without_a_name_or_a_digest_are_errors() {
    let sigstore = sigstore("");
    for (name, digest, expected) in [
        ("", DIGEST, "no name of an image"),
        (DIGEST, DIGEST, "no name of an image"),
        ("example.org/a1", "", "no digest of an image"),
        ("example.org/a1", "sha256:0", "no digest of an image"),
    ] {
        let error = sigstore
            .found(&Image { name, digest })
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_container_is_that_of_the_pod_before_others() {
    let container = |image: &str| WorkloadAttrsDocker {
        attested: true,
        container: Some(WorkloadAttrsDockerContainer {
            image: image.to_owned(),
            ..WorkloadAttrsDockerContainer::default()
        }),
    };
    let mut attributes = WorkloadAttrs::default();
    assert!(Image::of(&attributes).is_none());
    attributes.docker = Some(container("docker"));
    assert_eq!(Image::of(&attributes).unwrap().name, "docker");
    attributes.kubernetes = Some(WorkloadAttrsKubernetes::default());
    assert_eq!(Image::of(&attributes).unwrap().name, "docker");
    attributes.kubernetes = Some(WorkloadAttrsKubernetes {
        container: Some(WorkloadAttrsKubernetesContainer {
            image: "pod".to_owned(),
            ..WorkloadAttrsKubernetesContainer::default()
        }),
        ..WorkloadAttrsKubernetes::default()
    });
    assert_eq!(Image::of(&attributes).unwrap().name, "pod");
}

#[test]
fn fuzz_bundles_of_registries() {
    let check = bolero::check!().with_type::<(Vec<(u16, u8)>, String)>();
    check.for_each(|(edits, text)| {
        let mut json = JSON.as_bytes().to_vec();
        for (place, octet) in edits.iter().take(6) {
            let at = usize::from(*place) % json.len();
            json[at] = *octet;
        }
        if let Ok(bundle) = bundle::from_json(&json) {
            let encoded = bundle.encode_to_vec();
            assert_eq!(Bundle::decode(&*encoded).as_ref(), Ok(&bundle));
        }
        let names = ["signature", "certificate", "chain", "bundle"];
        let annotations = names.iter().enumerate().map(|(at, name)| {
            let family = if *name == "signature" {
                "dev.cosignproject.cosign"
            } else {
                "dev.sigstore.cosign"
            };
            let sample = if edits.len() % names.len() == at {
                text.clone()
            } else {
                "c2ln".to_owned()
            };
            (format!("{family}/{name}"), sample)
        });
        let annotations: HashMap<_, _> = annotations.collect();
        if let Ok(bundle) = bundle::from_annotations(&annotations, text.as_bytes()) {
            assert!(bundle.media_type.ends_with("version=0.1"));
        }
    });
}
