//! The `docker` attestor against Docker's own engine.

use std::path::PathBuf;

use crate::common::{
    Cgroup, Cluster, Docker, Process, Sandbox, bridge, identity, no_containers, skip,
};

/// One bot, and a workload identity that is named after the container.
pub(crate) fn resources(id: &str) -> String {
    format!(
        r"
kind: role
version: v7
metadata: {{name: issuer}}
spec: {{allow: {{workload_identity_labels: {{'*': ['*']}}, rules: [{{resources: [workload_identity], verbs: [list, read]}}]}}}}
---
kind: bot
version: v1
metadata: {{name: example}}
spec: {{roles: [issuer]}}
---
kind: workload_identity
version: v1
metadata: {{name: container, labels: {{a: b}}}}
spec: {{spiffe: {{id: '{id}'}}}}
"
    )
}

/// An agent with one attestor, which listens on `<sandbox>/run/w.sock`.
pub(crate) fn agent(
    sandbox: &Sandbox,
    cluster: &Cluster<'_>,
    attestor: &str,
    environment: &[(&str, &str)],
) -> Process {
    let run = sandbox.path("run");
    std::fs::create_dir_all(&run).unwrap();
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + &format!(
            "services:\n- type: workload-identity-api\n  listen: unix://{}/w.sock\n  \
             selector: {{labels: {{a: [b]}}}}\n  attestors: {{{attestor}}}\n",
            run.display()
        );
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(sandbox.write("tbot.yaml", config));
    command.envs(environment.iter().copied());
    let mut agent = sandbox.spawn("agent", command);
    agent.wait_for_log("The bot has a fresh identity");
    agent
}

/// The bridge as a process of the host; and the socket on which it listens.
pub(crate) fn bridged(
    sandbox: &Sandbox,
    name: &str,
    cgroup: Option<&Cgroup>,
) -> (Process, PathBuf) {
    let socket = sandbox.path(format!("run/{name}.sock"));
    let mut command = sandbox.command(bridge());
    command.arg(&socket).arg(sandbox.path("run/w.sock"));
    if let Some(cgroup) = cgroup {
        command = cgroup.enter(&command);
    }
    (sandbox.spawn(name, command), socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_names_its_containers_and_nobody_else() {
    if let Some(why) = no_containers(&["dockerd", "curl"]) {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let mut docker = Docker::start(&sandbox);
    let id =
        r#"/docker{{workload.docker.container.name}}/{{workload.docker.container.labels["app"]}}"#;
    let cluster = Cluster::start(&sandbox, &resources(id));
    let attestor = format!(
        "docker: {{enabled: true, addr: 'unix://{}'}}",
        docker.socket().display()
    );
    let mut agent = agent(&sandbox, &cluster, &attestor, &[]);
    let web = docker.run("web", &[("app", "shop")], ["/run/web.sock", "/run/w.sock"]);
    let expected = format!("spiffe://{}/docker/web/shop", Cluster::NAME);
    let socket = sandbox.path("run/web.sock");
    assert_eq!(identity(&socket).await.unwrap(), expected);

    // A process of the host is no container's, and that is no failure.
    let (_host, host) = bridged(&sandbox, "host", None);
    assert!(identity(&host).await.is_err());
    assert!(
        !agent.log().contains("Attestation failed"),
        "{}",
        agent.log()
    );

    // One that gives its cgroup the name of the container is not in it.
    let forged = format!("tbot-test-{}/docker/{web}", std::process::id());
    if let Some(cgroup) = Cgroup::make(&forged) {
        let (_forger, forger) = bridged(&sandbox, "forger", Some(&cgroup));
        assert!(identity(&forger).await.is_err());
        agent.wait_for_log("the name is forged");
    } else {
        skip("no cgroup may be made");
    }

    // Without an engine nothing is known of the container; with it, everything again.
    docker.stop();
    assert!(identity(&socket).await.is_err());
    agent.wait_for_log("does the engine run, and can the agent see its socket?");
    docker.resume();
    assert_eq!(identity(&socket).await.unwrap(), expected);
    agent.wait_for_log("Attestation works again");
}
