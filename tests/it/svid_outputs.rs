//! SVIDs as files, judged by programs that nobody here wrote: OpenSSL, Python's JWT library, AWS's SDK
//! and a Roles Anywhere that verifies what it is sent.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use crate::common::{
    Cluster, OutputText as _, Process, Sandbox, eventually, free_port, issuing, repository, skip,
    venv,
};

/// Two workload identities, and a bot that may issue both.
const IDENTITIES: &str = r"
kind: workload_identity
version: v1
metadata: {name: foo, labels: {env: test, app: foo}}
spec: {spiffe: {id: /svc/foo}}
---
kind: workload_identity
version: v1
metadata: {name: bar, labels: {env: test}}
spec: {spiffe: {id: /svc/bar}}
";

const ID: &str = "spiffe://test.example.org/svc/foo";

fn once(sandbox: &Sandbox, config: &str) -> Output {
    let path = sandbox.write("once.yaml", config);
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    command.arg(path).output().expect("tbot")
}

fn start(sandbox: &Sandbox, config: &str) -> Process {
    let path = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(path);
    sandbox.spawn("tbot", command)
}

/// `outputs:` with one X.509-SVID in `<sandbox>/svid`; `more` are further keys.
fn x509(sandbox: &Sandbox, more: &str) -> String {
    format!(
        "outputs:\n- type: workload-identity-x509\n  name: web\n  selector: {{name: foo}}\n  \
         destination: {{type: directory, path: {}}}\n{more}",
        sandbox.path("svid").display()
    )
}

fn openssl(sandbox: &Sandbox, line: &str) -> Output {
    let mut command = sandbox.command("openssl");
    command.args(line.split_whitespace()).output().unwrap()
}

/// The files of a directory but for the writability probe.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name() != ".write-test")
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn openssl_accepts_an_svid_and_its_bundle() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let token = cluster.invite("example", "5m");
    let config = cluster.config(&token, "bot") + &x509(&sandbox, "");
    once(&sandbox, &config).success();

    let found = files(&sandbox.path("svid"));
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "svid.pem",
            "svid_bundle.pem",
            "svid_crl.pem",
            "svid_key.pem"
        ]
    );
    for name in names {
        let mode = fs::metadata(sandbox.path("svid").join(name)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600, "{name}");
    }
    let verified = openssl(
        &sandbox,
        "verify -CAfile svid/svid_bundle.pem svid/svid.pem",
    );
    assert_eq!(verified.success(), "svid/svid.pem: OK\n");
    let verified = openssl(
        &sandbox,
        "verify -crl_check -CRLfile svid/svid_crl.pem -CAfile svid/svid_bundle.pem svid/svid.pem",
    );
    assert!(
        verified.text().contains("svid.pem: OK"),
        "{}",
        verified.text()
    );
    let names = openssl(
        &sandbox,
        "x509 -in svid/svid.pem -noout -ext subjectAltName",
    )
    .success();
    assert!(names.contains(&format!("URI:{ID}")), "{names}");
    let key = openssl(&sandbox, "pkey -in svid/svid_key.pem -pubout").success();
    let own = openssl(&sandbox, "x509 -in svid/svid.pem -noout -pubkey").success();
    assert_eq!(key, own);
    let key = String::from_utf8(found["svid_key.pem"].clone()).unwrap();
    assert!(key.starts_with("-----BEGIN PRIVATE KEY-----\n"));
}

#[test]
fn several_identities_and_none_are_told_apart_and_leave_no_files() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let path = sandbox.path("svid");
    for (selector, expected) in [
        ("labels: {env: [test]}", "matches 2 workload identities"),
        (
            "labels: {env: [prod]}",
            "no workload identity with the selector's labels",
        ),
        ("name: nobody", "nobody"),
    ] {
        let token = cluster.invite("example", "5m");
        for kind in ["x509", "jwt, audiences: [a]"] {
            let config = cluster.config(&token, "bot")
                + &format!(
                    "outputs:\n- {{type: workload-identity-{kind}, selector: {{{selector}}}, \
                     destination: {{type: directory, path: {}}}}}\n",
                    path.display()
                );
            let output = once(&sandbox, &config);
            assert_eq!(output.status.code(), Some(1), "{}", output.text());
            assert!(output.text().contains(expected), "{}", output.text());
            assert_eq!(files(&path), BTreeMap::new());
        }
    }
    // One of the two, by a label that only it has.
    let token = cluster.invite("example", "5m");
    let config = cluster.config(&token, "bot")
        + &format!(
            "outputs:\n- {{type: workload-identity-x509, selector: {{labels: {{app: [foo]}}}}, \
             destination: {{type: directory, path: {}}}}}\n",
            path.display()
        );
    once(&sandbox, &config).success();
    assert_eq!(files(&path).len(), 4);
}

#[test]
fn a_relying_party_accepts_a_token() {
    let python = venv().join("bin/python");
    if !python.exists() {
        return skip("no Python environment");
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let token = cluster.invite("example", "5m");
    let config = cluster.config(&token, "bot")
        + &format!(
            "outputs:\n- type: workload-identity-jwt\n  selector: {{name: foo}}\n  audiences: \
             [one.example, two.example]\n  destination: {{type: directory, path: {}}}\n",
            sandbox.path("jwt").display()
        );
    once(&sandbox, &config).success();
    let found: Vec<String> = files(&sandbox.path("jwt")).into_keys().collect();
    assert_eq!(found, ["jwt_svid"]);
    let verify = |audience: &str| {
        let issuer = format!("https://{}/workload-identity", cluster.proxy());
        let mut command = sandbox.command(&python);
        command
            .arg(repository().join("tests/support/jwt_svid.py"))
            .arg(issuer)
            .arg(cluster.web_authority())
            .arg(sandbox.path("jwt/jwt_svid"))
            .arg(audience);
        command.output().unwrap()
    };
    for audience in ["one.example", "two.example"] {
        assert_eq!(verify(audience).success().trim(), ID);
    }
    assert!(!verify("three.example").status.success());
}

#[test]
fn new_authorities_and_the_operators_wish_rewrite_the_files_and_run_the_hook_once_each() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let token = cluster.invite("example", "5m");
    let runs = sandbox.path("runs");
    // What the hook sees: its variables, and which certificate stands there.
    let script = sandbox.write(
        "hook.sh",
        "#!/bin/sh\necho \"$TBOT_OUTPUT $TBOT_DESTINATION ${TELEPORT_BOT_TOKEN:-none} \
         $(openssl x509 -in \"$TBOT_DESTINATION/svid.pem\" -noout -serial)\" >> \"$1\"\n",
    );
    let hook = format!(
        "  reload: {{exec: [/bin/sh, {}, {}]}}\n",
        script.display(),
        runs.display()
    );
    let config = cluster.config(&token, "bot") + &x509(&sandbox, &hook);
    let mut agent = start(&sandbox, &config);
    let ran = || -> Vec<String> {
        let text = fs::read_to_string(&runs).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    let serial = || openssl(&sandbox, "x509 -in svid/svid.pem -noout -serial").success();
    let bundle = || fs::read_to_string(sandbox.path("svid/svid_bundle.pem")).unwrap();
    let told = |count: usize| {
        eventually("the hook ran", || {
            let ran = ran();
            if ran.len() >= count {
                Ok(())
            } else {
                Err(format!("{ran:?}"))
            }
        });
        let ran = ran();
        assert_eq!(ran.len(), count, "{ran:?}");
        let expected = format!(
            "web {} none {}",
            sandbox.path("svid").display(),
            serial().trim()
        );
        assert_eq!(ran[count - 1], expected);
    };
    agent.wait_for_log("Told the users of the output to reload");
    told(1);
    assert_eq!(bundle().matches("BEGIN").count(), 1);

    agent.signal("HUP");
    told(2);

    let first = serial();
    cluster.run(&["rotate", "--type", "spiffe", "--manual"]);
    eventually("the bundle has both authorities", || {
        let count = bundle().matches("BEGIN").count();
        if count == 2 { Ok(()) } else { Err(count) }
    });
    told(3);
    assert_ne!(serial(), first);
    let verified = openssl(
        &sandbox,
        "verify -CAfile svid/svid_bundle.pem svid/svid.pem",
    );
    assert_eq!(verified.success(), "svid/svid.pem: OK\n");
    agent.check_running();
    assert_eq!(ran().len(), 3);
}

#[test]
fn a_hook_that_fails_is_an_unhealthy_output_whose_files_stay() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let token = cluster.invite("example", "5m");
    let hook = "  reload: {exec: [sh, -c, 'sleep 600 & wait'], timeout: 1s}\n";
    let config = cluster.config(&token, "bot") + &x509(&sandbox, hook);
    let output = once(&sandbox, &config);
    assert_eq!(output.status.code(), Some(1), "{}", output.text());
    assert!(
        output.text().contains("reload: exec: not done within 1 s"),
        "{}",
        output.text()
    );
    assert_eq!(files(&sandbox.path("svid")).len(), 4);

    let port = free_port();
    let hook = "  reload: {signal: {pid_file: /run/no-such-program.pid}}\n";
    let config = cluster.config(&token, "bot")
        + &format!("diag_addr: 127.0.0.1:{port}\n")
        + &x509(&sandbox, hook);
    let mut agent = start(&sandbox, &config);
    agent.wait_for_log("its users were not all told to reload");
    let mut curl = sandbox.command("curl");
    let ready = curl
        .args(["-sS", &format!("http://127.0.0.1:{port}/readyz/web")])
        .output()
        .unwrap()
        .success();
    assert!(ready.contains("is the program running?"), "{ready}");
}

/// A Roles Anywhere whose trust anchor is the content of a file.
struct RolesAnywhere {
    _server: Process,
    url: String,
    notes: PathBuf,
}

impl RolesAnywhere {
    fn start(sandbox: &Sandbox, anchor: &Path) -> Self {
        let port = free_port();
        let notes = sandbox.path("granted.json");
        let mut command = sandbox.command(venv().join("bin/python"));
        command
            .arg(repository().join("tests/support/roles_anywhere.py"))
            .arg(port.to_string())
            .args([anchor, &notes]);
        let server = sandbox.spawn("roles-anywhere", command);
        eventually("Roles Anywhere listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port))
        });
        Self {
            _server: server,
            url: format!("http://127.0.0.1:{port}"),
            notes,
        }
    }

    fn granted(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(&self.notes).unwrap()).unwrap()
    }
}

#[test]
fn aws_credentials_are_had_for_an_svid_and_read_by_awss_sdk() {
    let python = venv().join("bin/python");
    if !python.exists() {
        return skip("no Python environment");
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let token = cluster.invite("example", "5m");
    // The trust anchor is made of what another output wrote.
    once(
        &sandbox,
        &(cluster.config(&token, "bot") + &x509(&sandbox, "")),
    )
    .success();
    let aws = RolesAnywhere::start(&sandbox, &sandbox.path("svid/svid_bundle.pem"));
    let config = |more: &str| {
        cluster.config(&token, "bot")
            + &format!(
                "outputs:\n- type: workload-identity-aws-roles-anywhere\n  selector: {{name: foo}}\n  \
                 destination: {{type: directory, path: {}}}\n  \
                 role_arn: arn:aws:iam::123456789012:role/example\n  \
                 profile_arn: arn:aws:rolesanywhere:eu-west-1:123456789012:profile/p\n  \
                 trust_anchor_arn: arn:aws:rolesanywhere:eu-west-1:123456789012:trust-anchor/t\n{more}",
                sandbox.path("aws").display()
            )
    };
    let exchange = |more: &str| {
        let path = sandbox.write("aws.yaml", config(more));
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command
            .arg(path)
            .env("AWS_ENDPOINT_URL_ROLESANYWHERE", &aws.url);
        command.output().unwrap()
    };
    let sdk = |profiles: &[&str]| {
        let mut command = sandbox.command(&python);
        command
            .arg(repository().join("tests/support/aws_profile.py"))
            .args(profiles)
            .env(
                "AWS_SHARED_CREDENTIALS_FILE",
                sandbox.path("aws/aws_credentials"),
            )
            .env("AWS_EC2_METADATA_DISABLED", "true");
        command.output().unwrap().success()
    };

    sandbox.write(
        "aws/aws_credentials",
        "# by hand\n[other]\naws_access_key_id = AKIAOTHER\naws_secret_access_key = x\n",
    );
    exchange("").success();
    assert_eq!(
        sdk(&["default", "other"]),
        "default ASIATEST1 secret/1+= token/1==\nother AKIAOTHER x None\n"
    );
    let granted = aws.granted();
    assert_eq!(granted[0]["id"], ID);
    assert_eq!(granted[0]["region"], "eu-west-1");
    assert_eq!(granted[0]["seconds"], 6 * 3600);
    assert_eq!(granted[0]["role"], "arn:aws:iam::123456789012:role/example");

    // Again, and into another profile; a comment made by hand is still there.
    exchange("  session_duration: 1h\n  session_renewal_interval: 10m\n").success();
    exchange("  credential_profile_name: third\n").success();
    assert_eq!(
        sdk(&["default", "other", "third"]),
        "default ASIATEST2 secret/2+= token/2==\nother AKIAOTHER x None\n\
         third ASIATEST3 secret/3+= token/3==\n"
    );
    assert_eq!(aws.granted()[1]["seconds"], 3600);
    let text = fs::read_to_string(sandbox.path("aws/aws_credentials")).unwrap();
    assert!(text.starts_with("# by hand\n[other]\n"), "{text}");

    // What cannot be merged with is left alone, and nothing is asked of AWS for it.
    sandbox.write("aws/aws_credentials", "[other\nhunter2\n");
    let refused = exchange("");
    assert_eq!(refused.status.code(), Some(1));
    let told = refused.text();
    assert!(told.contains("line 1 of the existing file"), "{told}");
    assert!(!told.contains("hunter2"), "{told}");
    assert_eq!(aws.granted().as_array().unwrap().len(), 3);
    exchange("  overwrite_credential_file: true\n").success();
    let text = fs::read_to_string(sandbox.path("aws/aws_credentials")).unwrap();
    assert!(
        text.starts_with("[default]\naws_secret_access_key = "),
        "{text}"
    );
}

#[test]
fn what_aws_refuses_is_told_and_the_old_credentials_stay() {
    if !venv().join("bin/python").exists() {
        return skip("no Python environment");
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    let token = cluster.invite("example", "5m");
    // An anchor that is not the cluster's: the web server's authority.
    let aws = RolesAnywhere::start(&sandbox, &cluster.web_authority());
    let old = "[default]\naws_access_key_id = OLD\n";
    sandbox.write("aws/aws_credentials", old);
    let config = cluster.config(&token, "bot")
        + &format!(
            "outputs:\n- {{type: workload-identity-aws-roles-anywhere, selector: {{name: foo}}, \
             destination: {{type: directory, path: {}}}, role_arn: 'arn:aws:iam::1:role/r', \
             profile_arn: 'arn:aws:rolesanywhere:us-east-1:1:profile/p', \
             trust_anchor_arn: 'arn:aws:rolesanywhere:us-east-1:1:trust-anchor/t'}}\n",
            sandbox.path("aws").display()
        );
    let path = sandbox.write("aws.yaml", config);
    for (url, expected) in [
        (
            aws.url.as_str(),
            "refused (403 Forbidden): AssertionError: Untrusted certificate",
        ),
        ("http://127.0.0.1:1", "IAM Roles Anywhere at 127.0.0.1:1"),
        ("ftp://x", "AWS_ENDPOINT_URL_ROLESANYWHERE is"),
    ] {
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command
            .arg(&path)
            .env("AWS_ENDPOINT_URL_ROLESANYWHERE", url);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", output.text());
        assert!(output.text().contains(expected), "{}", output.text());
        let kept = fs::read_to_string(sandbox.path("aws/aws_credentials")).unwrap();
        assert_eq!(kept, old);
    }
}
