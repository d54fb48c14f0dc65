//! The real parts themselves, before anything is tested with them.

use crate::common::{Moto, OutputText as _, Sandbox, Systemd, eventually, skip};

#[test]
fn systemd_boots_twice_side_by_side_and_names_the_unit_of_a_process() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandboxes = [Sandbox::new(), Sandbox::new()];
    let machines = sandboxes.each_ref().map(Systemd::boot);
    for (number, machine) in machines.iter().enumerate() {
        machine.run(["useradd", "--system", "teleport"]).success();
        machine.write(
            "/etc/systemd/system/my-app.service",
            "[Service]\nUser=teleport\nExecStart=/bin/sleep infinity\n",
        );
        machine.run(["systemctl", "daemon-reload"]).success();
        machine.run(["systemctl", "start", "my-app"]).success();
        let pid = machine
            .run(["systemctl", "show", "-p", "MainPID", "--value", "my-app"])
            .success();
        let unit = machine.run([
            "busctl",
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
            "GetUnitByPID",
            "u",
            pid.trim(),
        ]);
        assert_eq!(
            unit.success().trim(),
            r#"o "/org/freedesktop/systemd1/unit/my_2dapp_2eservice""#
        );
        let user = machine.run(["ps", "-o", "user=", "-p", pid.trim()]);
        assert_eq!(user.success().trim(), "teleport", "machine {number}");
        machine.write("/etc/only-in-here", "");
    }
    assert!(!std::path::Path::new("/etc/only-in-here").exists());
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    assert!(
        !users.contains("teleport:"),
        "the host has the machine's user"
    );
}

#[test]
fn a_machine_cannot_change_the_host() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let witness = sandbox.write("witness", "here");
    let machine = Systemd::boot(&sandbox);
    for path in ["/usr/x", "/home/x", "/sys/x", env!("CARGO_MANIFEST_DIR")] {
        let touched = machine.run(["touch", path]);
        assert!(
            !touched.status.success(),
            "{path} can be changed from inside"
        );
    }
    // Booting empties /tmp: it has to be the machine's own.
    assert_eq!(std::fs::read_to_string(witness).unwrap(), "here");
}

#[test]
fn moto_verifies_signatures_and_names_the_instance() {
    let sandbox = Sandbox::new();
    let Some(moto) = Moto::start(&sandbox, "teleport-bot-role", "i-0abc123") else {
        return skip("the Python environment is missing: make setup");
    };
    let ask = |secret: &str| {
        let mut command = sandbox.command(crate::common::venv().join("bin/python"));
        command.args([
            "-c",
            "import boto3, sys; print(boto3.client('sts', endpoint_url=sys.argv[1]).get_caller_identity()['Arn'])",
            &moto.url(),
        ]);
        for (name, value) in moto.environment() {
            command.env(name, value);
        }
        command.env("AWS_DEFAULT_REGION", "us-east-1");
        command.env("AWS_SECRET_ACCESS_KEY", secret);
        command.output().unwrap()
    };
    assert_eq!(
        ask(&moto.credentials[1]).success().trim(),
        format!(
            "arn:aws:sts::{}:assumed-role/teleport-bot-role/i-0abc123",
            Moto::ACCOUNT
        )
    );
    let refused = ask("another secret");
    assert!(
        refused.text().contains("SignatureDoesNotMatch"),
        "{}",
        refused.text()
    );
}

#[test]
fn a_process_ends_with_its_handle() {
    let sandbox = Sandbox::new();
    let mut sleep = sandbox.command("sleep");
    sleep.arg("1000");
    let process = sandbox.spawn("sleep", sleep);
    let alive = format!("/proc/{}", process.id());
    assert!(std::path::Path::new(&alive).exists());
    drop(process);
    eventually("it is gone", || {
        if std::path::Path::new(&alive).exists() {
            Err("alive")
        } else {
            Ok(())
        }
    });
}
