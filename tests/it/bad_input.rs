//! What goes wrong in the field, tried on the real binary: each failure ends with the right exit
//! code and one line that names the cause and the remedy, and leaves what was there.
//!
//! Wrong configuration files are tried in `tests/golden/config/bad`. What needs a clock or a cluster
//! that lies is tried where it is decided: a proof signed 15 minutes ago in `join::iam::verify`,
//! wrong certificates in `identity::material`, a storage torn at each write in `identity::store`.

mod attack;
mod cluster;
mod destinations;
mod join;
mod runtime;
mod sockets;
mod storage;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

pub(crate) use crate::common::RESOURCES;
use crate::common::{OutputText as _, Process, Sandbox};

/// What the log says when the bot has joined or renewed.
const FRESH: &str = "The bot has a fresh identity";

/// An identity output without SSH texts, which need a proxy.
pub(crate) fn output(path: &Path) -> String {
    format!(
        "  - {{type: identity, ssh_config: off, destination: {{type: directory, path: {}}}}}\n",
        path.display()
    )
}

/// A Workload API on `socket`; `more` are further keys of the service.
fn workload_api(socket: &Path, more: &str) -> String {
    format!(
        "  - {{type: workload-identity-api, listen: \"unix://{}\", selector: {{name: foo}}{more}}}\n",
        socket.display()
    )
}

/// Runs `tbot start --oneshot` to its end.
pub(crate) fn once(sandbox: &Sandbox, config: &str) -> Output {
    let path = sandbox.write("once.yaml", config);
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    command.arg(path).output().expect("tbot")
}

/// Starts `tbot start`; its log is `<name>.log`.
pub(crate) fn start(sandbox: &Sandbox, name: &str, config: &str) -> Process {
    let path = sandbox.write(&format!("{name}.yaml"), config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(path);
    sandbox.spawn(name, command)
}

/// Checks that a command failed while it ran, with one line that has every text.
#[track_caller]
pub(crate) fn assert_refused(output: &Output, texts: &[&str]) {
    assert_ended(output, 1, texts);
}

/// The same for a mistake in what was written: 2.
pub(crate) fn assert_mistaken(output: &Output, texts: &[&str]) {
    assert_ended(output, 2, texts);
}

fn assert_ended(output: &Output, code: i32, texts: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{}", output.text());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let errors: Vec<_> = stderr
        .lines()
        .skip_while(|line| !line.starts_with("ERROR: "))
        .collect();
    let [error] = errors.as_slice() else {
        panic!("not one line:\n{stderr}");
    };
    for text in texts {
        assert!(error.contains(text), "{text:?} is not in:\n{stderr}");
    }
}

/// Every file below `dir` with its content.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().expect("a type").is_dir() {
            let below = snapshot(&entry.path());
            files.extend(
                below
                    .into_iter()
                    .map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)),
            );
        } else if let Ok(bytes) = std::fs::read(entry.path()) {
            files.insert(name, bytes);
        }
    }
    files
}
