use std::sync::Mutex;

use async_trait::async_trait;
use base64::Engine as _;
use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;

use super::*;
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::events::Events;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::pb::proto::event::Resource;
use crate::pb::proto::{Event, Operation, Watch};
use crate::pb::teleport::header::v1::Metadata;
use crate::pb::teleport::machineid::v1::{SpiffeFederation, SpiffeFederationStatus};
use crate::spiffe::TrustDomain;
use crate::spiffe::jwt::JwtBundle;
use crate::workload::bundle::{BundleError, follow};
use crate::workload::{BundleFeed, Bundles};
use std::sync::Arc;

fn federation(name: &str, document: &str) -> SpiffeFederation {
    SpiffeFederation {
        metadata: Some(Metadata {
            name: name.into(),
            ..Metadata::default()
        }),
        status: Some(SpiffeFederationStatus {
            current_bundle: document.into(),
            ..SpiffeFederationStatus::default()
        }),
        ..SpiffeFederation::default()
    }
}

fn document(authority: &Authority) -> String {
    let der = base64::engine::general_purpose::STANDARD.encode(&authority.der);
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let jwks = JwtBundle::from_pems([key.public_pem().as_str()]).unwrap();
    let jwks: serde_json::Value = serde_json::from_slice(&jwks.jwks()).unwrap();
    let mut jwt = jwks["keys"][0].clone();
    jwt["use"] = "jwt-svid".into();
    format!(r#"{{"keys":[{jwt},{{"use":"x509-svid","kty":"EC","x5c":["{der}"]}}]}}"#)
}

#[test]
fn a_bundle_holds_every_trusted_certificate_once() {
    let (old, new) = (Authority::new(DOMAIN), Authority::new(DOMAIN));
    let bundles = Bundles::from_authority(&message(DOMAIN, &[&new, &old, &new])).unwrap();
    assert_eq!(
        &bundles.local()[..],
        [new.der.clone(), old.der.clone()].concat()
    );
    assert_eq!(bundles.trust_domain().name(), DOMAIN);
    let error = Bundles::from_authority(&message("Not A Domain", &[&old])).unwrap_err();
    assert_eq!(error, BundleError::TrustDomain("Not A Domain".into()));
    assert_eq!(
        Bundles::from_authority(&CertAuthorityV2::default()).unwrap_err(),
        BundleError::Empty
    );
}

/// A cluster whose state the test changes.
#[derive(Debug, Default)]
struct Cluster {
    authority: Mutex<Option<CertAuthorityV2>>,
    federations: Mutex<Option<Vec<SpiffeFederation>>>,
    watches: Mutex<Vec<mpsc::UnboundedReceiver<Result<Event, ClusterError>>>>,
    asked: Mutex<Vec<Watch>>,
}

#[async_trait]
impl BundleFeed for Cluster {
    async fn authority(&self, cluster: &str) -> Result<CertAuthorityV2, ClusterError> {
        assert_eq!(cluster, DOMAIN);
        let authority = self.authority.lock().unwrap().clone();
        authority.ok_or_else(|| ClusterError::call("GetCertAuthority")(Status::unavailable("x")))
    }

    async fn federations(&self) -> Result<Vec<SpiffeFederation>, ClusterError> {
        let federations = self.federations.lock().unwrap().clone();
        federations.ok_or_else(|| ClusterError::call("List")(Status::unimplemented("x")))
    }

    async fn watch(&self, watch: Watch) -> Result<Events, ClusterError> {
        self.asked.lock().unwrap().push(watch);
        match self.watches.lock().unwrap().pop() {
            Some(events) => Ok(UnboundedReceiverStream::new(events).boxed()),
            None => Err(ClusterError::call("WatchEvents")(Status::unimplemented(
                "x",
            ))),
        }
    }
}

type Sender = mpsc::UnboundedSender<Result<Event, ClusterError>>;

impl Cluster {
    fn watched(&self) -> Sender {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.watches.lock().unwrap().push(receiver);
        sender
            .send(Ok(Event {
                r#type: Operation::Init as i32,
                resource: None,
            }))
            .unwrap();
        sender
    }
}

fn put(resource: Resource) -> Event {
    Event {
        r#type: Operation::Put as i32,
        resource: Some(resource),
    }
}

fn delete(kind: &str, name: &str) -> Event {
    let header = crate::pb::types::ResourceHeader {
        kind: kind.into(),
        metadata: Some(crate::pb::types::Metadata {
            name: name.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Event {
        r#type: Operation::Delete as i32,
        resource: Some(Resource::ResourceHeader(header)),
    }
}

/// Runs `test` beside the follower.
async fn beside<F: Future<Output = ()>>(
    cluster: &Cluster,
    test: impl FnOnce(watch::Receiver<Option<Arc<Bundles>>>) -> F,
) {
    let (sender, receiver) = watch::channel(None);
    let clock = Clock::simulated(start());
    tokio::select! {
        () = follow(cluster, DOMAIN, &clock, &sender) => {}
        () = test(receiver) => {}
    }
}

#[tokio::test(start_paused = true)]
async fn changes_are_followed_and_nothing_unusable_replaces_what_is_good() {
    let (old, new, friend) = (
        Authority::new(DOMAIN),
        Authority::new(DOMAIN),
        Authority::new("friend"),
    );
    let cluster = Cluster::default();
    *cluster.authority.lock().unwrap() = Some(message(DOMAIN, &[&old]));
    *cluster.federations.lock().unwrap() = Some(vec![
        federation("friend.org", &document(&friend)),
        federation("late.org", ""),
    ]);
    let events = cluster.watched();
    beside(&cluster, |mut bundles| async move {
        bundles.changed().await.unwrap();
        let first = bundles.borrow_and_update().clone().unwrap();
        assert_eq!(&first.local()[..], old.der);
        let federated: Vec<_> = first
            .federated()
            .iter()
            .map(|(d, b)| (d.name().to_owned(), b.x509.to_vec(), b.jwt.len()))
            .collect();
        assert_eq!(
            federated,
            [("friend.org".to_owned(), friend.der.clone(), 1)]
        );

        // None of these is news.
        events
            .send(Ok(put(Resource::CertAuthority(message(DOMAIN, &[&old])))))
            .unwrap();
        events
            .send(Ok(put(Resource::CertAuthority(message(
                "leaf.org",
                &[&new],
            )))))
            .unwrap();
        events
            .send(Ok(put(Resource::SpiffeFederation(federation(
                "friend.org",
                "junk",
            )))))
            .unwrap();
        events.send(Ok(delete("cert_authority", DOMAIN))).unwrap();
        // This one is.
        events
            .send(Ok(put(Resource::CertAuthority(message(
                DOMAIN,
                &[&new, &old],
            )))))
            .unwrap();
        bundles.changed().await.unwrap();
        let second = bundles.borrow_and_update().clone().unwrap();
        assert_eq!(
            &second.local()[..],
            [new.der.clone(), old.der.clone()].concat()
        );
        assert_eq!(second.federated(), first.federated());

        // A trust domain that revoked all of its keys is believed; nobody speaks for another.
        events
            .send(Ok(put(Resource::SpiffeFederation(federation(
                DOMAIN,
                &document(&friend),
            )))))
            .unwrap();
        events
            .send(Ok(put(Resource::SpiffeFederation(federation(
                "friend.org",
                r#"{"keys":[]}"#,
            )))))
            .unwrap();
        bundles.changed().await.unwrap();
        let third = bundles.borrow_and_update().clone().unwrap();
        let domain = TrustDomain::new("friend.org").unwrap();
        assert!(second.jwt_of(&domain).is_some_and(|keys| keys.len() == 1));
        assert!(third.jwt_of(&domain).is_some_and(JwtBundle::is_empty));
        assert_eq!(third.federated().len(), 1);
        assert_eq!(
            third.federated_x509().count() + third.federated_jwt().count(),
            0
        );
        assert_eq!(third.jwt_of(third.trust_domain()), Some(third.jwt()));

        events
            .send(Ok(delete("spiffe_federation", "friend.org")))
            .unwrap();
        bundles.changed().await.unwrap();
        assert!(
            bundles
                .borrow_and_update()
                .as_ref()
                .unwrap()
                .federated()
                .is_empty()
        );
    })
    .await;
    let watch = cluster.asked.lock().unwrap().remove(0);
    assert_eq!(watch.kinds[0].kind, "cert_authority");
    assert_eq!(
        watch.kinds[0].filter.get("spiffe").map(String::as_str),
        Some(DOMAIN)
    );
    assert_eq!(watch.kinds[1].kind, "spiffe_federation");
    assert!(watch.kinds.iter().all(|kind| !kind.load_secrets));
}

#[tokio::test(start_paused = true)]
async fn the_first_bundle_is_asked_for_without_long_pauses() {
    let authority = Authority::new(DOMAIN);
    let cluster = Cluster::default();
    beside(&cluster, |mut bundles| {
        let (cluster, authority) = (&cluster, &authority);
        let asked = || cluster.asked.lock().unwrap().len();
        async move {
            tokio::time::sleep(HOUR).await;
            assert!((60..150).contains(&asked()), "{} in an hour", asked());
            *cluster.authority.lock().unwrap() = Some(message(DOMAIN, &[authority]));
            let heard = tokio::time::timeout(Duration::from_mins(1), bundles.changed());
            heard.await.expect("somebody waits").unwrap();
            // News can wait.
            *cluster.authority.lock().unwrap() = None;
            let before = asked();
            tokio::time::sleep(6 * HOUR).await;
            assert!(asked() - before < 100, "{} times", asked() - before);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_last_good_bundle_outlives_the_cluster() {
    let (old, new) = (Authority::new(DOMAIN), Authority::new(DOMAIN));
    let cluster = Cluster::default();
    *cluster.authority.lock().unwrap() = Some(message(DOMAIN, &[&old]));
    let events = cluster.watched();
    beside(&cluster, |mut bundles| {
        let cluster = &cluster;
        async move {
            bundles.changed().await.unwrap();
            bundles.borrow_and_update();
            *cluster.authority.lock().unwrap() = None;
            drop(events);
            tokio::time::sleep(HOUR).await;
            assert!(!bundles.has_changed().unwrap());
            assert_eq!(&bundles.borrow().as_ref().unwrap().local()[..], old.der);
            // The cluster is back; it has no federations and no changes to tell.
            *cluster.authority.lock().unwrap() = Some(message(DOMAIN, &[&new]));
            bundles.changed().await.unwrap();
            assert_eq!(&bundles.borrow().as_ref().unwrap().local()[..], new.der);
        }
    })
    .await;
}
