//! The section, the URI forms, and what an apply sends. `tests/it/kubernetes_secret.rs` writes to an
//! API.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use serde_json::json;

use super::object::wanted;
use super::*;
use crate::destination::{FileSet, from_uri, read};
use crate::yaml::{Problems, emit, parse};

fn plan(yaml: &str) -> Result<Arc<dyn DestinationPlan>, String> {
    let problems = Problems::default();
    let node = parse(yaml).map_err(|problem| problem.to_string())?;
    let mut fields = Fields::new(&node, "", &problems).unwrap();
    let plan = read(&mut fields, "destination");
    fields.finish();
    let text = problems.render("tbot.yaml");
    plan.filter(|_| text.is_empty()).ok_or(text)
}

#[test]
fn every_key_is_read_and_written_back() {
    let text = "type: kubernetes_secret\nname: plugin-identity\nnamespace: teleport\nlabels:\n  \
                example.com/team: a\n  tier: \"1\"\nkubeconfig_path: /etc/k\nkubeconfig_context: c\n";
    let indented = text.replace('\n', "\n  ");
    let plan = plan(&format!("destination:\n  {}\n", indented.trim_end())).unwrap();
    assert_eq!(emit::emit(&plan.emit()), text);
    assert_eq!(
        plan.to_string(),
        "kubernetes_secret: teleport/plugin-identity"
    );
}

#[test]
fn bad_sections_are_refused() {
    let long = "a".repeat(254);
    for bad in [
        "name: ''",
        "name: Upper",
        "name: a_b",
        "name: -a",
        "name: a..b",
        "name: a/b",
        "name: \"a\\nb\"",
        &format!("name: {long}"),
        "namespace: x",
        "name: a, namespace: a.b",
        "name: a, namespace: A",
        "name: a, labels: {'a b': c}",
        "name: a, labels: {a: '-b'}",
        "name: a, labels: {a/b/c: d}",
        "name: a, labels: [a]",
    ] {
        let text = format!("destination: {{type: kubernetes_secret, {bad}}}");
        assert!(plan(&text).is_err(), "{bad}");
    }
}

#[test]
fn uris_name_a_secret() {
    for (uri, key) in [
        ("kubernetes-secret:///a.b-c", "kubernetes-secret:///a.b-c"),
        ("kubernetes-secret://ns/a", "kubernetes-secret://ns/a"),
        ("kubernetes-secret:///a%2Db?x#y", "kubernetes-secret:///a-b"),
    ] {
        let plan = from_uri(uri).unwrap();
        assert_eq!(plan.key(), key, "{uri}");
    }
    for bad in [
        "kubernetes-secret:",
        "kubernetes-secret://",
        "kubernetes-secret:///",
        "kubernetes-secret://name",
        "kubernetes-secret:name",
        "kubernetes-secret:///A",
        "kubernetes-secret://N/a",
        "kubernetes-secret:///a/b",
        "kubernetes-secret:///%zz",
    ] {
        assert!(from_uri(bad).is_err(), "{bad}");
    }
}

fn settings() -> Settings {
    of_uri("///x").unwrap()
}

fn files(names: &[(&str, &str)]) -> FileSet {
    let file = |(name, text): &(&str, &str)| ((*name).into(), text.as_bytes().to_vec().into());
    names.iter().map(file).collect()
}

/// A Secret with keys held by managers.
fn live(held: &[(&str, &str, &[&str])], more: serde_json::Value) -> Secret {
    let mut object = json!({
        "metadata": {"name": "x", "resourceVersion": "7", "managedFields": []},
        "data": {},
        "type": "Opaque",
    });
    for (manager, operation, keys) in held {
        let mut fields = json!({".": {}});
        for key in *keys {
            object["data"][key] = json!("b2xk");
            fields[format!("f:{key}")] = json!({});
        }
        let entry = json!({
            "manager": manager, "operation": operation, "apiVersion": "v1",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:data": fields, "f:type": {}},
        });
        let list = object["metadata"]["managedFields"].as_array_mut();
        list.unwrap().push(entry);
    }
    for (key, value) in more.as_object().unwrap() {
        match value.as_object() {
            Some(inner) => inner
                .iter()
                .for_each(|(name, value)| object[key][name] = value.clone()),
            None => object[key] = value.clone(),
        }
    }
    serde_json::from_value(object).unwrap()
}

fn keys(secret: &Secret) -> Vec<&str> {
    let data = secret.data.as_ref().unwrap();
    data.keys().map(String::as_str).collect()
}

#[test]
fn what_is_ours_is_sent_again_and_what_is_not_is_left_alone() {
    let live = live(
        &[
            ("tbot", "Apply", &["key", "old", "shared"]),
            ("helm", "Update", &["theirs", "shared"]),
            ("tbot", "Update", &["patched"]),
        ],
        json!({}),
    );
    let sent = wanted(
        Some(&live),
        &files(&[("key", "new"), ("identity", "i")]),
        &settings(),
        "ns",
    );
    let sent = sent.unwrap();
    assert_eq!(keys(&sent), [".write-test", "identity", "key", "old"]);
    let data = sent.data.unwrap();
    assert_eq!(data["key"], ByteString(b"new".to_vec()));
    assert_eq!(data["old"], ByteString(b"old".to_vec()));
    assert_eq!(sent.metadata.resource_version.as_deref(), Some("7"));
    assert_eq!(sent.metadata.namespace.as_deref(), Some("ns"));
    assert_eq!(sent.metadata.labels, None);

    let fresh = wanted(None, &files(&[("key", "k")]), &settings(), "ns").unwrap();
    assert_eq!(fresh.type_.as_deref(), Some("Opaque"));
    assert_eq!(fresh.metadata.resource_version, None);
    assert_eq!(keys(&fresh), [".write-test", "key"]);
}

#[test]
fn a_type_is_kept() {
    let live = live(&[], json!({"type": "kubernetes.io/tls"}));
    let sent = wanted(Some(&live), &files(&[("tls.crt", "c")]), &settings(), "ns").unwrap();
    assert_eq!(sent.type_.as_deref(), Some("kubernetes.io/tls"));
}

#[test]
fn secrets_of_others_are_refused() {
    let owner = json!([{"apiVersion": "v1", "kind": "SealedSecret", "name": "s", "uid": "1",
                        "controller": true}]);
    for (more, says) in [
        (json!({"immutable": true}), "immutable"),
        (
            json!({"type": "kubernetes.io/service-account-token"}),
            "type kubernetes.io/service-account-token",
        ),
        (json!({"type": "helm.sh/release.v1"}), "helm.sh/release.v1"),
        (
            json!({"metadata": {"ownerReferences": owner}}),
            "SealedSecret s",
        ),
        (
            json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            "being deleted",
        ),
    ] {
        let problem = wanted(Some(&live(&[], more)), &files(&[]), &settings(), "ns").unwrap_err();
        assert!(problem.contains(says), "{problem}");
    }
}

#[test]
fn keys_and_sizes_are_checked_before_anything_is_sent() {
    for bad in ["cockroach/ca.crt", "a b", "..", "..a", "", "a\n", "ä"] {
        assert!(
            wanted(None, &files(&[(bad, "")]), &settings(), "ns").is_err(),
            "{bad:?}"
        );
    }
    let theirs = live(&[("helm", "Update", &["theirs"])], json!({}));
    let room = 1024 * 1024 - "old".len();
    let fits = "x".repeat(room);
    wanted(Some(&theirs), &files(&[("k", &fits)]), &settings(), "ns").unwrap();
    let too_much = "x".repeat(room + 1);
    let problem = wanted(
        Some(&theirs),
        &files(&[("k", &too_much)]),
        &settings(),
        "ns",
    )
    .unwrap_err();
    assert!(
        problem.contains("1048577 bytes") && problem.contains("1048576 in one"),
        "{problem}"
    );
    assert!(problem.contains("k 1048574, theirs 3"), "{problem}");
}
