use std::sync::atomic::Ordering;

use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::*;
use crate::pb::envoy::config::core::v3::{BuildVersion, Node, node};
use crate::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use crate::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use crate::pb::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use crate::pb::envoy::r#type::v3::SemanticVersion;

const ID: &str = "spiffe://example.org/svc/foo";

fn asking(names: &[&str], nonce: &str) -> DiscoveryRequest {
    DiscoveryRequest {
        resource_names: names.iter().map(|&name| name.to_owned()).collect(),
        response_nonce: nonce.to_owned(),
        ..DiscoveryRequest::default()
    }
}

type Requests<T> = mpsc::UnboundedSender<T>;

async fn open(
    world: &World,
    first: DiscoveryRequest,
) -> (Requests<DiscoveryRequest>, Streaming<DiscoveryResponse>) {
    let mut client = SecretDiscoveryServiceClient::new(world.channel().await);
    let (sender, receiver) = mpsc::unbounded_channel();
    sender.send(first).unwrap();
    let requests = UnboundedReceiverStream::new(receiver);
    let answers = client.stream_secrets(requests).await.unwrap().into_inner();
    (sender, answers)
}

fn names(response: &DiscoveryResponse) -> Vec<String> {
    response
        .resources
        .iter()
        .map(|any| Secret::decode(&any.value[..]).unwrap().name)
        .collect()
}

async fn silent<T: std::fmt::Debug>(answers: &mut Streaming<T>) {
    let next = tokio::time::timeout(Duration::from_millis(200), answers.message()).await;
    assert!(next.is_err(), "{next:?}");
}

#[tokio::test]
async fn a_stream_follows_requests_renewals_and_bundles() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .run(async {
            let (requests, mut answers) = open(&world, asking(&["default"], "")).await;
            let first = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&first), ["default"]);
            assert_eq!(
                (first.nonce.len(), first.version_info.is_empty()),
                (8, false)
            );
            // Acknowledged: nothing follows. Another name: an answer.
            requests.send(asking(&["default"], &first.nonce)).unwrap();
            silent(&mut answers).await;
            requests
                .send(asking(&[ID, "ROOTCA"], &first.nonce))
                .unwrap();
            let second = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&second), ["ROOTCA", ID]);
            assert_ne!(second.nonce, first.nonce);
            // A renewal is pushed with the new key.
            world.cache.renew_all();
            let renewed = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&renewed), ["ROOTCA", ID]);
            assert_eq!(renewed.resources[0], second.resources[0]);
            assert_ne!(renewed.resources[1], second.resources[1]);
            // So is another authority.
            let next = Authority::new(DOMAIN);
            world.publish(&[&next, &world.authority]);
            let rotated = answers.message().await.unwrap().unwrap();
            assert_ne!(rotated.resources[0], renewed.resources[0]);
            requests.send(asking(&["nothing"], &rotated.nonce)).unwrap();
            let status = answers.message().await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert_eq!(status.message(), "unknown resource names: nothing");
            assert!(world.issuer.pids.lock().unwrap().len() >= 2);
        })
        .await;
}

#[tokio::test]
async fn an_svid_is_not_sent_beside_a_bundle_that_cannot_vouch_for_it() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .run(async {
            let (requests, mut answers) = open(&world, asking(&["default", "ROOTCA"], "")).await;
            let first = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&first), ["ROOTCA", "default"]);
            // Its authority is gone: the SVID waits for its renewal, and the bundle for the SVID.
            world.publish(&[&Authority::new(DOMAIN)]);
            silent(&mut answers).await;
            requests.send(asking(&["ROOTCA"], &first.nonce)).unwrap();
            let alone = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&alone), ["ROOTCA"]);
            assert_ne!(alone.resources[0], first.resources[0]);
        })
        .await;
}

#[tokio::test]
async fn the_cache_is_that_of_the_spiffe_calls() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .run(async {
            let mut client = world.client().await;
            let svid = client.fetch_x509svid(call(X509svidRequest {})).await;
            let _held = svid.unwrap();
            let (_requests, mut answers) = open(&world, asking(&[], "")).await;
            let all = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&all), ["spiffe://example.org", ID]);
            assert_eq!(world.issuer.pids.lock().unwrap().len(), 1, "issued once");
        })
        .await;
}

#[tokio::test]
async fn who_gets_no_svid_still_gets_bundles() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world.issuer.refuses.store(true, Ordering::Relaxed);
    world
        .run(async {
            let (_requests, mut answers) = open(&world, asking(&["ALL"], "")).await;
            let bundles = answers.message().await.unwrap().unwrap();
            assert_eq!(names(&bundles), ["ALL"]);
            assert!(world.issuer.pids.lock().unwrap().is_empty());
            let (_requests, mut answers) = open(&world, asking(&["default"], "")).await;
            let status = answers.message().await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied);
            assert_eq!(status.message(), "no identity issued: no rule");
        })
        .await;
}

#[tokio::test]
async fn a_fetch_is_answered_once_and_without_a_version() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .run(async {
            let mut client = SecretDiscoveryServiceClient::new(world.channel().await);
            let answer = client.fetch_secrets(asking(&["default", "ROOTCA"], ""));
            let answer = answer.await.unwrap().into_inner();
            assert_eq!(names(&answer), ["ROOTCA", "default"]);
            assert_eq!((&*answer.nonce, &*answer.version_info), ("", ""));
            let version = SemanticVersion {
                major_number: 1,
                minor_number: 17,
                patch: 4,
            };
            let version = BuildVersion {
                version: Some(version),
            };
            let old = DiscoveryRequest {
                node: Some(Node {
                    user_agent_version_type: Some(
                        node::UserAgentVersionType::UserAgentBuildVersion(version),
                    ),
                    ..Node::default()
                }),
                ..asking(&["default"], "")
            };
            let status = client.fetch_secrets(old).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            let other = DiscoveryRequest {
                type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(),
                ..asking(&["default"], "")
            };
            let status = client.fetch_secrets(other).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
        })
        .await;
}

#[tokio::test]
async fn the_delta_form_is_served_too() {
    let world = World::new();
    world.publish(&[&world.authority]);
    let subscribe = |names: &[&str]| DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|&name| name.to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    };
    let changed = |response: &DeltaDiscoveryResponse| -> Vec<String> {
        let names = response.resources.iter().map(|r| r.name.clone());
        names.collect()
    };
    world
        .run(async {
            let mut client = SecretDiscoveryServiceClient::new(world.channel().await);
            let (requests, receiver) = mpsc::unbounded_channel();
            requests.send(subscribe(&["default", "ROOTCA"])).unwrap();
            let stream = client.delta_secrets(UnboundedReceiverStream::new(receiver));
            let mut answers = stream.await.unwrap().into_inner();
            let first = answers.message().await.unwrap().unwrap();
            assert_eq!(changed(&first), ["ROOTCA", "default"]);
            silent(&mut answers).await;
            world.cache.renew_all();
            let renewed = answers.message().await.unwrap().unwrap();
            assert_eq!(changed(&renewed), ["default"]);
            assert_ne!(renewed.resources[0].version, first.resources[1].version);
            // What is unknown is told, and the rest goes on.
            requests
                .send(subscribe(&["spiffe://gone.example"]))
                .unwrap();
            let told = answers.message().await.unwrap().unwrap();
            assert_eq!(told.removed_resources, ["spiffe://gone.example"]);
            world.cache.renew_all();
            let renewed = answers.message().await.unwrap().unwrap();
            assert_eq!(changed(&renewed), ["default"]);
            assert!(renewed.removed_resources.is_empty());
        })
        .await;
}
