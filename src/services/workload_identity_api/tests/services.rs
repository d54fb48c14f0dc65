//! What is on the socket beside the standard's calls.

use tokio_stream::StreamExt as _;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use super::*;

fn ask(question: MessageRequest) -> tokio_stream::Once<ServerReflectionRequest> {
    tokio_stream::once(ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    })
}

async fn told(world: &World, question: MessageRequest) -> MessageResponse {
    let mut client = ServerReflectionClient::new(world.channel().await);
    let stream = client.server_reflection_info(ask(question)).await.unwrap();
    let answer: ServerReflectionResponse = stream.into_inner().next().await.unwrap().unwrap();
    answer.message_response.unwrap()
}

#[tokio::test]
async fn the_server_describes_itself_without_the_header() {
    let world = World::new();
    world
        .run(async {
            let question = MessageRequest::ListServices(String::new());
            let MessageResponse::ListServicesResponse(list) = told(&world, question).await else {
                panic!("no list");
            };
            let mut names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
            names.sort();
            for name in [
                "SpiffeWorkloadAPI",
                "envoy.service.secret.v3.SecretDiscoveryService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
            ] {
                assert!(names.iter().any(|known| known == name), "{name}: {names:?}");
            }
            for symbol in ["SpiffeWorkloadAPI.FetchX509SVID", "X509SVIDResponse"] {
                let question = MessageRequest::FileContainingSymbol(symbol.to_owned());
                assert!(
                    matches!(
                        told(&world, question).await,
                        MessageResponse::FileDescriptorResponse(_)
                    ),
                    "{symbol}"
                );
            }
        })
        .await;
}

#[tokio::test]
async fn the_older_form_of_reflection_is_there_too() {
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::{
        ServerReflectionRequest, server_reflection_request::MessageRequest,
    };
    let world = World::new();
    world
        .run(async {
            let mut client = ServerReflectionClient::new(world.channel().await);
            let question = tokio_stream::once(ServerReflectionRequest {
                host: String::new(),
                message_request: Some(MessageRequest::ListServices(String::new())),
            });
            let stream = client.server_reflection_info(question).await.unwrap();
            assert!(stream.into_inner().next().await.unwrap().is_ok());
        })
        .await;
}

#[tokio::test]
async fn health_is_told_without_the_header() {
    let world = World::new();
    tell(&world.health, false).await;
    world
        .run(async {
            let mut client = HealthClient::new(world.channel().await);
            for (serves, expected) in [
                (false, ServingStatus::NotServing),
                (true, ServingStatus::Serving),
            ] {
                tell(&world.health, serves).await;
                for service in ["", "SpiffeWorkloadAPI"] {
                    let request = HealthCheckRequest {
                        service: service.to_owned(),
                    };
                    let answer = client.check(request).await.unwrap().into_inner();
                    assert_eq!(answer.status(), expected, "{service:?}");
                }
            }
        })
        .await;
}

#[tokio::test]
async fn who_watches_the_server_s_health_does_not_hold_up_its_end() {
    let world = World::new();
    let mut watching = None;
    world
        .run(async {
            let mut client = HealthClient::new(world.channel().await);
            let request = HealthCheckRequest::default();
            let mut stream = client.watch(request).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap();
            watching = Some(tokio::spawn(async move { stream.message().await }));
            world.shutdown.cancel();
            std::future::pending::<()>().await;
        })
        .await;
    let status = watching.unwrap().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

/// Calls a method that nobody declared.
async fn unknown(world: &World, path: &'static str, header: bool) -> Code {
    let mut client = tonic::client::Grpc::new(world.channel().await);
    client.ready().await.unwrap();
    let request = if header {
        call(X509svidRequest {})
    } else {
        tonic::Request::new(X509svidRequest {})
    };
    let codec = tonic_prost::ProstCodec::<X509svidRequest, X509svidRequest>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    client.unary(request, path, codec).await.unwrap_err().code()
}

#[tokio::test]
async fn what_is_not_served_is_told_and_the_header_comes_first() {
    let world = World::new();
    world
        .run(async {
            for (path, header, code) in [
                ("/SpiffeWorkloadAPI/FetchWITSVID", true, Code::Unimplemented),
                (
                    "/SpiffeWorkloadAPI/FetchWITBundles",
                    true,
                    Code::Unimplemented,
                ),
                ("/SpiffeWorkloadAPI/Nothing", true, Code::Unimplemented),
                (
                    "/SpiffeWorkloadAPI/FetchWITSVID",
                    false,
                    Code::InvalidArgument,
                ),
                ("/SpiffeWorkloadAPI/Nothing", false, Code::InvalidArgument),
                ("/nobody.Knows/This", true, Code::Unimplemented),
                ("/nobody.Knows/This", false, Code::Unimplemented),
                (
                    "/envoy.service.secret.v3.SecretDiscoveryService/Nothing",
                    false,
                    Code::Unimplemented,
                ),
            ] {
                assert_eq!(unknown(&world, path, header).await, code, "{path} {header}");
            }
        })
        .await;
}
