//! Hooks that need a real systemd.

use crate::common::{Cluster, OutputText as _, RESOURCES, Sandbox, Systemd, skip};

#[test]
fn systemd_reloads_a_unit_that_runs_and_tells_of_one_that_fails() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let machine = Systemd::boot(&sandbox);
    for (name, reload) in [
        ("web", "/bin/sh -c 'echo web >> /root/reloads'"),
        ("idle", "/bin/sh -c 'echo idle >> /root/reloads'"),
        ("broken", "/bin/false"),
    ] {
        let unit = format!("[Service]\nExecStart=/bin/sleep infinity\nExecReload={reload}\n");
        machine.write(&format!("/etc/systemd/system/{name}.service"), &unit);
    }
    machine
        .shell("systemctl daemon-reload; systemctl start web broken")
        .success();
    let token = cluster.invite("example", "5m");
    let storage = sandbox.path("bot");
    let config = cluster
        .config(&token, "bot")
        .replace(storage.to_str().unwrap(), "/root/bot");
    for (unit, problem) in [
        ("web", None),
        ("idle", None),
        ("broken", Some("journalctl -u broken.service tells more")),
        ("nothing", Some("systemd: nothing.service: ")),
    ] {
        let outputs = format!(
            "outputs:\n- type: workload-identity-x509\n  selector: {{name: foo}}\n  destination: \
             {{type: directory, path: /root/svid}}\n  reload: {{systemd: {unit}.service}}\n"
        );
        machine.write("/root/tbot.yaml", &(config.clone() + &outputs));
        let output = machine.run(["tbot", "start", "--oneshot", "-c", "/root/tbot.yaml"]);
        match problem {
            None => drop(output.success()),
            Some(problem) => {
                assert_eq!(output.status.code(), Some(1), "{unit}: {}", output.text());
                assert!(output.text().contains(problem), "{unit}: {}", output.text());
            }
        }
    }
    assert_eq!(machine.shell("cat /root/reloads").success(), "web\n");
    let idle = machine.run(["systemctl", "is-active", "idle"]);
    assert_eq!(
        idle.text().trim(),
        "inactive",
        "a stopped unit stays stopped"
    );
}
