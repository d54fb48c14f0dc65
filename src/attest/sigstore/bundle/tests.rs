//! Bundles as cosign writes them.

use super::*;
use prost::Message as _;

fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// `{"apiVersion":"0.0.1","kind":"hashedrekord","spec":{}}`, promised at a moment of 2023.
const PROMISED: &str = r#"{"SignedEntryTimestamp": "c2V0", "Payload": {
    "body": "eyJhcGlWZXJzaW9uIjoiMC4wLjEiLCJraW5kIjoiaGFzaGVkcmVrb3JkIiwic3BlYyI6e319",
    "integratedTime": 1690000000, "logIndex": 4242, "logID": "c0d23d6a"}}"#;

#[test]
fn annotations_of_a_key_make_a_bundle() {
    let bundle = from_annotations(&annotations(&[(SIGNATURE, "c2ln")]), b"envelope").unwrap();
    assert_eq!(bundle.media_type, ASSEMBLED);
    let material = bundle.verification_material.unwrap();
    assert!(matches!(
        material.content,
        Some(verification_material::Content::PublicKey(_))
    ));
    assert!(material.tlog_entries.is_empty());
    let Some(bundle::Content::MessageSignature(signature)) = bundle.content else {
        panic!("a signature");
    };
    assert_eq!(signature.signature, b"sig");
    let hash = signature.message_digest.unwrap();
    assert_eq!(hash.algorithm(), HashAlgorithm::Sha2256);
    assert_eq!(hash.digest, sha256(b"envelope"));
}

#[test]
fn annotations_of_a_certificate_and_a_log_make_a_bundle() {
    let certificate = pem::encode("CERTIFICATE", b"leaf");
    let chain = pem::encode("CERTIFICATE", b"inner") + &pem::encode("CERTIFICATE", b"root");
    let bundle = from_annotations(
        &annotations(&[
            (SIGNATURE, "c2ln"),
            (CERTIFICATE, &certificate),
            (CHAIN, &chain),
            (REKOR, PROMISED),
        ]),
        b"envelope",
    )
    .unwrap();
    let material = bundle.verification_material.unwrap();
    let Some(verification_material::Content::X509CertificateChain(chain)) = material.content else {
        panic!("a chain");
    };
    let raw: Vec<_> = chain
        .certificates
        .into_iter()
        .map(|c| c.raw_bytes)
        .collect();
    assert_eq!(raw, [&b"leaf"[..], b"inner", b"root"]);
    let entry = material.tlog_entries.into_iter().next().unwrap();
    assert_eq!(
        (entry.log_index, entry.integrated_time),
        (4242, 1_690_000_000)
    );
    assert_eq!(entry.log_id.unwrap().key_id, [0xc0, 0xd2, 0x3d, 0x6a]);
    let kind = entry.kind_version.unwrap();
    assert_eq!((&*kind.kind, &*kind.version), ("hashedrekord", "0.0.1"));
    assert_eq!(
        entry.inclusion_promise.unwrap().signed_entry_timestamp,
        b"set"
    );
    assert!(entry.canonicalized_body.starts_with(b"{\"apiVersion\""));
}

#[test]
fn malformed_annotations_are_told_by_name() {
    for (pairs, expected) in [
        (vec![], SIGNATURE),
        (vec![(SIGNATURE, "")], SIGNATURE),
        (vec![(SIGNATURE, "%")], SIGNATURE),
        (
            vec![(SIGNATURE, "c2ln"), (CERTIFICATE, "-----BEGIN X")],
            CERTIFICATE,
        ),
        (vec![(SIGNATURE, "c2ln"), (REKOR, "{}")], REKOR),
        (vec![(SIGNATURE, "c2ln"), (REKOR, "[")], REKOR),
    ] {
        let error = from_annotations(&annotations(&pairs), b"")
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn json_becomes_the_same_in_protobuf() {
    let json = r#"{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
      "verificationMaterial": {
        "certificate": {"rawBytes": "bGVhZg=="},
        "tlogEntries": [{"logIndex": "4242", "logId": {"keyId": "wNI9ag=="},
          "kindVersion": {"kind": "dsse", "version": "0.0.1"}, "integratedTime": "1690000000",
          "inclusionPromise": {"signedEntryTimestamp": "c2V0"},
          "inclusionProof": {"logIndex": "1", "rootHash": "-_8", "treeSize": 7, "hashes": ["AA==", "AQ"],
            "checkpoint": {"envelope": "rekor\n7\n"}},
          "canonicalizedBody": "e30="}],
        "timestampVerificationData": {"rfc3161Timestamps": [{"signedTimestamp": "dHM="}]}},
      "dsseEnvelope": {"payload": "cGF5", "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": "c2ln", "keyid": ""}]}, "later": {"x": 1}}"#;
    let bundle = from_json(json.as_bytes()).unwrap();
    assert_eq!(Bundle::decode(&*bundle.encode_to_vec()).unwrap(), bundle);
    assert!(bundle.media_type.ends_with("v0.3+json"));
    let material = bundle.verification_material.unwrap();
    assert_eq!(
        material.content,
        Some(verification_material::Content::Certificate(
            X509Certificate {
                raw_bytes: b"leaf".to_vec()
            }
        ))
    );
    let entry = &material.tlog_entries[0];
    assert_eq!(
        (entry.log_index, entry.integrated_time),
        (4242, 1_690_000_000)
    );
    let proof = entry.inclusion_proof.as_ref().unwrap();
    assert_eq!((proof.log_index, proof.tree_size), (1, 7));
    assert_eq!(proof.root_hash, [0xfb, 0xff]);
    assert_eq!(proof.hashes, [[0], [1]]);
    assert_eq!(proof.checkpoint.as_ref().unwrap().envelope, "rekor\n7\n");
    let stamps = material
        .timestamp_verification_data
        .unwrap()
        .rfc3161_timestamps;
    assert_eq!(stamps[0].signed_timestamp, b"ts");
    let Some(bundle::Content::DsseEnvelope(envelope)) = bundle.content else {
        panic!("an envelope");
    };
    assert_eq!(envelope.payload, b"pay");
    assert_eq!(envelope.payload_type, "application/vnd.in-toto+json");
    assert_eq!(envelope.signatures[0].sig, b"sig");

    let json = r#"{"mediaType": "x", "verificationMaterial": {"publicKey": {"hint": "h"}},
        "messageSignature": {"messageDigest": {"algorithm": "SHA2_256", "digest": "AA=="}, "signature": "c2ln"}}"#;
    let bundle = from_json(json.as_bytes()).unwrap();
    let Some(bundle::Content::MessageSignature(signature)) = bundle.content else {
        panic!("a signature");
    };
    assert_eq!(
        signature.message_digest.unwrap().algorithm(),
        HashAlgorithm::Sha2256
    );
}

#[test]
fn other_json_is_refused() {
    for json in [
        "",
        "{}",
        "[]",
        r#"{"mediaType": "x"}"#,
        r#"{"mediaType": "x", "verificationMaterial": {"certificate": {"rawBytes": "%"}}}"#,
        r#"{"mediaType": "x", "verificationMaterial": {"tlogEntries": [{"logIndex": "x"}]}}"#,
    ] {
        assert!(from_json(json.as_bytes()).is_err(), "{json}");
    }
}
