use tonic::Code;

use super::*;
use crate::embedded::resources::Mode;
use crate::embedded::workload_identity::{a_cluster, caller_with, with};
use crate::pb::teleport::header::v1::Metadata;

const ROLES: &str = "
kind: role
version: v7
metadata: {name: editor}
spec:
  allow:
    rules: [{resources: [spiffe_federation], verbs: [create, delete]}]
---
kind: role
version: v7
metadata: {name: blind}
spec:
  deny:
    rules: [{resources: [spiffe_federation], verbs: [list]}]
";

fn message(name: &str, url: &str) -> wire::SpiffeFederation {
    wire::SpiffeFederation {
        kind: KIND.to_owned(),
        version: "v1".to_owned(),
        metadata: Some(Metadata {
            name: name.to_owned(),
            ..Metadata::default()
        }),
        spec: Some(wire::SpiffeFederationSpec {
            bundle_source: Some(wire::SpiffeFederationBundleSource {
                https_web: Some(wire::SpiffeFederationBundleSourceHttpsWeb {
                    bundle_endpoint_url: url.to_owned(),
                }),
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
async fn whom_a_role_lets_creates_and_deletes_and_everybody_reads() {
    let service = Federations { state: a_cluster() };
    let state = &service.state;
    let files = [("roles".to_owned(), ROLES.to_owned())];
    state.create(&files, Mode::Create, "test").unwrap();
    let caller = |roles: &[&str]| caller_with(state, roles);
    let (editor, nobody, blind) = (caller(&["editor"]), caller(&[]), caller(&["blind"]));
    let create = async |by, message| {
        let spiffe_federation = Some(message);
        let request = wire::CreateSpiffeFederationRequest { spiffe_federation };
        service.create_spiffe_federation(with(by, request)).await
    };
    let good = || message("b.example", "https://b.example/bundle");
    assert_eq!(code(create(&nobody, good()).await), Code::PermissionDenied);
    let junk = || message("b.example", "junk");
    assert_eq!(
        code(create(&nobody, junk()).await),
        Code::PermissionDenied,
        "before anything is read"
    );
    for (wrong, why) in [
        (junk(), "bundle_endpoint_url"),
        (message("B_ example", "https://b.example/"), "trust domain"),
        (message("", "https://b.example/"), "name"),
        (
            wire::SpiffeFederation {
                kind: "role".to_owned(),
                ..good()
            },
            "kind",
        ),
        (
            wire::SpiffeFederation {
                version: "v9".to_owned(),
                ..good()
            },
            "version",
        ),
        (
            wire::SpiffeFederation {
                spec: None,
                ..good()
            },
            "0 sources",
        ),
    ] {
        let refused = create(&editor, wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(why), "{why}: {refused}");
    }
    let made = create(&editor, good()).await.unwrap().into_inner();
    assert_eq!(made.spec, good().spec);
    assert_eq!(code(create(&editor, good()).await), Code::AlreadyExists);

    let get = async |by| {
        let name = "b.example".to_owned();
        let request = wire::GetSpiffeFederationRequest { name };
        service.get_spiffe_federation(with(by, request)).await
    };
    let list = async |by| {
        let request = wire::ListSpiffeFederationsRequest::default();
        let page = service.list_spiffe_federations(with(by, request)).await?;
        Ok::<_, Status>(page.into_inner().spiffe_federations)
    };
    assert_eq!(get(&nobody).await.unwrap().into_inner(), made);
    assert_eq!(list(&nobody).await.unwrap(), std::slice::from_ref(&made));
    assert_eq!(get(&blind).await.unwrap().into_inner(), made);
    assert_eq!(
        list(&blind).await.unwrap_err().code(),
        Code::PermissionDenied
    );

    let delete = async |by| {
        let name = "b.example".to_owned();
        let request = wire::DeleteSpiffeFederationRequest { name };
        service.delete_spiffe_federation(with(by, request)).await
    };
    assert_eq!(code(delete(&nobody).await), Code::PermissionDenied);
    delete(&editor).await.unwrap();
    assert_eq!(code(delete(&editor).await), Code::NotFound);
    assert_eq!(code(get(&nobody).await), Code::NotFound);
    let events = state.audit.events();
    let ours = events.iter().filter(|event| event["user"] == "bot-example");
    let told: Vec<_> = ours.map(|event| (&event["code"], &event["name"])).collect();
    let name = &json!("b.example");
    let expected = [(&json!("TSPIFFE001I"), name), (&json!("TSPIFFE002I"), name)];
    assert_eq!(told, expected);
}
