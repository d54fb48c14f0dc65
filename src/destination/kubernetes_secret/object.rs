//! What an apply sends, decided from the Secret that is there. No network in here.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;

use super::Settings;
use crate::destination::FileSet;

/// The field manager, as upstream names itself: either agent goes on where the other stopped.
pub(super) const MANAGER: &str = "tbot";
/// Always empty. Upstream writes it to see whether it can write.
const WRITE_TEST: &str = ".write-test";
/// The most bytes that the values of a Secret may have together (Kubernetes' `MaxSecretSize`).
const MAX_BYTES: usize = 1024 * 1024;
/// The longest key.
const MAX_KEY: usize = 253;
/// The type of Secrets that are made here.
pub(super) const OPAQUE: &str = "Opaque";

/// The object to apply, or why it must not be.
///
/// What this manager holds is sent again with its values, because an apply takes away what its
/// manager held and does not send; what others hold is not sent, so that it stays theirs.
pub(super) fn wanted(
    live: Option<&Secret>,
    files: &FileSet,
    settings: &Settings,
    namespace: &str,
) -> Result<Secret, String> {
    if let Some(live) = live {
        suitable(live)?;
    }
    let present = live.and_then(|live| live.data.as_ref());
    let mut data: BTreeMap<String, ByteString> = match (live, present) {
        (Some(live), Some(present)) => {
            let own = own(live, "Apply", &["f:data"]);
            let ours = present.iter().filter(|(key, _)| own.contains(key.as_str()));
            ours.map(|(key, value)| (key.clone(), value.clone()))
                .collect()
        }
        _ => BTreeMap::new(),
    };
    data.insert(WRITE_TEST.to_owned(), ByteString::default());
    for (name, content) in files {
        check_key(name)?;
        data.insert(name.clone(), ByteString(content.expose().clone()));
    }
    check_size(present, &data)?;
    let type_ = live
        .and_then(|live| live.type_.clone())
        .unwrap_or_else(|| OPAQUE.to_owned());
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(settings.name.clone()),
            namespace: Some(namespace.to_owned()),
            resource_version: live.and_then(|live| live.metadata.resource_version.clone()),
            labels: (!settings.labels.is_empty()).then(|| settings.labels.clone()),
            ..ObjectMeta::default()
        },
        type_: Some(type_),
        data: Some(data),
        ..Secret::default()
    })
}

/// Whether the Secret is one to write to.
pub(super) fn suitable(live: &Secret) -> Result<(), String> {
    if live.immutable == Some(true) {
        return Err(
            "it is immutable: delete it, and it is made anew, or choose another name".to_owned(),
        );
    }
    if live.metadata.deletion_timestamp.is_some() {
        return Err("it is being deleted and waits for its finalizers".to_owned());
    }
    let type_ = live.type_.as_deref().unwrap_or(OPAQUE);
    let foreign = (type_.starts_with("kubernetes.io/") && type_ != "kubernetes.io/tls")
        || type_.starts_with("bootstrap.kubernetes.io/")
        || type_.starts_with("helm.sh/");
    if foreign {
        return Err(format!(
            "it is a Secret of type {type_}, which something else writes and reads: choose another \
             name (a Secret made here is of type {OPAQUE})"
        ));
    }
    let owners = live.metadata.owner_references.iter().flatten();
    if let Some(owner) = owners
        .filter(|owner| owner.controller == Some(true))
        .map(|owner| format!("{} {}", owner.kind, owner.name))
        .next()
    {
        return Err(format!(
            "the controller of {owner} keeps it and would undo what is written: choose another name"
        ));
    }
    Ok(())
}

/// The keys of the map at `path` that this manager wrote by `operation` and nobody else holds.
pub(super) fn own<'s>(live: &'s Secret, operation: &str, path: &[&str]) -> BTreeSet<&'s str> {
    let (mut own, mut others) = (BTreeSet::new(), BTreeSet::new());
    for entry in live.metadata.managed_fields.iter().flatten() {
        let fields = entry.fields_v1.as_ref().and_then(|fields| {
            let map = path.iter().try_fold(&fields.0, |at, step| at.get(*step))?;
            map.as_object()
        });
        let keys = fields
            .into_iter()
            .flat_map(|fields| fields.keys())
            .filter_map(|key| key.strip_prefix("f:"));
        if entry.operation.as_deref() == Some(operation)
            && entry.manager.as_deref() == Some(MANAGER)
        {
            own.extend(keys);
        } else {
            others.extend(keys);
        }
    }
    &own - &others
}

/// Kubernetes takes `[-._a-zA-Z0-9]+` for a key, and the kubelet makes a file of it.
fn check_key(name: &str) -> Result<(), String> {
    if name.contains('/') {
        return Err(format!(
            "a Secret has no directories, and {name:?} is a file in one: this output needs a \
             destination of type directory"
        ));
    }
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if !plain || name.is_empty() || name == "." || name.starts_with("..") || name.len() > MAX_KEY {
        return Err(format!(
            "{name:?} is no key for a Secret: at most {MAX_KEY} letters, digits, `-`, `_` and `.`, \
             not beginning with `..`"
        ));
    }
    Ok(())
}

/// Adds up what would be in the Secret, other managers' keys included.
pub(super) fn check_size(
    present: Option<&BTreeMap<String, ByteString>>,
    data: &BTreeMap<String, ByteString>,
) -> Result<(), String> {
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for (key, value) in present.into_iter().flatten().chain(data) {
        sizes.insert(key, value.0.len());
    }
    let total: usize = sizes.values().sum();
    if total <= MAX_BYTES {
        return Ok(());
    }
    let mut largest: Vec<_> = sizes.into_iter().collect();
    largest.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    let largest: Vec<String> = largest
        .iter()
        .take(3)
        .map(|(key, size)| format!("{key} {size}"))
        .collect();
    Err(format!(
        "it would hold {total} bytes, and Kubernetes takes {MAX_BYTES} in one Secret (largest: {}): \
         give outputs Secrets of their own",
        largest.join(", ")
    ))
}
