use std::os::unix::fs::PermissionsExt as _;

use serde_json::json;
use tokio::sync::broadcast::error::TryRecvError;

use super::*;

const START: Duration = Duration::from_secs(1_800_000_000);

fn clock() -> Clock {
    Clock::simulated(UNIX_EPOCH + START)
}

fn bot(name: &str) -> Resource {
    Resource {
        kind: "bot".to_owned(),
        version: "v1".to_owned(),
        name: name.to_owned(),
        labels: BTreeMap::from([("a".to_owned(), "b\"".to_owned())]),
        spec: json!({"roles": ["x"]}),
        ..Resource::default()
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_put_is_got_also_by_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cluster.db");
    let store = Store::open(&path, clock()).unwrap();
    let put = store.put(bot("one"), &Put::Create).unwrap();
    assert_eq!(put.revision.len(), 36);
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", file.path());
    }
    // No orderly close: what is left is what a killed process leaves.
    std::mem::forget(store);
    let store = Store::open(&path, clock()).unwrap();
    assert_eq!(store.get("bot", "one").unwrap().unwrap(), put);
    assert_eq!(store.get("token", "one").unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_write_expects_what_it_says() {
    let store = Store::in_memory(clock()).unwrap();
    let first = store.put(bot("one"), &Put::Create).unwrap();
    assert!(matches!(
        store.put(bot("one"), &Put::Create),
        Err(StoreError::Exists { .. })
    ));
    let second = store.put(bot("one"), &Put::Upsert).unwrap();
    assert_ne!(first.revision, second.revision);
    let stale = Put::Update {
        revision: first.revision,
    };
    assert!(matches!(
        store.put(bot("one"), &stale),
        Err(StoreError::Conflict { found, .. }) if found == second.revision
    ));
    assert!(matches!(
        store.put(bot("two"), &stale),
        Err(StoreError::NotFound { .. })
    ));
    let fresh = Put::Update {
        revision: second.revision,
    };
    store.put(bot("one"), &fresh).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_expired_resource_is_gone() {
    let store = Store::in_memory(clock()).unwrap();
    let mut short = bot("short");
    short.expires = Some(UNIX_EPOCH + START + Duration::from_secs(10));
    store.put(short.clone(), &Put::Create).unwrap();
    store.put(bot("long"), &Put::Create).unwrap();
    assert_eq!(store.list("bot").unwrap().len(), 2);
    assert_eq!(store.sweep().unwrap(), 0);
    let mut changes = store.changes();
    tokio::time::advance(Duration::from_secs(11)).await;
    assert_eq!(store.get("bot", "short").unwrap(), None);
    assert_eq!(store.list("bot").unwrap().len(), 1);
    let stale = Put::Update {
        revision: String::new(),
    };
    assert!(matches!(
        store.put(short.clone(), &stale),
        Err(StoreError::NotFound { .. })
    ));
    assert_eq!(store.sweep().unwrap(), 1);
    assert!(changes.try_recv().unwrap().deleted);
    short.expires = None;
    store.put(short, &Put::Create).unwrap();
    assert!(store.get("bot", "short").unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_failed_transaction_leaves_no_trace() {
    let store = Store::in_memory(clock()).unwrap();
    store.put(bot("kept"), &Put::Create).unwrap();
    let mut changes = store.changes();
    let result: Result<(), StoreError> = store.transaction(|tx| {
        tx.put(bot("new"), &Put::Create)?;
        assert!(tx.delete("bot", "kept")?);
        assert_eq!(tx.list("bot")?.len(), 1);
        tx.put(bot("new"), &Put::Create)?;
        Ok(())
    });
    assert!(result.is_err());
    assert_eq!(store.list("bot").unwrap()[0].name, "kept");
    assert_eq!(changes.try_recv(), Err(TryRecvError::Empty));
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_transaction_rolls_it_back() {
    let store = Store::in_memory(clock()).unwrap();
    let clone = store.clone();
    let outcome = std::thread::spawn(move || {
        clone.transaction(|tx| -> Result<(), StoreError> {
            tx.put(bot("half"), &Put::Create)?;
            panic!("on purpose")
        })
    })
    .join();
    assert!(outcome.is_err());
    assert_eq!(store.get("bot", "half").unwrap(), None);
    store.put(bot("half"), &Put::Create).unwrap();
}

#[tokio::test(start_paused = true)]
async fn changes_are_told_in_order() {
    let store = Store::in_memory(clock()).unwrap();
    let mut changes = store.changes();
    store.put(bot("b"), &Put::Create).unwrap();
    store.put(bot("a"), &Put::Create).unwrap();
    assert!(store.delete("bot", "b").unwrap());
    assert!(!store.delete("bot", "b").unwrap());
    let told: Vec<(String, bool)> = std::iter::from_fn(|| changes.try_recv().ok())
        .map(|change| (change.name, change.deleted))
        .collect();
    let expected = [("b", false), ("a", false), ("b", true)];
    assert_eq!(told, expected.map(|(name, gone)| (name.to_owned(), gone)));
    let names: Vec<String> = store
        .list("bot")
        .unwrap()
        .into_iter()
        .map(|r| r.name)
        .collect();
    assert_eq!(names, ["a"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_database_of_ours_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cluster.db");
    std::fs::write(
        &path,
        "certainly not a database, but long enough to look at",
    )
    .unwrap();
    let error = Store::open(&path, clock()).unwrap_err();
    assert!(matches!(error, StoreError::Sqlite { .. }));
    assert!(error.to_string().contains("cluster.db"), "{error}");
    std::fs::remove_file(&path).unwrap();
    Connection::open(&path)
        .unwrap()
        .execute_batch("PRAGMA user_version = 99")
        .unwrap();
    assert!(matches!(
        Store::open(&path, clock()),
        Err(StoreError::Schema { found: 99, .. })
    ));
    assert!(matches!(
        Store::open(Path::new("/proc/nowhere/db"), clock()),
        Err(StoreError::Open { .. })
    ));
}

#[test]
fn times_survive_to_the_microsecond() {
    for micros_ in [0, 1, -1, 1_800_000_000_123_456, i64::MAX] {
        assert_eq!(micros(from_micros(micros_)), micros_);
    }
}
