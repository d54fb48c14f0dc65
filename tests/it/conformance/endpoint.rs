//! The endpoint: the header, the status codes, what is there and what is not.

use bytes::Bytes;
use prost::Message as _;
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest, X509BundlesRequest,
    X509svidRequest,
};
use tonic::{Code, Request, Status};

use super::{FRUITFUL, FRUITLESS, Report, Stage};
use crate::common::{OutputText as _, Sandbox, Workload, eventually, first};

const AUDIENCE: &str = "audience.example.org";

/// Each call of the standard with a request that is in order.
fn calls(token: &str) -> [(&'static str, Bytes); 5] {
    let jwt = JwtsvidRequest {
        audience: vec![AUDIENCE.into()],
        ..JwtsvidRequest::default()
    };
    let validate = ValidateJwtsvidRequest {
        audience: AUDIENCE.into(),
        svid: token.into(),
    };
    [
        ("FetchX509SVID", X509svidRequest {}.encode_to_vec().into()),
        (
            "FetchX509Bundles",
            X509BundlesRequest {}.encode_to_vec().into(),
        ),
        ("FetchJWTSVID", jwt.encode_to_vec().into()),
        (
            "FetchJWTBundles",
            JwtBundlesRequest {}.encode_to_vec().into(),
        ),
        ("ValidateJWTSVID", validate.encode_to_vec().into()),
    ]
}

/// The first answer to a call with the header's values.
async fn answer(
    workload: &Workload,
    method: &str,
    header: &[&str],
    message: &Bytes,
) -> Result<Bytes, Status> {
    let mut request = Request::new(message.clone());
    for value in header {
        request
            .metadata_mut()
            .append("workload.spiffe.io", value.parse().unwrap());
    }
    let path = format!("/SpiffeWorkloadAPI/{method}");
    first(workload.open_path(&path, request).await?).await
}

fn jwt(audience: &[&str], spiffe_id: &str) -> JwtsvidRequest {
    JwtsvidRequest {
        audience: audience.iter().map(|&text| text.to_owned()).collect(),
        spiffe_id: spiffe_id.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_needs_the_header_exactly() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let workload = Workload::connect(&stage.socket("one")).await;
    let fetched: JwtsvidResponse = workload
        .fetch("FetchJWTSVID", &jwt(&[AUDIENCE], ""))
        .await
        .unwrap();
    let mut report = Report::default();
    for (method, message) in calls(&fetched.svids[0].svid) {
        for header in [
            &[][..],
            &["True"],
            &["TRUE"],
            &["1"],
            &[""],
            &["false"],
            &["true,true"],
            &["true", "true"],
            &["true", "false"],
        ] {
            let refused = answer(&workload, method, header, &message).await;
            let what = format!("{method} with {header:?}");
            report.status("WE-05", &what, Code::InvalidArgument, &refused);
            let text = refused.err().map(|status| status.message().to_owned());
            report.expect(
                "WE-04",
                &what,
                text.as_deref() == Some("security header missing from request"),
            );
        }
        let answered = answer(&workload, method, &["true"], &message).await;
        report.check(
            "WL-01",
            method,
            answered.map(drop).map_err(|e| e.to_string()),
        );
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_calls_are_unimplemented() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let workload = Workload::connect(&stage.socket("one")).await;
    let mut report = Report::default();
    for (clause, path) in [
        ("WL-26", "/SpiffeWorkloadAPI/FetchWITSVID"),
        ("WL-26", "/SpiffeWorkloadAPI/FetchWITBundles"),
        ("WE-14", "/SpiffeWorkloadAPI/FetchEverything"),
        ("WE-14", "/SpiffeWorkloadAPI/"),
        ("WE-14", "/spiffe.workload.SpiffeWorkloadAPI/FetchX509SVID"),
        ("WE-14", "/nothing.Here/Call"),
    ] {
        let mut request = Request::new(Bytes::new());
        let metadata = request.metadata_mut();
        metadata.insert("workload.spiffe.io", "true".parse().unwrap());
        let answer = match workload.open_path(path, request).await {
            Ok(stream) => first(stream).await,
            Err(status) => Err(status),
        };
        report.status(clause, path, Code::Unimplemented, &answer);
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_fields_are_invalid_arguments() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let workload = Workload::connect(&stage.socket("one")).await;
    let mut report = Report::default();
    for audience in [&[][..], &[""], &["a", ""]] {
        let answer = workload.first("FetchJWTSVID", &jwt(audience, "")).await;
        let what = format!("audience {audience:?}");
        report.status("WL-06", &what, Code::InvalidArgument, &answer);
    }
    for (audience, svid) in [("", ""), ("a", ""), ("", "a.b.c")] {
        let request = ValidateJwtsvidRequest {
            audience: audience.into(),
            svid: svid.into(),
        };
        let answer = workload.first("ValidateJWTSVID", &request).await;
        let what = format!("audience {audience:?}, SVID {svid:?}");
        report.status("WL-06", &what, Code::InvalidArgument, &answer);
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn requested_ids_are_read_strictly_and_granted_exactly() {
    let sandbox = Sandbox::new();
    let stage = Stage::new(&sandbox);
    let workload = Workload::connect(&stage.socket("many")).await;
    let mut report = Report::default();
    let all: JwtsvidResponse = workload
        .fetch("FetchJWTSVID", &jwt(&[AUDIENCE], ""))
        .await
        .unwrap();
    report.expect("WL-15", "without an ID, all come", all.svids.len() == 5);
    let one: JwtsvidResponse = workload
        .fetch(
            "FetchJWTSVID",
            &jwt(&[AUDIENCE], "spiffe://test.example.org/svc/c"),
        )
        .await
        .unwrap();
    let ids: Vec<_> = one.svids.iter().map(|svid| &*svid.spiffe_id).collect();
    report.expect(
        "WL-15",
        "with an ID, that one comes",
        ids == ["spiffe://test.example.org/svc/c"],
    );
    for id in [
        "spiffe://test.example.org/svc/one",
        "spiffe://test.example.org/svc/A",
        "spiffe://test.example.org/svc",
        "spiffe://other.example.org/svc/a",
    ] {
        let answer = workload.first("FetchJWTSVID", &jwt(&[AUDIENCE], id)).await;
        let clause = if id.ends_with('A') { "ID-07" } else { "WL-16" };
        report.status(clause, id, Code::PermissionDenied, &answer);
    }
    for (clause, id) in [
        ("ID-07", "SPIFFE://test.example.org/svc/a"),
        ("ID-07", "spiffe://TEST.example.org/svc/a"),
        ("ID-01", "https://test.example.org/svc/a"),
        ("ID-01", "spiffe:///svc/a"),
        ("ID-01", "spiffe://test.example.org/svc/a?b"),
        ("ID-01", "spiffe://test.example.org/svc/a#b"),
        ("ID-02", "spiffe://user@test.example.org/svc/a"),
        ("ID-02", "spiffe://test.example.org:443/svc/a"),
        ("ID-02", "spiffe://test.example.org:/svc/a"),
        ("ID-03", "spiffe://test%2eexample.org/svc/a"),
        ("ID-05", "spiffe://test.example.org/svc/%61"),
        ("ID-05", "spiffe://test.example.org/svc//a"),
        ("ID-05", "spiffe://test.example.org/svc/../svc/a"),
        ("ID-05", "spiffe://test.example.org/svc/a/"),
        ("ID-05", "spiffe://test.example.org/svc/\u{e9}"),
        ("ID-06", &format!("spiffe://td/{}", "a".repeat(2048))),
    ] {
        let answer = workload.first("FetchJWTSVID", &jwt(&[AUDIENCE], id)).await;
        report.status(clause, id, Code::InvalidArgument, &answer);
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_nothing_is_denied_and_who_may_not_is_never_served() {
    let sandbox = Sandbox::new();
    let stage = Stage::with(&sandbox, "", &FRUITLESS.map(|name| (name, "")));
    let mut report = Report::default();
    for name in FRUITLESS {
        let workload = Workload::connect(&stage.socket(name)).await;
        let svid = workload.first("FetchX509SVID", &X509svidRequest {}).await;
        let token = workload.first("FetchJWTSVID", &jwt(&[AUDIENCE], "")).await;
        let clauses: &[&str] = match name {
            "nobody" => &["WE-11", "WL-11"],
            "too-long" => &["ID-06"],
            "root" => &["X5-02"],
            _ => &["ID-05"],
        };
        for clause in clauses {
            let what = format!("X.509-SVID of {name}");
            report.status(clause, &what, Code::PermissionDenied, &svid);
            let what = format!("JWT-SVID of {name}");
            report.status(clause, &what, Code::PermissionDenied, &token);
        }
        if name == "nobody" {
            // Clients of SPIFFE look for these words.
            for refused in [&svid, &token] {
                let text = refused.as_ref().unwrap_err().message();
                report.expect("WL-11", text, text.contains("no identity issued"));
            }
            let bundles = workload
                .first("FetchX509Bundles", &X509BundlesRequest {})
                .await;
            report.expect("WL-11", "bundles are for everybody", bundles.is_ok());
        }
    }
    report.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_now_is_unavailable() {
    let sandbox = Sandbox::new();
    let mut stage = Stage::cluster(&sandbox, "test.example.org");
    let mut report = Report::default();
    // The cluster went away after the configuration was made, before the agent ever joined.
    let token = stage.cluster.invite("example", "10m");
    let config = stage.cluster.config(&token, "bot");
    let socket = stage.socket("one");
    stage.cluster.stop();
    let config = format!(
        "{config}services: [{{type: workload-identity-api, listen: \"unix://{}\", selector: {{name: one}}}}]\n",
        socket.display()
    );
    let path = sandbox.write("early.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(path);
    let _agent = sandbox.spawn("early", command);
    let workload = Workload::connect(&socket).await;
    let messages = calls("a.b.c");
    let waiting = messages.iter().map(|(method, message)| {
        let workload = &workload;
        async move { (method, answer(workload, method, &["true"], message).await) }
    });
    for (method, answer) in futures_util::future::join_all(waiting).await {
        report.status("WE-10", method, Code::Unavailable, &answer);
    }
    // The connection is good for all that comes later.
    stage.cluster.resume();
    let mut last = String::new();
    for _ in 0..30 {
        match workload.first("FetchX509SVID", &X509svidRequest {}).await {
            Ok(_) => {
                last.clear();
                break;
            }
            Err(status) => last = status.to_string(),
        }
    }
    report.check(
        "WE-10",
        "it serves when it can",
        if last.is_empty() { Ok(()) } else { Err(last) },
    );
    report.finish();
}

#[test]
fn the_socket_is_local_plain_and_told_in_the_standards_form() {
    let sandbox = Sandbox::new();
    let stage = Stage::with(&sandbox, "", &FRUITFUL.map(|name| (name, "")));
    let mut report = Report::default();
    let socket = stage.socket("one").display().to_string();
    for (path, environment) in [
        (Some(format!("unix://{socket}")), None),
        (None, Some(format!("unix://{socket}"))),
        (None, Some(format!("unix:{socket}"))),
    ] {
        let mut command = sandbox.tbot(["spiffe-inspect"]);
        if let Some(path) = &path {
            command.args(["--path", path]);
        }
        if let Some(value) = &environment {
            command.env("SPIFFE_ENDPOINT_SOCKET", value);
        }
        let what = format!("path {path:?}, environment {environment:?}");
        let output = command.output().unwrap();
        let verdict = if output.status.success() {
            Ok(())
        } else {
            Err(output.text())
        };
        report.check("WE-08", &what, verdict);
    }
    for address in [
        "unix://run/x.sock",
        "unix:x.sock",
        "unix:///x.sock?a=b",
        "unix:///x.sock#a",
        "unix://user@/x.sock",
        "tcp://localhost:1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:1/path",
        "tcp://127.0.0.1:1?a=b",
        "tcp://user@127.0.0.1:1",
        "http://127.0.0.1:1",
    ] {
        let mut command = sandbox.tbot(["spiffe-inspect"]);
        command.env("SPIFFE_ENDPOINT_SOCKET", address);
        let code = command.output().unwrap().status.code();
        report.expect("WE-07", address, code == Some(2));
    }
    // On TCP the callers have no names, which is said.
    let config = stage
        .cluster
        .config(&stage.cluster.invite("example", "10m"), "tcp")
        + "services: [{type: workload-identity-api, listen: \"tcp://127.0.0.1:0\", selector: {name: one}}]\n";
    let path = sandbox.write("tcp.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(path);
    let mut agent = sandbox.spawn("tcp", command);
    agent.wait_for_log("callers cannot be told apart");
    eventually("the log is there", || {
        let log = std::fs::read_to_string(sandbox.path("agent.log"));
        log.map(|log| {
            let calm = !log.contains("callers cannot be told apart");
            report.expect("WE-01", "a unix socket needs no warning", calm);
        })
    });
    report.finish();
}
