//! Open streams, while the caller changes.

use std::sync::Mutex;

use super::*;
use crate::attest::{AttestError, Attestor, Peer};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrsUnix;

/// Finds what it is told to find.
#[derive(Debug, Default)]
struct Told {
    /// What the process ID is to be; `None` fails.
    pid: Mutex<Option<i32>>,
    looks: std::sync::atomic::AtomicUsize,
}

impl Told {
    fn new(pid: i32) -> Arc<Self> {
        let told = Self::default();
        told.becomes(Some(pid));
        Arc::new(told)
    }

    fn becomes(&self, pid: Option<i32>) {
        *self.pid.lock().unwrap() = pid;
    }

    fn looks(&self) -> usize {
        self.looks.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[async_trait]
impl Attestor for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    async fn attest(&self, peer: &Peer, found: &mut WorkloadAttrs) -> Result<(), AttestError> {
        self.looks
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let Some(pid) = *self.pid.lock().unwrap() else {
            return Err(AttestError {
                attestor: "told",
                pid: peer.pid(),
                problem: "away".into(),
            });
        };
        found.unix = Some(WorkloadAttrsUnix {
            pid,
            ..WorkloadAttrsUnix::default()
        });
        Ok(())
    }

    fn emit(&self) -> Tree {
        Tree::Null
    }
}

const INTERVAL: Duration = Duration::from_millis(200);

fn attestors(told: &Arc<Told>) -> Attestors {
    Attestors::new([Arc::clone(told) as Arc<dyn Attestor>])
}

type Svids = tonic::Streaming<crate::pb::workload_api::X509svidResponse>;

async fn opened(world: &World) -> Svids {
    let mut client = world.client().await;
    let request = with_header(X509svidRequest {}, &["true"]);
    client.fetch_x509svid(request).await.unwrap().into_inner()
}

/// Waits until it was looked `times` more often.
async fn looked(told: &Told, times: usize) {
    let before = told.looks();
    while told.looks() < before + times {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_caller_that_became_something_else_gets_what_that_may_have() {
    let world = World::new();
    world.publish(&[&world.authority]);
    let told = Told::new(1);
    let test = async {
        let mut stream = opened(&world).await;
        let first = stream.message().await.unwrap().unwrap();
        looked(&told, 2).await;
        assert_eq!(*world.issuer.pids.lock().unwrap(), [1], "nothing changed");
        // Nobody can say what it is: that is not its fault.
        told.becomes(None);
        looked(&told, 2).await;
        assert_eq!(*world.issuer.pids.lock().unwrap(), [1]);
        told.becomes(Some(2));
        let others = stream.message().await.unwrap().unwrap();
        assert_ne!(others.svids[0].x509_svid_key, first.svids[0].x509_svid_key);
        assert_eq!(*world.issuer.pids.lock().unwrap(), [1, 2]);
        world
            .issuer
            .refuses
            .store(true, std::sync::atomic::Ordering::Relaxed);
        told.becomes(Some(3));
        let ended = stream.message().await.unwrap_err();
        assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    };
    world.run_with(attestors(&told), INTERVAL, test).await;
}

#[tokio::test]
async fn the_streams_of_a_connection_are_looked_at_together() {
    let world = World::new();
    world.publish(&[&world.authority]);
    let told = Told::new(1);
    let test = async {
        let mut client = world.client().await;
        let mut streams = Vec::new();
        for _ in 0..20 {
            let request = with_header(X509svidRequest {}, &["true"]);
            let mut stream = client.fetch_x509svid(request).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap();
            streams.push(stream);
        }
        assert_eq!(told.looks(), 1, "calls that come together");
        tokio::time::sleep(5 * INTERVAL).await;
        let looks = told.looks();
        assert!((4..=12).contains(&looks), "{looks} looks in five intervals");
    };
    world.run_with(attestors(&told), INTERVAL, test).await;
}

#[tokio::test]
async fn who_waits_for_the_same_is_sent_the_same_bytes() {
    let world = World::new();
    world.publish(&[&world.authority]);
    let test = async {
        let (mut one, mut two) = (opened(&world).await, opened(&world).await);
        let first = one.message().await.unwrap().unwrap();
        assert_eq!(two.message().await.unwrap().unwrap(), first);
        // What says the same is not sent again; what says something else is, to all.
        world.publish(&[&world.authority]);
        let other = Authority::new(DOMAIN);
        world.publish(&[&world.authority, &other]);
        for stream in [&mut one, &mut two] {
            let next = stream.message().await.unwrap().unwrap();
            assert!(next.svids[0].bundle.len() > first.svids[0].bundle.len());
        }
        assert_eq!(world.issuer.pids.lock().unwrap().len(), 1);
    };
    world.run(test).await;
}
