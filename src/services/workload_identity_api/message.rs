//! What the SPIFFE messages hold.

use bytes::Bytes;
use tonic::Status;

use crate::pb::workload_api::{Jwtsvid, X509svid};
use crate::workload::jwt::JwtSvid;
use crate::workload::{Bundles, IssueError, Svid};

/// One identity of `FetchX509SVID`.
pub(super) fn entry(svid: &Svid, bundles: &Bundles) -> X509svid {
    X509svid {
        spiffe_id: svid.id.to_string(),
        x509_svid: svid.chain.clone(),
        x509_svid_key: svid.key.clone(),
        bundle: bundles.local().clone(),
        hint: svid.hint.clone(),
    }
}

/// Federated bundles by the ID of their trust domain.
pub(super) fn federated(bundles: &Bundles) -> impl Iterator<Item = (String, Bytes)> {
    bundles
        .federated_x509()
        .map(|(domain, bundle)| (domain.id(), bundle.clone()))
}

/// One identity of `FetchJWTSVID`.
pub(super) fn token(svid: &JwtSvid) -> Jwtsvid {
    Jwtsvid {
        spiffe_id: svid.id.to_string(),
        svid: svid.token.clone(),
        hint: svid.hint.clone(),
    }
}

/// A refusal or a failure to issue, as the standard wants it answered.
pub(super) fn not_issued(error: IssueError) -> Status {
    match error {
        IssueError::Refused(why) => Status::permission_denied(format!("no identity issued: {why}")),
        IssueError::Unavailable(why) | IssueError::Answer(why) => Status::unavailable(why),
    }
}

/// JSON claims as protobuf.
pub(super) fn claims(value: serde_json::Value) -> prost_types::Value {
    use prost_types::value::Kind;
    use serde_json::Value;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(values) => Kind::ListValue(prost_types::ListValue {
            values: values.into_iter().map(claims).collect(),
        }),
        Value::Object(fields) => Kind::StructValue(prost_types::Struct {
            fields: fields
                .into_iter()
                .map(|(name, value)| (name, claims(value)))
                .collect(),
        }),
    };
    prost_types::Value { kind: Some(kind) }
}
