//! A revoked SVID: the list reaches open streams and files, and OpenSSL judges by it.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tbot::crypto::pem;
use tbot::crypto::x509::Certificate;
use tbot::pb::workload_api::{
    X509BundlesRequest, X509BundlesResponse, X509svidRequest, X509svidResponse,
};
use tonic::Streaming;

use crate::common::{Cluster, OutputText as _, RESOURCES, Sandbox, Workload, decode, eventually};

fn openssl(sandbox: &Sandbox, line: &str) -> Output {
    let mut command = sandbox.command("openssl");
    command.args(line.split_whitespace()).output().unwrap()
}

/// The serial number of a certificate as a revocation names it.
fn serial(der: &[u8]) -> String {
    Certificate::from_der(der)
        .unwrap()
        .serial()
        .replace(':', "")
}

/// Whether OpenSSL finds a serial in a list (DER).
fn lists(sandbox: &Sandbox, list: &[u8], serial: &str) -> bool {
    sandbox.write("list.der", list);
    let shown = openssl(sandbox, "crl -inform DER -in list.der -noout -text").success();
    shown.contains(&format!("Serial Number: {}", serial.to_uppercase()))
}

/// The resource that revokes a certificate.
fn revocation(serial: &str) -> String {
    format!(
        "kind: workload_identity_x509_revocation\nversion: v1\n\
         metadata: {{name: \"{serial}\", expires: \"2099-01-01T00:00:00Z\"}}\n\
         spec: {{reason: test, revoked_at: \"2026-01-01T00:00:00Z\"}}\n"
    )
}

/// The next message; a list takes a few seconds to be signed.
async fn next<M: prost::Message + Default>(stream: &mut Streaming<Bytes>) -> M {
    let next = tokio::time::timeout(Duration::from_secs(30), stream.message());
    let bytes = next.await.expect("a push within 30 s").unwrap();
    decode(&bytes.expect("a message"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_reaches_streams_and_files_within_seconds_and_can_be_taken_back() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let socket = sandbox.path("w.sock");
    let config = cluster.config(&token, "bot")
        + &format!(
            "services:\n- {{type: workload-identity-api, listen: \"unix://{}\", \
             selector: {{name: foo}}}}\noutputs:\n- {{type: workload-identity-x509, selector: \
             {{name: foo}}, destination: {{type: directory, path: {}}}}}\n",
            socket.display(),
            sandbox.path("svid").display()
        );
    let config = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(config);
    let _agent = sandbox.spawn("agent", command);
    let workload = Workload::connect(&socket).await;
    let mut svids = workload
        .open("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let mut bundles = workload
        .open("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    let held: X509svidResponse = next(&mut svids).await;
    let _: X509BundlesResponse = next(&mut bundles).await;
    let leaf = serial(&held.svids[0].x509_svid);
    assert!(!lists(&sandbox, &held.crl[0], &leaf));
    eventually("the files are there", || {
        fs::metadata(sandbox.path("svid/svid_crl.pem"))
    });
    let in_file = serial_of_file(&sandbox.path("svid/svid.pem"));
    let judged = || {
        openssl(
            &sandbox,
            "verify -crl_check -CRLfile svid/svid_crl.pem -CAfile svid/svid_bundle.pem svid/svid.pem",
        )
        .text()
    };
    assert!(judged().contains("OK"), "{}", judged());

    let begun = Instant::now();
    cluster.create(&(revocation(&leaf) + "---\n" + &revocation(&in_file)));
    let told: X509svidResponse = next(&mut svids).await;
    let bundled: X509BundlesResponse = next(&mut bundles).await;
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
    assert!(lists(&sandbox, &told.crl[0], &leaf) && lists(&sandbox, &told.crl[0], &in_file));
    assert_eq!(told.svids, held.svids, "nothing was issued for that");
    assert_eq!(told.crl, bundled.crl);
    eventually("OpenSSL refuses what is in the files", || {
        let judged = judged();
        if judged.contains("certificate revoked") {
            Ok(())
        } else {
            Err(judged)
        }
    });

    let shown = cluster.run(&["get", "workload_identity_x509_revocation"]);
    assert!(shown.contains(&leaf) && shown.contains(&in_file), "{shown}");
    for serial in [&leaf, &in_file] {
        let name = format!("workload_identity_x509_revocation/{serial}");
        let told = cluster.run(&["rm", &name]);
        assert!(told.contains("has been deleted"), "{told}");
    }
    // The list with both may have been on its way when the stream was last read.
    loop {
        let told: X509svidResponse = next(&mut svids).await;
        if !lists(&sandbox, &told.crl[0], &leaf) {
            break;
        }
    }
    eventually("OpenSSL accepts what is in the files", || {
        let judged = judged();
        if judged.contains("svid.pem: OK") {
            Ok(())
        } else {
            Err(judged)
        }
    });

    // After a rotation the new authority signs the list; those who hold SVIDs of the old one are judged
    // by the list that the old one signed.
    cluster.create(&revocation(&leaf));
    fs::copy(sandbox.path("svid/svid.pem"), sandbox.path("good.pem")).unwrap();
    sandbox.write("leaf.der", x509_first(&held.svids[0].x509_svid));
    openssl(&sandbox, "x509 -inform DER -in leaf.der -out bad.pem").success();
    for phase in ["init", "update_clients"] {
        cluster.run(&["rotate", "--type", "spiffe", "--manual", "--phase", phase]);
    }
    let rotated = async {
        loop {
            let told: X509svidResponse = next(&mut svids).await;
            sandbox.write("list.der", &told.crl[0]);
            let newest = x509_first(&told.svids[0].bundle);
            sandbox.write("newest.der", newest);
            openssl(&sandbox, "x509 -inform DER -in newest.der -out newest.pem").success();
            let line = "crl -inform DER -in list.der -noout -CAfile newest.pem";
            let new = serial(&told.svids[0].x509_svid) != leaf;
            if new && openssl(&sandbox, line).text().contains("verify OK") {
                return told;
            }
        }
    };
    let rotated = tokio::time::timeout(Duration::from_secs(60), rotated).await;
    let rotated = rotated.expect("a list by the new authority");
    assert_eq!(rotated.crl.len(), 2);
    for list in &rotated.crl {
        assert!(lists(&sandbox, list, &leaf));
    }
    let bundled: X509BundlesResponse = loop {
        let bundled: X509BundlesResponse = next(&mut bundles).await;
        if bundled.crl == rotated.crl {
            break bundled;
        }
    };
    let bundle = &bundled.bundles["spiffe://test.example.org"];
    judge_during_a_rotation(&sandbox, &rotated, bundle);
}

/// OpenSSL's verdict over SVIDs of both authorities, by what a stream and what the files hold.
fn judge_during_a_rotation(sandbox: &Sandbox, rotated: &X509svidResponse, bundle: &[u8]) {
    let pem = |label, ders: Vec<&[u8]>| -> String {
        let blocks = ders.into_iter().map(|der| pem::encode(label, der));
        blocks.collect()
    };
    let first = x509_first(bundle);
    let authorities = pem("CERTIFICATE", vec![first, &bundle[first.len()..]]);
    sandbox.write("authorities.pem", authorities);
    let all = rotated.crl.iter().map(|list| &list[..]).collect();
    sandbox.write("lists.pem", pem("X509 CRL", all));
    sandbox.write("leaf.der", x509_first(&rotated.svids[0].x509_svid));
    openssl(sandbox, "x509 -inform DER -in leaf.der -out new.pem").success();
    let by_stream = "-CRLfile lists.pem -CAfile authorities.pem";
    let by_files = "-CRLfile svid/svid_crl.pem -CAfile svid/svid_bundle.pem";
    eventually("the files have both lists", || {
        let text = fs::read_to_string(sandbox.path("svid/svid_crl.pem")).unwrap();
        let both = text.matches("BEGIN X509 CRL").count() == 2;
        both.then_some(()).ok_or(text)
    });
    for (what, verdict) in [
        ("good.pem", "good.pem: OK"),
        ("bad.pem", "certificate revoked"),
        ("new.pem", "new.pem: OK"),
    ] {
        for by in [by_stream, by_files] {
            let judged = openssl(sandbox, &format!("verify -crl_check {by} {what}")).text();
            assert!(judged.contains(verdict), "{by}: {judged}");
        }
    }
}

fn serial_of_file(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    serial(Certificate::from_pem(&text).unwrap().der())
}

/// The first certificate of a row: of a bundle, the authority that signs now.
fn x509_first(bundle: &[u8]) -> &[u8] {
    let length = usize::from(bundle[2]) << 8 | usize::from(bundle[3]);
    &bundle[..length + 4]
}
