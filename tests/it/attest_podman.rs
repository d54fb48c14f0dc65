//! The `podman` attestor against Podman itself.

use crate::attest_docker::{agent, resources};
use crate::common::{Cluster, Podman, Sandbox, identity, no_containers, skip};

#[tokio::test(flavor = "multi_thread")]
async fn podman_names_its_containers_and_their_pods() {
    if let Some(why) = no_containers(&["podman", "conmon", "runc", "catatonit"]) {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let mut podman = Podman::start(&sandbox);
    let id = "/podman/{{workload.podman.pod.name}}/{{workload.podman.container.name}}/\
              {{workload.podman.pod.labels.tier}}";
    let alone = r#"
---
kind: workload_identity
version: v1
metadata: {name: alone, labels: {a: b}}
spec:
  rules: {allow: [{conditions: [{attribute: workload.podman.pod.name, eq: {value: ""}}]}]}
  spiffe: {id: '/podman/{{workload.podman.container.name}}/{{workload.podman.container.labels["app"]}}'}
"#;
    let cluster = Cluster::start(&sandbox, &(resources(id) + alone));
    let attestor = format!(
        "podman: {{enabled: true, addr: 'unix://{}'}}",
        podman.socket().display()
    );
    let mut agent = agent(&sandbox, &cluster, &attestor, &[]);
    podman.podman(&[
        "pod",
        "create",
        "--network=none",
        "--name=pod",
        "--label=tier=front",
    ]);
    let bridge = |name: &str| [format!("/run/{name}.sock"), "/run/w.sock".to_owned()];
    for (name, options, expected) in [
        ("alone", "--network=none", "alone/x"),
        ("member", "--pod=pod", "pod/member/front"),
    ] {
        let [near, far] = bridge(name);
        podman.run(&["--name", name, "--label=app=x", options], [&near, &far]);
        let socket = sandbox.path(format!("run/{name}.sock"));
        let expected = format!("spiffe://{}/podman/{expected}", Cluster::NAME);
        assert_eq!(identity(&socket).await.unwrap(), expected);
    }

    let socket = sandbox.path("run/member.sock");
    podman.stop();
    assert!(identity(&socket).await.is_err());
    agent.wait_for_log("the engine does not run");
    podman.resume();
    assert!(identity(&socket).await.is_ok());
    agent.wait_for_log("Attestation works again");
}
