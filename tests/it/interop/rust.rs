//! The library of Rust, which lives in this process.

use std::collections::BTreeSet;

use futures_util::StreamExt as _;
use spiffe::{TrustDomain, WorkloadApiClient, WorkloadApiError};

use super::{AUDIENCE, FOO, GOO, Stage};
use crate::common::Sandbox;

#[tokio::test(flavor = "multi_thread")]
async fn the_rust_client_sees_everything() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let client = WorkloadApiClient::connect_to(stage.address("foo"))
        .await
        .unwrap();
    let domain = TrustDomain::new("test.example.org").unwrap();

    let svids = client.fetch_all_x509_svids().await.unwrap();
    let ids: Vec<_> = svids
        .iter()
        .map(|svid| svid.spiffe_id().to_string())
        .collect();
    assert_eq!(ids, [FOO, GOO]);
    let keys = client.fetch_jwt_bundles().await.unwrap();
    assert_eq!(keys.get(&domain).unwrap().jwt_authorities().count(), 1);

    let tokens = client.fetch_all_jwt_svids([AUDIENCE], None).await.unwrap();
    let ids: Vec<_> = tokens
        .iter()
        .map(|svid| svid.spiffe_id().to_string())
        .collect();
    assert_eq!(ids, [FOO, GOO]);
    let goo = GOO.parse().unwrap();
    let token = client.fetch_jwt_svid([AUDIENCE], Some(&goo)).await.unwrap();
    assert_eq!(token.spiffe_id(), &goo);
    let valid = client.validate_jwt_token(AUDIENCE, token.token()).await;
    assert_eq!(valid.unwrap().spiffe_id(), &goo);
    assert!(
        client
            .validate_jwt_token("other", token.token())
            .await
            .is_err()
    );
    let key = keys
        .get(&domain)
        .unwrap()
        .find_jwt_authority(token.key_id())
        .cloned();
    assert!(key.is_some(), "the token's key is not in the bundle");

    let late = WorkloadApiClient::connect_to(stage.address("late"))
        .await
        .unwrap();
    for refused in [
        late.fetch_x509_svid().await.map(drop),
        late.fetch_jwt_svid([AUDIENCE], None).await.map(drop),
    ] {
        assert!(
            matches!(refused, Err(WorkloadApiError::NoIdentityIssued)),
            "{refused:?}"
        );
    }
    stage.create_late();
    // A refusal counts for a moment, so that callers who ask on and on cost the cluster nothing.
    let svid = eventually_some(|| async { late.fetch_x509_svid().await.ok() }).await;
    assert_eq!(
        svid.spiffe_id().to_string(),
        "spiffe://test.example.org/svc/late"
    );

    // Streams across renewals and a rotation.
    let mut contexts = client.stream_x509_contexts().await.unwrap();
    let mut bundles = client.stream_jwt_bundles().await.unwrap();
    let mut leaves = BTreeSet::new();
    for phase in ["", "init", "update_clients", "update_servers", "standby"] {
        if !phase.is_empty() {
            stage.rotate(phase);
        }
        let wanted = if ["", "standby"].contains(&phase) {
            1
        } else {
            2
        };
        // The old authority goes when nothing of it is used any more.
        let before = leaves.len();
        loop {
            let context = contexts.next().await.unwrap().unwrap();
            let svid = context.default_svid().unwrap();
            assert_eq!(svid.spiffe_id().to_string(), FOO);
            leaves.insert(svid.cert_chain()[0].as_bytes().to_vec());
            let bundle = context.bundle_set().get(&domain).unwrap();
            if bundle.authorities().len() == wanted && leaves.len() > before + 1 {
                break;
            }
        }
        while ["", "init", "standby"].contains(&phase) {
            let keys = bundles.next().await.unwrap().unwrap();
            if keys.get(&domain).unwrap().jwt_authorities().count() == wanted {
                break;
            }
        }
    }
}

/// What comes after some seconds of asking.
async fn eventually_some<T, F: Future<Output = Option<T>>>(mut ask: impl FnMut() -> F) -> T {
    for _ in 0..300 {
        if let Some(found) = ask().await {
            return found;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("nothing came");
}
