//! A writer, killed before each single system call of a write: the next one finds the old set or the
//! new one, and every file is whole at any time.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use tbot::config::{self, Overlay, Source};
use tbot::destination::{Destination, FileSet};
use tbot::env::Env;

use crate::common::{Sandbox, eventually, skip};

/// Tells the writer where to write.
const PLACE: &str = "TBOT_TEST_PLACE";

const NAMES: [&str; 6] = [
    "cockroach/node.crt",
    "cockroach/node.key",
    "identity",
    "key",
    "teleport-host-ca.crt",
    "tlscert",
];

fn destination(path: &Path) -> Arc<dyn Destination> {
    let source = Source {
        name: "tbot.yaml".to_owned(),
        text: format!(
            "version: v2\nservices: [{{type: identity, ssh_config: off, destination: {{type: \
             directory, path: {}}}}}]",
            path.display()
        ),
    };
    let loaded = config::load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
    loaded.plan.services[0].plan.destination().unwrap().build()
}

fn set(generation: u32) -> FileSet {
    let file = |name: &str| {
        let text = format!("{name} of {generation}\n").repeat(200);
        (name.to_owned(), text.into_bytes().into())
    };
    NAMES.map(file).into()
}

/// Which set each file is of; panics at a torn one.
fn generations(path: &Path) -> Vec<u32> {
    NAMES
        .iter()
        .map(|name| {
            let content = std::fs::read(path.join(name)).unwrap();
            (1..=3)
                .find(|generation| *set(*generation)[*name].expose() == content)
                .unwrap_or_else(|| panic!("{name} is torn"))
        })
        .collect()
}

/// Not a test of its own: the process that is killed.
#[test]
#[ignore = "is started by the test below"]
fn writer() {
    let path = PathBuf::from(std::env::var_os(PLACE).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let place = destination(&path);
    runtime.block_on(place.init()).unwrap();
    println!("\nready");
    std::io::stdin().read_exact(&mut [0]).unwrap();
    runtime.block_on(place.check_writable()).unwrap();
    runtime.block_on(place.write(set(2))).unwrap();
}

/// A writer under `strace`, with further arguments. Returns how it ended.
fn traced(path: &Path, log: &Path, arguments: &[&str]) -> ExitStatus {
    let mut writer = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "killed_writer::writer",
            "--ignored",
            "--nocapture",
        ])
        .args(["--test-threads", "1"])
        .env(PLACE, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(writer.stdout.take().unwrap());
    assert!(stdout.by_ref().lines().any(|line| line.unwrap() == "ready"));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(log);
    strace
        .args(arguments)
        .args(["-p", &writer.id().to_string()]);
    let mut strace = strace.stderr(Stdio::null()).spawn().unwrap();
    // Every thread has to be followed before the write begins.
    let tasks = format!("/proc/{}/task", writer.id());
    eventually("strace follows every thread", || {
        for task in std::fs::read_dir(&tasks).unwrap() {
            let status = task.unwrap().path().join("status");
            let status = std::fs::read_to_string(status).unwrap_or_default();
            // A zombie was killed before a call that it was in the middle of.
            if status.contains("TracerPid:\t0") && !status.contains("State:\tZ") {
                return Err("not yet");
            }
        }
        Ok(())
    });
    // It may be killed before it reads.
    drop(writer.stdin.take().unwrap().write_all(b"\n"));
    strace.wait().unwrap();
    writer.wait().unwrap()
}

/// How often each system call is made in a write, by any one thread.
fn calls(log: &str) -> BTreeMap<String, usize> {
    let mut by_thread: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for line in log.lines() {
        let mut words = line.split_whitespace();
        let (Some(thread), Some(call)) = (words.next(), words.next()) else {
            continue;
        };
        if let Some((name, _)) = call.split_once('(')
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        {
            *by_thread.entry((thread, name)).or_default() += 1;
        }
    }
    let mut most = BTreeMap::new();
    for ((_, name), count) in by_thread {
        let entry = most.entry(name.to_owned()).or_default();
        *entry = count.max(*entry);
    }
    // What ends a process is no part of a write.
    most.retain(|name, _| !matches!(name.as_str(), "exit" | "exit_group"));
    most
}

#[test]
fn a_kill_before_any_system_call_leaves_the_old_or_the_new_set() {
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("strace is missing");
    }
    let sandbox = Sandbox::new();
    let base = sandbox.path("").canonicalize().unwrap();
    let log = base.join("log");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let old = |number: usize| {
        let path = base.join(number.to_string());
        runtime.block_on(destination(&path).write(set(1))).unwrap();
        path
    };
    let whole = old(0);
    assert!(traced(&whole, &log, &[]).success());
    assert_eq!(generations(&whole), [2; 6]);
    let calls = calls(&std::fs::read_to_string(&log).unwrap());
    for name in [
        "mkdirat", "openat", "pwrite64", "fsync", "renameat", "unlinkat", "flock",
    ] {
        assert!(calls.contains_key(name), "{name} is not in {calls:?}");
    }

    let (mut kills, mut news, mut mixed) = (0, 0, 0);
    for (name, count) in &calls {
        for at in 1..=*count {
            let path = old(1 + kills);
            let inject = format!("inject={name}:signal=KILL:when={at}");
            if traced(&path, &log, &["-e", &inject]).signal() != Some(9) {
                // A call that depends on how threads meet was not made this time.
                continue;
            }
            kills += 1;
            let context = format!("{name} {at}");
            // Whoever reads now sees whole files.
            let seen = generations(&path);
            mixed += usize::from(seen.iter().any(|generation| *generation != seen[0]));
            // Whoever writes or starts next finds one set.
            runtime.block_on(destination(&path).init()).unwrap();
            let seen = generations(&path);
            assert!(
                seen == [1; 6] || seen == [2; 6],
                "killed before {context}: {seen:?}"
            );
            news += usize::from(seen[0] == 2);
            let mut left: Vec<_> = std::fs::read_dir(&path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.starts_with(".tbot-"))
                .collect();
            left.sort();
            assert!(left.is_empty(), "killed before {context}: {left:?} stay");
            runtime.block_on(destination(&path).write(set(3))).unwrap();
            assert_eq!(generations(&path), [3; 6], "after {context}");
            std::fs::remove_dir_all(&path).unwrap();
        }
    }
    eprintln!(
        "{kills} kills at {} kinds of call: {news} new sets, {mixed} sets to be moved on at the next \
         start",
        calls.len()
    );
    assert!(kills > 60 && news > 5 && kills - news > 20);
}
