//! How long the thread of a user runs.

use std::os::unix::net::UnixStream;

use tokio::sync::mpsc::channel;

use super::*;
use crate::attest::Credentials;
use crate::services::workload_identity_api::door::Arrived;
use crate::services::workload_identity_api::server::Server;
use crate::services::workload_identity_api::threads::serve;

fn server(world: &World) -> Arc<Server> {
    let source = Arc::new(world.source(attest::Plan::default().build(), HOUR));
    Arc::new(Server::new(source, HealthReporter::new(), false))
}

#[tokio::test(start_paused = true)]
async fn a_thread_that_nobody_needs_ends() {
    let world = World::new();
    let (line, arrivals) = channel(1);
    serve(&server(&world), arrivals).await;
    assert!(line.is_closed(), "the next caller gets another one");
}

#[tokio::test(start_paused = true)]
async fn a_thread_stays_for_who_waits_and_for_who_is_connected() {
    let world = World::new();
    let server = server(&world);
    let (line, arrivals) = channel(2);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let credentials = Credentials::of(&ours).unwrap();
    line.try_send(Arrived::Local(ours, credentials)).unwrap();
    let mut serving = std::pin::pin!(serve(&server, arrivals));
    let hour = tokio::time::timeout(HOUR, serving.as_mut()).await;
    assert!(hour.is_ok(), "who never says anything is hung up on");
    drop(theirs);

    let (line, arrivals) = channel(2);
    drop(line);
    tokio::time::timeout(Duration::from_secs(1), serve(&server, arrivals))
        .await
        .expect("nobody can come any more");
}
