//! Clients of the embedded cluster that know nothing of this project: gRPC's own library with messages
//! made from the table of wire facts, and OpenSSL.

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tbot::crypto::pem;

use crate::bad_input::RESOURCES;
use crate::common::{Cluster, OutputText as _, Sandbox, repository, skip, venv};

/// The cluster's role that the bot has.
const ROLE: &str = "issuer";

/// The authority of the auth service's certificate, as strangers get it: with `curl` nobody can, so
/// it is taken from an agent's output.
fn host_authority(sandbox: &Sandbox, cluster: &Cluster<'_>) -> std::path::PathBuf {
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + "outputs:\n"
        + &crate::bad_input::output(&sandbox.path("out"));
    crate::bad_input::once(sandbox, &config).success();
    sandbox.path("out/teleport-host-ca.crt")
}

fn openssl(sandbox: &Sandbox, arguments: &[&str]) -> String {
    let mut command = sandbox.command("openssl");
    command.args(arguments).output().unwrap().success()
}

#[test]
fn a_client_made_of_the_wire_table_joins_and_gets_everything() {
    if !venv().join("bin/python").exists() {
        return skip("the Python environment is missing: make setup");
    }
    assert!(RESOURCES.contains(&format!("metadata: {{name: {ROLE}}}")));
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let host = host_authority(&sandbox, &cluster);
    let tokens = [(); 2].map(|()| cluster.invite("example", "10m"));
    let out = sandbox.path("foreign");
    fs::create_dir(&out).unwrap();
    let mut python = sandbox.command(venv().join("bin/python"));
    python
        .arg(repository().join("tests/support/foreign.py"))
        .arg(repository().join("tests/wire-facts.tsv"))
        .args([&cluster.auth(), Cluster::NAME])
        .arg(&host)
        .args(&tokens)
        .arg(&out);
    let shown = python.output().unwrap().success();
    for line in [
        "Ping 18.",
        "RegisterUsingToken ",
        "Join ",
        "Ping as bot",
        "GetCertAuthorities spiffe",
        "GenerateUserCerts",
        "ListResources",
        "IssueWorkloadIdentity spiffe://test.example.org/svc/foo",
    ] {
        assert!(
            shown.lines().any(|l| l.starts_with(line)),
            "{line}: {shown}"
        );
    }
    assert!(shown.contains("refused "), "{shown}");

    let path = |name: &str| out.join(name).to_str().unwrap().to_owned();
    for name in ["old.pem", "new.pem", "issued.pem"] {
        let verify = ["verify", "-purpose", "sslclient", "-CAfile"];
        let verdict = openssl(
            &sandbox,
            &[&verify[..], &[&path("user-ca.pem"), &path(name)]].concat(),
        );
        assert!(verdict.ends_with(": OK\n"), "{verdict}");
    }
    let mut curl = sandbox.command("curl");
    curl.args(["--silent", "--fail", "--cacert"])
        .arg(cluster.web_authority())
        .arg(format!(
            "https://{}/webapi/spiffe/bundle.json",
            cluster.proxy()
        ));
    let bundle: Value = serde_json::from_str(&curl.output().unwrap().success()).unwrap();
    let authority = STANDARD.decode(bundle["keys"][0]["x5c"][0].as_str().unwrap());
    let authority = sandbox.write(
        "bundle.pem",
        pem::encode("CERTIFICATE", &authority.unwrap()),
    );
    let verdict = openssl(
        &sandbox,
        &[
            "verify",
            "-x509_strict",
            "-CAfile",
            authority.to_str().unwrap(),
            &path("svid.pem"),
        ],
    );
    assert!(verdict.ends_with(": OK\n"), "{verdict}");
}

#[test]
fn each_protocol_offered_finds_its_certificate_on_the_shared_port() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let host = host_authority(&sandbox, &cluster);
    let encoded = format!("{}.teleport.cluster.local", hex::encode(Cluster::NAME));
    let auth = format!("teleport-auth@{encoded},h2");
    let (host, web) = (host.to_str().unwrap(), cluster.web_authority());
    let web = web.to_str().unwrap();
    for (offered, name, authority, agreed) in [
        (Some(auth.as_str()), encoded.as_str(), host, "h2"),
        (Some("h2"), "localhost", web, "h2"),
        (Some("http/1.1"), "localhost", web, "http/1.1"),
        (Some("teleport-proxy-grpc,h2"), "localhost", web, "h2"),
        (None, "localhost", web, ""),
    ] {
        let address = cluster.proxy();
        let mut arguments = vec!["s_client", "-connect", &address, "-servername", name];
        arguments.extend([
            "-verify_hostname",
            name,
            "-verify_return_error",
            "-CAfile",
            authority,
        ]);
        if let Some(offered) = offered {
            arguments.extend(["-alpn", offered]);
        }
        let shown = openssl(&sandbox, &arguments);
        assert!(
            shown.contains("Verify return code: 0 (ok)"),
            "{offered:?}: {shown}"
        );
        let line = shown.lines().find(|line| line.contains("ALPN"));
        match agreed {
            "" => assert_eq!(line, Some("No ALPN negotiated"), "{offered:?}"),
            agreed => assert_eq!(line, Some(format!("ALPN protocol: {agreed}").as_str())),
        }
    }
}
