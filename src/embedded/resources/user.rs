//! `kind: user`: kept because guides write one beside the role that they are about. Nobody logs in here,
//! so what a user could prove itself by is not read.

use super::{Resource, set};
use crate::yaml::Fields;

/// Parts of a user that are for logging in, which this cluster does not have.
const LOGIN: &[&str] = &[
    "created_by",
    "expires",
    "github_identities",
    "oidc_identities",
    "saml_identities",
    "status",
    "trusted_device_ids",
];

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    let roles = fields.strings("roles").unwrap_or_default();
    if roles.is_empty() {
        fields.error("roles", "a user needs a role", Some("name at least one"));
    }
    set(&mut resource.spec, "roles", roles);
    fields.ignore("traits");
    for key in LOGIN {
        fields.ignore(key);
    }
}
