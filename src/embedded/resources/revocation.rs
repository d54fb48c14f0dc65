//! `kind: workload_identity_x509_revocation`: an X.509-SVID that must not be trusted any more.

use super::{Resource, set, time};
use crate::embedded::instant::rfc3339;
use crate::yaml::Fields;

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    let serial = &resource.name;
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if serial.is_empty() || !serial.len().is_multiple_of(2) || !serial.bytes().all(hex) {
        fields.error_here(
            format!("the name {serial:?} is no serial number"),
            "write the certificate's serial in lower-case hex, two digits a byte, no colons",
        );
    }
    if resource.expires.is_none() {
        fields.error_here(
            "`metadata.expires` is required",
            "write the end of the certificate's life: until then it stays revoked",
        );
    }
    fields.required("reason");
    match time(fields, "revoked_at") {
        Some(at) => set(&mut resource.spec, "revoked_at", rfc3339(at)),
        None if fields.has("revoked_at") => {}
        None => fields.error("revoked_at", "`revoked_at` is required", None),
    }
}
