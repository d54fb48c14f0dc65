use std::time::Duration;

use serde_json::Value;
use tonic::Code;

use super::*;
use crate::embedded::caller::Caller;
use crate::embedded::resources::Mode;
use crate::embedded::workload_identity::service::tests::{caller_with, state, with};

const EDITOR: &str = "
kind: role
version: v7
metadata: {name: editor}
spec:
  allow:
    rules: [{resources: [workload_identity], verbs: ['*']}]
";

fn service() -> (Resources, Caller, Caller) {
    let state = state();
    let files = [("role.yaml".to_owned(), EDITOR.to_owned())];
    state.create(&files, Mode::Create, "test").unwrap();
    let editor = caller_with(&state, &["editor"]);
    let reader = caller_with(&state, &["reader"]);
    (Resources { state }, editor, reader)
}

fn message(name: &str, id: &str) -> wire::WorkloadIdentity {
    wire::WorkloadIdentity {
        kind: KIND.into(),
        version: "v1".into(),
        metadata: Some(crate::pb::teleport::header::v1::Metadata {
            name: name.into(),
            ..Default::default()
        }),
        spec: Some(wire::WorkloadIdentitySpec {
            rules: None,
            spiffe: Some(wire::WorkloadIdentitySpiffe {
                id: id.into(),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

fn code<T: std::fmt::Debug>(answer: Answer<T>) -> Code {
    answer.unwrap_err().code()
}

#[tokio::test(start_paused = true)]
async fn what_is_written_is_read_back_and_recorded() {
    let (service, editor, reader) = service();
    let create = |id| wire::CreateWorkloadIdentityRequest {
        workload_identity: Some(message("new", id)),
    };
    let refused = service
        .create_workload_identity(with(&reader, create("/x")))
        .await;
    assert_eq!(code(refused), Code::PermissionDenied);
    let refused = service
        .create_workload_identity(with(&editor, create("x")))
        .await;
    assert_eq!(code(refused), Code::InvalidArgument);
    let made = service
        .create_workload_identity(with(&editor, create("/x")))
        .await;
    let made = made.unwrap().into_inner();
    let again = service
        .create_workload_identity(with(&editor, create("/x")))
        .await;
    assert_eq!(code(again), Code::AlreadyExists);

    let get = || wire::GetWorkloadIdentityRequest {
        name: "new".into(),
        ..Default::default()
    };
    let read = service.get_workload_identity(with(&reader, get())).await;
    assert_eq!(read.unwrap().into_inner(), made);

    let update = |message| wire::UpdateWorkloadIdentityRequest {
        workload_identity: Some(message),
    };
    let updated = service
        .update_workload_identity(with(&editor, update(made.clone())))
        .await;
    assert_ne!(
        updated.unwrap().into_inner().metadata,
        made.metadata,
        "a new revision"
    );
    let stale = service
        .update_workload_identity(with(&editor, update(made)))
        .await;
    assert_eq!(code(stale), Code::FailedPrecondition);
    let none = service
        .update_workload_identity(with(&editor, update(message("none", "/a"))))
        .await;
    assert_eq!(code(none), Code::NotFound);
    let upsert = wire::UpsertWorkloadIdentityRequest {
        workload_identity: Some(message("new", "/y")),
    };
    service
        .upsert_workload_identity(with(&editor, upsert))
        .await
        .unwrap();

    let delete = || wire::DeleteWorkloadIdentityRequest {
        name: "new".into(),
        ..Default::default()
    };
    service
        .delete_workload_identity(with(&editor, delete()))
        .await
        .unwrap();
    let gone = service
        .delete_workload_identity(with(&editor, delete()))
        .await;
    assert_eq!(code(gone), Code::NotFound);
    assert_eq!(
        code(service.get_workload_identity(with(&reader, get())).await),
        Code::NotFound
    );
    let events = service.state.audit.events();
    let ours = events.iter().filter(|event| event["user"] == "bot-example");
    let codes: Vec<&Value> = ours.map(|event| &event["code"]).collect();
    assert_eq!(codes, ["WID001I", "WID002I", "WID001I", "WID003I"]);
}

#[tokio::test(start_paused = true)]
async fn pages_cover_everything_once() {
    let (service, editor, reader) = service();
    let list = |page_token: String| wire::ListWorkloadIdentitiesRequest {
        page_size: 2,
        page_token,
    };
    let refused = service
        .list_workload_identities(with(&reader, list(String::new())))
        .await;
    assert_eq!(code(refused), Code::PermissionDenied);
    let mut names = Vec::new();
    let mut token = String::new();
    loop {
        let page = service
            .list_workload_identities(with(&editor, list(token)))
            .await;
        let page = page.unwrap().into_inner();
        assert!(page.workload_identities.len() <= 2);
        let found = page.workload_identities.into_iter();
        names.extend(found.map(|one| one.metadata.unwrap().name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(
        names,
        ["a-static", "b-unit", "c-hidden", "d-other", "e-root"]
    );
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_opens_nothing() {
    let (service, mut editor, _) = service();
    tokio::time::advance(Duration::from_hours(2)).await;
    let get = wire::GetWorkloadIdentityRequest::default();
    let refused = service
        .get_workload_identity(with(&editor, get.clone()))
        .await;
    assert_eq!(code(refused), Code::PermissionDenied);
    editor.identity = None;
    let refused = service.get_workload_identity(with(&editor, get)).await;
    assert_eq!(code(refused), Code::PermissionDenied);
}
