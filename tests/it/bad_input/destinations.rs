//! Outputs that cannot be written.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{RESOURCES, assert_refused, once, output, snapshot, start};
use crate::common::{Cluster, OutputText as _, Sandbox, eventually, skip};

#[test]
fn a_path_that_can_never_be_written_is_named_before_the_token_is_used() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = |out: &Path| cluster.config(&token, "bot") + "outputs:\n" + &output(out);

    let file = sandbox.write("file", "mine");
    assert_refused(
        &once(&sandbox, &config(&file)),
        &[file.to_str().unwrap(), "not a directory"],
    );
    let below = file.join("out");
    assert_refused(&once(&sandbox, &config(&below)), &[below.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");

    let target = sandbox.path("target");
    std::fs::create_dir(&target).unwrap();
    let link = sandbox.path("link");
    symlink(&target, &link).unwrap();
    let secure = config(&link).replace("path: ", "symlinks: secure, path: ");
    let secure = secure.replace(
        &format!(
            "{{type: directory, symlinks: secure, path: {}",
            sandbox.path("bot").display()
        ),
        &format!("{{type: directory, path: {}", sandbox.path("bot").display()),
    );
    assert_refused(
        &once(&sandbox, &secure),
        &[link.to_str().unwrap(), "symbolic link"],
    );
    assert!(snapshot(&target).is_empty());

    // Nothing of this cost the token.
    once(&sandbox, &config(&sandbox.path("out"))).success();
}

/// A file system of its own, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// A few pages.
    fn tiny(path: PathBuf) -> Option<Self> {
        Self::mount(path, "tmpfs", "size=16k")
    }

    fn mount(path: PathBuf, kind: &str, options: &str) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", kind, "-o", options, "tbot-test"])
            .arg(&path)
            .output()
            .unwrap();
        mounted.status.success().then_some(Self(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[test]
fn a_full_disk_fails_its_output_and_no_other() {
    let sandbox = Sandbox::new();
    let Some(full) = Mounted::tiny(sandbox.path("full")) else {
        return skip("mounting a small file system needs root");
    };
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + "outputs:\n"
        + &output(&full.0.join("out"))
        + &output(&sandbox.path("out"));
    std::fs::write(full.0.join("filler"), [0; 8 * 1024]).unwrap();
    let before = snapshot(&full.0.join("out"));
    let failed = once(&sandbox, &config);
    assert_refused(&failed, &["1 of the outputs failed: identity-1"]);
    assert!(
        failed
            .text()
            .contains(&format!("write {}/", full.0.join("out").display()))
            && failed.text().contains("No space left on device"),
        "{}",
        failed.text()
    );
    assert!(sandbox.path("out/identity").exists(), "{}", failed.text());
    assert!(!full.0.join("out/tlscert").exists());
    assert_eq!(
        snapshot(&full.0.join("out")).get("tlscert"),
        before.get("tlscert")
    );

    // With room again, the next run has no trouble and needs no token.
    std::fs::remove_file(full.0.join("filler")).unwrap();
    let roomy = Command::new("mount")
        .args(["-o", "remount,size=1m"])
        .arg(&full.0)
        .status()
        .unwrap();
    assert!(roomy.success());
    once(&sandbox, &config).success();
    assert!(full.0.join("out/identity").exists());
}

#[test]
fn an_output_that_cannot_be_made_at_the_start_stops_no_other() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let bad = sandbox.write("bad", "mine");
    let config = cluster.config(&token, "bot")
        + "outputs:\n"
        + &output(&bad)
        + &output(&sandbox.path("good"));
    let failed = once(&sandbox, &config);
    assert_refused(&failed, &["1 of the outputs failed: identity-1"]);
    assert!(sandbox.path("good/identity").exists(), "{}", failed.text());

    std::fs::remove_dir_all(sandbox.path("good")).unwrap();
    let mut agent = start(&sandbox, "agent", &config);
    agent.wait_for_log("A service is not ready");
    eventually("the good output is written", || {
        std::fs::metadata(sandbox.path("good/identity"))
    });
    assert_eq!(std::fs::read_to_string(&bad).unwrap(), "mine");
    // Mended, the bad one is written without a restart.
    std::fs::remove_file(&bad).unwrap();
    eventually("the other is written too", || {
        std::fs::metadata(bad.join("identity"))
    });
    agent.check_running();
}

#[test]
fn a_read_only_file_system_keeps_what_it_has_until_it_can_be_written() {
    let sandbox = Sandbox::new();
    let Some(mounted) = Mounted::mount(sandbox.path("disk"), "tmpfs", "size=1m") else {
        return skip("mounting needs root");
    };
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&mounted.0.join("out"));
    once(&sandbox, &config).success();
    let remount = |options: &str| {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,{options}")]);
        assert!(mount.arg(&mounted.0).status().unwrap().success());
    };
    remount("ro");
    let before = snapshot(&mounted.0);
    let refused = once(&sandbox, &config);
    assert_refused(&refused, &["1 of the outputs failed: identity-1"]);
    assert!(
        refused.text().contains("Read-only file system")
            && refused.text().contains(mounted.0.to_str().unwrap()),
        "{}",
        refused.text()
    );
    assert_eq!(snapshot(&mounted.0), before);
    remount("rw");
    once(&sandbox, &config).success();
    assert_ne!(snapshot(&mounted.0), before);
}

#[test]
fn a_file_system_without_access_control_lists_is_told_or_refused() {
    let sandbox = Sandbox::new();
    let Some(mounted) = Mounted::mount(sandbox.path("disk"), "ramfs", "mode=755") else {
        return skip("mounting needs root");
    };
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let out = mounted.0.join("out");
    let config = |acls: &str| {
        cluster.config(&token, "bot")
            + "outputs:\n"
            + &output(&out).replace(
                &format!("path: {}", out.display()),
                &format!(
                    "path: {}, acls: {acls}, readers: [{{user: 52002}}]",
                    out.display()
                ),
            )
    };
    let refused = once(&sandbox, &config("required"));
    assert_refused(
        &refused,
        &[out.to_str().unwrap(), "acls is required", "acls: try"],
    );
    assert!(!out.join("key").exists());
    let text = once(&sandbox, &config("try")).success();
    assert!(text.contains("readers get no access"), "{text}");
    let mode = std::fs::metadata(out.join("key")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

#[test]
fn a_directory_of_another_user_is_named() {
    if !rustix::process::geteuid().is_root() {
        return skip("other users need root");
    }
    let sandbox = Sandbox::new();
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(sandbox.path(""), everybody.clone()).unwrap();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let (foreign, own) = (sandbox.path("foreign"), sandbox.path("own"));
    for path in [&foreign, &own, &sandbox.path("bot")] {
        std::fs::create_dir(path).unwrap();
        std::fs::set_permissions(path, everybody.clone()).unwrap();
    }
    for path in [&own, &sandbox.path("bot")] {
        std::os::unix::fs::chown(path, Some(52001), Some(52001)).unwrap();
    }
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&foreign) + &output(&own);
    let file = sandbox.write("once.yaml", config);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut agent = sandbox.command("setpriv");
    agent
        .args(["--reuid", "52001", "--regid", "52001", "--clear-groups"])
        .arg(env!("CARGO_BIN_EXE_tbot"))
        .args(["start", "--oneshot", "-c"])
        .arg(file);
    let refused = agent.output().unwrap();
    assert_refused(&refused, &["1 of the outputs failed: identity-1"]);
    let text = refused.text();
    assert!(
        text.contains("belongs to another user")
            && text.contains(foreign.to_str().unwrap())
            && text.contains("Permission denied"),
        "{text}"
    );
    assert!(snapshot(&foreign).is_empty());
    assert!(own.join("identity").exists(), "{text}");
}

#[test]
fn outputs_to_one_directory_are_told_and_all_written() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let out = sandbox.path("out");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&out).repeat(3);
    for _ in 0..3 {
        let text = once(&sandbox, &config).success();
        assert_eq!(
            text.matches("write to the same destination").count(),
            2,
            "{text}"
        );
        let names = snapshot(&out).into_keys();
        let left: Vec<_> = names.filter(|name| name.starts_with(".tbot-")).collect();
        assert!(left.is_empty(), "{left:?}");
        let whole = snapshot(&out);
        assert!(whole["identity"].starts_with(&whole["key"]));
    }
}
