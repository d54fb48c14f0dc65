//! `kind: spiffe_federation`: another trust domain, and where its bundle comes from.

use super::Resource;
use crate::embedded::federation::source::Endpoint;
use crate::spiffe::bundle::Document;
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::yaml::Fields;

/// The sources, of which a federation has one. The last one is not Teleport's.
const SOURCES: &[&str] = &["static", "https_web", "https_spiffe"];

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    if TrustDomain::new(&resource.name).is_err() {
        fields.error_here(
            format!("the name {:?} is no trust domain", resource.name),
            "write its bare name, without spiffe://: 1 to 255 of a-z, 0-9, '.', '-', '_'",
        );
    }
    let Some(mut source) = fields.section("bundle_source") else {
        if !fields.has("bundle_source") {
            let hint = Some("add `bundle_source: {https_web: {bundle_endpoint_url: https://…}}`");
            fields.error("bundle_source", "`bundle_source` is required", hint);
        }
        return;
    };
    let given: Vec<&str> = SOURCES
        .iter()
        .copied()
        .filter(|key| source.has(key))
        .collect();
    if given.len() != 1 {
        source.error_here(
            format!("{} sources are given", given.len()),
            "name exactly one of static, https_web and https_spiffe",
        );
    }
    if let Some(mut fixed) = source.section("static") {
        bundle(&mut fixed, "bundle", true);
        fixed.finish();
    }
    if let Some(mut web) = source.section("https_web") {
        endpoint(&mut web);
        web.finish();
    }
    if let Some(mut spiffe) = source.section("https_spiffe") {
        endpoint(&mut spiffe);
        let itself =
            endpoint_id(&mut spiffe).is_some_and(|id| id.trust_domain().name() == resource.name);
        bundle(&mut spiffe, "initial_bundle", itself);
        spiffe.finish();
    }
    source.finish();
}

fn endpoint(fields: &mut Fields<'_>) {
    if let Some(url) = fields.required("bundle_endpoint_url")
        && let Err(error) = Endpoint::parse(&url)
    {
        fields.error("bundle_endpoint_url", error.to_string(), None);
    }
}

fn endpoint_id(fields: &mut Fields<'_>) -> Option<SpiffeId> {
    let id = fields.required("endpoint_spiffe_id")?;
    match id.parse() {
        Ok(id) => Some(id),
        Err(error) => {
            let message = format!("{id:?} is no SPIFFE ID of a workload");
            fields.error("endpoint_spiffe_id", message, Some(&format!("{error}")));
            None
        }
    }
}

fn bundle(fields: &mut Fields<'_>, key: &str, required: bool) {
    let text = if required {
        fields.required(key)
    } else {
        fields.string(key)
    };
    if let Some(text) = text
        && let Err(error) = Document::parse(text.as_bytes())
    {
        let hint = Some("write the JSON document of the trust domain as one text");
        fields.error(key, format!("is no SPIFFE bundle: {error}"), hint);
    }
}
