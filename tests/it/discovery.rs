//! EKS clusters found by label, as the guide has it: moto is AWS, `serve` reads the guide's file.

use serde_json::Value;

use crate::common::{Cluster, Moto, OutputText as _, Sandbox, eventually, repository, skip, venv};

/// The file of the guide, with two regions and without its long interval.
const TELEPORT: &str = r#"
version: v3
teleport:
  join_params:
    token_name: "/tmp/token"
    method: token
  proxy_server: "teleport.example.com:443"
auth_service:
  enabled: false
proxy_service:
  enabled: false
ssh_service:
  enabled: false
discovery_service:
  enabled: true
  discovery_group: "aws-prod"
  poll_interval: 1s
  aws:
  - types: ["eks"]
    regions: ["eu-west-1", "us-east-1"]
    tags:
      "env": "prod"
kubernetes_service:
  enabled: true
  resources:
  - labels:
      "env": "prod"
"#;

const RESOURCES: &str = "\
kind: role
version: v7
metadata: {name: prod}
spec: {allow: {kubernetes_labels: {env: prod}, kubernetes_groups: [viewers]}}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [prod]}
---
kind: kube_cluster
version: v3
metadata: {name: by-hand, labels: {env: test}}
spec: {}
";

fn eks(sandbox: &Sandbox, moto: &Moto, arguments: &[&str]) {
    let mut command = sandbox.command(venv().join("bin/python"));
    command
        .arg(repository().join("tests/support/eks.py"))
        .arg(moto.url())
        .args(arguments)
        .envs(moto.environment());
    command.output().expect("python").success();
}

/// The clusters that are registered, each with its labels.
fn registered(cluster: &Cluster<'_>) -> Vec<(String, Value)> {
    let text = cluster.run(&["get", "kube_cluster", "--format", "json"]);
    let found: Vec<Value> = serde_json::from_str(&text).unwrap();
    found
        .into_iter()
        .map(|found| {
            let metadata = &found["metadata"];
            let name = metadata["name"].as_str().unwrap().to_owned();
            (name, metadata["labels"].clone())
        })
        .collect()
}

fn wait_for(cluster: &Cluster<'_>, names: &[&str]) -> Vec<(String, Value)> {
    eventually(&format!("registered are {names:?}"), || {
        let found = registered(cluster);
        if found.iter().map(|(name, _)| name).eq(names) {
            Ok(found)
        } else {
            Err(format!("{found:?}"))
        }
    })
}

#[test]
fn clusters_in_aws_are_registered_by_label_and_go_with_their_tags() {
    let sandbox = Sandbox::new();
    let Some(moto) = Moto::start(&sandbox, "discovery", "teleport") else {
        return skip("moto is missing: tests/support/setup.sh installs it");
    };
    moto.verify_nothing();
    let run = |arguments: &[&str]| eks(&sandbox, &moto, arguments);
    run(&["eu-west-1", "create", "one", "env=prod", "team=a"]);
    run(&["eu-west-1", "create", "other", "env=dev"]);
    run(&[
        "us-east-1",
        "create",
        "two",
        "env=prod",
        "TeleportKubernetesName=two",
    ]);
    let config = sandbox.write("teleport.yaml", TELEPORT);
    let mut environment = moto.environment().to_vec();
    let url = moto.url();
    environment.push(("AWS_ENDPOINT_URL", &url));
    let cluster = Cluster::start_in(
        &sandbox,
        RESOURCES,
        &environment,
        &["--config", config.to_str().unwrap()],
    );
    let one = "one-eks-eu-west-1-123456789012";
    let found = wait_for(&cluster, &["by-hand", one, "two"]);
    let expected = serde_json::json!({
        "account-id": "123456789012",
        "env": "prod",
        "region": "eu-west-1",
        "team": "a",
        "teleport.dev/cloud": "AWS",
        "teleport.dev/discovery-type": "eks",
        "teleport.dev/origin": "cloud",
        "teleport.internal/discovered-name": "one",
        "teleport.internal/discovery-group-name": "aws-prod",
    });
    assert_eq!(found[1].1, expected);
    kubeconfig_by_label(&sandbox, &cluster, &[one, "two"]);

    run(&["eu-west-1", "tag", "other", "env=prod"]);
    let other = "other-eks-eu-west-1-123456789012";
    wait_for(&cluster, &["by-hand", one, other, "two"]);
    run(&["eu-west-1", "tag", "one", "env=dev"]);
    wait_for(&cluster, &["by-hand", other, "two"]);
    run(&["us-east-1", "delete", "two"]);
    wait_for(&cluster, &["by-hand", other]);
    let gone: Vec<Value> = cluster
        .events("kube.delete")
        .into_iter()
        .map(|event| event["name"].clone())
        .collect();
    assert_eq!(gone, [one, "two"]);
}

/// An agent that selects by label writes these clusters.
fn kubeconfig_by_label(sandbox: &Sandbox, cluster: &Cluster<'_>, names: &[&str]) {
    let destination = sandbox.path("kube");
    let config = format!(
        "version: v2\nproxy_server: {}\nonboarding: {{join_method: token, token: {}}}\n\
         storage: {{type: memory}}\nservices:\n- type: kubernetes/v2\n  disable_exec_plugin: true\n  \
         selectors: [{{labels: {{env: prod}}}}]\n  destination: {{type: directory, path: {}}}\n",
        cluster.proxy(),
        cluster.invite("example", "5m"),
        destination.display(),
    );
    let config = sandbox.write("tbot.yaml", config);
    let mut agent = sandbox.tbot(["start", "--oneshot", "-c"]);
    agent
        .arg(config)
        .env("SSL_CERT_FILE", cluster.web_authority())
        .output()
        .unwrap()
        .success();
    let written = std::fs::read_to_string(destination.join("kubeconfig.yaml")).unwrap();
    for name in names {
        let context = format!("name: {}-{name}\n", Cluster::NAME);
        assert!(written.contains(&context), "{context}{written}");
    }
    assert!(!written.contains("by-hand"), "{written}");
}

#[test]
fn a_wrong_file_ends_the_start() {
    let sandbox = Sandbox::new();
    for (text, told) in [
        (TELEPORT.replace("eks", "ec2"), "\"ec2\" is not discovered"),
        (TELEPORT.replace("tags:", "tag:"), "tag"),
        ("discovery_service: [".to_owned(), "not YAML"),
    ] {
        let config = sandbox.write("teleport.yaml", text);
        let mut command = sandbox.tbot(["cluster", "serve", "--listen", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(sandbox.path("cluster"));
        let output = command.arg("--config").arg(config).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(told), "{error}");
    }
    assert!(!sandbox.path("cluster").exists(), "nothing was begun");
}

#[test]
fn mistakes_at_the_prompt_end_with_two() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    drop(cluster.invite("example", "5m"));
    let bad = sandbox.write("bad.yaml", "kind: [\n");
    let bad = bad.to_str().unwrap();
    for (arguments, code, told) in [
        (vec!["get", "foo"], 2, "no kind of resource"),
        (vec!["get", "bot/none"], 1, "is not found"),
        (vec!["rm", "bot"], 2, "write KIND/NAME"),
        (vec!["rm", "foo/x"], 2, "no kind of resource"),
        (vec!["rm", "kube_cluster/none"], 1, "is not found"),
        (vec!["create", bad], 2, "bad.yaml:"),
        (vec!["rotate", "--type", "foo"], 2, "no authority"),
        (
            vec!["rotate", "--type", "host", "--phase", "foo"],
            2,
            "no phase",
        ),
        (vec!["tokens", "add", "--type=node"], 2, "only bots join"),
        (
            vec!["serve", "--public-addr", "http://foo"],
            2,
            "HOST or HOST:PORT",
        ),
    ] {
        let mut command = sandbox.tbot(["cluster", "--data-dir"]);
        command.arg(sandbox.path("cluster")).args(&arguments);
        let output = command.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(told), "{arguments:?}: {error}");
    }
    let removed = cluster.run(&["rm", "bot/example"]);
    assert!(removed.contains("its tokens stay"), "{removed}");
}
