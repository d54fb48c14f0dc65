//! `kind: workload_identity`: a SPIFFE ID and who may have it.

use super::Resource;
use crate::embedded::workload_identity::resource::{spec_from_json, spec_to_json};
use crate::yaml::Fields;

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    for key in fields.keys() {
        fields.ignore(key);
    }
    match spec_from_json(&resource.spec) {
        Ok(spec) => resource.spec = spec_to_json(&spec),
        Err(error) => fields.error_here(
            format!("`{}` {}", error.path, error.problem),
            "docs/reference/workload_identity.md has all of them",
        ),
    }
}
