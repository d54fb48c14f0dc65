//! JWT-SVIDs that must not be believed, signed with the cluster's own key where that makes the lie
//! better.

use serde_json::json;
use tbot::pb::workload_api::{ValidateJwtsvidRequest, ValidateJwtsvidResponse};
use tonic::Code;

use super::{Report, Stage, has_python, python};
use crate::common::{Sandbox, Workload, skip};

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_validated_fully() {
    if !has_python() {
        return skip("the Python environment is missing: make setup");
    }
    let sandbox = Sandbox::new();
    let stage = Stage::with(&sandbox, "", &[("one", "")]);
    let workload = Workload::connect(&stage.socket("one")).await;
    let forged = python(
        &sandbox,
        "forge",
        &json!({
            "database": sandbox.path("cluster/cluster.db"),
            "trust_domain": "test.example.org",
            "audience": "here",
        }),
    );
    let mut report = Report::default();
    let tokens = forged.as_array().unwrap();
    assert!(tokens.len() > 30, "{forged}");
    for token in tokens {
        let [clause, what, svid] = [0, 1, 2].map(|at| token[at].as_str().unwrap());
        let good = token[3].as_bool().unwrap();
        let request = ValidateJwtsvidRequest {
            audience: "here".into(),
            svid: svid.into(),
        };
        let answer: Result<ValidateJwtsvidResponse, _> =
            workload.fetch("ValidateJWTSVID", &request).await;
        match answer {
            Ok(valid) if good => {
                let claims = valid.claims.unwrap_or_default().fields;
                let whole = ["sub", "aud", "exp"].map(|name| claims.contains_key(name));
                report.expect(
                    "WL-20",
                    what,
                    whole == [true; 3] && valid.spiffe_id == "spiffe://test.example.org/svc/forged",
                );
            }
            Err(status) if good => report.check(clause, what, Err(status.to_string())),
            refused => report.status(clause, what, Code::InvalidArgument, &refused),
        }
    }
    report.finish();
}
