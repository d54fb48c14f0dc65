//! The storage is stopped before and after every write, torn, emptied, and shared with upstream.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::crypto::KeyAlgorithm;
use crate::destination::{Lock, from_uri};
use crate::identity::fixtures::{Authority, start};

/// A destination whose process dies at the n-th write, before or after it took effect.
#[derive(Debug)]
struct Dying {
    inner: Arc<dyn Destination>,
    left: AtomicUsize,
    after: bool,
}

#[async_trait]
impl Destination for Dying {
    async fn init(&self) -> Result<(), DestinationError> {
        self.inner.init().await
    }
    async fn check_writable(&self) -> Result<(), DestinationError> {
        self.inner.check_writable().await
    }
    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        let left = self.left.load(Ordering::Relaxed);
        if left > 0 {
            self.left.store(left - 1, Ordering::Relaxed);
            return self.inner.write(files).await;
        }
        if self.after {
            self.inner.write(files).await?;
        }
        Err(DestinationError::Unsuitable {
            path: "storage".into(),
            problem: "stopped".into(),
        })
    }
    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        self.inner.read(name).await
    }
    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        self.inner.lock()
    }
    fn is_persistent(&self) -> bool {
        self.inner.is_persistent()
    }
    fn directory(&self) -> Option<&Path> {
        self.inner.directory()
    }
}

fn memory() -> Arc<dyn Destination> {
    from_uri("memory://").unwrap().build()
}

fn directory(path: &Path) -> Arc<dyn Destination> {
    from_uri(path.to_str().unwrap()).unwrap().build()
}

fn key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
}

fn identity(authority: &Authority, generation: u64) -> Identity {
    let from = start() + Duration::from_mins(20 * generation);
    authority.identity(key(), generation, from)
}

fn generations(loaded: &Loaded) -> Vec<u64> {
    loaded
        .candidates
        .iter()
        .map(|stored| stored.identity.generation())
        .collect()
}

fn same_key(a: &PrivateKey, b: &PrivateKey) -> bool {
    a.public_spki() == b.public_spki()
}

#[tokio::test]
async fn an_empty_storage_holds_nothing() {
    let loaded = Store::open(memory()).load().await.unwrap();
    assert!(loaded.candidates.is_empty() && loaded.pending.is_none() && loaded.warnings.is_empty());
}

#[tokio::test]
async fn what_is_committed_comes_back_newest_first() {
    let authority = Authority::new("example.org");
    let place = memory();
    let store = Store::open(Arc::clone(&place));
    for generation in 1..=5 {
        let identity = identity(&authority, generation);
        store.begin(identity.key()).await.unwrap();
        let between = Store::open(Arc::clone(&place)).load().await.unwrap();
        assert!(same_key(&between.pending.clone().unwrap(), identity.key()));
        let old: Vec<u64> = (1..generation).rev().take(1).collect();
        assert_eq!(generations(&between), old);
        store.commit(&identity, "hash").await.unwrap();
        let loaded = Store::open(Arc::clone(&place)).load().await.unwrap();
        assert!(loaded.pending.is_none() && loaded.warnings.is_empty());
        assert_eq!(generations(&loaded)[0], generation);
        assert_eq!(loaded.candidates[0].token_hash, "hash");
        assert!(same_key(
            loaded.candidates[0].identity.key(),
            identity.key()
        ));
    }
}

#[tokio::test]
async fn of_several_keys_that_were_to_be_sent_the_last_one_counts() {
    let keys = [(7, key()), (9, key()), (8, key())];
    for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
        let place = memory();
        for (name, which) in SLOTS.into_iter().zip(order) {
            let (sequence, key) = &keys[which];
            let key = key.to_pem().expose().clone();
            let state = State::Pending { key };
            let record = Record {
                sequence: *sequence,
                state,
            };
            let files = FileSet::from([(name.to_owned(), encode(&record).unwrap())]);
            place.write(files).await.unwrap();
        }
        let pending = Store::open(place).load().await.unwrap().pending.unwrap();
        assert!(same_key(&pending, &keys[1].1), "{order:?}");
    }
}

#[tokio::test]
async fn a_stop_at_any_write_leaves_the_old_or_the_new_identity() {
    let authority = Authority::new("example.org");
    let base = tempfile::tempdir().unwrap();
    let mut outcomes = [0, 0];
    for persistent in [false, true] {
        for after in [false, true] {
            for stop in 0..=3 {
                let path = base
                    .path()
                    .canonicalize()
                    .unwrap()
                    .join(format!("{after}-{stop}"));
                let inner = if persistent {
                    directory(&path)
                } else {
                    memory()
                };
                let store = Store::open(Arc::clone(&inner));
                store.begin(&key()).await.unwrap();
                store.commit(&identity(&authority, 1), "one").await.unwrap();

                let next = identity(&authority, 2);
                let dying = Store::open(Arc::new(Dying {
                    inner: Arc::clone(&inner),
                    left: AtomicUsize::new(stop),
                    after,
                }));
                let begun = dying.begin(next.key()).await.is_ok();
                let used = begun && dying.commit(&next, "two").await.is_ok();

                let restarted = if persistent { directory(&path) } else { inner };
                restarted.init().await.unwrap();
                let store = Store::open(restarted);
                let loaded = store.load().await.unwrap();
                let newest = generations(&loaded)[0];
                assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
                if used {
                    assert_eq!(newest, 2, "used, therefore durable");
                } else if begun && newest == 1 {
                    assert!(same_key(loaded.pending.as_ref().unwrap(), next.key()));
                }
                let hash = if newest == 1 { "one" } else { "two" };
                assert_eq!(loaded.candidates[0].token_hash, hash);
                outcomes[usize::from(newest == 2)] += 1;

                // Whatever happened, the next renewal works.
                store.begin(&key()).await.unwrap();
                store
                    .commit(&identity(&authority, 3), "three")
                    .await
                    .unwrap();
                assert_eq!(generations(&store.load().await.unwrap())[0], 3);
            }
        }
    }
    assert!(outcomes[0] > 4 && outcomes[1] > 4, "{outcomes:?}");
}

#[tokio::test]
async fn a_torn_or_foreign_slot_is_told_and_the_other_is_used() {
    let authority = Authority::new("example.org");
    let place = memory();
    let store = Store::open(Arc::clone(&place));
    store.commit(&identity(&authority, 1), "h").await.unwrap();
    store.commit(&identity(&authority, 2), "h").await.unwrap();
    let newest = place.read(".slot-1").await.unwrap().unwrap();
    let whole = newest.expose().clone();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut cases: Vec<Vec<u8>> = [0, 1, 20, 81, 82, 200, whole.len() - 1]
        .iter()
        .map(|length| whole[..*length].to_vec())
        .collect();
    cases.push(flipped);
    cases.push(b"not ours\nat all".to_vec());
    cases.push(vec![0; 4096]);
    for bytes in cases {
        place
            .write(FileSet::from([(".slot-1".into(), bytes.into())]))
            .await
            .unwrap();
        let loaded = Store::open(Arc::clone(&place)).load().await.unwrap();
        // The mirror still holds the newest identity, the other slot the one before.
        assert_eq!(generations(&loaded), [2, 1]);
        assert_eq!(loaded.warnings.len(), 1);
        assert!(
            loaded.warnings[0].contains(".slot-1"),
            "{:?}",
            loaded.warnings
        );
    }
}

#[tokio::test]
async fn one_unreadable_file_hides_no_other_and_blocks_no_renewal() {
    let authority = Authority::new("example.org");
    let base = tempfile::tempdir().unwrap();
    let base = base.path().canonicalize().unwrap();
    // The newest identity is in slot 1 and in upstream's files, the one before in slot 0.
    for (case, broken, mirrored, left) in [
        ("older", ".slot-0", false, vec![2]),
        ("newer", ".slot-1", false, vec![1]),
        ("newer but mirrored", ".slot-1", true, vec![2, 1]),
        ("upstream's", "tlscert", true, vec![2, 1]),
    ] {
        let path = base.join(case);
        let place = directory(&path);
        let store = Store::open(Arc::clone(&place));
        store.commit(&identity(&authority, 1), "h").await.unwrap();
        store.commit(&identity(&authority, 2), "h").await.unwrap();
        std::fs::remove_file(path.join(broken)).unwrap();
        std::fs::create_dir(path.join(broken)).unwrap();
        if !mirrored {
            std::fs::remove_file(path.join("key")).unwrap();
        }

        let store = Store::open(Arc::clone(&place));
        let loaded = store.load().await.unwrap();
        assert_eq!(generations(&loaded), left, "{case}");
        assert!(loaded.warnings[0].contains(broken), "{:?}", loaded.warnings);
        store.begin(&key()).await.unwrap();
        for generation in 3..6 {
            let identity = identity(&authority, generation);
            store.commit(&identity, "h").await.unwrap();
            let loaded = Store::open(Arc::clone(&place)).load().await.unwrap();
            assert_eq!(generations(&loaded)[0], generation, "{case}");
        }
    }
}

#[tokio::test]
async fn an_unreadable_file_is_not_taken_for_an_empty_storage() {
    let authority = Authority::new("example.org");
    let base = tempfile::tempdir().unwrap();
    let path = base.path().canonicalize().unwrap().join("storage");
    let place = directory(&path);
    place.init().await.unwrap();
    std::fs::create_dir(path.join(".slot-0")).unwrap();
    let refused = Store::open(Arc::clone(&place)).load().await.unwrap_err();
    assert!(refused.to_string().contains(".slot-0"), "{refused}");
    std::fs::remove_dir(path.join(".slot-0")).unwrap();
    let store = Store::open(place);
    store.commit(&identity(&authority, 1), "h").await.unwrap();
    assert_eq!(generations(&store.load().await.unwrap()), [1]);
}

#[tokio::test]
async fn upstreams_files_are_written_as_upstream_writes_them() {
    let authority = Authority::new("example.org");
    let place = memory();
    let identity = identity(&authority, 1);
    let two = vec![authority.ssh_line(), Authority::new("other").ssh_line()];
    let identity = identity.with_ssh_authorities(two.clone());
    Store::open(Arc::clone(&place))
        .commit(&identity, "abc")
        .await
        .unwrap();
    let read = async |name: &str| {
        String::from_utf8(place.read(name).await.unwrap().unwrap().expose().clone()).unwrap()
    };
    assert_eq!(read("sshcacerts").await, format!("{}${}", two[0], two[1]));
    assert_eq!(read("tlscacerts").await, authority.pem);
    assert_eq!(read("tlscert").await, identity.tls_pem());
    assert_eq!(read("key-cert.pub").await, identity.ssh_line());
    assert_eq!(read("key").await, *identity.key().to_pem().expose());
    assert_eq!(
        read("key.pub").await,
        identity.key().public_ssh_line().unwrap()
    );
    assert_eq!(read("tokenhash").await, "abc");
}

#[tokio::test]
async fn a_storage_of_upstreams_agent_is_taken_over_and_given_back() {
    let authority = Authority::new("example.org");
    let place = memory();
    place
        .write(upstream_files(&identity(&authority, 1), "h1"))
        .await
        .unwrap();
    let store = Store::open(Arc::clone(&place));
    let loaded = store.load().await.unwrap();
    assert_eq!(generations(&loaded), [1]);
    assert_eq!(loaded.candidates[0].token_hash, "h1");

    store.commit(&identity(&authority, 2), "h1").await.unwrap();
    assert_eq!(generations(&store.load().await.unwrap()), [2]);

    // Upstream's agent renewed in between: its identity counts, ours is the second choice.
    place
        .write(upstream_files(&identity(&authority, 7), "h1"))
        .await
        .unwrap();
    assert_eq!(generations(&store.load().await.unwrap()), [7, 2]);
}

#[tokio::test]
async fn torn_files_of_another_agent_are_told() {
    let authority = Authority::new("example.org");
    for (name, bytes) in [
        ("key", "junk"),
        ("tlscert", "-----BEGIN CERTIFICATE-----\nMII"),
        ("tlscacerts", ""),
        ("key-cert.pub", ""),
    ] {
        let place = memory();
        let mut files = upstream_files(&identity(&authority, 1), "h");
        files.insert(name.into(), bytes.as_bytes().to_vec().into());
        place.write(files).await.unwrap();
        let loaded = Store::open(place).load().await.unwrap();
        assert!(loaded.candidates.is_empty(), "{name}");
        assert_eq!(loaded.warnings.len(), 1, "{name}");
    }
    // Empty files, as `tbot init` leaves them, are nothing at all.
    let place = memory();
    let empty = upstream_files(&identity(&authority, 1), "h")
        .into_keys()
        .map(|name| (name, Vec::new().into()))
        .collect();
    place.write(empty).await.unwrap();
    let loaded = Store::open(place).load().await.unwrap();
    assert!(loaded.candidates.is_empty() && loaded.warnings.is_empty());
}

#[tokio::test]
async fn slots_are_private_files() {
    use std::os::unix::fs::MetadataExt as _;
    let base = tempfile::tempdir().unwrap();
    let path = base.path().canonicalize().unwrap().join("storage");
    let store = Store::open(directory(&path));
    store.begin(&key()).await.unwrap();
    store
        .commit(&identity(&Authority::new("c"), 1), "h")
        .await
        .unwrap();
    for entry in std::fs::read_dir(&path).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            entry.metadata().unwrap().mode() & 0o7777,
            0o600,
            "{:?}",
            entry.file_name()
        );
    }
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
}
