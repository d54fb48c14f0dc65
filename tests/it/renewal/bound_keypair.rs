//! A bot that is bound by its key, over days of simulated time and through what may happen between the
//! cluster's answer and the bot's storage.

use std::path::Path;
use std::sync::atomic::AtomicU32;

use serde_json::Value;
use tbot::destination::{Destination, DestinationError, FileSet, Lock};
use tbot::secret::Secret;

use super::*;

const TOKEN: &str = "
kind: token
version: v2
metadata: {name: bound}
spec: {roles: [Bot], bot_name: example, join_method: bound_keypair, bound_keypair: {recovery: {limit: 3}}}
";

fn create(setup: &Setup, yaml: &str) {
    let files = [("token.yaml".to_owned(), yaml.to_owned())];
    let state = setup.cluster.state();
    state.create(&files, Mode::Force, "test").unwrap();
}

/// What the cluster knows of the key.
fn status(setup: &Setup) -> Value {
    let token = setup.cluster.state().store.get("token", "bound");
    token.unwrap().unwrap().status["bound_keypair"].clone()
}

fn locks(setup: &Setup) -> usize {
    setup.cluster.state().store.list("lock").unwrap().len()
}

fn by_secret(secret: &Value) -> Arc<dyn Prover> {
    let secret = Secret::new(secret.as_str().unwrap().to_owned());
    let method = join::method("bound_keypair").unwrap();
    method.with_parameter(secret).unwrap()
}

/// A place in memory where the join state, or the identity after it, cannot be written a number of
/// times.
#[derive(Debug)]
struct Shaky {
    inner: Arc<dyn Destination>,
    failures: AtomicU32,
    identities: AtomicU32,
    /// Whether a join state was the last that was written.
    settled: AtomicBool,
}

impl Shaky {
    fn new(failures: u32) -> Arc<Self> {
        Arc::new(Self {
            inner: destination::from_uri("memory://").unwrap().build(),
            failures: AtomicU32::new(failures),
            identities: AtomicU32::new(0),
            settled: AtomicBool::new(false),
        })
    }
}

fn full() -> DestinationError {
    DestinationError::Unsuitable {
        path: "memory".to_owned(),
        problem: "it is full".to_owned(),
    }
}

#[async_trait]
impl Destination for Shaky {
    async fn init(&self) -> Result<(), DestinationError> {
        self.inner.init().await
    }

    async fn check_writable(&self) -> Result<(), DestinationError> {
        self.inner.check_writable().await
    }

    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        let state = files.contains_key("bkp_state");
        let failures = match (state, self.settled.load(Ordering::Relaxed)) {
            (true, _) => Some(&self.failures),
            (false, true) => Some(&self.identities),
            (false, false) => None,
        };
        if let Some(failures) = failures {
            let left = failures.load(Ordering::Relaxed);
            if left > 0 {
                failures.store(left - 1, Ordering::Relaxed);
                return Err(full());
            }
        }
        self.settled.store(state, Ordering::Relaxed);
        self.inner.write(files).await
    }

    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        self.inner.read(name).await
    }

    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        self.inner.lock()
    }

    fn is_persistent(&self) -> bool {
        true
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}

async fn setup(join_v1: bool) -> Setup {
    let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let setup = Setup::with(clock, |config| config.join_v1 = join_v1).await;
    create(&setup, TOKEN);
    setup
}

#[tokio::test(start_paused = true)]
async fn renewals_are_free_and_an_expired_certificate_costs_one_recovery() {
    for join_v1 in [true, false] {
        let setup = setup(join_v1).await;
        let secret = status(&setup)["registration_secret"].clone();
        let (handle, running) = setup.start_with(by_secret(&secret), "bound").await;
        let first = handle.ready().await.unwrap();
        let joined = status(&setup);
        assert_eq!(joined["recovery_count"], 1, "newer service: {join_v1}");
        assert_eq!(joined["registration_secret"], Value::Null);
        tokio::time::sleep(Duration::from_hours(12)).await;
        let later = handle.identity().borrow().clone().unwrap();
        assert_eq!(later.instance_id(), first.instance_id());
        assert!(later.generation() > 30, "{}", later.generation());
        assert_eq!(status(&setup), joined, "renewals change nothing");

        // Longer away than the certificate lives.
        setup.network.out.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_hours(3)).await;
        setup.network.out.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_mins(30)).await;
        let recovered = handle.identity().borrow().clone().unwrap();
        assert_ne!(recovered.instance_id(), first.instance_id());
        assert_eq!(status(&setup)["recovery_count"], 2);
        let id = recovered.instance_id().unwrap().clone();
        assert_eq!(status(&setup)["bound_bot_instance_id"], *id);
        let record = setup.cluster.state().store.get("bot_instance", &id);
        let previous = record.unwrap().unwrap().spec["previous_instance_id"].clone();
        assert_eq!(previous, first.instance_id().unwrap());
        tokio::time::sleep(Duration::from_hours(2)).await;
        assert_eq!(status(&setup)["recovery_count"], 2);
        assert_eq!(locks(&setup), 0);
        setup.shutdown.cancel();
        running.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_could_not_be_stored_is_given_again() {
    for join_v1 in [true, false] {
        let setup = setup(join_v1).await;
        let secret = status(&setup)["registration_secret"].clone();
        // More often than one join tries.
        let storage = Shaky::new(8);
        let place = Arc::clone(&storage) as Arc<dyn Destination>;
        let (handle, running) = setup.start_in(by_secret(&secret), "bound", place).await;
        handle.ready().await.unwrap();
        let joined = status(&setup);
        assert_eq!(joined["recovery_count"], 1, "newer service: {join_v1}");

        // The same at a renewal, and at a recovery.
        let reload = async |count: u32| {
            storage.failures.store(count, Ordering::Relaxed);
            setup.reload.send_modify(|count| *count += 1);
            tokio::time::sleep(Duration::from_mins(5)).await;
        };
        reload(8).await;
        assert_eq!(status(&setup), joined);
        setup.network.out.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_hours(3)).await;
        storage.failures.store(8, Ordering::Relaxed);
        setup.network.out.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_mins(30)).await;
        assert_eq!(status(&setup)["recovery_count"], 2);
        // The join state is stored, and the certificate is not: both places for it fail.
        setup.network.out.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_hours(3)).await;
        storage.identities.store(2, Ordering::Relaxed);
        setup.network.out.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_mins(30)).await;
        assert_eq!(storage.identities.load(Ordering::Relaxed), 0);
        assert_eq!(status(&setup)["recovery_count"], 3);
        reload(0).await;
        assert!(setup.registry.snapshot().at(setup.clock.now()).healthy());
        assert_eq!(storage.failures.load(Ordering::Relaxed), 0);
        assert_eq!(locks(&setup), 0);
        setup.shutdown.cancel();
        running.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_key_is_replaced_when_the_token_asks_for_it() {
    for join_v1 in [true, false] {
        let setup = setup(join_v1).await;
        let secret = status(&setup)["registration_secret"].clone();
        let storage = Shaky::new(0);
        let place = Arc::clone(&storage) as Arc<dyn Destination>;
        let (handle, running) = setup.start_in(by_secret(&secret), "bound", place).await;
        handle.ready().await.unwrap();
        let before = status(&setup);
        let wish = "bound_keypair: {rotate_after: \"2027-01-15T08:00:00Z\", recovery:";
        create(&setup, &TOKEN.replace("bound_keypair: {recovery:", wish));
        assert_eq!(status(&setup), before, "the bot stays bound");
        // Its answer is lost once.
        storage.failures.store(8, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_hours(1)).await;
        let after = status(&setup);
        assert_ne!(after["bound_public_key"], before["bound_public_key"]);
        assert_ne!(after["last_rotated_at"], Value::Null);
        let file = storage.inner.read("id_bkp.pub").await.unwrap().unwrap();
        let line = String::from_utf8(file.expose().clone()).unwrap();
        assert_eq!(after["bound_public_key"], line.trim());
        tokio::time::sleep(Duration::from_hours(6)).await;
        assert_eq!(status(&setup), after, "once");
        assert!(setup.registry.snapshot().at(setup.clock.now()).healthy());
        assert_eq!(locks(&setup), 0);
        setup.shutdown.cancel();
        running.await.unwrap();
    }
}
