//! Outputs that cannot be written.

use std::os::unix::fs::symlink;
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

/// A file system of a few pages, unmounted when dropped.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(path: PathBuf) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=16k", "tmpfs"])
            .arg(&path)
            .output()
            .unwrap();
        mounted.status.success().then_some(Self(path))
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[test]
fn a_full_disk_fails_its_output_and_no_other() {
    let sandbox = Sandbox::new();
    let Some(full) = Tiny::mount(sandbox.path("full")) else {
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
