//! The `onboarding` section: how the bot joins and whom it believes while it has no identity.

use std::sync::Arc;

use crate::cluster::trust::{PIN_FORM, Trust, is_pin};
use crate::join::{self, JoinMethod, METHODS, Prover, TokenSource};
use crate::yaml::Fields;

use super::plan::Onboarding;

/// Sections of upstream's join methods. Those of other methods than the configured one are read by
/// nobody, and no mistake in a file that is shared.
const SECTIONS: &[&str] = &[
    "azure",
    "bound_keypair",
    "generic_oidc",
    "gitlab",
    "kubernetes",
    "terraform",
];

/// Reads the section from the root's fields.
pub(super) fn read(root: &mut Fields<'_>, insecure: bool) -> Onboarding {
    let mut onboarding = Onboarding {
        trust: Trust {
            insecure,
            ..Trust::default()
        },
        ..Onboarding::default()
    };
    let Some(mut fields) = root.section("onboarding") else {
        return onboarding;
    };
    onboarding.token = fields.string("token").map(TokenSource::new);
    onboarding.method = fields
        .string("join_method")
        .and_then(|name| method(&fields, "join_method", &name))
        .map(|method| configured(method, &mut fields));
    onboarding.trust.ca_pins = fields.strings("ca_pins").unwrap_or_default();
    onboarding.trust.ca_path = fields.string("ca_path").map(Into::into);
    for (index, pin) in onboarding.trust.ca_pins.iter().enumerate() {
        if !is_pin(pin) {
            fields.error(
                "ca_pins",
                format!("item {index}, {pin:?}, is no pin"),
                Some(PIN_FORM),
            );
        }
    }
    let pinned = !onboarding.trust.ca_pins.is_empty();
    let has_ca = onboarding.trust.ca_path.is_some();
    for (given, key) in [(pinned, "ca_pins"), (has_ca, "ca_path")] {
        if given && insecure {
            fields.error(
                key,
                format!(
                    "`{key}` together with `insecure`: one checks the server, the other does not"
                ),
                Some("remove `insecure`"),
            );
        }
    }
    if pinned && has_ca {
        fields.error(
            "ca_path",
            "`ca_path` together with `ca_pins`",
            Some("keep one of them"),
        );
    }
    for section in SECTIONS {
        fields.ignore(section);
    }
    fields.finish();
    onboarding
}

/// The method with its own section, if it has one and it is there.
fn configured(method: &'static dyn JoinMethod, fields: &mut Fields<'_>) -> Arc<dyn Prover> {
    let Some(mut section) = method.section().and_then(|key| fields.section(key)) else {
        return method.read(None);
    };
    let prover = method.read(Some(&mut section));
    section.finish();
    prover
}

/// The join method called `name`; reports at `key` if there is none.
pub(super) fn method(
    fields: &Fields<'_>,
    key: &str,
    name: &str,
) -> Option<&'static dyn JoinMethod> {
    let found = join::method(name);
    if found.is_none() {
        let here: Vec<&str> = METHODS.iter().map(|method| method.name()).collect();
        fields.unknown_kind(key, "join methods", name, &here, &[]);
    }
    found
}
