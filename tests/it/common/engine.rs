//! Container engines, started by the test, with nothing of the host's engines in them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::bridge::bridge;
use super::sandbox::OutputText as _;
use super::{Process, Sandbox, eventually};

/// The image of every container.
const IMAGE: &str = "localhost/tbot-test:1";

/// Why containers cannot be run here, if so.
pub(crate) fn no_containers(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("running containers needs root".to_owned());
    }
    let dirs = ["/usr/sbin", "/usr/bin", "/usr/local/bin"];
    programs
        .iter()
        .find(|program| !dirs.iter().any(|dir| Path::new(dir).join(program).exists()))
        .map(|program| format!("{program} is not installed: make setup"))
}

/// The image as an archive of its one file.
fn archive(sandbox: &Sandbox) -> PathBuf {
    let archive = sandbox.path("image.tar");
    let dir = sandbox.path("image");
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::copy(bridge(), dir.join("bridge")).expect("the bridge");
    let mut tar = sandbox.command("tar");
    tar.arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(&dir)
        .arg("bridge");
    tar.output().expect("tar").success();
    archive
}

/// Undoes mounts that an engine leaves, so that the sandbox can be removed.
fn unmount_below(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = |line: &str| {
        let place = line.split(' ').nth(1)?;
        Path::new(place).starts_with(dir).then(|| place.to_owned())
    };
    let places: Vec<_> = mounts.lines().filter_map(below).collect();
    for place in places.iter().rev() {
        drop(Command::new("umount").arg(place).status());
    }
}

/// A `dockerd` whose containers outlive it.
pub(crate) struct Docker<'a> {
    sandbox: &'a Sandbox,
    process: Option<Process>,
    containers: Vec<String>,
}

impl<'a> Docker<'a> {
    pub(crate) fn start(sandbox: &'a Sandbox) -> Self {
        let mut docker = Self {
            sandbox,
            process: None,
            containers: Vec::new(),
        };
        docker.resume();
        let archive = archive(sandbox);
        let body = format!("@{}", archive.display());
        let (repository, tag) = IMAGE.rsplit_once(':').expect("a tag");
        let path = format!("/images/create?fromSrc=-&repo={repository}&tag={tag}");
        let mut curl = docker.curl("POST", &path);
        curl.args([
            "-H",
            "Content-Type: application/x-tar",
            "--data-binary",
            &body,
        ]);
        curl.output().expect("curl").success();
        docker
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.sandbox.path("docker/d.sock")
    }

    /// Starts the engine; containers that still run are its again.
    pub(crate) fn resume(&mut self) {
        let root = self.sandbox.path("docker");
        std::fs::create_dir_all(&root).expect("a directory");
        let mut command = self.sandbox.command("/usr/sbin/dockerd");
        command
            .arg("--data-root")
            .arg(root.join("root"))
            .arg("--exec-root")
            .arg(root.join("exec"))
            .arg("--pidfile")
            .arg(root.join("pid"))
            .arg("--host")
            .arg(format!("unix://{}", self.socket().display()))
            .arg("--config-file")
            .arg(self.sandbox.write("docker/daemon.json", "{}"))
            .args([
                "--storage-driver=vfs",
                "--iptables=false",
                "--ip6tables=false",
            ])
            .args(["--bridge=none", "--live-restore"]);
        let mut process = self.sandbox.spawn("dockerd", command);
        eventually("dockerd answers", || {
            process.check_running();
            let answer = self.curl("GET", "/_ping").output().expect("curl");
            answer.status.success().then_some(()).ok_or(answer.text())
        });
        self.process = Some(process);
    }

    /// Stops the engine; containers go on.
    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal("TERM");
            process.wait();
        }
    }

    /// Runs the bridge in a container that has the sandbox's `run`; its ID comes back.
    pub(crate) fn run(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        arguments: [&str; 2],
    ) -> String {
        let labels: Value = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let bind = format!("{}:/run", self.sandbox.path("run").display());
        let container = json!({
            "Image": IMAGE,
            "Entrypoint": ["/bridge", arguments[0], arguments[1]],
            "Labels": labels,
            "HostConfig": {"Binds": [bind], "NetworkMode": "none"},
        });
        let mut create = self.curl("POST", &format!("/containers/create?name={name}"));
        create.args(["-H", "Content-Type: application/json", "--data"]);
        let answer = create.arg(container.to_string()).output().expect("curl");
        let answer: Value = serde_json::from_slice(&answer.stdout).expect("JSON");
        let id = answer["Id"].as_str().expect("an ID").to_owned();
        self.containers.push(id.clone());
        let mut start = self.curl("POST", &format!("/containers/{id}/start"));
        start.output().expect("curl").success();
        id
    }

    fn curl(&self, method: &str, path: &str) -> Command {
        let mut curl = self.sandbox.command("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--request",
            method,
        ])
        .arg("--unix-socket")
        .arg(self.socket())
        .arg(format!("http://localhost{path}"));
        curl
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        if self.process.is_none() && !std::thread::panicking() {
            self.resume();
        }
        for id in &self.containers {
            let path = format!("/containers/{id}?force=1");
            drop(self.curl("DELETE", &path).output());
        }
        self.stop();
        unmount_below(&self.sandbox.path("docker"));
    }
}

/// A Podman with a store of its own, and its API's service.
pub(crate) struct Podman<'a> {
    sandbox: &'a Sandbox,
    service: Option<Process>,
}

impl<'a> Podman<'a> {
    pub(crate) fn start(sandbox: &'a Sandbox) -> Self {
        // Limits that may be set where the test may not raise its own.
        sandbox.write(
            "containers.conf",
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n",
        );
        let mut podman = Self {
            sandbox,
            service: None,
        };
        let archive = archive(sandbox);
        podman.podman(&["import", archive.to_str().expect("text"), IMAGE]);
        podman.resume();
        podman
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.sandbox.path("podman/p.sock")
    }

    /// Serves the API.
    pub(crate) fn resume(&mut self) {
        let mut command = self.command();
        command
            .args(["system", "service", "--time=0"])
            .arg(format!("unix://{}", self.socket().display()));
        let mut service = self.sandbox.spawn("podman", command);
        eventually("podman serves", || {
            service.check_running();
            std::os::unix::net::UnixStream::connect(self.socket())
        });
        self.service = Some(service);
    }

    /// Stops serving it; containers go on.
    pub(crate) fn stop(&mut self) {
        self.service = None;
    }

    /// Runs a command that has to succeed.
    pub(crate) fn podman(&self, arguments: &[&str]) -> String {
        self.command()
            .args(arguments)
            .output()
            .expect("podman")
            .success()
    }

    /// Moves the image into a registry, and has it from there.
    pub(crate) fn move_image(&self, to: &str) {
        self.podman(&["push", "--tls-verify=false", IMAGE, to]);
        self.podman(&["rmi", IMAGE]);
        self.podman(&["pull", "--tls-verify=false", to]);
    }

    /// Runs the bridge in a container that has the sandbox's `run`.
    pub(crate) fn run(&self, options: &[&str], arguments: [&str; 2]) {
        self.run_image(IMAGE, options, arguments);
    }

    /// The same from another image.
    pub(crate) fn run_image(&self, image: &str, options: &[&str], arguments: [&str; 2]) {
        let volume = format!("{}:/run", self.sandbox.path("run").display());
        let mut run = vec![
            "run",
            "--detach",
            "--volume",
            &volume,
            "--entrypoint",
            "/bridge",
        ];
        run.extend_from_slice(options);
        run.extend_from_slice(&[image, arguments[0], arguments[1]]);
        self.podman(&run);
    }

    fn command(&self) -> Command {
        let root = self.sandbox.path("podman");
        let mut command = self.sandbox.command("podman");
        command
            .env("CONTAINERS_CONF", self.sandbox.path("containers.conf"))
            .arg("--root")
            .arg(root.join("root"))
            .arg("--runroot")
            .arg(root.join("run"))
            .arg("--tmpdir")
            .arg(root.join("tmp"))
            .args(["--storage-driver=vfs", "--cgroup-manager=cgroupfs"]);
        command
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let mut left = String::new();
        for arguments in [["pod", "rm"], ["container", "rm"]] {
            let mut command = self.command();
            command
                .args(arguments)
                .args(["--all", "--force", "--time=0"]);
            match command.output() {
                Ok(output) if output.status.success() => {}
                Ok(output) => left.push_str(&output.text()),
                Err(error) => drop(write!(left, "{error}")),
            }
        }
        unmount_below(&self.sandbox.path("podman"));
        if !left.is_empty() {
            eprintln!("containers may be left: {left}");
        }
    }
}
