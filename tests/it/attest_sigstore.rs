//! The `sigstore` attestor against a real registry, with what cosign writes there.

use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::attest_docker::{agent, resources};
use crate::common::{
    Cluster, OutputText as _, Podman, Process, Sandbox, eventually, free_port, identity,
    no_containers, skip,
};

/// Debian's registry, which knows no referrers.
struct Registry<'a> {
    sandbox: &'a Sandbox,
    host: String,
    _process: Process,
}

impl<'a> Registry<'a> {
    fn start(sandbox: &'a Sandbox) -> Self {
        let host = format!("127.0.0.1:{}", free_port());
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{host}'}}\n",
            sandbox.path("registry").display()
        );
        let mut command = sandbox.command("docker-registry");
        command
            .arg("serve")
            .arg(sandbox.write("registry.yaml", config));
        let mut process = sandbox.spawn("registry", command);
        eventually("the registry answers", || {
            process.check_running();
            std::net::TcpStream::connect(&host)
        });
        Self {
            sandbox,
            host,
            _process: process,
        }
    }

    fn curl(&self, arguments: &[&str], path: &str) -> String {
        let mut curl = self.sandbox.command("curl");
        curl.args(["--silent", "--show-error", "--fail-with-body", "--include"])
            .args(arguments)
            .arg(if path.starts_with('/') {
                format!("http://{}/v2/team/app{path}", self.host)
            } else {
                path.to_owned()
            });
        curl.output().unwrap().success()
    }

    /// Uploads a blob, and gives its descriptor.
    fn blob(&self, kind: &str, content: &str) -> Value {
        let file = self.sandbox.write("blob", content);
        let digest = digest(&file);
        let answer = self.curl(&["--request", "POST"], "/blobs/uploads/");
        let location = header(&answer, "location");
        let data = format!("@{}", file.display());
        self.curl(
            &[
                "--request",
                "PUT",
                "-H",
                "Content-Type: application/octet-stream",
                "--data-binary",
                &data,
            ],
            &format!("{location}&digest={digest}"),
        );
        json!({"mediaType": kind, "digest": digest, "size": content.len()})
    }

    fn manifest(&self, tag: &str, kind: &str, manifest: &Value) {
        let kind = format!("Content-Type: {kind}");
        let manifest = manifest.to_string();
        let arguments = ["--request", "PUT", "-H", &kind, "--data-binary", &manifest];
        self.curl(&arguments, &format!("/manifests/{tag}"));
    }
}

fn header(answer: &str, name: &str) -> String {
    let mut lines = answer.lines();
    let value = lines.find_map(|line| {
        let (key, value) = line.split_once(": ")?;
        key.eq_ignore_ascii_case(name)
            .then(|| value.trim().to_owned())
    });
    value.unwrap_or_else(|| panic!("no {name} in {answer}"))
}

fn digest(file: &Path) -> String {
    let sum = Command::new("sha256sum")
        .arg(file)
        .output()
        .unwrap()
        .success();
    format!("sha256:{}", sum.split(' ').next().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_of_the_image_reach_the_cluster() {
    let programs = [
        "podman",
        "conmon",
        "runc",
        "catatonit",
        "docker-registry",
        "curl",
    ];
    if let Some(why) = no_containers(&programs) {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let registry = Registry::start(&sandbox);
    let podman = Podman::start(&sandbox);
    let image = format!("{}/team/app:1", registry.host);
    podman.move_image(&image);
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
    let answer = registry.curl(&["-H", accept], "/manifests/1");
    let digest = header(&answer, "docker-content-digest");

    // What `cosign sign --key` leaves there.
    let oci = "application/vnd.oci.image.manifest.v1+json";
    let config = registry.blob("application/vnd.oci.image.config.v1+json", "{}");
    let signed = json!({"critical": {"image": {"docker-manifest-digest": digest}}}).to_string();
    let mut layer = registry.blob("application/vnd.dev.cosign.simplesigning.v1+json", &signed);
    let signature = STANDARD.encode("signature");
    layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
    let tag = digest.replace(':', "-");
    let manifest =
        json!({"schemaVersion": 2, "mediaType": oci, "config": config, "layers": [layer]});
    registry.manifest(&format!("{tag}.sig"), oci, &manifest);

    let cluster = Cluster::start(
        &sandbox,
        &resources("/signed/{{workload.podman.container.name}}"),
    );
    let attestors = format!(
        "podman: {{enabled: true, addr: 'unix://{}'}}, \
         sigstore: {{enabled: true, allowed_private_network_prefixes: [127.0.0.0/8]}}",
        podman.socket().display()
    );
    let agent = agent(&sandbox, &cluster, &attestors, &[]);
    let options = ["--name=app", "--network=none"];
    podman.run_image(&image, &options, ["/run/app.sock", "/run/w.sock"]);
    let expected = format!("spiffe://{}/signed/app", Cluster::NAME);
    assert_eq!(
        identity(&sandbox.path("run/app.sock")).await.unwrap(),
        expected
    );
    let issued = cluster.events("spiffe.svid.issued");
    let attributes = &issued.last().unwrap()["attributes"];
    assert_eq!(
        attributes["workload"]["podman"]["container"]["image_digest"],
        digest
    );
    // Audit events say nothing of signatures.
    let log = agent.log();
    let line = log
        .lines()
        .find(|line| line.contains("Looked for signatures of an image"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert!(
        line.contains(&digest) && line.contains("payloads:1 "),
        "{line}"
    );
    assert!(!log.contains("Cannot look for signatures"), "{log}");
}
