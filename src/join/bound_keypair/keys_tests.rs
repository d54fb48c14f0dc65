use std::time::Duration;

use super::*;
use crate::crypto::KeyAlgorithm;
use crate::destination::from_uri;
use crate::join::tests::mutilated::{Edit, mutilated};

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn new_key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap()
}

fn line(key: &PrivateKey) -> String {
    key.public_ssh_line().unwrap()
}

async fn memory() -> Arc<dyn Destination> {
    let storage = from_uri("memory://").unwrap().build();
    storage.init().await.unwrap();
    storage
}

async fn put(storage: &Arc<dyn Destination>, name: &str, content: &str) {
    let content = Secret::new(content.as_bytes().to_vec());
    let files = FileSet::from([(name.to_owned(), content)]);
    storage.write(files).await.unwrap();
}

async fn text(storage: &Arc<dyn Destination>, name: &str) -> String {
    let content = storage.read(name).await.unwrap().unwrap();
    String::from_utf8(content.expose().clone()).unwrap()
}

#[tokio::test]
async fn what_is_stored_comes_back() {
    let storage = memory().await;
    assert!(!Keys::load(&storage, now()).await.unwrap().any());
    let key = new_key();
    let mut keys = Keys::unbound(key.clone(), now());
    keys.settle(&line(&key), b"state".to_vec()).unwrap();
    keys.store(&storage).await.unwrap();
    let again = Keys::load(&storage, now()).await.unwrap();
    assert_eq!(again.active().unwrap().public_spki(), key.public_spki());
    assert_eq!(again.state().unwrap().expose(), b"state");
    assert!(again.find(line(&key).trim()).is_ok());
}

#[tokio::test]
async fn the_files_have_upstreams_forms() {
    let storage = memory().await;
    let key = new_key();
    Keys::unbound(key.clone(), now())
        .store(&storage)
        .await
        .unwrap();
    assert_eq!(&text(&storage, "id_bkp").await, key.to_pem().expose());
    assert_eq!(text(&storage, "id_bkp.pub").await, line(&key));
    assert_eq!(storage.read("bkp_state").await.unwrap(), None);
    let history = text(&storage, "bkp_key_history.json").await;
    let history: serde_json::Value = serde_json::from_str(&history).unwrap();
    let expected = serde_json::json!({"entries": [{
        "time": "2027-01-15T08:00:00Z",
        "private_key": key.to_pem().expose(),
    }]});
    assert_eq!(history, expected);
}

#[tokio::test]
async fn upstreams_files_are_read() {
    let storage = memory().await;
    let (key, old) = (
        new_key(),
        PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(),
    );
    put(&storage, "id_bkp", key.to_pem().expose()).await;
    // As Go writes a local time.
    let history = serde_json::json!({"entries": [
        {"time": "2026-11-21T09:12:03.059546224+01:00", "private_key": old.to_pem().expose()},
    ]});
    put(&storage, "bkp_key_history.json", &history.to_string()).await;
    let keys = Keys::load(&storage, now()).await.unwrap();
    assert!(keys.find(&line(&key)).is_ok());
    assert!(keys.find(&line(&old)).is_ok());
    assert_eq!(
        keys.find(&line(&new_key())).unwrap_err().to_string(),
        KeysError::Unknown.to_string()
    );
    assert!(keys.find("no key").is_err());
    // An agent that stored before its first join left this.
    put(&storage, "id_bkp", "").await;
    let keys = Keys::load(&storage, now()).await.unwrap();
    assert!(keys.active().is_none());
    assert!(keys.find(&line(&old)).is_ok());
}

#[tokio::test]
async fn damage_is_not_taken_for_absence() {
    let storage = memory().await;
    put(&storage, "id_bkp", "damaged").await;
    let error = Keys::load(&storage, now()).await.unwrap_err();
    assert!(matches!(error, KeysError::Damaged("id_bkp")), "{error}");
    put(&storage, "id_bkp", new_key().to_pem().expose()).await;
    put(&storage, "bkp_key_history.json", "{").await;
    assert!(
        Keys::load(&storage, now())
            .await
            .unwrap()
            .active()
            .is_some()
    );
    // Without a key in use, the history may hold the only one.
    put(&storage, "id_bkp", "").await;
    assert!(Keys::load(&storage, now()).await.is_err());
}

#[tokio::test]
async fn one_damaged_key_of_the_history_costs_no_other() {
    let (storage, old) = (memory().await, new_key());
    let history = serde_json::json!({"entries": [
        {"time": "2026-11-21T09:12:03Z", "private_key": "damaged"},
        {"time": "2026-11-21T09:12:02Z", "private_key": old.to_pem().expose()},
    ]});
    put(&storage, "bkp_key_history.json", &history.to_string()).await;
    for active in ["", new_key().to_pem().expose()] {
        put(&storage, "id_bkp", active).await;
        let keys = Keys::load(&storage, now()).await.unwrap();
        assert!(keys.find(&line(&old)).is_ok());
        keys.store(&storage).await.unwrap();
        let stored = text(&storage, "bkp_key_history.json").await;
        let stored: serde_json::Value = serde_json::from_str(&stored).unwrap();
        assert_eq!(stored, history, "somebody may mend it");
    }
    let history = history.to_string().replace("PRIVATE", "");
    put(&storage, "bkp_key_history.json", &history).await;
    put(&storage, "id_bkp", "").await;
    assert!(Keys::load(&storage, now()).await.is_err(), "none is left");
}

#[tokio::test]
async fn ten_keys_are_kept_and_the_one_in_use_beside_them() {
    let storage = memory().await;
    let key = new_key();
    let mut keys = Keys::unbound(key.clone(), now());
    let newer: Vec<_> = (0..KEPT + 2).map(|_| new_key()).collect();
    for key in &newer {
        keys.add(key.clone(), now());
    }
    keys.store(&storage).await.unwrap();
    let keys = Keys::load(&storage, now()).await.unwrap();
    assert!(keys.find(&line(&key)).is_ok(), "the key in use stays");
    let known: Vec<_> = newer
        .iter()
        .map(|key| keys.find(&line(key)).is_ok())
        .collect();
    assert_eq!(known.iter().filter(|known| **known).count(), KEPT);
    assert!(known.ends_with(&[true]), "the newest stay");
}

#[tokio::test]
async fn debug_shows_no_key_and_no_state() {
    let key = new_key();
    let mut keys = Keys::unbound(key.clone(), now());
    keys.settle(&line(&key), b"canary".to_vec()).unwrap();
    let shown = format!("{keys:?}");
    assert!(
        !shown.contains("canary") && !shown.contains("BEGIN"),
        "{shown}"
    );
}

/// Each write of a rotation may be the last thing that happens, and the cluster may or may not have
/// taken the new key by then.
#[tokio::test]
async fn a_stop_anywhere_in_a_rotation_loses_no_key() {
    let (old, new) = (new_key(), new_key());
    for stored in 0..=2 {
        let storage = memory().await;
        let mut keys = Keys::unbound(old.clone(), now());
        keys.settle(&line(&old), b"first".to_vec()).unwrap();
        keys.store(&storage).await.unwrap();
        if stored >= 1 {
            keys.add(new.clone(), now());
            keys.store(&storage).await.unwrap();
        }
        if stored >= 2 {
            keys.settle(&line(&new), b"second".to_vec()).unwrap();
            keys.store(&storage).await.unwrap();
        }
        let after = Keys::load(&storage, now()).await.unwrap();
        // The cluster never hears of a key that is not stored, so it asks for the old one then.
        assert!(after.find(&line(&old)).is_ok(), "{stored}");
        assert_eq!(after.find(&line(&new)).is_ok(), stored >= 1, "{stored}");
        let expected: &[u8] = if stored >= 2 { b"second" } else { b"first" };
        assert_eq!(after.state().unwrap().expose(), expected);
    }
}

#[test]
fn fuzz_keys_that_a_cluster_asks_for() {
    let mine = new_key();
    let keys = Keys::unbound(mine.clone(), now());
    let sample = line(&mine);
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let bytes = mutilated(sample.as_bytes(), edits);
        let asked = String::from_utf8_lossy(&bytes);
        if keys.find(&asked).is_ok() {
            let spki = ssh::spki_of_public_line(&asked).unwrap();
            assert_eq!(spki, mine.public_spki());
        }
    });
}
