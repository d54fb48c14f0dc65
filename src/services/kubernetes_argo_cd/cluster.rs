//! A cluster as Argo CD is told of it.
//!
//! What the keys mean is in Argo CD's documentation, "Declarative Setup", section "Clusters".

use std::collections::BTreeMap;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::clock::rfc3339;
use crate::crypto::sha256_hex;
use crate::destination::manifest;
use crate::secret::Secret;
use crate::services::kubernetes::access::Address;
use crate::services::kubernetes::select::Found;
use crate::services::kubernetes::template::Template;

/// The label by which Argo CD finds its clusters.
pub(super) const TYPE_LABEL: &str = "argocd.argoproj.io/secret-type";
/// Its value for them.
const CLUSTER: &str = "cluster";
/// Hexadecimal digits at the end of a Secret's name.
const SUFFIX: usize = 16;

/// What is configured of the Secrets beside where they are.
#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) labels: BTreeMap<String, Template>,
    pub(super) annotations: BTreeMap<String, Template>,
    pub(super) project: Option<String>,
    /// The only namespaces that Argo CD manages; empty for all.
    pub(super) namespaces: Vec<String>,
    /// Whether it manages what has no namespace, beside `namespaces`.
    pub(super) cluster_resources: bool,
    /// How clusters are named; `None` as upstream does.
    pub(super) name: Option<Template>,
}

/// How every one of the clusters is reached, by whom and since when. Texts are PEM.
#[derive(Debug)]
pub(super) struct Credential<'c> {
    /// The Teleport cluster.
    pub(super) cluster: &'c str,
    pub(super) address: &'c Address,
    pub(super) authorities: &'c str,
    pub(super) certificate: &'c str,
    pub(super) key: &'c str,
    pub(super) bot: &'c str,
    pub(super) now: SystemTime,
}

/// The key `config` of a Secret.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Config<'c> {
    tls_client_config: Tls<'c>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Tls<'c> {
    ca_data: String,
    cert_data: String,
    key_data: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_name: Option<&'c str>,
}

impl Look {
    /// The end of the Secret's name, and its manifest.
    pub(super) fn manifest(
        &self,
        found: &Found,
        by: &Credential<'_>,
    ) -> Result<(String, Secret<Vec<u8>>), serde_json::Error> {
        let render = |template: &Template| template.render(by.cluster, &found.name, &found.labels);
        let rendered = |templates: &BTreeMap<String, Template>| -> BTreeMap<String, String> {
            let all = templates.iter();
            all.map(|(key, template)| (key.clone(), render(template)))
                .filter(|(_, text)| !text.is_empty())
                .collect()
        };
        let mut labels = rendered(&self.labels);
        labels.insert(TYPE_LABEL.to_owned(), CLUSTER.to_owned());
        let mut annotations = rendered(&self.annotations);
        for (key, value) in [
            ("bot-name", by.bot),
            ("kubernetes-cluster-name", &found.name),
            ("tbot-version", env!("CARGO_PKG_VERSION")),
            ("teleport-cluster-name", by.cluster),
            ("updated", &rfc3339(by.now)),
        ] {
            annotations.insert(format!("teleport.dev/{key}"), value.to_owned());
        }
        let name = self
            .name
            .as_ref()
            .map_or_else(|| render(&Template::both_names()), render);
        let config = serde_json::to_string(&Config {
            tls_client_config: Tls {
                ca_data: STANDARD.encode(by.authorities),
                cert_data: STANDARD.encode(by.certificate),
                key_data: STANDARD.encode(by.key),
                server_name: by.address.server_name.as_deref(),
            },
        })?;
        let restricted = !self.namespaces.is_empty();
        let data = [
            ("name", Some(name)),
            (
                "server",
                Some(by.address.of_cluster(by.cluster, &found.name)),
            ),
            ("config", Some(config)),
            ("project", self.project.clone()),
            ("namespaces", restricted.then(|| self.namespaces.join(","))),
            (
                "clusterResources",
                restricted.then(|| self.cluster_resources.to_string()),
            ),
        ];
        let data = data
            .into_iter()
            .filter_map(|(key, text)| Some((key.to_owned(), text?.into_bytes())));
        let file = manifest(labels, annotations, data.collect())?;
        Ok((suffix(by.cluster, &found.name), file))
    }
}

/// What tells the Secret of a cluster from the others: the same for every agent.
fn suffix(cluster: &str, kubernetes: &str) -> String {
    let hash = sha256_hex(format!("{cluster}{kubernetes}").as_bytes());
    hash.chars().take(SUFFIX).collect()
}
