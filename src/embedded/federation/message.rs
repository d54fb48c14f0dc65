//! Federations as agents see them.

use prost::Message as _;
use prost_types::Timestamp;
use serde_json::Value;

use super::KIND;
use crate::embedded::desk::metadata;
use crate::embedded::instant::parse_rfc3339;
use crate::embedded::store::{Resource, StoreError, Tx};
use crate::pb::teleport::machineid::v1 as wire;

/// The resource on the wire. What a source has that the wire has no field for (`https_spiffe`) is left
/// out: agents use the status alone.
pub(in crate::embedded) fn to_message(resource: &Resource) -> wire::SpiffeFederation {
    let status = &resource.status;
    let time = |key: &str| -> Option<Timestamp> {
        Some(parse_rfc3339(status.get(key)?.as_str()?)?.into())
    };
    wire::SpiffeFederation {
        kind: resource.kind.clone(),
        sub_kind: resource.sub_kind.clone(),
        version: resource.version.clone(),
        metadata: Some(metadata(resource)),
        spec: Some(wire::SpiffeFederationSpec {
            bundle_source: resource.spec.get("bundle_source").map(source),
        }),
        status: (!status.is_null()).then(|| wire::SpiffeFederationStatus {
            current_bundle: text(status, "/current_bundle").unwrap_or_default(),
            current_bundle_synced_at: time("current_bundle_synced_at"),
            next_sync_at: time("next_sync_at"),
            current_bundle_synced_from: status.get("current_bundle_synced_from").map(source),
        }),
    }
}

/// The page in resources of a request that names no size, and the largest one.
const PAGES: (usize, usize) = (100, 1000);
/// The size from which on a page is full, in bytes: clients read messages of 4 MiB.
const FULL_PAGE: usize = 1024 * 1024;

/// One page of all federations, by name. The token of a page is the name that it begins with.
pub(in crate::embedded) fn page(
    tx: &Tx<'_>,
    request: &wire::ListSpiffeFederationsRequest,
) -> Result<wire::ListSpiffeFederationsResponse, StoreError> {
    let limit = match usize::try_from(request.page_size) {
        Ok(0) | Err(_) => PAGES.0,
        Ok(limit) => limit.min(PAGES.1),
    };
    let mut page = wire::ListSpiffeFederationsResponse::default();
    let mut size = 0;
    tx.each_from(KIND, &request.page_token, |resource| {
        if page.spiffe_federations.len() == limit || size >= FULL_PAGE {
            page.next_page_token = resource.name;
            return false;
        }
        let message = to_message(&resource);
        size += message.encoded_len();
        page.spiffe_federations.push(message);
        true
    })?;
    Ok(page)
}

fn source(json: &Value) -> wire::SpiffeFederationBundleSource {
    wire::SpiffeFederationBundleSource {
        r#static: text(json, "/static/bundle")
            .map(|bundle| wire::SpiffeFederationBundleSourceStatic { bundle }),
        https_web: text(json, "/https_web/bundle_endpoint_url").map(|bundle_endpoint_url| {
            wire::SpiffeFederationBundleSourceHttpsWeb {
                bundle_endpoint_url,
            }
        }),
    }
}

fn text(json: &Value, pointer: &str) -> Option<String> {
    json.pointer(pointer)?.as_str().map(str::to_owned)
}
