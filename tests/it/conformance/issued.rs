//! What is issued and published, taken apart by others.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svidRequest,
    X509svidResponse,
};

use super::{FRUITFUL, Report, Stage, has_python, python};
use crate::common::{Sandbox, Workload, skip};

fn text(bytes: &[u8]) -> Value {
    STANDARD.encode(bytes).into()
}

/// All that one socket gives, as a document for the judge.
async fn fetched(stage: &Stage<'_>, set: &str, domain: &str) -> Value {
    let workload = Workload::connect(&stage.socket(set)).await;
    let x509: X509svidResponse = workload
        .fetch("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let bundles: X509BundlesResponse = workload
        .fetch("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    let jwt_bundles: JwtBundlesResponse = workload
        .fetch("FetchJWTBundles", &JwtBundlesRequest {})
        .await
        .unwrap();
    let mut tokens = Vec::new();
    for audience in [&["one"][..], &["one", "two"]] {
        let request = JwtsvidRequest {
            audience: audience.iter().map(|&name| name.to_owned()).collect(),
            ..JwtsvidRequest::default()
        };
        let jwt: JwtsvidResponse = workload.fetch("FetchJWTSVID", &request).await.unwrap();
        for svid in jwt.svids {
            let request = ValidateJwtsvidRequest {
                audience: "one".into(),
                svid: svid.svid.clone(),
            };
            let valid: ValidateJwtsvidResponse =
                workload.fetch("ValidateJWTSVID", &request).await.unwrap();
            let claims = valid.claims.unwrap_or_default();
            tokens.push(json!({
                "asked": audience, "spiffe_id": svid.spiffe_id, "svid": svid.svid, "hint": svid.hint,
                "valid_id": valid.spiffe_id,
                "valid_claims": claims.fields.keys().collect::<Vec<_>>(),
            }));
        }
    }
    json!({
        "set": set,
        "trust_domain": domain,
        "x509": x509.svids.iter().map(|svid| json!({
            "spiffe_id": svid.spiffe_id, "chain": text(&svid.x509_svid),
            "key": text(&svid.x509_svid_key), "bundle": text(&svid.bundle), "hint": svid.hint,
        })).collect::<Vec<_>>(),
        "federated": x509.federated_bundles.iter().map(|(id, der)| (id.clone(), text(der)))
            .collect::<serde_json::Map<_, _>>(),
        "crl": x509.crl.iter().map(|der| text(der)).collect::<Vec<_>>(),
        "bundles": bundles.bundles.iter().map(|(id, der)| (id.clone(), text(der)))
            .collect::<serde_json::Map<_, _>>(),
        "jwt": tokens,
        "jwt_bundles": jwt_bundles.bundles.iter().map(|(id, jwks)| (id.clone(), text(jwks)))
            .collect::<serde_json::Map<_, _>>(),
    })
}

/// Adds the judge's verdicts; sees to it that it looked at every clause that it is to judge.
fn judge(report: &mut Report, sandbox: &Sandbox, document: &Value, clauses: &[&str]) {
    let verdict = python(sandbox, "judge", document);
    for clause in clauses {
        let looked = verdict["checked"][*clause].as_u64() > Some(0);
        report.expect(clause, "the judge looked at it", looked);
    }
    for problem in verdict["problems"].as_array().unwrap() {
        let [clause, text] = [0, 1].map(|at| problem[at].as_str().unwrap());
        report.check(clause, "the judge says", Err(text.to_owned()));
    }
}

/// The clauses that the judge decides by looking at what one socket gave.
const ISSUED: [&str; 30] = [
    "ID-01", "ID-02", "ID-03", "ID-05", "ID-06", "ID-08", "ID-09", "X5-01", "X5-02", "X5-03",
    "X5-04", "X5-05", "X5-06", "X5-07", "X5-08", "X5-09", "X5-11", "JW-01", "JW-02", "JW-03",
    "JW-04", "JW-05", "JW-06", "JW-07", "JW-08", "WL-08", "WL-12", "WL-13", "WL-18", "WL-20",
];

#[tokio::test(flavor = "multi_thread")]
async fn svids_and_bundles_are_what_the_standard_says() {
    if !has_python() {
        return skip("the Python environment is missing: make setup");
    }
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let mut report = Report::default();
    for set in FRUITFUL {
        let document = fetched(&stage, set, "test.example.org").await;
        judge(&mut report, &sandbox, &document, &ISSUED);
        let x509 = document["x509"].as_array().unwrap();
        let jwt = document["jwt"].as_array().unwrap();
        let count = if set == "many" { 5 } else { 1 };
        report.expect("WL-07", set, x509.len() == count);
        report.expect("WL-17", set, jwt.len() == 2 * count);
        if set == "longest" {
            let id = x509[0]["spiffe_id"].as_str().unwrap();
            report.expect("ID-06", "2048 bytes are served", id.len() == 2048);
        }
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_are_unique_and_short() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let mut report = Report::default();
    let document = fetched(&stage, "many", "test.example.org").await;
    let jwt = document["jwt"].as_array().unwrap();
    for (what, svids) in [
        ("X.509", document["x509"].as_array().unwrap().as_slice()),
        ("JWT", &jwt[..5]),
    ] {
        let ids: Vec<_> = svids.iter().map(|svid| &svid["spiffe_id"]).collect();
        let wanted = ["a", "b", "c", "d", "e"]
            .map(|name| json!(format!("spiffe://test.example.org/svc/{name}")));
        report.expect("WL-22", what, ids == wanted.iter().collect::<Vec<_>>());
        let hints: Vec<_> = svids
            .iter()
            .map(|svid| svid["hint"].as_str().unwrap())
            .collect();
        report.expect("WL-09", what, hints[..3] == ["same", "", ""]);
        report.expect("WL-10", what, hints[3..] == ["", "e"]);
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_domains_of_any_look_are_served() {
    if !has_python() {
        return skip("the Python environment is missing: make setup");
    }
    let mut report = Report::default();
    for domain in ["1.2.3.4", "under_score"] {
        let sandbox = Sandbox::new();
        let mut stage = Stage::cluster(&sandbox, domain);
        stage
            .start("agent", "", &[("one", "")])
            .wait_for_log("The bot has a fresh identity");
        let document = fetched(&stage, "one", domain).await;
        judge(&mut report, &sandbox, &document, &["ID-01", "X5-11"]);
        let id = &document["x509"][0]["spiffe_id"];
        report.expect(
            "ID-04",
            domain,
            *id == json!(format!("spiffe://{domain}/svc/one")),
        );
    }
    report.finish();
}

#[test]
fn the_published_bundle_is_what_the_standard_says() {
    if !has_python() {
        return skip("the Python environment is missing: make setup");
    }
    let sandbox = Sandbox::new();
    let stage = Stage::cluster(&sandbox, "test.example.org");
    let mut report = Report::default();
    let mut last = json!({"spiffe_sequence": 0});
    for phase in ["", "init", "update_clients", "update_servers", "standby"] {
        if !phase.is_empty() {
            stage.rotate(phase);
        }
        let (kind, bundle) = stage.published("/webapi/spiffe/bundle.json");
        report.expect("FE-09", &kind, kind.starts_with("application/json"));
        let document = json!({"trust_domain": "test.example.org", "bundle": bundle});
        let clauses = [
            "X5-05", "X5-06", "X5-13", "JW-10", "TB-01", "TB-02", "TB-03", "TB-04", "TB-05",
            "ID-08",
        ];
        judge(&mut report, &sandbox, &document, &clauses);
        let sequence = |bundle: &Value| bundle["spiffe_sequence"].as_u64().unwrap_or_default();
        let grows = sequence(&bundle) > sequence(&last);
        report.expect("TB-02", phase, grows || bundle["keys"] == last["keys"]);
        // Only the first step brings keys, and they do not sign yet: whatever signs later was published.
        let known = last["keys"].as_array().cloned().unwrap_or_default();
        let fresh = bundle["keys"].as_array().unwrap().iter();
        let fresh = fresh.filter(|key| !known.contains(key)).count();
        let wanted = match phase {
            "" | "init" => 2,
            _ => 0,
        };
        report.expect("FE-01", &format!("new in {phase}"), fresh == wanted);
        last.clone_from(&bundle);
        let keys = |name: &str| {
            let keys = bundle["keys"].as_array().unwrap().iter();
            keys.filter(|key| key["use"] == name).count()
        };
        // What signs from now on was published before; what does not sign any more goes.
        let both = ["init", "update_clients", "update_servers"].contains(&phase);
        let wanted = if both { 2 } else { 1 };
        let clause = if both { "FE-01" } else { "FE-02" };
        for name in ["x509-svid", "jwt-svid"] {
            report.expect(clause, &format!("{phase} {name}"), keys(name) == wanted);
        }
    }
    report.finish();
}

#[test]
fn the_endpoint_of_the_bundle_speaks_current_tls_to_anybody() {
    let sandbox = Sandbox::new();
    let stage = Stage::cluster(&sandbox, "test.example.org");
    let mut report = Report::default();
    let shakes_hands = |options: &[&str]| {
        let mut openssl = sandbox.command("openssl");
        openssl
            .args(["s_client", "-verify_return_error", "-connect"])
            .arg(stage.cluster.proxy())
            .arg("-CAfile")
            .arg(stage.cluster.web_authority())
            .args(options);
        openssl.output().unwrap().status.success()
    };
    for good in ["-tls1_2", "-tls1_3"] {
        report.expect("FE-10", good, shakes_hands(&[good]));
    }
    let weak = ["-cipher", "ALL:@SECLEVEL=0"];
    for old in ["-tls1", "-tls1_1"] {
        report.expect("FE-10", old, !shakes_hands(&[&[old][..], &weak].concat()));
    }
    let without_forward_secrecy = ["-tls1_2", "-cipher", "kRSA:@SECLEVEL=0"];
    let refused = !shakes_hands(&without_forward_secrecy);
    report.expect("FE-10", "key exchange by RSA", refused);
    report.finish();
}
