//! What every kind of destination must do.

use std::sync::Arc;

use super::{Destination, FileSet};
use crate::secret::Secret;

fn set(files: &[(&str, &str)]) -> FileSet {
    files
        .iter()
        .map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec().into()))
        .collect()
}

async fn text(place: &dyn Destination, name: &str) -> Option<String> {
    let content: Option<Secret<Vec<u8>>> = place.read(name).await.unwrap();
    content.map(|content| String::from_utf8(content.expose().clone()).unwrap())
}

/// Runs the contract against fresh, empty destinations that `make` gives for a name.
pub(super) async fn check(make: impl Fn(&str) -> Arc<dyn Destination>) {
    let place = make("contract");
    assert_eq!(
        text(place.as_ref(), "key").await,
        None,
        "nothing before init"
    );
    place.init().await.unwrap();
    place.init().await.unwrap();
    place.check_writable().await.unwrap();
    place.check_writable().await.unwrap();
    assert_eq!(
        text(place.as_ref(), "key").await,
        None,
        "missing is no error"
    );

    place.write(set(&[])).await.unwrap();
    place
        .write(set(&[("key", "k1"), ("tlscert", "c1"), ("empty", "")]))
        .await
        .unwrap();
    assert_eq!(text(place.as_ref(), "key").await.as_deref(), Some("k1"));
    assert_eq!(text(place.as_ref(), "empty").await.as_deref(), Some(""));

    // Other files stay; one and several files at a time; longer and shorter.
    place.write(set(&[("other", "o")])).await.unwrap();
    place
        .write(set(&[("key", "k"), ("tlscert", "a longer one")]))
        .await
        .unwrap();
    assert_eq!(text(place.as_ref(), "key").await.as_deref(), Some("k"));
    assert_eq!(
        text(place.as_ref(), "tlscert").await.as_deref(),
        Some("a longer one")
    );
    assert_eq!(text(place.as_ref(), "other").await.as_deref(), Some("o"));

    // Two writers at once: every file is one of theirs, whole, and the set is not mixed.
    let (a, b) = (
        set(&[("key", "a"), ("tlscert", "a")]),
        set(&[("key", "b"), ("tlscert", "b")]),
    );
    let (first, second) = tokio::join!(place.write(a), place.write(b));
    first.unwrap();
    second.unwrap();
    assert_eq!(
        text(place.as_ref(), "key").await,
        text(place.as_ref(), "tlscert").await
    );

    // What survives is there for the next process.
    let next = make("contract");
    next.init().await.unwrap();
    let kept = text(next.as_ref(), "other").await;
    assert_eq!(kept.is_some(), place.is_persistent());
}
