//! Refused calls in the audit log, one line each.
//!
//! Joins write their own lines, which tell more.

use serde_json::json;
use tonic::{Code, Status};

use crate::embedded::audit::Audit;
use crate::embedded::caller::Caller;

/// The event's name and code. A Teleport cluster has no event for this; both are our own.
pub(in crate::embedded) const EVENT: (&str, &str) = ("request.refused", "TRQ00E");
/// How much of a refusal's text is kept, in characters: callers choose some of it.
const MAX_TEXT: usize = 1024;
/// Services whose calls make or change something.
const WEIGHTY: &[&str] = &[
    "/proto.AuthService/GenerateUserCerts",
    "/teleport.workloadidentity.v1.WorkloadIdentityIssuanceService/",
    "/teleport.workloadidentity.v1.WorkloadIdentityResourceService/",
];
/// Services that write a line for each join, refused or not.
const JOINS: &[&str] = &["/proto.JoinService/", "/teleport.join.v1.JoinService/"];

/// Whether a call of `path` that ended with `code` was refused and nobody has told yet.
///
/// A question about something that is not there is none; neither is a failure of the cluster.
fn is_refusal(path: &str, code: Code) -> bool {
    let among = |list: &[&str]| list.iter().any(|prefix| path.starts_with(prefix));
    match code {
        _ if among(JOINS) => false,
        Code::PermissionDenied | Code::Unauthenticated => true,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::ResourceExhausted
        | Code::OutOfRange
        | Code::Unknown => among(WEIGHTY),
        _ => false,
    }
}

/// Writes a line if the call was refused.
pub(super) fn note(audit: &Audit, path: &str, caller: Option<&Caller>, status: &Status) {
    if !is_refusal(path, status.code()) {
        return;
    }
    let identity = caller.and_then(|caller| caller.identity.as_ref());
    let text = |of: fn(&crate::embedded::caller::TlsIdentity) -> &str| {
        identity.map(of).unwrap_or_default().to_owned()
    };
    let error: String = status.message().chars().take(MAX_TEXT).collect();
    let (event, code) = EVENT;
    audit.emit(json!({
        "event": event,
        "code": code,
        "success": false,
        "method": path,
        "error": error,
        "user": text(|identity| &identity.user),
        "impersonator": text(|identity| &identity.impersonator),
        "bot_name": text(|identity| &identity.bot_name),
        "bot_instance_id": text(|identity| &identity.bot_instance_id),
        "addr.remote": caller.map(|caller| caller.addr.ip().to_string()),
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_from_failures_and_from_questions() {
        const CERTS: &str = "/proto.AuthService/GenerateUserCerts";
        const SVID: &str =
            "/teleport.workloadidentity.v1.WorkloadIdentityIssuanceService/IssueWorkloadIdentity";
        for (path, code, refused) in [
            (CERTS, Code::PermissionDenied, true),
            (CERTS, Code::NotFound, true),
            (CERTS, Code::Ok, false),
            (CERTS, Code::Unavailable, false),
            (CERTS, Code::Cancelled, false),
            (SVID, Code::InvalidArgument, true),
            (SVID, Code::Unknown, true),
            ("/proto.AuthService/GetRole", Code::NotFound, false),
            ("/proto.AuthService/GetRole", Code::PermissionDenied, true),
            ("/proto.AuthService/Nothing", Code::Unimplemented, false),
            (
                "/proto.JoinService/RegisterUsingToken",
                Code::PermissionDenied,
                false,
            ),
        ] {
            assert_eq!(is_refusal(path, code), refused, "{path} {code:?}");
        }
    }
}
