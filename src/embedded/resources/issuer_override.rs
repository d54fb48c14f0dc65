//! `kind: workload_identity_x509_issuer_override`: SVIDs as part of another hierarchy.

use super::Resource;
use crate::embedded::workload_identity::issuer_override::{NAME, read};
use crate::yaml::Fields;

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    for key in fields.keys() {
        if key == "overrides" {
            fields.ignore(key);
        }
    }
    if resource.name != NAME {
        fields.error_here(
            format!("the name {:?} counts for nothing", resource.name),
            "the one that is used has the name `default`",
        );
    }
    if let Err(error) = read(&resource.spec) {
        fields.error_here(error.to_string(),
            "write certificates as base64 of DER, the chain from the issuer on and without its root",
        );
    }
}
