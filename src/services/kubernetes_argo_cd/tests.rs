//! The section, and the manifests. `tests/it/argo_cd.rs` has them written.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::*;
use crate::services::kubernetes::select::Found;
use crate::services::testing::plan;
use crate::yaml::{Problems, parse};

const SELECTORS: &str = "selectors: [{name: k}]\n";

#[test]
fn the_section_is_read_and_written() {
    let least = plan(&Kind, SELECTORS).unwrap();
    assert_eq!(
        least,
        "kubernetes-argo-cd-output (kubernetes secrets: teleport.argocd-cluster.*)\nselectors:\n  - \
         name: k\nsecret_name_prefix: teleport.argocd-cluster\n"
    );
    let section = "selectors:\n  - labels:\n      env: prod\nsecret_namespace: argocd\n\
                   secret_name_prefix: a.b-c\nsecret_labels:\n  env: '{{index .Labels \"env\"}}'\n  \
                   team: web\nsecret_annotations:\n  example.com/note: any text\nproject: p\n\
                   namespaces:\n  - a\n  - b\ncluster_resources: true\ncluster_name_template: \
                   '{{.KubeName}}'\n";
    let written = plan(&Kind, section).unwrap();
    assert_eq!(
        written,
        format!("kubernetes-argo-cd-output (kubernetes secrets: argocd/a.b-c.*)\n{section}")
    );
}

#[test]
fn bad_sections_are_refused() {
    let long = "a".repeat(237);
    for (bad, told) in [
        ("secret_namespace: a.b", "no name for a namespace"),
        ("secret_name_prefix: Upper", "no name for a Secret"),
        ("secret_name_prefix: a.", "no name for a Secret"),
        (
            &format!("secret_name_prefix: {long}"),
            "no name for a Secret",
        ),
        (
            "secret_labels: {argocd.argoproj.io/secret-type: repository}",
            "what Argo CD finds clusters by",
        ),
        ("secret_labels: {a b: c}", "no name for a label"),
        ("secret_labels: {a: '-'}", "no value for the label a"),
        (
            "secret_labels: {a: '{{.Nothing}}'}",
            "a: `{{.Nothing}}` is not known here",
        ),
        ("secret_annotations: {a b: c}", "no name for a label"),
        ("secret_annotations: {a: '{{'}", "a `{{` is not closed"),
        ("namespaces: [a, '']", "no name for a namespace"),
        ("namespaces: [A]", "no name for a namespace"),
        (
            "cluster_resources: true",
            "manages the whole cluster anyway",
        ),
        (
            "cluster_name_template: '{{.X}}'",
            "`{{.X}}` is not known here",
        ),
        ("destination: {type: memory}", "destination: unknown key"),
    ] {
        let error = plan(&Kind, &format!("{SELECTORS}{bad}")).unwrap_err();
        assert!(error.contains(told), "{bad}: {error}");
    }
    let error = plan(&Kind, "project: p").unwrap_err();
    assert!(error.contains("at least one selector is needed"), "{error}");
}

/// The end of the name and the manifest of `found` in the section `yaml`.
fn manifest(yaml: &str, found: &Found, server_name: Option<&str>) -> (String, Value) {
    let problems = Problems::default();
    let node = parse(yaml).unwrap();
    let look = Look::read(&mut Fields::new(&node, "", &problems).unwrap()).unwrap();
    let address = Address {
        url: "https://p:1".to_owned(),
        server_name: server_name.map(str::to_owned),
    };
    let credential = Credential {
        cluster: "root",
        address: &address,
        authorities: "CA",
        certificate: "CERTIFICATE",
        key: "KEY",
        bot: "example",
        now: SystemTime::UNIX_EPOCH + Duration::from_millis(1500),
    };
    let (suffix, file) = look.manifest(found, &credential).unwrap();
    let mut object: Value = serde_json::from_slice(file.expose()).unwrap();
    for value in object["data"].as_object_mut().unwrap().values_mut() {
        use base64::Engine as _;
        let bytes = base64::engine::general_purpose::STANDARD.decode(value.as_str().unwrap());
        *value = String::from_utf8(bytes.unwrap()).unwrap().into();
    }
    (suffix, object)
}

fn found() -> Found {
    Found {
        name: "k1".to_owned(),
        labels: BTreeMap::from([("env".to_owned(), "prod".to_owned())]),
        namespace: None,
    }
}

#[test]
fn a_cluster_is_told_with_everything() {
    let yaml = "secret_labels: {env: '{{index .Labels \"env\"}}', none: '{{.Labels.none}}', \
                k: '{{.KubeName}}'}\n\
                secret_annotations: {note: 'of {{.ClusterName}}', teleport.dev/updated: never}\n\
                project: p\nnamespaces: [a, b]\ncluster_name_template: '{{.KubeName}}!'";
    let (suffix, object) = manifest(yaml, &found(), Some("sni"));
    // printf rootk1 | sha256sum | cut -c -16
    assert_eq!(suffix, "a41a7aa344f6c044");
    let expected = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "labels": {"argocd.argoproj.io/secret-type": "cluster", "env": "prod", "k": "k1"},
            "annotations": {
                "note": "of root",
                "teleport.dev/bot-name": "example",
                "teleport.dev/kubernetes-cluster-name": "k1",
                "teleport.dev/tbot-version": env!("CARGO_PKG_VERSION"),
                "teleport.dev/teleport-cluster-name": "root",
                "teleport.dev/updated": "1970-01-01T00:00:01Z",
            },
        },
        "data": {
            "name": "k1!",
            "server": "https://p:1/v1/teleport/cm9vdA/azE",
            "config": "{\"tlsClientConfig\":{\"caData\":\"Q0E=\",\"certData\":\"Q0VSVElGSUNBVEU=\",\
                       \"keyData\":\"S0VZ\",\"serverName\":\"sni\"}}",
            "project": "p",
            "namespaces": "a,b",
            "clusterResources": "false",
        },
    });
    assert_eq!(object, expected);
}

#[test]
fn what_is_not_configured_is_left_out() {
    let (_, object) = manifest("{}", &found(), None);
    let data = object["data"].as_object().unwrap();
    assert_eq!(
        data.keys().collect::<Vec<_>>(),
        ["config", "name", "server"]
    );
    assert_eq!(data["name"], "root-k1");
    assert!(!data["config"].as_str().unwrap().contains("serverName"));
    let (_, object) = manifest("{namespaces: [a], cluster_resources: true}", &found(), None);
    assert_eq!(object["data"]["clusterResources"], "true");
}
