use std::time::Duration;

use tonic::Code;

use super::*;
use crate::embedded::caller::Caller;
use crate::embedded::resources::Mode;
use crate::embedded::workload_identity::{a_cluster, caller_with, with};
use crate::pb::teleport::header::v1::Metadata;

const EDITOR: &str = "
kind: role
version: v7
metadata: {name: editor}
spec:
  allow:
    rules: [{resources: [workload_identity_x509_revocation], verbs: ['*']}]
";

fn message(service: &Revocation, serial: &str) -> wire::WorkloadIdentityX509Revocation {
    let now = service.state.clock.now();
    wire::WorkloadIdentityX509Revocation {
        kind: KIND.to_owned(),
        version: "v1".to_owned(),
        metadata: Some(Metadata {
            name: serial.to_owned(),
            expires: Some((now + Duration::from_hours(1)).into()),
            ..Metadata::default()
        }),
        spec: Some(wire::WorkloadIdentityX509RevocationSpec {
            reason: "lost".to_owned(),
            revoked_at: Some(now.into()),
        }),
        ..Default::default()
    }
}

fn code<T>(answer: Answer<T>) -> Code {
    answer.map(drop).unwrap_err().code()
}

fn service() -> (Revocation, Caller, Caller) {
    let service = Revocation::start(&a_cluster());
    let state = &service.state;
    let files = [("role".to_owned(), EDITOR.to_owned())];
    state.create(&files, Mode::Create, "test").unwrap();
    let (editor, nobody) = (caller_with(state, &["editor"]), caller_with(state, &[]));
    (service, editor, nobody)
}

async fn create(
    service: &Revocation,
    by: &Caller,
    message: wire::WorkloadIdentityX509Revocation,
) -> Answer<wire::WorkloadIdentityX509Revocation> {
    let request = wire::CreateWorkloadIdentityX509RevocationRequest {
        workload_identity_x509_revocation: Some(message),
    };
    service
        .create_workload_identity_x509_revocation(with(by, request))
        .await
}

#[tokio::test(start_paused = true)]
async fn what_is_no_revocation_is_refused_with_its_reason() {
    let (service, editor, nobody) = service();
    let good = || message(&service, "0a0b");
    let refused = create(&service, &nobody, good()).await;
    assert_eq!(code(refused), Code::PermissionDenied);
    let without = |change: fn(&mut wire::WorkloadIdentityX509Revocation)| {
        let mut message = good();
        change(&mut message);
        message
    };
    for (wrong, why) in [
        (message(&service, "0A0B"), "serial"),
        (
            without(|m| m.metadata.as_mut().unwrap().expires = None),
            "expires",
        ),
        (without(|m| m.spec = None), "reason"),
        (
            without(|m| m.spec.as_mut().unwrap().revoked_at = None),
            "revoked_at",
        ),
        (
            without(|m| {
                let at = &mut m.spec.as_mut().unwrap().revoked_at;
                at.as_mut().unwrap().seconds = i64::MAX;
            }),
            "no point in time",
        ),
    ] {
        let refused = create(&service, &editor, wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(why), "{why}: {refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_revoked_is_read_back_and_in_the_list() {
    let (service, editor, nobody) = service();
    let state = &service.state;
    let good = || message(&service, "0a0b");
    let made = create(&service, &editor, good())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(made.spec, good().spec);
    assert_eq!(
        code(create(&service, &editor, good()).await),
        Code::AlreadyExists
    );

    let request = wire::StreamSignedCrlRequest {};
    let stream = service.stream_signed_crl(with(&nobody, request)).await;
    let mut lists = stream.unwrap().into_inner();
    let listed = async || loop {
        let list = lists.next().await.unwrap().unwrap().crl;
        let list = <x509_cert::crl::CertificateList as der::Decode>::from_der(&list).unwrap();
        if let Some(revoked) = list.tbs_cert_list.revoked_certificates {
            break revoked[0].serial_number.to_string();
        }
    };
    let mut listed = listed;
    assert_eq!(listed().await, "0A:0B");

    let get = async |by| {
        let name = "0a0b".to_owned();
        let request = wire::GetWorkloadIdentityX509RevocationRequest { name };
        service
            .get_workload_identity_x509_revocation(with(by, request))
            .await
    };
    assert_eq!(get(&editor).await.unwrap().into_inner(), made);
    assert_eq!(code(get(&nobody).await), Code::PermissionDenied);

    let mut other = made.clone();
    other.spec.as_mut().unwrap().reason = "stolen".to_owned();
    let update = async |message: &wire::WorkloadIdentityX509Revocation| {
        let request = wire::UpdateWorkloadIdentityX509RevocationRequest {
            workload_identity_x509_revocation: Some(message.clone()),
        };
        let request = with(&editor, request);
        service
            .update_workload_identity_x509_revocation(request)
            .await
    };
    let updated = update(&other).await.unwrap().into_inner();
    assert_eq!(updated.spec, other.spec);
    assert_eq!(
        code(update(&other).await),
        Code::FailedPrecondition,
        "stale"
    );
    let request = wire::UpsertWorkloadIdentityX509RevocationRequest {
        workload_identity_x509_revocation: Some(message(&service, "0c")),
    };
    let request = with(&editor, request);
    service
        .upsert_workload_identity_x509_revocation(request)
        .await
        .unwrap();

    let list = async |page_size, page_token: &str| {
        let request = wire::ListWorkloadIdentityX509RevocationsRequest {
            page_size,
            page_token: page_token.to_owned(),
        };
        let request = with(&editor, request);
        let page = service
            .list_workload_identity_x509_revocations(request)
            .await;
        let page = page.unwrap().into_inner();
        let names = page.workload_identity_x509_revocations.into_iter();
        let names: Vec<String> = names.map(|one| one.metadata.unwrap().name).collect();
        (names, page.next_page_token)
    };
    let names = ["0a0b".to_owned(), "0c".to_owned()];
    assert_eq!(list(0, "").await, (names.to_vec(), String::new()));
    assert_eq!(
        list(1, "").await,
        (vec!["0a0b".to_owned()], "0c".to_owned())
    );
    assert_eq!(list(1, "0c").await, (vec!["0c".to_owned()], String::new()));

    let delete = async |name: &str| {
        let name = name.to_owned();
        let request = wire::DeleteWorkloadIdentityX509RevocationRequest { name };
        let request = with(&editor, request);
        service
            .delete_workload_identity_x509_revocation(request)
            .await
    };
    delete("0a0b").await.unwrap();
    assert_eq!(code(delete("0a0b").await), Code::NotFound);
    let events = state.audit.events();
    let ours = events.iter().filter(|event| event["user"] == "bot-example");
    let codes: Vec<&Value> = ours.map(|event| &event["code"]).collect();
    assert_eq!(codes, ["WID004I", "WID005I", "WID004I", "WID006I"]);
}
