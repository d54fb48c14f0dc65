//! Finds what was signed of an image: cosign's own tag, and what refers to the image.

use std::collections::HashMap;

use prost::Message as _;
use serde::Deserialize;

use super::bundle::{self, BundleError};
use super::reference::{Reference, is_digest};
use super::registry::{Registries, RegistryError, Repository};
use crate::pb::teleport::workloadidentity::v1::SigstoreVerificationPayload;

/// Payloads that one way of looking brings at most.
const MAX_PAYLOADS: usize = 25;
/// The largest layer that is read, in bytes.
const MAX_LAYER: usize = 10 * 1024 * 1024;
/// A layer that cosign signed.
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// How types of bundles begin; a version follows.
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle";

/// Why one registry brought nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiscoveryError {
    /// The registry did not tell.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A manifest or index is none.
    #[error("{reference}: no manifest: {source}")]
    Manifest {
        reference: String,
        #[source]
        source: serde_json::Error,
    },
    /// Something has a form that it should not have.
    #[error("{reference}: {problem}")]
    Form { reference: String, problem: String },
    /// A bundle is none.
    #[error("{reference}: {source}")]
    Bundle {
        reference: String,
        #[source]
        source: BundleError,
    },
}

/// What was found, and whether every registry could be asked.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub(super) payloads: Vec<SigstoreVerificationPayload>,
    pub(super) complete: bool,
}

/// A manifest or an index: as far as it is used, they look alike.
#[derive(Debug, Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

impl Manifest {
    /// The layers that cosign signed, as many as are looked at.
    fn signed_layers(&self) -> impl Iterator<Item = &Descriptor> {
        let layers = self.layers.iter();
        let signed = layers.filter(|layer| layer.media_type == SIMPLE_SIGNING);
        signed.take(MAX_PAYLOADS)
    }

    /// The bundles that an index lists, as many as are looked at.
    fn artifacts(&self) -> impl Iterator<Item = &Descriptor> {
        let artifacts = self.manifests.iter();
        let bundles = artifacts.filter(|artifact| artifact.artifact_type.starts_with(BUNDLE));
        bundles.take(MAX_PAYLOADS)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    digest: String,
    #[serde(default)]
    size: usize,
    annotations: Option<HashMap<String, String>>,
}

/// Asks the image's registry and every additional one. One that fails is told and left out.
pub(super) async fn discover(
    registries: &Registries,
    image: &Reference,
    additional: &[String],
    digest: &str,
) -> Found {
    let mut found = Found {
        payloads: Vec::new(),
        complete: true,
    };
    let hosts = std::iter::once(&image.registry).chain(additional.iter());
    for host in hosts {
        match Box::pin(at(registries, host, &image.repository, digest)).await {
            Ok(payloads) => found.payloads.extend(payloads),
            Err(error) => {
                found.complete = false;
                tracing::warn!(
                    registry = host,
                    repository = image.repository,
                    %error,
                    "Cannot look for signatures of an image"
                );
            }
        }
    }
    tracing::info!(
        registry = image.registry,
        repository = image.repository,
        digest,
        payloads = found.payloads.len(),
        "Looked for signatures of an image"
    );
    found
}

async fn at(
    registries: &Registries,
    host: &str,
    name: &str,
    digest: &str,
) -> Result<Vec<SigstoreVerificationPayload>, DiscoveryError> {
    let repository = registries.open(host, name).await?;
    let mut payloads = signed(&repository, digest).await?;
    payloads.extend(referring(&repository, digest).await?);
    Ok(payloads)
}

/// What cosign keeps in a tag that is named after the digest.
async fn signed(
    repository: &Repository<'_>,
    digest: &str,
) -> Result<Vec<SigstoreVerificationPayload>, DiscoveryError> {
    let tag = format!("{}.sig", digest.replace(':', "-"));
    let Some(bytes) = repository.manifest(&tag).await? else {
        return Ok(Vec::new());
    };
    let manifest = parsed(&tag, &bytes)?;
    let mut payloads = Vec::new();
    for layer in manifest.signed_layers() {
        let envelope = read(repository, layer).await?;
        let annotations = layer.annotations.clone().unwrap_or_default();
        let bundle = bundle::from_annotations(&annotations, &envelope).map_err(|source| {
            DiscoveryError::Bundle {
                reference: tag.clone(),
                source,
            }
        })?;
        payloads.push(SigstoreVerificationPayload {
            bundle: bundle.encode_to_vec(),
            simple_signing_envelope: Some(envelope),
        });
    }
    Ok(payloads)
}

/// What says of itself that it refers to the image.
async fn referring(
    repository: &Repository<'_>,
    digest: &str,
) -> Result<Vec<SigstoreVerificationPayload>, DiscoveryError> {
    // A registry that does not know the question may have the answer as a tag.
    let index = match repository.referrers(digest).await? {
        Some(index) => Some(index),
        None => repository.manifest(&digest.replace(':', "-")).await?,
    };
    let Some(index) = index else {
        return Ok(Vec::new());
    };
    let index = parsed(digest, &index)?;
    let mut payloads = Vec::new();
    for artifact in index.artifacts() {
        let reference = &artifact.digest;
        let form = |problem: String| DiscoveryError::Form {
            reference: reference.clone(),
            problem,
        };
        if !is_digest(reference) {
            return Err(form("no digest".to_owned()));
        }
        let manifest = repository.manifest(reference).await?;
        let manifest = manifest.ok_or_else(|| form("it is listed, but not there".to_owned()))?;
        let layers = parsed(reference, &manifest)?.layers;
        let [layer] = layers.as_slice() else {
            return Err(form(format!(
                "it has {} layers instead of one",
                layers.len()
            )));
        };
        let json = read(repository, layer).await?;
        let bundle = bundle::from_json(&json).map_err(|source| DiscoveryError::Bundle {
            reference: reference.clone(),
            source,
        })?;
        payloads.push(SigstoreVerificationPayload {
            bundle: bundle.encode_to_vec(),
            simple_signing_envelope: None,
        });
    }
    Ok(payloads)
}

fn parsed(reference: &str, bytes: &[u8]) -> Result<Manifest, DiscoveryError> {
    serde_json::from_slice(bytes).map_err(|source| DiscoveryError::Manifest {
        reference: reference.to_owned(),
        source,
    })
}

async fn read(repository: &Repository<'_>, layer: &Descriptor) -> Result<Vec<u8>, DiscoveryError> {
    let form = |problem: String| DiscoveryError::Form {
        reference: layer.digest.clone(),
        problem,
    };
    if !is_digest(&layer.digest) {
        return Err(form("no digest".to_owned()));
    }
    if layer.size > MAX_LAYER {
        return Err(form(format!(
            "a layer of {} bytes, more than {MAX_LAYER}",
            layer.size
        )));
    }
    Ok(repository.blob(&layer.digest, MAX_LAYER).await?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json",
        "manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":7,
        "artifactType":"application/vnd.dev.sigstore.bundle.v0.3+json",
        "digest":"sha256:4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6"}]}"#;
    const MANIFEST: &str = r#"{"schemaVersion":2,"config":{"digest":"sha256:00","size":2},
        "layers":[{"mediaType":"application/vnd.dev.cosign.simplesigning.v1+json","size":242,
        "digest":"sha256:4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6",
        "annotations":{"dev.cosignproject.cosign/signature":"c2ln"}}]}"#;

    /// What is asked for of all that a registry lists.
    fn wanted(bytes: &[u8]) -> Vec<String> {
        let Ok(manifest) = parsed("sample", bytes) else {
            return Vec::new();
        };
        let artifacts = manifest.artifacts().map(|one| &one.digest);
        let layers = manifest.signed_layers().map(|one| &one.digest);
        let all = artifacts.chain(layers).cloned();
        all.collect()
    }

    #[test]
    fn samples_are_read() {
        for sample in [INDEX, MANIFEST] {
            let digests = wanted(sample.as_bytes());
            assert!(
                matches!(&*digests, [digest] if is_digest(digest)),
                "{digests:?}"
            );
        }
    }

    #[test]
    fn fuzz_manifests_and_indexes() {
        let check = bolero::check!().with_type::<(bool, Vec<(u16, u8, u8)>)>();
        check.for_each(|(index, edits)| {
            let sample = if *index { INDEX } else { MANIFEST };
            let mut bytes = sample.as_bytes().to_vec();
            for (place, octet, how) in edits.iter().take(6) {
                let at = usize::from(*place) % bytes.len().max(1);
                match how % 4 {
                    0 => bytes.truncate(at),
                    // The same again and again: lists that are long.
                    1 => {
                        let part: Vec<u8> = bytes.iter().copied().skip(at).take(400).collect();
                        for _ in 0..*octet {
                            bytes.splice(at..at, part.iter().copied());
                        }
                    }
                    _ => {
                        if let Some(byte) = bytes.get_mut(at) {
                            *byte = *octet;
                        }
                    }
                }
            }
            let digests = wanted(&bytes);
            assert!(
                digests.len() <= 2 * MAX_PAYLOADS,
                "{} requests",
                digests.len()
            );
        });
    }
}
