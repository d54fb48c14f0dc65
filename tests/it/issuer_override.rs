//! SVIDs in a hierarchy that the cluster has not made, judged by OpenSSL, which made it.

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::common::{Cluster, OutputText as _, RESOURCES, Sandbox};

#[test]
fn the_chain_leads_to_the_other_root_and_a_new_key_needs_its_own_override() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let openssl = |line: &str| {
        let mut command = sandbox.command("openssl");
        command.args(line.split_whitespace()).output().unwrap()
    };
    let once = || {
        let token = cluster.invite("example", "5m");
        let config = cluster.config(&token, "bot")
            + &format!(
                "outputs:\n- {{type: workload-identity-x509, selector: {{name: foo}}, \
                 destination: {{type: directory, path: {}}}}}\n",
                sandbox.path("svid").display()
            );
        let path = sandbox.write("once.yaml", config);
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command.arg(path).output().unwrap()
    };
    let mut curl = sandbox.command("curl");
    let bundle = curl
        .args(["-sS", "--cacert"])
        .arg(cluster.web_authority())
        .arg(format!(
            "https://{}/webapi/spiffe/bundle.json",
            cluster.proxy()
        ))
        .output()
        .unwrap()
        .success();
    let bundle: Value = serde_json::from_str(&bundle).unwrap();
    let authority = STANDARD.decode(bundle["keys"][0]["x5c"][0].as_str().unwrap());
    sandbox.write("authority.der", authority.unwrap());
    let key = openssl("x509 -inform DER -in authority.der -noout -pubkey").success();
    sandbox.write("spiffe.pub", key);
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout root.key -out root.pem \
         -subj /CN=outside -days 10 -addext keyUsage=critical,keyCertSign,cRLSign",
    )
    .success();
    sandbox.write(
        "ca.cnf",
        "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n\
         subjectKeyIdentifier=hash\n",
    );
    openssl(
        "x509 -new -force_pubkey spiffe.pub -subj /CN=workloads -CA root.pem -CAkey root.key -days 10 \
         -extfile ca.cnf -outform DER -out issuer.der",
    )
    .success();
    let issuer = STANDARD.encode(fs::read(sandbox.path("issuer.der")).unwrap());
    let resource = json!({
        "kind": "workload_identity_x509_issuer_override",
        "version": "v1",
        "metadata": {"name": "default"},
        "spec": {"overrides": [{"issuer": issuer, "chain": [issuer]}]},
    });
    cluster.create(&resource.to_string());
    once().success();

    let svid = fs::read_to_string(sandbox.path("svid/svid.pem")).unwrap();
    assert_eq!(svid.matches("BEGIN CERTIFICATE").count(), 2, "{svid}");
    let verdict = openssl(
        "verify -x509_strict -purpose sslserver -CAfile root.pem -untrusted svid/svid.pem svid/svid.pem",
    );
    assert_eq!(verdict.success(), "svid/svid.pem: OK\n");
    let shown = openssl("x509 -in svid/svid.pem -noout -issuer").success();
    assert!(shown.contains("workloads"), "{shown}");

    for phase in ["init", "update_clients"] {
        cluster.run(&["rotate", "--type", "spiffe", "--manual", "--phase", phase]);
    }
    let refused = once();
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        refused
            .text()
            .contains("none of its issuers is for the key"),
        "{}",
        refused.text()
    );
    cluster.run(&["rm", "workload_identity_x509_issuer_override/default"]);
    once().success();
    let svid = fs::read_to_string(sandbox.path("svid/svid.pem")).unwrap();
    assert_eq!(svid.matches("BEGIN CERTIFICATE").count(), 1, "{svid}");
}
