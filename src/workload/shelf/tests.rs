use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;

use super::*;
use crate::attest::Process;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::destination::{DestinationError, Lock, from_uri};
use crate::secret::Secret;
use crate::workload::tests::{Authority, DOMAIN, HOUR, TokenKey, message, start};

const MARK: Mark = [1; 32];

fn own() -> Holder {
    running(std::process::id())
}

fn running(pid: u32) -> Holder {
    Holder {
        process: Process::of(i32::try_from(pid).unwrap()).unwrap(),
        user: Some(0),
    }
}

fn svids(authority: &Authority) -> Arc<[Svid]> {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let id = format!("spiffe://{DOMAIN}/svc/foo");
    let leaf = authority.leaf(&key, &[&id]);
    let parsed = crate::crypto::x509::Certificate::from_der(&leaf).unwrap();
    Arc::new([Svid {
        id: id.parse().unwrap(),
        chain: leaf.into(),
        key: Bytes::copy_from_slice(key.pkcs8_der().expose()),
        hint: "hint".into(),
        issued_at: start(),
        not_after: parsed.not_after(),
        serial: parsed.serial(),
        name: "foo".into(),
        revision: "r".into(),
    }])
}

/// As if there were a process with this ID.
fn process(user: u32, pid: usize) -> Holder {
    let process = serde_json::json!({ "boot": 1, "pid": pid, "began": 1 });
    Holder {
        process: serde_json::from_value(process).unwrap(),
        user: Some(user),
    }
}

fn content(authority: &Authority) -> Content {
    Content {
        svids: Row::from_iter([(MARK, kept_svids(own(), svids(authority)))]),
        tokens: Row::default(),
        beside: Some(Beside {
            bundles: bundles(authority),
            crl: None,
        }),
    }
}

fn bundles(authority: &Authority) -> Arc<Bundles> {
    Arc::new(Bundles::from_authority(&message(DOMAIN, &[authority])).unwrap())
}

fn origin(server: &str, token: &str) -> Origin {
    Origin {
        server: server.to_owned(),
        token: token.to_owned(),
    }
}

async fn storage(path: &std::path::Path) -> Arc<dyn Destination> {
    let storage = from_uri(path.to_str().unwrap()).unwrap().build();
    storage.init().await.unwrap();
    storage
}

/// Waits until the file holds something else than `before`.
async fn written(storage: &Arc<dyn Destination>, before: &[u8]) -> Secret<Vec<u8>> {
    loop {
        match storage.read(FILE).await.unwrap() {
            Some(bytes) if bytes.expose() != before => return bytes,
            _ => tokio::task::yield_now().await,
        }
    }
}

#[tokio::test]
async fn a_restart_loses_nothing_that_is_still_good() {
    let directory = tempfile::tempdir().unwrap();
    let storage = storage(&directory.path().canonicalize().unwrap()).await;
    let clock = Clock::simulated(start());
    let authority = Authority::new(DOMAIN);
    let svids = svids(&authority);
    let shelf = Shelf::open(Arc::clone(&storage), clock.clone(), origin("a", "t")).await;
    assert!(shelf.get(&MARK, start()).is_none());
    let list = Bytes::from_static(b"list");
    shelf.tell(&bundles(&authority), &Crl::Signed(list.clone()));
    shelf.put(MARK, own(), &svids);
    let file = written(&storage, b"").await;
    drop(shelf);
    let text = String::from_utf8_lossy(file.expose());
    assert!(text.starts_with("tbot-svids-2 "), "{text}");

    let again = Shelf::open(Arc::clone(&storage), clock.clone(), origin("a", "t")).await;
    let kept = again.get(&MARK, start()).unwrap();
    assert_eq!(format!("{kept:?}"), format!("{svids:?}"));
    assert_eq!(kept[0].key, svids[0].key);
    assert_eq!(kept[0].issued_at, svids[0].issued_at);
    assert_eq!(kept[0].not_after, svids[0].not_after);
    let beside = again.beside(start()).unwrap();
    assert_eq!(*beside.bundles, *bundles(&authority));
    assert_eq!(beside.crl, Some(list));
    assert!(again.get(&[2; 32], start()).is_none(), "somebody else's");
    assert!(again.beside(start() + HOUR).is_none(), "for whom?");
    assert!(again.get(&MARK, start() + HOUR).is_none(), "expired");
    assert!(again.get(&MARK, start()).is_none(), "and gone");

    let late = Clock::simulated(start() + HOUR);
    let late = Shelf::open(storage, late, origin("a", "t")).await;
    assert!(late.inner.content().is_empty());
}

/// A place whose first write fails.
#[derive(Debug)]
struct Full(Arc<dyn Destination>, AtomicBool);

#[async_trait]
impl Destination for Full {
    async fn init(&self) -> Result<(), DestinationError> {
        self.0.init().await
    }

    async fn check_writable(&self) -> Result<(), DestinationError> {
        self.0.check_writable().await
    }

    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        if self.1.swap(false, Ordering::Relaxed) {
            return Err(DestinationError::Unsuitable {
                path: FILE.to_owned(),
                problem: "no space left".to_owned(),
            });
        }
        self.0.write(files).await
    }

    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        self.0.read(name).await
    }

    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        self.0.lock()
    }

    fn is_persistent(&self) -> bool {
        self.0.is_persistent()
    }

    fn directory(&self) -> Option<&std::path::Path> {
        self.0.directory()
    }
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_stored_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let place = storage(&directory.path().canonicalize().unwrap()).await;
    let full = Arc::new(Full(Arc::clone(&place), AtomicBool::new(true)));
    let clock = Clock::simulated(start());
    let shelf = Shelf::open(full, clock.clone(), origin("a", "t")).await;
    shelf.tell(&bundles(&Authority::new(DOMAIN)), &Crl::None);
    clock.sleep(SWEEP / 2).await;
    assert!(place.read(FILE).await.unwrap().is_none());
    clock.sleep(SWEEP).await;
    assert!(place.read(FILE).await.unwrap().is_some());
}

#[tokio::test]
async fn what_another_cluster_or_bot_was_issued_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let storage = storage(&directory.path().canonicalize().unwrap()).await;
    let clock = Clock::simulated(start());
    let authority = Authority::new(DOMAIN);
    let content = content(&authority);
    for (written, configured, used) in [
        (("a", "t"), ("a", "t"), true),
        (("a", "t"), ("b", "t"), false),
        (("a", "t"), ("a", "u"), false),
        // A token that cannot be read at this moment is no other one.
        (("a", "t"), ("a", ""), true),
        (("a", ""), ("a", "t"), true),
        (("", ""), ("a", "t"), false),
    ] {
        let bytes = record::encode(&origin(written.0, written.1), &content);
        let file = FileSet::from([(FILE.to_owned(), bytes)]);
        storage.write(file).await.unwrap();
        let configured = origin(configured.0, configured.1);
        let shelf = Shelf::open(Arc::clone(&storage), clock.clone(), configured).await;
        assert_eq!(shelf.get(&MARK, start()).is_some(), used, "{written:?}");
        assert_eq!(shelf.beside(start()).is_some(), used, "{written:?}");
    }
}

#[tokio::test]
async fn what_the_current_authority_did_not_issue_is_not_served() {
    let (old, new) = (Authority::new(DOMAIN), Authority::new(DOMAIN));
    let shelf = Shelf::default();
    let svids = svids(&old);
    shelf.put(MARK, own(), &svids);
    assert!(
        shelf.get(&MARK, start()).is_none(),
        "no bundle to hold it against"
    );
    shelf.tell(&bundles(&old), &Crl::None);
    assert!(shelf.get(&MARK, start()).is_some());
    shelf.tell(&bundles(&new), &Crl::None);
    assert!(shelf.get(&MARK, start()).is_none());
}

#[tokio::test]
async fn a_key_that_is_not_the_certificates_is_noticed() {
    let authority = Authority::new(DOMAIN);
    let shelf = Shelf::default();
    shelf.tell(&bundles(&authority), &Crl::None);
    let (one, other) = (svids(&authority), svids(&authority));
    let mixed = Svid {
        key: other[0].key.clone(),
        ..one[0].clone()
    };
    let mixed: Arc<[Svid]> = Arc::new([mixed]);
    shelf.put(MARK, own(), &mixed);
    assert!(shelf.get(&MARK, start()).is_none());
    shelf.put(MARK, own(), &one);
    assert!(shelf.get(&MARK, start()).is_some());
    shelf.withdraw(&MARK);
    assert!(shelf.get(&MARK, start()).is_none());
}

#[tokio::test]
async fn damaged_files_are_ignored_and_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let storage = storage(&directory.path().canonicalize().unwrap()).await;
    let clock = Clock::simulated(start());
    let authority = Authority::new(DOMAIN);
    let content = content(&authority);
    let good = record::encode(&origin("a", "t"), &content).expose().clone();
    let sealed = |body: &[u8]| {
        let sum = crate::crypto::sha256_hex(body);
        [format!("tbot-svids-2 {sum}\n").as_bytes(), body].concat()
    };
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("torn", good[..good.len() / 2].to_vec()),
        ("a flipped bit", flipped),
        ("another form", sealed(b"{}")),
        ("no JSON", sealed(b"\xff")),
        (
            "no bundle",
            sealed(br#"{"bundles":{"trust_domain":"x","own":{"x509":"","jwt":""},"federated":{}},"crl":null,"answers":[]}"#),
        ),
        ("of a former form", [b"tbot-svids-1", &good["tbot-svids-2".len()..]].concat()),
        ("foreign", b"hello\n".to_vec()),
    ] {
        let file = FileSet::from([(FILE.to_owned(), Secret::new(bytes.clone()))]);
        storage.write(file).await.unwrap();
        let shelf = Shelf::open(Arc::clone(&storage), clock.clone(), origin("a", "t")).await;
        assert!(shelf.inner.content().is_empty(), "{what}");
        assert!(shelf.beside(start()).is_none(), "{what}");
        shelf.tell(&bundles(&authority), &Crl::None);
        let now = written(&storage, &bytes).await;
        assert!(record::decode(&now, start()).is_ok(), "{what}");
    }
}

#[test]
fn what_is_over_or_for_nobody_goes() {
    let authority = Authority::new(DOMAIN);
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let inner = Inner::default();
    let svids = svids(&authority);
    for (mark, holder) in [([1; 32], own()), ([2; 32], running(child.id()))] {
        let svids = kept_svids(holder, Arc::clone(&svids));
        inner.content().svids.put(mark, svids);
    }
    assert!(!inner.sweep(start()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(inner.sweep(start()));
    assert!(inner.content().svids.get(&[1; 32]).is_some());
    assert_eq!(inner.content().svids.len(), 1);
    assert!(inner.sweep(start() + HOUR));
    assert!(inner.content().is_empty());
}

#[test]
fn what_is_kept_is_bounded() {
    let authority = Authority::new(DOMAIN);
    let shelf = Shelf::default();
    let (short, long) = (svids(&authority), svids(&authority));
    let long: Arc<[Svid]> = Arc::new([Svid {
        not_after: long[0].not_after + HOUR,
        ..long[0].clone()
    }]);
    shelf.put([0; 32], own(), &short);
    shelf.put([1; 32], process(1, 1), &short);
    for number in 2..=row::MAX + 5 {
        let mut mark = [9; 32];
        mark[..8].copy_from_slice(&number.to_be_bytes());
        shelf.put(mark, process(1, number), &long);
    }
    {
        let content = shelf.inner.content();
        assert_eq!(content.svids.len(), row::MAX);
        assert!(content.svids.get(&[1; 32]).is_none(), "the first to expire");
        assert!(content.svids.get(&[0; 32]).is_some(), "another user's");
    }

    // One process that asks for ever more takes nobody else's room.
    let shelf = Shelf::default();
    shelf.put([0; 32], own(), &short);
    for number in 1..=100 {
        shelf.put([number; 32], process(0, 1), &long);
    }
    assert!(shelf.inner.content().svids.get(&[0; 32]).is_some());
    assert_eq!(shelf.inner.content().svids.len(), 17);
}

fn tokens(key: &TokenKey, audiences: &[&str]) -> Tokens {
    Tokens {
        asked: start(),
        svids: vec![key.token("/svc/foo", audiences, start() + HOUR)],
    }
}

fn names(audiences: &[&str]) -> Vec<String> {
    audiences.iter().map(|&name| name.to_owned()).collect()
}

#[tokio::test]
async fn tokens_survive_a_restart_too_and_are_for_their_audiences_and_keys_only() {
    let directory = tempfile::tempdir().unwrap();
    let storage = storage(&directory.path().canonicalize().unwrap()).await;
    let clock = Clock::simulated(start());
    let (key, next) = (TokenKey::new(), TokenKey::new());
    let given = tokens(&key, &["a", "b"]);
    let shelf = Shelf::open(Arc::clone(&storage), clock.clone(), origin("a", "t")).await;
    shelf.tell(&key.bundles(), &Crl::None);
    let first = written(&storage, b"").await;
    shelf.put_tokens(MARK, own(), tokens(&key, &["a", "b"]));
    let file = written(&storage, first.expose()).await;
    drop(shelf);
    let text = String::from_utf8_lossy(file.expose());
    assert!(text.contains(&given.svids[0].token));

    let both = names(&["a", "b"]);
    let open = async || Shelf::open(Arc::clone(&storage), clock.clone(), origin("a", "t")).await;
    let again = open().await;
    let kept = again.tokens(&MARK, &both, start()).unwrap();
    assert_eq!(kept.svids[0].token, given.svids[0].token);
    assert_eq!(kept.svids[0].not_after, given.svids[0].not_after);
    assert_eq!(kept.asked, start());
    assert!(again.beside(start()).is_some(), "tokens need them too");
    assert!(again.get(&MARK, start()).is_none(), "no X.509-SVID");
    assert!(
        again.tokens(&[2; 32], &both, start()).is_none(),
        "somebody else's"
    );
    assert!(
        again.tokens(&MARK, &both, start() + HOUR).is_none(),
        "expired"
    );
    assert!(again.tokens(&MARK, &both, start()).is_none(), "and gone");

    let again = open().await;
    let others = names(&["a", "b", "c"]);
    assert!(
        again.tokens(&MARK, &others, start()).is_none(),
        "for another"
    );

    let again = open().await;
    again.tell(&next.bundles(), &Crl::None);
    assert!(
        again.tokens(&MARK, &both, start()).is_none(),
        "of another key"
    );

    let again = open().await;
    again.withdraw_tokens(&MARK);
    assert!(again.tokens(&MARK, &both, start()).is_none());
    assert!(again.beside(start()).is_none());
}

#[test]
fn very_long_tokens_are_not_kept_and_take_the_place_of_none() {
    let key = TokenKey::new();
    let shelf = Shelf::default();
    shelf.tell(&key.bundles(), &Crl::None);
    let long = "x".repeat(TOKENS);
    for (audiences, kept) in [(["a"], true), ([&*long], false)] {
        shelf.put_tokens(MARK, own(), tokens(&key, &audiences));
        let found = shelf.tokens(&MARK, &names(&audiences), start());
        assert_eq!(found.is_some(), kept);
    }
    assert!(shelf.inner.content().is_empty());
}

#[test]
fn what_is_long_is_bounded_by_its_length() {
    let key = TokenKey::new();
    let long = "x".repeat(TOKENS / 2);
    let mut content = content(&Authority::new(DOMAIN));
    let token = key.token("/svc/foo", &[&long], start() + HOUR);
    for number in 0..1000_u16 {
        let mut mark = [9; 32];
        mark[..2].copy_from_slice(&number.to_be_bytes());
        let tokens = Tokens {
            asked: start(),
            svids: vec![token.clone()],
        };
        // The first are of another user.
        let user = u32::from(number >= 100);
        let holder = process(user, number.into());
        content.tokens.put(mark, kept_tokens(holder, tokens));
    }
    let bytes = record::encode(&origin("a", "t"), &content);
    assert!(
        bytes.expose().len() < row::BYTES * 3 / 2,
        "{}",
        bytes.expose().len()
    );
    let (_, read) = record::decode(&bytes, start()).unwrap();
    assert_eq!(read.svids.len(), 1);
    assert!(read.tokens.len() > 300, "{}", read.tokens.len());
    let kept = read.tokens.iter().map(|(_, kept)| kept.holder.user);
    assert_eq!(kept.filter(|user| *user == Some(0)).count(), 100);
}
