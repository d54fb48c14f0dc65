//! Joining with a token over HTTP: `POST /webapi/host/credentials`, the JSON form of
//! `proto.JoinService/RegisterUsingToken`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use serde_json::{Value, json};
use tonic::service::Routes;
use tonic::{Code, Request, Status};

use super::Refusal;
use crate::embedded::caller::Caller;
use crate::embedded::instant::parse_rfc3339;
use crate::pb::proto::Certs;
use crate::pb::proto::join_service_client::JoinServiceClient;
use crate::pb::types::RegisterUsingTokenRequest;

/// Joins with the request in `body`, on behalf of `caller`.
pub(super) async fn join(routes: Routes, body: &[u8], caller: Caller) -> Result<Value, Refusal> {
    let message = message(body, &caller)?;
    let mut request = Request::new(message);
    request.extensions_mut().insert(caller);
    let certs = JoinServiceClient::new(routes)
        .register_using_token(request)
        .await
        .map_err(|status| refusal(&status))?
        .into_inner();
    Ok(answer(&certs))
}

/// Reads the JSON form. What a client may not say about itself (its address, its instance and
/// its generation) is set or left out here.
fn message(body: &[u8], caller: &Caller) -> Result<RegisterUsingTokenRequest, Refusal> {
    let bad = |what: &str| Refusal(StatusCode::BAD_REQUEST, what.to_owned());
    let json: Value = serde_json::from_slice(body)
        .map_err(|error| bad(&format!("the body is no JSON: {error}")))?;
    let text = |key: &str| match json.get(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(bad(&format!("`{key}` must be text"))),
    };
    let bytes = |key: &str| {
        STANDARD
            .decode(text(key)?)
            .map_err(|_source| bad(&format!("`{key}` must be base64")))
    };
    let expires = match text("expires")?.as_str() {
        "" => None,
        at => Some(parse_rfc3339(at).ok_or_else(|| bad("`expires` must be an RFC 3339 time"))?),
    };
    Ok(RegisterUsingTokenRequest {
        host_id: text("hostID")?,
        node_name: text("node_name")?,
        role: text("role")?,
        token: text("token")?,
        public_tls_key: bytes("public_tls_key")?,
        public_ssh_key: bytes("public_ssh_key")?,
        remote_addr: caller.addr.ip().to_string(),
        ec2_identity_document: bytes("ec2_id")?,
        id_token: text("id_token")?,
        expires: expires.map(Into::into),
        ..RegisterUsingTokenRequest::default()
    })
}

fn answer(certs: &Certs) -> Value {
    let encode = |bytes: &Vec<u8>| STANDARD.encode(bytes);
    json!({
        "ssh": encode(&certs.ssh),
        "tls": encode(&certs.tls),
        "tls_ca_certs": certs.tlsca_certs.iter().map(encode).collect::<Vec<_>>(),
        "ssh_ca_certs": certs.sshca_certs.iter().map(encode).collect::<Vec<_>>(),
    })
}

/// The HTTP status that stands for a gRPC one (upstream `trace.ErrorToCode`).
fn refusal(status: &Status) -> Refusal {
    let code = match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => StatusCode::FORBIDDEN,
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists => StatusCode::CONFLICT,
        Code::FailedPrecondition => StatusCode::PRECONDITION_FAILED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    Refusal(code, status.message().to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::embedded::caller::Listener;

    fn caller() -> Caller {
        Caller {
            addr: SocketAddr::from(([192, 0, 2, 1], 5)),
            listener: Listener::Web,
            identity: None,
        }
    }

    #[test]
    fn clients_cannot_claim_an_instance() {
        let body = json!({
            "hostID": "", "role": "Bot", "token": "t", "additional_principals": null,
            "public_tls_key": STANDARD.encode("key"), "public_ssh_key": null,
            "remote_addr": "10.0.0.1", "expires": "2030-01-01T00:00:00.5Z",
            "bot_instance_id": "stolen", "bot_generation": 7, "previous_bot_instance_id": "x",
        });
        let message = message(body.to_string().as_bytes(), &caller()).unwrap();
        let expires = message.expires.unwrap();
        assert_eq!(
            (expires.seconds, expires.nanos),
            (1_893_456_000, 500_000_000)
        );
        let expected = RegisterUsingTokenRequest {
            role: "Bot".to_owned(),
            token: "t".to_owned(),
            public_tls_key: b"key".to_vec(),
            remote_addr: "192.0.2.1".to_owned(),
            expires: message.expires,
            ..RegisterUsingTokenRequest::default()
        };
        assert_eq!(message, expected);
    }

    #[test]
    fn odd_bodies_are_bad_requests() {
        for body in [
            "",
            "[",
            "{\"token\": 1}",
            "{\"public_tls_key\": \"*\"}",
            "{\"expires\": \"x\"}",
        ] {
            let Refusal(status, text) = message(body.as_bytes(), &caller()).unwrap_err();
            assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
            assert!(!text.is_empty());
        }
    }

    #[tokio::test]
    async fn refusals_keep_their_words() {
        let Refusal(status, text) = join(Routes::default(), b"{}", caller()).await.unwrap_err();
        assert_eq!(status, StatusCode::NOT_IMPLEMENTED, "{text}");
        let denied = refusal(&Status::permission_denied("token expired or not found"));
        assert_eq!(denied.0, StatusCode::FORBIDDEN);
        assert_eq!(denied.1, "token expired or not found");
    }
}
