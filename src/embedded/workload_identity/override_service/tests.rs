use der::{Decode as _, Encode as _};
use tonic::Code;
use x509_cert::request::CertReq;

use super::*;
use crate::crypto::x509::Certificate;
use crate::embedded::ca::{GRACE, Mode as Rotate, Phase, Step};
use crate::embedded::resources::Mode;
use crate::embedded::workload_identity::{a_cluster, caller_with, with};
use crate::pb::teleport::header::v1::Metadata;

const ROLES: &str = "
kind: role
version: v7
metadata: {name: editor}
spec:
  allow:
    rules: [{resources: [workload_identity_x509_issuer_override], verbs: ['*']}]
---
kind: role
version: v7
metadata: {name: signer}
spec:
  allow:
    rules: [{resources: [workload_identity_x509_issuer_override_csr], verbs: [create]}]
";

fn service() -> Overrides {
    let state = a_cluster();
    let files = [("roles".to_owned(), ROLES.to_owned())];
    state.create(&files, Mode::Create, "test").unwrap();
    Overrides { state }
}

fn code<T: std::fmt::Debug>(answer: Answer<T>) -> Code {
    answer.unwrap_err().code()
}

#[tokio::test(start_paused = true)]
async fn requests_are_for_the_cluster_s_own_keys_and_hold_what_was_asked_for() {
    let service = service();
    let state = &service.state;
    let sign = async |roles: &[&str], issuer: &[u8], mode: CsrCreationMode| {
        let request = wire::SignX509IssuerCsrRequest {
            issuer: issuer.to_vec(),
            csr_creation_mode: mode.into(),
        };
        let request = with(&caller_with(state, roles), request);
        service.sign_x509_issuer_csr(request).await
    };
    let own = |state: &ClusterState| {
        let authority = state.authorities.get(AuthorityType::Spiffe);
        let all = authority.active.tls.iter().chain(&authority.additional.tls);
        all.map(|one| one.certificate.clone()).collect::<Vec<_>>()
    };
    let [first] = own(state).try_into().unwrap();
    let same = CsrCreationMode::Same;
    for roles in [&[][..], &["editor"]] {
        assert_eq!(
            code(sign(roles, &first, same).await),
            Code::PermissionDenied
        );
    }
    let signer: &[&str] = &["signer"];
    assert_eq!(code(sign(signer, b"x", same).await), Code::NotFound);
    let unspecified = sign(signer, &first, CsrCreationMode::Unspecified).await;
    assert_eq!(code(unspecified), Code::InvalidArgument);

    // The keys of a rotation that has begun can be certified before they sign.
    let step = Step {
        to: Phase::Init,
        mode: Rotate::Manual,
        grace: GRACE,
    };
    state.rotate(AuthorityType::Spiffe, step, "test").unwrap();
    let both = own(state);
    assert_eq!(both.len(), 2);
    for issuer in &both {
        for mode in [CsrCreationMode::Same, CsrCreationMode::Empty] {
            let answer = sign(signer, issuer, mode).await.unwrap().into_inner();
            let certificate = x509_cert::Certificate::from_der(issuer).unwrap();
            let request = CertReq::from_der(&answer.csr).unwrap();
            let subject = match mode {
                CsrCreationMode::Same => certificate.tbs_certificate.subject,
                _ => RdnSequence::default(),
            };
            assert_eq!(request.info.subject, subject);
            let spki = request.info.public_key.to_der().unwrap();
            assert_eq!(spki, Certificate::from_der(issuer).unwrap().spki());
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("csr");
            std::fs::write(&path, &answer.csr).unwrap();
            let verified = std::process::Command::new("openssl")
                .args(["req", "-inform", "DER", "-verify", "-noout", "-in"])
                .arg(&path)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&verified.stderr).into_owned();
            assert!(verified.status.success() && said.contains("OK"), "{said}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_written_is_read_back_and_recorded() {
    let service = service();
    let state = &service.state;
    let (editor, nobody) = (caller_with(state, &["editor"]), caller_with(state, &[]));
    let issuer = {
        let authority = state.authorities.get(AuthorityType::Spiffe);
        authority.signer().unwrap().certificate.clone()
    };
    let message = |issuer: &[u8]| wire::X509IssuerOverride {
        kind: KIND.to_owned(),
        version: "v1".to_owned(),
        metadata: Some(Metadata {
            name: "default".to_owned(),
            ..Metadata::default()
        }),
        spec: Some(wire::X509IssuerOverrideSpec {
            overrides: vec![Override {
                issuer: issuer.to_vec(),
                chain: Vec::new(),
            }],
        }),
        ..Default::default()
    };
    let create = async |by, message| {
        let x509_issuer_override = Some(message);
        let request = wire::CreateX509IssuerOverrideRequest {
            x509_issuer_override,
        };
        service.create_x509_issuer_override(with(by, request)).await
    };
    let refused = create(&nobody, message(&issuer)).await;
    assert_eq!(code(refused), Code::PermissionDenied);
    let refused = create(&editor, message(b"junk")).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    let made = create(&editor, message(&issuer))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(made.spec, message(&issuer).spec);
    let again = create(&editor, message(&issuer)).await;
    assert_eq!(code(again), Code::AlreadyExists);

    let get = async |by| {
        let name = "default".to_owned();
        let request = wire::GetX509IssuerOverrideRequest { name };
        service.get_x509_issuer_override(with(by, request)).await
    };
    assert_eq!(get(&editor).await.unwrap().into_inner(), made);
    assert_eq!(code(get(&nobody).await), Code::PermissionDenied);
    let request = wire::ListX509IssuerOverridesRequest::default();
    let listed = service
        .list_x509_issuer_overrides(with(&editor, request))
        .await;
    let listed = listed.unwrap().into_inner().x509_issuer_overrides;
    assert_eq!(listed, std::slice::from_ref(&made));

    let update = async |message: &wire::X509IssuerOverride| {
        let x509_issuer_override = Some(message.clone());
        let request = wire::UpdateX509IssuerOverrideRequest {
            x509_issuer_override,
        };
        service
            .update_x509_issuer_override(with(&editor, request))
            .await
    };
    update(&made).await.unwrap();
    assert_eq!(code(update(&made).await), Code::FailedPrecondition, "stale");
    let request = wire::UpsertX509IssuerOverrideRequest {
        x509_issuer_override: Some(message(&issuer)),
    };
    let upserted = service
        .upsert_x509_issuer_override(with(&editor, request))
        .await;
    assert_eq!(upserted.unwrap().into_inner().spec, made.spec);
    let delete = async || {
        let name = "default".to_owned();
        let request = wire::DeleteX509IssuerOverrideRequest { name };
        service
            .delete_x509_issuer_override(with(&editor, request))
            .await
    };
    delete().await.unwrap();
    assert_eq!(code(delete().await), Code::NotFound);
    let events = state.audit.events();
    let ours = events.iter().filter(|event| event["user"] == "bot-example");
    let codes: Vec<&Value> = ours.map(|event| &event["code"]).collect();
    assert_eq!(codes, ["WID007I", "WID007I", "WID007I", "WID008I"]);
}
