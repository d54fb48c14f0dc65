//! The output `kubernetes/argo-cd`: what Argo CD finds in its namespace.

use std::process::Output;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::common::{Cluster, Fault, KubeApi, OutputText as _, RECORDED, Sandbox};

const SERVED: &str = "
---
kind: kube_cluster
version: v3
metadata: {name: k1, labels: {env: test}}
spec: {}
---
kind: kube_cluster
version: v3
metadata: {name: k2, labels: {env: test, team: web}}
spec: {}
---
kind: kube_cluster
version: v3
metadata: {name: k3}
spec: {}
";

/// What finds `k1` and `k2`.
const TEST: &str = "selectors: [{labels: {env: test}}]";

/// A run that ends, with an output of these keys.
fn once(
    sandbox: &Sandbox,
    cluster: &Cluster<'_>,
    api: &KubeApi,
    keys: &str,
    hides: bool,
) -> Output {
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "storage")
        + &format!(
            "services:\n  - {{type: kubernetes/argo-cd, secret_namespace: {}, {keys}}}\n",
            KubeApi::NAMESPACE
        );
    let config = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    command
        .arg(config)
        .env("SSL_CERT_FILE", cluster.web_authority())
        .env("KUBECONFIG", api.kubeconfig(sandbox, None));
    if hides {
        command.env("TELEPORT_TLS_ROUTING_CONN_UPGRADE", "yes");
    }
    command.output().unwrap()
}

/// The Secret of a cluster, its data decoded.
fn secret(api: &KubeApi, cluster: &str) -> (String, Value) {
    let of = "teleport.dev/kubernetes-cluster-name";
    let found = api
        .names()
        .into_iter()
        .map(|name| (name.clone(), api.object(&name)))
        .find(|(_, object)| object["metadata"]["annotations"][of] == cluster);
    let (name, mut object) = found.unwrap();
    object["data"] = json!(api.data(&name).unwrap());
    (name, object)
}

#[test]
fn argo_cd_finds_every_cluster_and_keeps_what_it_added() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let cluster = Cluster::start(&sandbox, &format!("{RECORDED}{SERVED}"));
    let run = |keys: &str| once(&sandbox, &cluster, &api, keys, false);
    let hook = "project: web, reload: {exec: [/bin/echo, changed-the-secrets]}";
    let told = run(&format!("{TEST}, {hook}")).success();
    assert!(told.contains("changed-the-secrets"), "{told}");

    assert_eq!(api.names().len(), 2, "{:?}", api.names());
    let (name, object) = secret(&api, "k1");
    let teleport = object["metadata"]["annotations"]["teleport.dev/teleport-cluster-name"].clone();
    let teleport = teleport.as_str().unwrap();
    let mut hash = sandbox.command("sh");
    hash.args(["-c", &format!("printf %s {teleport}k1 | sha256sum")]);
    let hash = hash.output().unwrap().success();
    assert_eq!(name, format!("teleport.argocd-cluster.{}", &hash[..16]));
    assert_eq!(object["type"], "Opaque");
    assert_eq!(
        object["metadata"]["labels"],
        json!({"argocd.argoproj.io/secret-type": "cluster"})
    );
    assert_eq!(
        object["metadata"]["annotations"]["teleport.dev/bot-name"],
        "example"
    );
    assert_eq!(object["data"]["name"], format!("{teleport}-k1"));
    assert_eq!(object["data"]["project"], "web");
    let server = object["data"]["server"].as_str().unwrap();
    let base = format!("https://{}/v1/teleport/", cluster.proxy());
    assert!(
        server.starts_with(&base) && server.ends_with("/azE"),
        "{server}"
    );
    let config: Value = serde_json::from_str(object["data"]["config"].as_str().unwrap()).unwrap();
    let tls = &config["tlsClientConfig"];
    assert_eq!(
        tls["serverName"],
        "kube-teleport-proxy-alpn.teleport.cluster.local"
    );
    let [key, certificate] = ["keyData", "certData"].map(|part| {
        let pem = STANDARD.decode(tls[part].as_str().unwrap()).unwrap();
        sandbox.write(part, pem)
    });
    let public = |arguments: &[&str], file| {
        let mut openssl = sandbox.command("openssl");
        openssl.args(arguments).arg("-in").arg(file);
        openssl.output().unwrap().success()
    };
    assert_eq!(
        public(&["pkey", "-pubout"], key),
        public(&["x509", "-noout", "-pubkey"], certificate)
    );

    // Argo CD adds to it, and edits it in the middle of a renewal; the project is given up.
    api.edit(&name, "argocd", "labels.team", "a");
    api.edit(&name, "argocd", "data.shard", &STANDARD.encode("1"));
    api.state().faults.push_back(("PUT", Fault::Touched));
    run(TEST).success();
    assert!(api.state().faults.is_empty());
    let (_, renewed) = secret(&api, "k1");
    assert_eq!(renewed["metadata"]["labels"]["team"], "a");
    let data = renewed["data"].as_object().unwrap();
    let keys: Vec<_> = data.keys().map(String::as_str).collect();
    assert_eq!(keys, ["config", "name", "server", "shard"]);
    assert_ne!(renewed["data"]["config"], object["data"]["config"]);
}

#[test]
fn a_secret_that_cannot_be_written_keeps_no_other_from_it() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let cluster = Cluster::start(&sandbox, &format!("{RECORDED}{SERVED}"));
    let run = |keys: &str| once(&sandbox, &cluster, &api, keys, false);
    run(TEST).success();
    let configs = || ["k1", "k2"].map(|name| secret(&api, name).1["data"]["config"].clone());
    let before = configs();
    let (closed, _) = secret(&api, "k1");
    api.state().closed.insert(closed.clone());
    let refused = run(TEST);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
    for part in [
        "1 of 2 not written",
        &format!("{closed}: "),
        "may not `update` secrets in the namespace bots",
        "verbs: [get, create, update]",
    ] {
        assert!(refused.text().contains(part), "{part}: {}", refused.text());
    }
    let after = configs();
    assert_eq!(after[0], before[0]);
    assert_ne!(after[1], before[1]);

    // What is no cluster of the selectors any more is left to its certificate's end.
    api.state().closed.clear();
    run("selectors: [{name: k3}]").success();
    assert_eq!(api.names().len(), 3);
}

#[test]
fn what_cannot_work_is_told() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let cluster = Cluster::start(&sandbox, &format!("{RECORDED}{SERVED}"));
    let refused = once(&sandbox, &cluster, &api, TEST, true);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
    let told = refused.text();
    assert!(told.contains("load balancer at layer 7"), "{told}");
    assert!(api.names().is_empty());

    api.state().verbs.remove("create");
    let keys = format!("{TEST}, secret_name_prefix: p");
    let told = once(&sandbox, &cluster, &api, &keys, false).text();
    assert!(told.contains("may not `create` secrets"), "{told}");
    assert!(told.contains("kubernetes secrets: bots/p.*"), "{told}");
}
