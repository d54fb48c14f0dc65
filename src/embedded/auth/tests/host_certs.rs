//! SSH certificates for servers.

use tonic::Code;

use super::served::served;
use super::*;
use crate::pb::teleport::trust::v1::GenerateHostCertRequest;

fn host(principals: &[&str]) -> GenerateHostCertRequest {
    GenerateHostCertRequest {
        key: key().public_ssh_line().unwrap().into_bytes(),
        principals: principals.iter().map(|&name| name.to_owned()).collect(),
        cluster_name: "real.example.org".to_owned(),
        role: "Node".to_owned(),
        ttl: Some(prost_types::Duration {
            seconds: 3600,
            nanos: 0,
        }),
        ..GenerateHostCertRequest::default()
    }
}

impl Lab {
    async fn host_cert(
        &self,
        by: &Certs,
        request: GenerateHostCertRequest,
    ) -> Result<Vec<u8>, Status> {
        let request = self.from(Some(by), request);
        let answer = self.auth.generate_host_cert(request).await?;
        Ok(answer.into_inner().ssh_certificate)
    }
}

#[tokio::test]
async fn host_certificates_are_as_recorded() {
    let (lab, _, wide, _) = served().await;
    let line = lab
        .host_cert(&wide, host(&["node.example.com"]))
        .await
        .unwrap();
    let line = String::from_utf8(line).unwrap();
    let certificate = ssh_key::Certificate::from_openssh(line.trim()).unwrap();
    assert_eq!(
        certificate.cert_type(),
        ssh_key::certificate::CertType::Host
    );
    assert_eq!(certificate.key_id(), "");
    assert_eq!(certificate.valid_principals(), ["node.example.com"]);
    assert!(certificate.critical_options().is_empty());
    let extensions: Vec<(String, String)> = certificate
        .extensions()
        .iter()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    assert_eq!(
        extensions,
        [
            ("x-teleport-authority", "real.example.org"),
            ("x-teleport-role", "Node")
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
    );
    assert_eq!(certificate.valid_before() - certificate.valid_after(), 3660);
    let authority = lab.auth.state.authorities.trusted_ssh(AuthorityType::Host);
    let signer = ssh_key::PublicKey::new(certificate.signature_key().clone(), "");
    assert_eq!(signer.to_openssh().unwrap(), authority[0].trim());
    let events = lab.events("cert.create");
    let event = events.last().unwrap();
    assert_eq!(event["cert_type"], "host");
    assert_eq!(
        event["identity"]["principals"],
        serde_json::json!(["node.example.com"])
    );
}

#[tokio::test]
async fn host_certificates_are_refused_with_a_reason() {
    let (lab, own, wide, narrow) = served().await;
    let change = |edit: fn(&mut GenerateHostCertRequest)| {
        let mut request = host(&["a"]);
        edit(&mut request);
        request
    };
    let denied = r#"access denied to perform action "create" on "host_cert""#;
    for (by, request, code, text) in [
        (&own, host(&["a"]), Code::PermissionDenied, denied),
        (&narrow, host(&["a"]), Code::PermissionDenied, denied),
        (
            &wide,
            host(&[]),
            Code::InvalidArgument,
            "host ID or principals are required",
        ),
        (&wide, host(&["a", ""]), Code::InvalidArgument, "principal"),
        (
            &wide,
            host(&["a\nb"]),
            Code::InvalidArgument,
            "the principal \"a\\nb\"",
        ),
        (
            &wide,
            host(&["x"; 257]),
            Code::InvalidArgument,
            "more than 256",
        ),
        (
            &wide,
            change(|request| request.cluster_name = "leaf".to_owned()),
            Code::NotFound,
            "cert authority host/leaf is not found",
        ),
        (
            &wide,
            change(|request| request.role = "Auth".to_owned()),
            Code::InvalidArgument,
            "role \"Auth\" is not supported",
        ),
        (
            &wide,
            change(|request| request.ttl = None),
            Code::InvalidArgument,
            "time to live",
        ),
        (
            &wide,
            change(|request| {
                request.ttl = Some(prost_types::Duration {
                    seconds: -5,
                    nanos: 0,
                });
            }),
            Code::InvalidArgument,
            "time to live",
        ),
        (
            &wide,
            change(|request| request.key = b"ssh-ed25519 junk".to_vec()),
            Code::InvalidArgument,
            "cannot read the SSH public key",
        ),
        (
            &wide,
            change(|request| request.key.clear()),
            Code::InvalidArgument,
            "must provide a public key",
        ),
    ] {
        let refusal = lab.host_cert(by, request).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
        assert!(refusal.message().contains(text), "{refusal}");
    }
    let long = change(|request| {
        request.ttl = Some(prost_types::Duration {
            seconds: i64::MAX,
            nanos: 0,
        });
    });
    let long = String::from_utf8(lab.host_cert(&wide, long).await.unwrap()).unwrap();
    let long = ssh_key::Certificate::from_openssh(long.trim()).unwrap();
    assert_eq!(long.valid_before() - long.valid_after(), 7 * 24 * 3600 + 60);
}
