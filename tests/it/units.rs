//! Every kind of unit that a workload may be in, on a booted systemd: which name it gets.

use crate::common::{Cluster, OutputText as _, Sandbox, Systemd, eventually, issuing, skip};

const IDENTITIES: &str = r#"
kind: workload_identity
version: v1
metadata: {name: unit}
spec: {spiffe: {id: "/svc/{{strings.replaceall(workload.systemd.service, \"@\", \"_\")}}"}}
"#;

const SOCKET: &str = "unix:///run/workload.sock";
const INSPECT: &str = "/usr/local/bin/tbot spiffe-inspect --path unix:///run/workload.sock";

/// Starts the agent as a unit of the machine.
fn agent(machine: &Systemd, sandbox: &Sandbox, cluster: &Cluster<'_>) {
    let token = cluster.invite("example", "10m");
    let storage = sandbox.path("bot").display().to_string();
    let config = cluster
        .config(&token, "bot")
        .replace(&storage, "/var/lib/bot")
        + &format!(
            "services: [{{type: workload-identity-api, listen: \"{SOCKET}\", selector: {{name: unit}}, \
             attestors: {{systemd: {{enabled: true}}}}}}]\n"
        );
    machine.write("/etc/tbot.yaml", &config);
    machine.write(
        "/etc/systemd/system/tbot.service",
        "[Service]\nStateDirectory=bot\nExecStart=/usr/local/bin/tbot start -c /etc/tbot.yaml\n",
    );
    machine.run(["systemctl", "daemon-reload"]).success();
    machine.run(["systemctl", "start", "tbot"]).success();
    eventually("the agent has joined", || {
        let journal = machine.run(["journalctl", "--no-pager", "-o", "cat", "-u", "tbot"]);
        let text = journal.text();
        if text.contains("The bot has a fresh identity") {
            Ok(())
        } else {
            Err(text)
        }
    });
}

/// Writes a unit whose command leaves what it sees in `/run/<name>.out`.
fn unit(machine: &Systemd, file: &str, text: &str) {
    machine.write(&format!("/etc/systemd/system/{file}"), text);
    machine.run(["systemctl", "daemon-reload"]).success();
}

/// Waits until `/run/<name>.out` shows an SVID of this service. SPIFFE IDs have no `@`: the template puts
/// a `_` there.
fn sees(machine: &Systemd, name: &str, service: &str) {
    let path = format!("/run/{name}.out");
    let wanted = format!(
        "- spiffe://{}/svc/{}\n",
        Cluster::NAME,
        service.replace('@', "_")
    );
    eventually(&format!("{name} gets {wanted:?}"), || {
        let shown = machine.run(["cat", &path]).text();
        if shown.contains(&wanted) {
            Ok(())
        } else {
            Err(shown)
        }
    });
}

/// A unit may make cgroups below its own and call them what it likes. That changes nothing.
fn delegated(machine: &Systemd, asks: &str) {
    machine.write(
        "/usr/local/bin/delegated",
        &format!(
            "#!/bin/sh -eu\nroot=$(awk '$3 == \"cgroup2\" {{print $2; exit}}' /proc/self/mounts)\n\
             group=$root$(sed -n 's/^0:://p' /proc/self/cgroup)/simple-app.service\n\
             mkdir \"$group\"\necho $$ > \"$group/cgroup.procs\"\n{asks}\n"
        ),
    );
    machine
        .run(["chmod", "755", "/usr/local/bin/delegated"])
        .success();
    unit(
        machine,
        "delegated.service",
        "[Service]\nType=oneshot\nDelegate=yes\nExecStart=/usr/local/bin/delegated\n",
    );
    machine.run(["systemctl", "start", "delegated"]).success();
    sees(machine, "delegated", "delegated");
}

#[test]
fn each_kind_of_unit_has_its_name() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let machine = Systemd::boot(&sandbox);
    agent(&machine, &sandbox, &cluster);
    let asks = |name: &str| format!("{INSPECT} > /run/{name}.out 2>&1");

    // Simple, and what it starts: the process that asks is a grandchild.
    let line = asks("simple-app");
    unit(
        &machine,
        "simple-app.service",
        &format!("[Service]\nExecStart=/bin/sh -c 'sh -c \"{line}\"; sleep infinity'\n"),
    );
    machine.run(["systemctl", "start", "simple-app"]).success();
    sees(&machine, "simple-app", "simple-app");

    // Forking: the process that asks has left its parent, and its session.
    let line = asks("forking");
    unit(
        &machine,
        "forking.service",
        &format!(
            "[Service]\nType=forking\nExecStart=/bin/sh -c 'setsid sh -c \"sleep 1; {line}; sleep infinity\" &'\n"
        ),
    );
    machine.run(["systemctl", "start", "forking"]).success();
    sees(&machine, "forking", "forking");

    // Instances of a template keep their instance.
    unit(
        &machine,
        "worker@.service",
        &format!(
            "[Service]\nType=oneshot\nExecStart=/bin/sh -c '{INSPECT} > /run/worker-%i.out 2>&1'\n"
        ),
    );
    for instance in ["1", "a.b"] {
        let name = format!("worker@{instance}");
        machine.run(["systemctl", "start", &name]).success();
        sees(&machine, &format!("worker-{instance}"), &name);
    }

    // A transient unit.
    machine
        .run([
            "systemd-run",
            "--unit=transient-app",
            "--wait",
            "--quiet",
            "sh",
            "-c",
            &asks("transient"),
        ])
        .success();
    sees(&machine, "transient", "transient-app");

    delegated(&machine, &asks("delegated"));

    // Units of a user's own manager are, for the system's, parts of the manager's unit: a user can call
    // them what they like, so that their names count for nothing.
    machine
        .run(["useradd", "--home-dir", "/tmp", "--uid", "1500", "somebody"])
        .success();
    unit(
        &machine,
        "user@.service",
        "[Service]\nUser=%i\nType=notify\nRuntimeDirectory=user/%i\nDelegate=yes\n\
         Environment=XDG_RUNTIME_DIR=/run/user/%i\nExecStart=/lib/systemd/systemd --user\n",
    );
    machine
        .shell("install -m 666 /dev/null /run/user.out")
        .success();
    machine.write(
        "/etc/systemd/user/simple-app.service",
        &format!(
            "[Service]\nType=oneshot\nExecStart=/bin/sh -c '{}'\n",
            asks("user")
        ),
    );
    machine.run(["systemctl", "start", "user@1500"]).success();
    machine
        .run([
            "setpriv",
            "--reuid=1500",
            "--regid=1500",
            "--clear-groups",
            "env",
            "XDG_RUNTIME_DIR=/run/user/1500",
            "systemctl",
            "--user",
            "start",
            "simple-app",
        ])
        .success();
    sees(&machine, "user", "user@1500");

    // A scope is no service: nothing is issued by its name, and the log says why.
    let refused = machine.run([
        "systemd-run",
        "--scope",
        "--unit=session-app",
        "--quiet",
        "sh",
        "-c",
        INSPECT,
    ]);
    assert!(!refused.status.success(), "{}", refused.text());
    assert!(!refused.text().contains("spiffe://"), "{}", refused.text());
    let journal = machine
        .run(["journalctl", "--no-pager", "-o", "cat", "-u", "tbot"])
        .success();
    assert!(
        journal.contains("session-app.scope is not a service"),
        "{journal}"
    );
}
