//! Programs that nobody here wrote judge what the agent gives: SPIFFE's client libraries, OpenSSL
//! and OpenSSH.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use spiffe::WorkloadApiClient;
use tokio_stream::StreamExt as _;

use crate::common::{
    Cluster, Moto, OutputText as _, Process, RECORDED, Sandbox, repository, skip, venv,
};

/// The subject of an identity output's certificate as recorded, last attribute first.
const SUBJECT: &str = r#"
1.3.9999.2.21=UTF8STRING:{"meta":{"join_token_name":"example-bot","join_method":"iam"},"iam":{"account":"123456789012","arn":"arn:aws:sts::123456789012:assumed-role/teleport-bot-role/i-0abc123"}}
1.3.9999.1.15=PRINTABLESTRING:none
1.3.9999.1.20=PRINTABLESTRING:local
1.3.9999.2.20=PRINTABLESTRING:<instance>
1.3.9999.2.18=PRINTABLESTRING:example
1.3.9999.2.9=PRINTABLESTRING:true
1.3.9999.2.7=PRINTABLESTRING:bot-example
1.3.9999.2.6=UTF8STRING:*
1.3.9999.2.5=UTF8STRING:*
1.3.9999.1.9=PRINTABLESTRING:127.0.0.1
1.3.9999.1.7=PRINTABLESTRING:test.example.org
1.3.9999.1.2=PRINTABLESTRING:system:masters
CN=PRINTABLESTRING:bot-example
O=PRINTABLESTRING:workload-identity-issuer + O=PRINTABLESTRING:event-handler + O=PRINTABLESTRING:resources
postalCode=PRINTABLESTRING:null
street=PRINTABLESTRING:test.example.org
L=PRINTABLESTRING:-teleport-internal-join + L=PRINTABLESTRING:root
"#;

/// What `ssh-keygen -L` shows of the SSH certificate from its principals on, as recorded.
const SSH: &str = r#"
Principals:
root
-teleport-internal-join
Critical Options: (none)
Extensions:
bot-instance-id@goteleport.com = <instance>
bot-name@goteleport.com = example
disallow-reissue
impersonator = bot-example
login-ip = 127.0.0.1
permit-port-forwarding
permit-pty
private-key-policy = none
teleport-roles = {"roles":["event-handler","workload-identity-issuer","resources"]}
teleport-route-to-cluster = test.example.org
teleport-traits = null
"#;

/// The files of an identity output as recorded.
const FILES: [&str; 13] = [
    ".write-test",
    "identity",
    "key",
    "key-cert.pub",
    "key.pub",
    "known_hosts",
    "ssh_config",
    "teleport-database-ca.crt",
    "teleport-host-ca.crt",
    "teleport-user-ca.crt",
    "test.example.org.known_hosts",
    "test.example.org.ssh_config",
    "tlscert",
];

/// Starts an agent whose SVIDs are renewed every few seconds; returns it with its socket's address.
fn hurried(sandbox: &Sandbox, cluster: &Cluster<'_>) -> (Process, String) {
    let address = format!("unix://{}", sandbox.path("w.sock").display());
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + &format!(
            "services:\n  - {{type: workload-identity-api, listen: \"{address}\", \
             selector: {{name: example-workload-identity}}, credential_ttl: 30s, renewal_interval: 4s}}\n"
        );
    let config = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(config);
    let mut agent = sandbox.spawn("agent", command);
    agent.wait_for_log("The bot has a fresh identity");
    (agent, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rust_client_sees_renewals_pushed() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RECORDED);
    let (_agent, address) = hurried(&sandbox, &cluster);
    let client = WorkloadApiClient::connect_to(&address).await.unwrap();
    let bundles = client.fetch_x509_bundles().await.unwrap();
    assert_eq!(bundles.len(), 1);
    let mut contexts = client.stream_x509_contexts().await.unwrap();
    let mut leaves = HashSet::new();
    for number in 0..3 {
        let context = contexts.next().await.unwrap().unwrap();
        let svid = context.default_svid().unwrap();
        assert_eq!(
            svid.spiffe_id().to_string(),
            format!("spiffe://{}/svc/foo", Cluster::NAME)
        );
        let leaf = svid.cert_chain()[0].as_bytes().to_vec();
        let bundle = bundles.get(svid.spiffe_id().trust_domain()).unwrap();
        verify(&sandbox, &leaf, bundle.authorities()[0].as_bytes());
        assert!(leaves.insert(leaf), "push {number} brought nothing new");
    }
}

/// `openssl verify` of a leaf against an authority, for both purposes of an SVID.
fn verify(sandbox: &Sandbox, leaf: &[u8], authority: &[u8]) {
    let [leaf, authority] = [("leaf", leaf), ("authority", authority)].map(|(name, der)| {
        let path = sandbox.write(&format!("{name}.der"), der);
        let pem = openssl(
            sandbox,
            &["x509", "-inform", "DER", "-in", path.to_str().unwrap()],
        );
        sandbox.write(&format!("{name}.pem"), pem)
    });
    for purpose in ["sslclient", "sslserver"] {
        let verdict = openssl(
            sandbox,
            &[
                "verify",
                "-x509_strict",
                "-purpose",
                purpose,
                "-CAfile",
                authority.to_str().unwrap(),
                leaf.to_str().unwrap(),
            ],
        );
        assert!(verdict.ends_with("leaf.pem: OK\n"), "{verdict}");
    }
}

fn openssl(sandbox: &Sandbox, arguments: &[&str]) -> String {
    let mut command = sandbox.command("openssl");
    command.args(arguments).output().unwrap().success()
}

#[test]
fn the_python_client_sees_renewals_pushed() {
    if !venv().join("bin/python").exists() {
        return skip("the Python environment is missing: make setup");
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RECORDED);
    let (_agent, address) = hurried(&sandbox, &cluster);
    let mut command = sandbox.command(venv().join("bin/python"));
    command
        .arg(repository().join("tests/support/watch.py"))
        .arg("3")
        .env("SPIFFE_ENDPOINT_SOCKET", &address);
    let shown = command.output().unwrap().success();
    assert!(
        shown.contains(&format!("bundles {}\n", Cluster::NAME)),
        "{shown}"
    );
    let svids: Vec<_> = shown
        .lines()
        .filter(|line| line.starts_with("svid "))
        .collect();
    assert_eq!(svids.len(), 3, "{shown}");
    let end = format!(" spiffe://{}/svc/foo 1", Cluster::NAME);
    assert!(svids.iter().all(|line| line.ends_with(&end)), "{shown}");
}

#[test]
fn the_identity_output_is_what_was_recorded() {
    let sandbox = Sandbox::new();
    let Some(moto) = Moto::start(&sandbox, "teleport-bot-role", "i-0abc123") else {
        return skip("the Python environment is missing: make setup");
    };
    let endpoint = moto.url();
    let cluster = Cluster::start_with(
        &sandbox,
        RECORDED,
        crate::common::free_port(),
        &["--sts-endpoint", &endpoint],
    );
    let out = sandbox.path("out");
    let config = sandbox.write(
        "tbot.yaml",
        format!(
            "version: v2\nproxy_server: {}\nonboarding: {{join_method: iam, token: example-bot}}\n\
             storage: {{type: memory}}\noutputs:\n  - {{type: identity, destination: {{type: directory, path: {}}}}}\n",
            cluster.proxy(),
            out.display(),
        ),
    );
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    command
        .arg(config)
        .envs(moto.environment())
        .env("SSL_CERT_FILE", cluster.web_authority())
        .output()
        .unwrap()
        .success();

    let mut files: Vec<_> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| {
            let mode = entry.metadata().unwrap().permissions().mode() & 0o7777;
            (entry.file_name().into_string().unwrap(), mode)
        })
        .collect();
    files.sort();
    assert_eq!(files, FILES.map(|name| (name.to_owned(), 0o600)));

    let certificate = out.join("tlscert");
    let mut subject = shown_subject(&sandbox, &certificate);
    let instance = subject
        .split_once("1.3.9999.2.20=PRINTABLESTRING:")
        .and_then(|(_, rest)| rest.lines().next())
        .expect("a bot instance")
        .to_owned();
    assert_eq!(instance.len(), 36, "{instance} is no UUID");
    subject = subject.replace(&instance, "<instance>");
    assert_eq!(subject, SUBJECT.trim());

    let text = |file: &Path| {
        openssl(
            &sandbox,
            &["x509", "-noout", "-text", "-in", file.to_str().unwrap()],
        )
    };
    let leaf = text(&certificate);
    for fact in [
        "Signature Algorithm: ecdsa-with-SHA256",
        "ASN1 OID: prime256v1",
        "X509v3 Key Usage: critical\n                Digital Signature\n",
        "X509v3 Extended Key Usage: \n                TLS Web Server Authentication, TLS Web Client Authentication\n",
        "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
        "X509v3 Authority Key Identifier:",
    ] {
        assert!(leaf.contains(fact), "{fact:?} is not in:\n{leaf}");
    }
    let ca = out.join("teleport-user-ca.crt");
    let verdict = openssl(
        &sandbox,
        &[
            "verify",
            "-CAfile",
            ca.to_str().unwrap(),
            certificate.to_str().unwrap(),
        ],
    );
    assert!(verdict.ends_with("tlscert: OK\n"), "{verdict}");
    assert_eq!(minutes(&sandbox, &certificate), 61);

    assert_eq!(
        shown_ssh(&sandbox, &out.join("key-cert.pub"), &instance),
        SSH.trim()
    );
}

/// The subject as OpenSSL shows it, one relative name per line, last first.
fn shown_subject(sandbox: &Sandbox, certificate: &Path) -> String {
    let shown = openssl(
        sandbox,
        &[
            "x509",
            "-noout",
            "-subject",
            "-nameopt",
            "sep_multiline,show_type,dn_rev,sname",
            "-in",
            certificate.to_str().unwrap(),
        ],
    );
    let lines: Vec<_> = shown.lines().skip(1).map(str::trim).collect();
    lines.join("\n")
}

/// The whole life of a certificate, in minutes.
fn minutes(sandbox: &Sandbox, certificate: &Path) -> i64 {
    let shown = openssl(
        sandbox,
        &[
            "x509",
            "-noout",
            "-dates",
            "-dateopt",
            "iso_8601",
            "-in",
            certificate.to_str().unwrap(),
        ],
    );
    let dates: Vec<_> = shown
        .lines()
        .map(|line| {
            let date = line.split_once('=').unwrap().1.replace(' ', "T");
            time::OffsetDateTime::parse(&date, &time::format_description::well_known::Rfc3339)
                .unwrap()
        })
        .collect();
    (dates[1] - dates[0]).whole_minutes()
}

/// What `ssh-keygen -L` shows from the principals on. It prints values that it does not know as hex
/// of a length and a text; here they are text.
fn shown_ssh(sandbox: &Sandbox, certificate: &Path, instance: &str) -> String {
    let mut command = sandbox.command("ssh-keygen");
    command.args(["-L", "-f"]).arg(certificate);
    let shown = command.output().unwrap().success();
    assert!(
        shown.contains("Type: ecdsa-sha2-nistp256-cert-v01@openssh.com user certificate"),
        "{shown}"
    );
    assert!(shown.contains("Key ID: \"bot-example\""), "{shown}");
    assert!(shown.contains("Signing CA: ED25519 "), "{shown}");
    let lines: Vec<_> = shown
        .lines()
        .map(str::trim)
        .skip_while(|line| !line.starts_with("Principals:"))
        .map(|line| {
            let line = line.trim_end_matches(" UNKNOWN FLAG OPTION");
            match line.split_once(" UNKNOWN OPTION: ") {
                None => line.to_owned(),
                Some((name, value)) => {
                    let bytes = hex::decode(value.split_whitespace().next().unwrap()).unwrap();
                    let text = String::from_utf8(bytes[4..].to_vec()).unwrap();
                    format!("{name} = {}", text.replace(instance, "<instance>"))
                }
            }
        })
        .collect();
    lines.join("\n")
}
