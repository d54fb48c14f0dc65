//! The destination `kubernetes_secret` against an API that is as strict as a real one, and the agent
//! with it.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tbot::config::{self, Overlay, Source};
use tbot::destination::{Destination, FileSet};
use tbot::env::Env;

use crate::common::{Cluster, Fault, KubeApi, OutputText as _, PLAIN_BOT, Sandbox, skip};

/// A destination of a configuration file, with further keys.
fn destination(more: &str) -> Arc<dyn Destination> {
    let source = Source {
        name: "tbot.yaml".to_owned(),
        text: format!(
            "version: v2\nservices: [{{type: identity, ssh_config: off, destination: \
             {{type: kubernetes_secret, name: identity, {more}}}}}]"
        ),
    };
    let loaded = config::load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
    let plan = loaded.plan.services[0].plan.destination().unwrap();
    plan.build()
}

fn set(files: &[(&str, &str)]) -> FileSet {
    let file = |(name, text): &(&str, &str)| ((*name).into(), text.as_bytes().to_vec().into());
    files.iter().map(file).collect()
}

/// An API, and a destination in it whose kubeconfig is right.
fn setup(sandbox: &Sandbox) -> (KubeApi, Arc<dyn Destination>) {
    let api = KubeApi::start(sandbox);
    let kubeconfig = api.kubeconfig(sandbox, None);
    let place = destination(&format!("kubeconfig_path: {}", kubeconfig.display()));
    (api, place)
}

fn data(api: &KubeApi) -> BTreeMap<String, String> {
    api.data("identity").unwrap_or_default()
}

#[track_caller]
fn assert_data(api: &KubeApi, expected: &[(&str, &str)]) {
    let data = data(api);
    let mut data: Vec<_> = data.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    data.retain(|(key, _)| *key != ".write-test");
    assert_eq!(data, expected);
}

#[tokio::test]
async fn a_set_is_one_apply_and_what_others_keep_stays() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    place.init().await.unwrap();
    place.check_writable().await.unwrap();
    assert_eq!(api.data("identity"), None, "a dry run makes nothing");
    assert!(place.read("key").await.unwrap().is_none());

    place
        .write(set(&[("key", "k1"), ("tlscert", "c1")]))
        .await
        .unwrap();
    assert_data(&api, &[("key", "k1"), ("tlscert", "c1")]);
    assert_eq!(data(&api)[".write-test"], "");
    assert_eq!(api.object("identity")["type"], "Opaque");

    // Someone adds a key, and one file is written alone: the others stay, whoever holds them.
    let mut foreign = BTreeMap::from([("theirs", "x")]);
    add_key(&api, &sandbox, &mut foreign);
    let before = (api.count("GET"), api.count("PATCH"));
    place.write(set(&[("key", "k2")])).await.unwrap();
    assert_eq!(
        (api.count("GET"), api.count("PATCH")),
        (before.0 + 1, before.1 + 1)
    );
    assert_data(&api, &[("key", "k2"), ("theirs", "x"), ("tlscert", "c1")]);
    let read = place.read("key").await.unwrap().unwrap();
    assert_eq!(read.expose(), b"k2");
    assert!(place.is_persistent() && place.directory().is_none());
    // What they hold is still theirs alone.
    let managers = api.object("identity")["metadata"]["managedFields"].to_string();
    assert_eq!(managers.matches("f:theirs").count(), 1, "{managers}");
}

/// Adds keys as another program that uses server-side apply.
fn add_key(api: &KubeApi, sandbox: &Sandbox, keys: &mut BTreeMap<&str, &str>) {
    let mut kubectl = sandbox.command("kubectl");
    let data: BTreeMap<_, _> = keys
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let object = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "identity",
        "labels": {"team": "a"}}, "type": "Opaque",
        "data": data.iter().map(|(key, value)| {
            (key.clone(), json!(STANDARD.encode(value)))
        }).collect::<serde_json::Map<_, _>>(),
    });
    let file = sandbox.write("theirs.json", object.to_string());
    kubectl
        .arg("--kubeconfig")
        .arg(api.kubeconfig(sandbox, None))
        .args(["apply", "--server-side", "--validate=false"])
        .args(["--field-manager=helm", "-f"])
        .arg(file);
    kubectl.output().unwrap().success();
}

#[tokio::test]
async fn labels_are_added_to_those_of_others() {
    let sandbox = Sandbox::new();
    let (api, _) = setup(&sandbox);
    let kubeconfig = api.kubeconfig(&sandbox, None);
    add_key(&api, &sandbox, &mut BTreeMap::from([("theirs", "x")]));
    let place = destination(&format!(
        "labels: {{app: tbot}}, kubeconfig_path: {}",
        kubeconfig.display()
    ));
    place.write(set(&[("key", "k")])).await.unwrap();
    assert_eq!(
        api.object("identity")["metadata"]["labels"],
        json!({"app": "tbot", "team": "a"})
    );
}

#[tokio::test]
async fn who_is_faster_is_waited_for() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    place.write(set(&[("key", "k1")])).await.unwrap();
    for fault in [Fault::Touched, Fault::Deleted] {
        api.state().faults.push_back(("PATCH", fault.clone()));
        place.write(set(&[("key", "k2")])).await.unwrap();
        assert_data(&api, &[("key", "k2")]);
    }
    // Two agents at once: each set is whole, whoever was last.
    let other = destination(&format!(
        "kubeconfig_path: {}",
        api.kubeconfig(&sandbox, None).display()
    ));
    let (a, b) = (
        set(&[("key", "a"), ("tlscert", "a")]),
        set(&[("key", "b"), ("tlscert", "b")]),
    );
    let (first, second) = tokio::join!(place.write(a), other.write(b));
    first.unwrap();
    second.unwrap();
    assert_eq!(data(&api)["key"], data(&api)["tlscert"]);
    // Someone who changes it all the time is named as such, and nothing is lost.
    for _ in 0..5 {
        api.state().faults.push_back(("PATCH", Fault::Touched));
    }
    let error = place.write(set(&[("key", "k3")])).await.unwrap_err();
    assert!(error.to_string().contains("all the time"), "{error}");
    assert_eq!(data(&api)["key"], data(&api)["tlscert"]);
    place.write(set(&[("key", "k3")])).await.unwrap();
}

#[tokio::test]
async fn secrets_of_others_are_named_and_left_alone() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    let owner = json!([{"apiVersion": "v1", "kind": "SealedSecret", "name": "sealed", "uid": "1",
                        "controller": true}]);
    for (more, says) in [
        (json!({"immutable": true}), "immutable: delete it"),
        (
            json!({"type": "kubernetes.io/service-account-token"}),
            "of type kubernetes.io/service-account-token",
        ),
        (
            json!({"metadata": {"ownerReferences": owner}}),
            "SealedSecret sealed",
        ),
    ] {
        api.put("identity", "kubectl", &[("token", "x")], more);
        let patches = api.count("PATCH");
        for result in [place.init().await, place.write(set(&[("key", "k")])).await] {
            let error = result.unwrap_err().to_string();
            assert!(
                error.contains(says) && error.contains("kubernetes_secret: identity"),
                "{error}"
            );
        }
        assert_eq!(api.count("PATCH"), patches, "nothing is even tried");
        assert_data(&api, &[("token", "x")]);
    }
    // A key that someone else set to something else.
    api.put("identity", "helm", &[("key", "theirs")], json!({}));
    place.init().await.unwrap();
    let error = place.write(set(&[("key", "hunter2-canary")])).await;
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("conflict with \"helm\"") && error.contains(".data.key"),
        "{error}"
    );
    assert!(!error.contains("canary"));
    assert_data(&api, &[("key", "theirs")]);
    // One that they set to the same can be shared, and one of another type is kept as it is.
    api.put(
        "identity",
        "helm",
        &[("tls.crt", "c")],
        json!({"type": "kubernetes.io/tls"}),
    );
    place.write(set(&[("tls.crt", "c")])).await.unwrap();
    assert_eq!(api.object("identity")["type"], "kubernetes.io/tls");
}

#[tokio::test]
async fn a_missing_permission_is_named_before_anything_is_written() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    for exists in [false, true] {
        if exists {
            api.put("identity", "helm", &[], json!({}));
        }
        for verb in ["get", "create", "patch"] {
            let all = ["get", "create", "patch"];
            api.state().verbs = all.into_iter().filter(|v| *v != verb).collect();
            let outcome = place.init().await;
            if exists && verb == "create" {
                outcome.unwrap();
                continue;
            }
            let error = outcome.unwrap_err().to_string();
            for text in [
                &format!("`{verb}`"),
                "secrets",
                "namespace bots",
                "verbs: [get, create, patch]",
            ] {
                assert!(error.contains(text), "{verb}: {error}");
            }
            if !exists {
                assert_eq!(api.data("identity"), None);
            }
        }
    }
}

#[tokio::test]
async fn refusals_are_explained_and_change_nothing() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    place.write(set(&[("key", "k1")])).await.unwrap();
    for code in [429, 500, 503] {
        for method in ["GET", "PATCH"] {
            api.state().faults.push_back((method, Fault::Answer(code)));
            let error = place.write(set(&[("key", "k2")])).await.unwrap_err();
            let text = error.to_string();
            assert!(text.contains(&code.to_string()), "{method}: {text}");
            assert_data(&api, &[("key", "k1")]);
        }
    }
    api.state().faults.push_back(("GET", Fault::Nonsense));
    let error = place.write(set(&[("key", "k2")])).await.unwrap_err();
    assert!(!error.to_string().contains("canary"), "{error}");

    let stranger = api.kubeconfig(&sandbox, Some("wrong-canary"));
    let place = destination(&format!("kubeconfig_path: {}", stranger.display()));
    let error = place.init().await.unwrap_err().to_string();
    assert!(
        error.contains("401") && error.contains(stranger.to_str().unwrap()),
        "{error}"
    );
    assert!(!error.contains("canary"), "{error}");
    // Credentials that were replaced meanwhile are read again.
    api.kubeconfig(&sandbox, None);
    place.init().await.unwrap();

    let elsewhere = destination(&format!(
        "namespace: elsewhere, kubeconfig_path: {}",
        stranger.display()
    ));
    let error = elsewhere.init().await.unwrap_err().to_string();
    assert!(
        error.contains("no namespace elsewhere: create it"),
        "{error}"
    );
    assert_data(&api, &[("key", "k1")]);
}

#[tokio::test]
async fn too_much_is_not_even_sent() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    place.write(set(&[("key", "k1")])).await.unwrap();
    let patches = api.count("PATCH");
    let huge = "x".repeat(1024 * 1024);
    let error = place.write(set(&[("identity", &huge)])).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("1048578 bytes") && error.contains("identity 1048576"),
        "{error}"
    );
    assert_eq!(api.count("PATCH"), patches);
    let largest = "x".repeat(1024 * 1024 - 2);
    place.write(set(&[("identity", &largest)])).await.unwrap();
    let error = place.write(set(&[("cockroach/ca.crt", "")])).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("type directory"), "{error}");
}

#[tokio::test]
async fn an_api_that_never_answers_is_given_up() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    place.write(set(&[("key", "k1")])).await.unwrap();
    api.state().faults.push_back(("PATCH", Fault::Hang));
    // Only now: a handshake on a clock that jumps would be over time.
    let write = place.write(set(&[("key", "k2")]));
    let jump = async {
        while !api.state().faults.is_empty() {
            tokio::task::yield_now().await;
        }
        tokio::time::pause();
        tokio::time::advance(std::time::Duration::from_secs(40)).await;
    };
    let (written, ()) = tokio::join!(write, jump);
    let error = written.unwrap_err().to_string();
    assert!(error.contains("no answer"), "{error}");
    tokio::time::resume();
    assert_data(&api, &[("key", "k1")]);
    place.write(set(&[("key", "k2")])).await.unwrap();
}

#[tokio::test]
async fn kubeconfigs_that_cannot_be_used_are_named_without_their_content() {
    let sandbox = Sandbox::new();
    for (content, says) in [
        ("users: [hunter2-canary", "not the YAML of a kubeconfig"),
        ("{}", "current-context"),
        ("current-context: x", "no context \"x\""),
    ] {
        let path = sandbox.write("bad", content);
        let place = destination(&format!("kubeconfig_path: {}", path.display()));
        let error = place.init().await.unwrap_err().to_string();
        assert!(
            error.contains(says) && error.contains(path.to_str().unwrap()),
            "{error}"
        );
        assert!(!error.contains("canary"), "{error}");
    }
    let missing = destination("kubeconfig_path: /no/such/kubeconfig");
    let error = missing.init().await.unwrap_err().to_string();
    assert!(error.contains("/no/such/kubeconfig"), "{error}");
    let plugin = sandbox.write(
        "plugin",
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "a",
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "clusters": [{"name": "a", "cluster": {"server": "https://127.0.0.1:1"}}],
            "users": [{"name": "a", "user": {"exec": {
                "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never",
                "command": "sh", "args": ["-c", "echo hunter2-canary; exit 3"],
            }}}],
        })
        .to_string(),
    );
    let place = destination(&format!("kubeconfig_path: {}", plugin.display()));
    let error = place.init().await.unwrap_err().to_string();
    assert!(
        error.contains("plugin") && error.contains("exit status: 3"),
        "{error}"
    );
    assert!(!error.contains("canary"), "{error}");
}

/// Keeps its own state in one Secret and writes its output to another.
fn config(cluster: &Cluster<'_>, token: &str, more: &str) -> String {
    format!(
        "version: v2\nauth_server: {}\nonboarding: {{join_method: token, token: \"{token}\", \
         ca_pins: [\"{}\"]}}\nstorage: {{type: kubernetes_secret, name: bot{more}}}\noutputs:\n  - \
         {{type: identity, ssh_config: off, destination: {{type: kubernetes_secret, \
         name: identity{more}}}}}\n",
        cluster.auth(),
        cluster.pin(),
    )
}

#[test]
fn the_agent_keeps_itself_and_its_output_in_secrets_that_kubectl_reads() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let cluster = Cluster::start(&sandbox, PLAIN_BOT);
    let token = cluster.invite("example", "10m");
    let kubeconfig = api.kubeconfig(&sandbox, None);
    let file = sandbox.write("tbot.yaml", config(&cluster, &token, ""));
    let once = || {
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command.arg(&file).env("KUBECONFIG", &kubeconfig);
        command.output().unwrap().success()
    };
    let first = once();
    assert!(!first.contains("Using the stored identity"), "{first}");
    let second = once();
    assert!(second.contains("Using the stored identity"), "{second}");
    assert_eq!(cluster.events("bot.join").len(), 1);

    let mut kubectl = sandbox.command("kubectl");
    kubectl.env("KUBECONFIG", &kubeconfig).args([
        "get",
        "secret",
        "identity",
        "-o",
        "jsonpath={.data.identity}",
    ]);
    let encoded = kubectl.output().unwrap().success();
    let identity = STANDARD.decode(encoded.trim()).unwrap();
    assert_eq!(String::from_utf8(identity).unwrap(), data(&api)["identity"]);
    let expected = [
        ".write-test",
        "identity",
        "key",
        "key-cert.pub",
        "key.pub",
        "teleport-database-ca.crt",
        "teleport-host-ca.crt",
        "teleport-user-ca.crt",
        "tlscert",
    ];
    assert_eq!(data(&api).into_keys().collect::<Vec<_>>(), expected);

    // Without any kubeconfig, or in a pod that may not: named before the token is used.
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    let refused = command.arg(&file).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        refused.text().contains("no way to the Kubernetes API"),
        "{}",
        refused.text()
    );
}

#[test]
fn the_command_line_takes_every_kind_of_destination() {
    let sandbox = Sandbox::new();
    for (uri, yaml) in [
        ("/opt/x", "type: directory\n      path: /opt/x"),
        ("file:///opt/x", "type: directory\n      path: /opt/x"),
        ("memory://", "type: memory"),
        (
            "kubernetes-secret:///x",
            "type: kubernetes_secret\n      name: x\n",
        ),
        (
            "kubernetes-secret://ns/x",
            "type: kubernetes_secret\n      name: x\n      namespace: ns\n",
        ),
    ] {
        let mut command = sandbox.tbot(["configure", "identity", "--join-method", "iam"]);
        command.args(["--storage", "memory://", "--destination", uri]);
        let text = command.output().unwrap().success();
        assert!(text.contains(yaml), "{uri}:\n{text}");
    }
    let mut command = sandbox.tbot(["configure", "identity", "--join-method", "iam"]);
    let refused = command
        .args(["--destination", "kubernetes-secret:///Upper"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", refused.text());
    assert!(
        refused.text().contains("no name for a Secret"),
        "{}",
        refused.text()
    );
}

#[test]
fn a_pod_uses_its_service_account_and_namespace() {
    if !rustix::process::geteuid().is_root() {
        return skip("a mount namespace needs root");
    }
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let cluster = Cluster::start(&sandbox, PLAIN_BOT);
    let token = cluster.invite("example", "10m");
    let (account, variables) = api.service_account(&sandbox);
    let file = sandbox.write("tbot.yaml", config(&cluster, &token, ""));
    let run = |pod_namespace: Option<&str>| {
        let script = format!(
            "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/kubernetes.io && \
             cp -r {} /run/secrets/kubernetes.io/serviceaccount && exec {} start --oneshot -c {}",
            account.display(),
            env!("CARGO_BIN_EXE_tbot"),
            file.display()
        );
        let mut command: Command = sandbox.command("unshare");
        command.args(["--mount", "sh", "-ec", &script]);
        for (name, value) in &variables {
            command.env(name, value);
        }
        if let Some(namespace) = pod_namespace {
            command.env("POD_NAMESPACE", namespace);
        }
        command.output().unwrap()
    };
    let refused = run(Some("elsewhere"));
    assert!(
        refused.text().contains("no namespace elsewhere"),
        "{}",
        refused.text()
    );
    run(None).success();
    run(Some(KubeApi::NAMESPACE)).success();
    assert!(data(&api).contains_key("identity"));
    // A missing permission costs no token and tells the rule.
    api.state().verbs.remove("patch");
    let refused = run(None);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        refused
            .text()
            .contains("the pod's service account may not `patch` secrets"),
        "{}",
        refused.text()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_see_whole_sets_only() {
    let sandbox = Sandbox::new();
    let (api, place) = setup(&sandbox);
    place
        .write(set(&[("key", "0"), ("tlscert", "0")]))
        .await
        .unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0;
            while !done.load(Ordering::Relaxed) {
                let data = data(&api);
                assert_eq!(data["key"], data["tlscert"]);
                reads += 1;
            }
            reads
        });
        tokio::task::block_in_place(|| {
            let runtime = tokio::runtime::Handle::current();
            for generation in 1..50 {
                let text = generation.to_string();
                let files = set(&[("key", &text), ("tlscert", &text)]);
                runtime.block_on(place.write(files)).unwrap();
            }
        });
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
}
