//! `tbot init`, and what the users of a prepared directory can do in it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{Cluster, OutputText as _, PLAIN_BOT, Sandbox, skip};

/// Users that no machine has; numbers do.
const BOT: &str = "52001";
const READER: &str = "52002";
const STRANGER: &str = "52003";

fn config(outputs: &[(&Path, &str)]) -> String {
    let mut text = "version: v2\noutputs:\n".to_owned();
    for (path, more) in outputs {
        text += &format!(
            "  - {{type: identity, ssh_config: off, destination: {{type: directory, path: {}{more}}}}}\n",
            path.display()
        );
    }
    text
}

fn init(sandbox: &Sandbox, config: &str, arguments: &[&str]) -> Output {
    let file = sandbox.write("init.yaml", config);
    let mut command = sandbox.tbot(["init", "-c"]);
    command.arg(file).args(arguments).output().unwrap()
}

/// A shell as another user, without any group of ours.
fn as_user(sandbox: &Sandbox, user: &str, script: &str) -> Output {
    let mut command: Command = sandbox.command("setpriv");
    command
        .args(["--reuid", user, "--regid", user, "--clear-groups"])
        .args(["sh", "-c", script]);
    command.output().unwrap()
}

/// Everybody may pass through the sandbox.
fn open_up(sandbox: &Sandbox) {
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(sandbox.path(""), everybody).unwrap();
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn getfacl(sandbox: &Sandbox, path: &Path) -> String {
    let mut command = sandbox.command("getfacl");
    command
        .args(["--omit-header", "--numeric", "--absolute-names"])
        .arg(path);
    command.output().unwrap().success()
}

#[test]
fn the_reader_reads_across_renewals_and_nobody_else_does() {
    if !is_root() {
        return skip("other users need root");
    }
    let sandbox = Sandbox::new();
    open_up(&sandbox);
    let out = sandbox.path("out");
    let cluster = Cluster::start(&sandbox, PLAIN_BOT);
    let token = cluster.invite("example", "10m");
    let outputs = config(&[(&out, "")]);
    let owner = format!("{BOT}:{BOT}");
    let arguments = [
        "--bot-user",
        BOT,
        "--reader-user",
        READER,
        "--owner",
        &owner,
    ];
    init(&sandbox, &outputs, &arguments).success();
    assert_eq!(
        getfacl(&sandbox, &out.join("key")).trim(),
        format!("user::rw-\nuser:{READER}:r--\ngroup::---\nmask::r--\nother::---")
    );
    assert_eq!(
        getfacl(&sandbox, &out).trim(),
        format!("user::rwx\nuser:{READER}:r-x\ngroup::---\nmask::r-x\nother::---")
    );

    // The agent runs as the bot's user.
    let storage = sandbox.path("bot");
    std::fs::create_dir(&storage).unwrap();
    std::os::unix::fs::chown(&storage, Some(52001), Some(52001)).unwrap();
    let full = cluster.config(&token, "bot") + outputs.strip_prefix("version: v2\n").unwrap();
    let file = sandbox.write("tbot.yaml", full);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let run = || {
        as_user(
            &sandbox,
            BOT,
            &format!(
                "{} start --oneshot -c {}",
                env!("CARGO_BIN_EXE_tbot"),
                file.display()
            ),
        )
        .success()
    };
    let mut last = Vec::new();
    for _ in 0..2 {
        run();
        let identity = std::fs::read(out.join("identity")).unwrap();
        assert_ne!(identity, last);
        last = identity;
        assert_eq!(
            std::fs::metadata(out.join("identity")).unwrap().uid(),
            52001
        );
        for name in ["identity", "key", "tlscert", "teleport-host-ca.crt"] {
            let path = out.join(name);
            let read = as_user(&sandbox, READER, &format!("cat {}", path.display()));
            assert_eq!(read.success().into_bytes(), std::fs::read(&path).unwrap());
            for (user, script) in [
                (READER, format!("echo x >> {}", path.display())),
                (READER, format!("rm -f {}", path.display())),
                (STRANGER, format!("cat {}", path.display())),
                (STRANGER, format!("ls {}", out.display())),
            ] {
                let done = as_user(&sandbox, user, &script);
                assert!(!done.status.success(), "{user} may: {script}");
            }
        }
    }
    // What the agent wrote is all known to init.
    let text = init(&sandbox, &outputs, &arguments).success();
    assert!(!text.contains("No agent writes this"), "{text}");
    assert_eq!(std::fs::read(out.join("identity")).unwrap(), last);
}

#[test]
fn readers_of_the_configuration_read_whoever_runs_the_agent() {
    if !is_root() {
        return skip("other users need root");
    }
    let sandbox = Sandbox::new();
    open_up(&sandbox);
    let out = sandbox.path("out");
    let cluster = Cluster::start(&sandbox, PLAIN_BOT);
    let token = cluster.invite("example", "10m");
    let readers = format!(", acls: required, readers: [{{user: {READER}}}, {{group: 52009}}]");
    let full = cluster.config(&token, "bot")
        + config(&[(&out, &readers)])
            .strip_prefix("version: v2\n")
            .unwrap();
    let file = sandbox.write("tbot.yaml", full);
    for _ in 0..2 {
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command.arg(&file).output().unwrap().success();
        let read = format!("cat {}", out.join("identity").display());
        as_user(&sandbox, READER, &read).success();
        assert!(!as_user(&sandbox, STRANGER, &read).status.success());
        let mut grouped = sandbox.command("setpriv");
        grouped.args(["--reuid", STRANGER, "--regid", "52009", "--clear-groups"]);
        grouped
            .args(["sh", "-c", &read])
            .output()
            .unwrap()
            .success();
        // Whatever someone grants by hand is taken back at the next write.
        let mut grant = sandbox.command("setfacl");
        grant.args(["-m", &format!("u:{STRANGER}:rw")]);
        grant.arg(out.join("identity")).output().unwrap().success();
    }
    assert_eq!(
        getfacl(&sandbox, &out.join("tlscert")).trim(),
        format!("user::rw-\nuser:{READER}:r--\ngroup::---\ngroup:52009:r--\nmask::r--\nother::---")
    );
}

#[test]
fn one_of_several_destinations_is_chosen_by_its_path() {
    let sandbox = Sandbox::new();
    let (one, two) = (sandbox.path("one"), sandbox.path("two"));
    let both = config(&[(&one, ", acls: off"), (&two, ", acls: off")]);
    let which = init(&sandbox, &both, &[]);
    assert_eq!(which.status.code(), Some(2), "{}", which.text());
    assert!(
        which.text().contains("--init-dir") && which.text().contains(two.to_str().unwrap()),
        "{}",
        which.text()
    );
    let elsewhere = init(&sandbox, &both, &["--init-dir", "/elsewhere"]);
    assert_eq!(elsewhere.status.code(), Some(2), "{}", elsewhere.text());
    assert!(!one.exists() && !two.exists());
    init(&sandbox, &both, &["--init-dir", two.to_str().unwrap()]).success();
    assert!(!one.exists());
    assert!(two.join("identity").exists() && two.join(".write-test").exists());
    assert_eq!(std::fs::metadata(&two).unwrap().mode() & 0o777, 0o700);

    // Without a file, for one directory.
    let three = sandbox.path("three");
    let mut command = sandbox.tbot(["init", "--proxy-server", "example.com:443"]);
    command.arg("--destination-dir").arg(&three);
    command.output().unwrap().success();
    assert!(three.join("ssh_config").exists());
    // Strangers are told, and go when asked.
    let only = config(&[(&one, ", acls: off")]);
    init(&sandbox, &only, &[]).success();
    std::fs::write(one.join("stranger"), "").unwrap();
    std::fs::write(one.join("root.ssh_config"), "").unwrap();
    let text = init(&sandbox, &only, &[]).success();
    assert!(
        text.contains("stranger") && one.join("stranger").exists(),
        "{text}"
    );
    init(&sandbox, &only, &["--clean"]).success();
    assert!(!one.join("stranger").exists() && one.join("root.ssh_config").exists());
}

#[test]
fn what_cannot_be_prepared_is_told_with_the_remedy() {
    let sandbox = Sandbox::new();
    let out = sandbox.path("out");
    let required = config(&[(&out, ", acls: required")]);
    let refused = init(&sandbox, &required, &[]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
    assert!(
        refused.text().contains("--bot-user and --reader-user"),
        "{}",
        refused.text()
    );
    let unknown = init(
        &sandbox,
        &required,
        &["--bot-user", "no-such-user", "--reader-user", "0"],
    );
    assert!(
        unknown.text().contains("no user \"no-such-user\""),
        "{}",
        unknown.text()
    );
    let memory = "version: v2\noutputs: [{type: identity, destination: {type: memory}}]\n";
    let refused = init(&sandbox, memory, &[]);
    assert!(
        refused.text().contains("only a directory"),
        "{}",
        refused.text()
    );
    let nothing = init(&sandbox, "version: v2\n", &[]);
    assert_eq!(nothing.status.code(), Some(2), "{}", nothing.text());
    assert!(nothing.text().contains("no service"), "{}", nothing.text());
    let storage = format!(
        "version: v2\nstorage: {{type: directory, path: {0}}}\noutputs: [{{type: identity, \
         destination: {{type: directory, path: {0}}}}}]\n",
        out.display()
    );
    let refused = init(&sandbox, &storage, &["--clean"]);
    assert!(refused.text().contains("storage too"), "{}", refused.text());

    if !is_root() {
        return skip("a change of the user needs root");
    }
    open_up(&sandbox);
    let foreign = sandbox.path("foreign");
    let file = sandbox.write("foreign.yaml", config(&[(&foreign, ", acls: off")]));
    std::fs::create_dir(&foreign).unwrap();
    std::os::unix::fs::chown(&foreign, Some(52003), None).unwrap();
    let script = format!(
        "{} init -c {} --owner 0:0",
        env!("CARGO_BIN_EXE_tbot"),
        file.display()
    );
    let refused = as_user(&sandbox, STRANGER, &script);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
    assert!(refused.text().contains("as root"), "{}", refused.text());
}
