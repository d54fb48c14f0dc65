//! `kind: workload_identity`: a SPIFFE ID and who may have it.

use std::time::SystemTime;

use super::{Resource, whole};
use crate::yaml::Fields;

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource, _now: SystemTime) {
    for key in ["spiffe", "rules"] {
        fields.ignore(key);
    }
    let id = resource.spec_text("/spiffe/id");
    if !id.starts_with('/') {
        whole(
            fields,
            format!("`spiffe.id` must start with `/`, not be {id:?}"),
            "write the path of the SPIFFE ID, for example `/svc/foo`",
        );
    }
}
