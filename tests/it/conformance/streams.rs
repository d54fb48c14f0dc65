//! What streams push, and that each message is the whole state.

use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tbot::crypto::x509::Certificate;
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, X509BundlesRequest, X509BundlesResponse,
    X509svidRequest, X509svidResponse,
};
use tonic::{Code, Status, Streaming};

use super::{Report, Stage};
use crate::common::{Sandbox, Workload, decode};

const OWN: &str = "spiffe://test.example.org";

/// The next message, within the patience that a push may cost.
async fn next(stream: &mut Streaming<Bytes>) -> Result<Bytes, Status> {
    let message = tokio::time::timeout(Duration::from_secs(30), stream.message());
    let message = message
        .await
        .map_err(|_elapsed| Status::deadline_exceeded("nothing was pushed"))??;
    message.ok_or_else(|| Status::unknown("the stream ended"))
}

/// Reads until a message satisfies `wanted`; every one on the way has to be whole.
async fn until<M: prost::Message + Default>(
    stream: &mut Streaming<Bytes>,
    whole: impl Fn(&M) -> bool,
    wanted: impl Fn(&M) -> bool,
) -> Result<M, String> {
    for _ in 0..20 {
        let message: M = decode(&next(stream).await.map_err(|e| e.to_string())?);
        if !whole(&message) {
            return Err("a message without part of the state".into());
        }
        if wanted(&message) {
            return Ok(message);
        }
    }
    Err("20 messages without the change".into())
}

fn whole(message: &X509svidResponse) -> bool {
    let parts = |svid: &tbot::pb::workload_api::X509svid| {
        !svid.spiffe_id.is_empty()
            && !svid.x509_svid.is_empty()
            && !svid.x509_svid_key.is_empty()
            && !svid.bundle.is_empty()
    };
    message.svids.len() == 5 && message.svids.iter().all(parts) && lists(&message.crl)
}

/// Whether the revocation lists are there: one for each authority, and there are two while they are rotated.
fn lists(crl: &[impl AsRef<[u8]>]) -> bool {
    matches!(crl.len(), 1 | 2) && crl.iter().all(|list| !list.as_ref().is_empty())
}

fn serial(message: &X509svidResponse) -> String {
    Certificate::from_der(&message.svids[0].x509_svid)
        .unwrap()
        .serial()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_push_is_the_whole_state() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let workload = Workload::connect(&stage.socket("many")).await;
    let mut report = Report::default();
    let mut svids = workload
        .open("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let mut bundles = workload
        .open("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    let mut keys = workload
        .open("FetchJWTBundles", &JwtBundlesRequest {})
        .await
        .unwrap();
    let begun: X509svidResponse = decode(&next(&mut svids).await.unwrap());
    report.expect("WL-03", "the first message", whole(&begun));
    let old: X509BundlesResponse = decode(&next(&mut bundles).await.unwrap());
    let old_keys: JwtBundlesResponse = decode(&next(&mut keys).await.unwrap());

    // A second stream has its first message at once, of the same state.
    let again: X509svidResponse = workload
        .fetch("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    report.expect("WL-04", "a second stream", serial(&again) == serial(&begun));

    // A revocation.
    let revoked = serial(&begun).replace(':', "");
    stage.cluster.create(&format!(
        "kind: workload_identity_x509_revocation\nversion: v1\n\
         metadata: {{name: \"{revoked}\", expires: \"2099-01-01T00:00:00Z\"}}\n\
         spec: {{reason: test, revoked_at: \"2026-01-01T00:00:00Z\"}}\n"
    ));
    let after = until(&mut svids, whole, |message| message.crl != begun.crl).await;
    report.check("WL-05", "a revocation", after.map(drop));
    let after = until(
        &mut bundles,
        |message: &X509BundlesResponse| lists(&message.crl) && message.bundles.contains_key(OWN),
        |message| message.crl != old.crl,
    )
    .await;
    report.check(
        "WL-05",
        "a revocation on the stream of bundles",
        after.map(drop),
    );

    // Another authority: bundles, keys and SVIDs.
    stage.rotate("init");
    let after = until(&mut svids, whole, |message| {
        message.svids[0].bundle != begun.svids[0].bundle
    })
    .await;
    report.check("WL-05", "a new authority", after.map(drop));
    let after = until(
        &mut bundles,
        |message: &X509BundlesResponse| lists(&message.crl) && message.bundles.contains_key(OWN),
        |message| message.bundles[OWN] != old.bundles[OWN],
    )
    .await;
    report.check(
        "WL-05",
        "a new authority on the stream of bundles",
        after.map(drop),
    );
    let after = until(
        &mut keys,
        |message: &JwtBundlesResponse| message.bundles.contains_key(OWN),
        |message| {
            let count = |keys: &[u8]| {
                let keys: Value = serde_json::from_slice(keys).unwrap();
                keys["keys"].as_array().unwrap().len()
            };
            count(&message.bundles[OWN]) > count(&old_keys.bundles[OWN])
        },
    )
    .await;
    report.check("WL-05", "a new key for JWTs", after.map(drop));

    // Renewal, here on the operator's wish.
    stage.agents[0].signal("HUP");
    let after = until(&mut svids, whole, |message| {
        serial(message) != serial(&begun)
    })
    .await;
    let order = |message: &X509svidResponse| {
        let ids = message.svids.iter().map(|svid| svid.spiffe_id.clone());
        ids.collect::<Vec<_>>()
    };
    if let Ok(renewed) = &after {
        report.expect("WL-22", "the order stays", order(renewed) == order(&begun));
    }
    report.check("WL-05", "a renewal", after.map(drop));
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_loses_an_identity_loses_the_stream() {
    let sandbox = Sandbox::new();
    let stage = Stage::with(&sandbox, "", &[("one", ""), ("many", "")]);
    let mut report = Report::default();
    let one = Workload::connect(&stage.socket("one")).await;
    let many = Workload::connect(&stage.socket("many")).await;
    let mut lost = one
        .open("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let mut fewer = many
        .open("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    next(&mut lost).await.unwrap();
    next(&mut fewer).await.unwrap();
    for name in ["one", "many-b"] {
        let resource = format!("workload_identity/{name}");
        stage.cluster.run(&["rm", &resource]);
    }
    stage.agents[0].signal("HUP");
    let end = loop {
        if let Err(status) = next(&mut lost).await {
            break status;
        }
    };
    report.status(
        "WL-25",
        "the only one is gone",
        Code::PermissionDenied,
        &Err::<(), _>(end),
    );
    let left = until(
        &mut fewer,
        |message: &X509svidResponse| !message.svids.is_empty(),
        |message| message.svids.len() == 4,
    )
    .await;
    report.check("WL-25", "one of several is gone", left.map(drop));
    report.finish();
}
