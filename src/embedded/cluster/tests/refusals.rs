//! Refusals in the audit log.

use serde_json::{Value, json};

use super::super::*;
use super::lab::{AUTH, Lab, channel};
use crate::embedded::admin::{Answer, Request};
use crate::pb::proto::auth_service_client::AuthServiceClient;
use crate::pb::proto::{GetRoleRequest, UserCertsRequest};
use crate::pb::teleport::workloadidentity::v1 as wire;
use wire::issue_workload_identity_request::Credential;
use wire::workload_identity_issuance_service_client::WorkloadIdentityIssuanceServiceClient;

/// The lines about refusals so far: what was asked, by whom, and why not.
fn lines(lab: &Lab) -> Vec<[String; 3]> {
    let text = fs::read_to_string(lab.data_dir().join("audit.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|event| event["event"] == "request.refused")
        .map(|event| {
            assert_eq!(
                (&event["code"], &event["success"]),
                (&json!("TRQ00E"), &json!(false))
            );
            ["method", "user", "error"].map(|key| event[key].as_str().unwrap().to_owned())
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn refused_calls_leave_one_line_each() {
    let lab = Lab::new().await;
    let (certs, key) = lab.joined().await;
    let stranger = channel(lab.connect(&[AUTH, "h2"], None).await.stream).await;
    let bot = lab.connect(&[AUTH, "h2"], Some((&certs, &key))).await;
    let bot = channel(bot.stream).await;
    let request = UserCertsRequest {
        username: "bot-b".to_owned(),
        role_requests: vec!["access".to_owned()],
        use_role_requests: true,
        tls_public_key: key.public_pem().into_bytes(),
        expires: Some((lab.clock.now() + std::time::Duration::from_mins(5)).into()),
        ..UserCertsRequest::default()
    };
    for channel in [&stranger, &bot] {
        let mut client = AuthServiceClient::new(channel.clone());
        client
            .generate_user_certs(request.clone())
            .await
            .unwrap_err();
    }
    let svid = wire::IssueWorkloadIdentityRequest {
        name: "nothing".to_owned(),
        credential: Some(Credential::X509SvidParams(wire::X509svidParams::default())),
        ..wire::IssueWorkloadIdentityRequest::default()
    };
    let mut client = WorkloadIdentityIssuanceServiceClient::new(bot.clone());
    client.issue_workload_identity(svid).await.unwrap_err();
    // Of no weight, and not refused: a role of one's own.
    let name = "bot-b".to_owned();
    let mut client = AuthServiceClient::new(bot);
    client.get_role(GetRoleRequest { name }).await.unwrap();
    let certs = "/proto.AuthService/GenerateUserCerts";
    let found = lines(&lab);
    assert_eq!(found.len(), 3, "{found:?}");
    let [nobody, roles, svid] = &found[..] else {
        unreachable!()
    };
    assert_eq!(nobody[..2], [certs, ""]);
    assert!(nobody[2].contains("a client certificate is required"));
    assert_eq!(roles[..2], [certs, "bot-b"]);
    assert!(roles[2].contains("role impersonation"), "{roles:?}");
    assert!(svid[0].ends_with("/IssueWorkloadIdentity"), "{svid:?}");
}

#[tokio::test(start_paused = true)]
async fn refused_commands_leave_one_line_each_without_secrets() {
    let lab = Lab::new().await;
    let state = lab.cluster.state();
    let bot = "kind: bot\nversion: v1\nmetadata: {name: b}\nspec: {roles: []}\n";
    let odd = "kind: token\nversion: v2\nmetadata: {name: a-secret-name}\nspec: {}\n";
    let create = |text: &str| Request::Create {
        files: vec![("file".to_owned(), text.to_owned())],
        force: false,
    };
    let remove = |kind: &str| Request::Remove {
        kind: kind.to_owned(),
        name: "a-secret-name".to_owned(),
    };
    for request in [create(bot), create(odd), remove("token"), remove("role")] {
        let answer = admin::answer(state, request, 7);
        assert!(matches!(answer, Answer::Refused { .. }), "{answer:?}");
    }
    let found = lines(&lab);
    let expected = [
        (
            "admin/create",
            "bot \"b\" already exists (use -f to replace it)",
        ),
        ("admin/create", "a file was rejected"),
        ("admin/remove", "token \"*************\" is not found"),
        ("admin/remove", "role \"a-secret-name\" is not found"),
    ];
    let expected = expected.map(|(method, error)| [method, "uid-7.root", error].map(str::to_owned));
    assert_eq!(found, expected);
}
