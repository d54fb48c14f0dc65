//! What an agent sends of its TPM, with mistakes in it.

use super::*;
use crate::crypto::tpm::Public;
use crate::join::tests::mutilated::{Edit, mutilated};

const LIMITED: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18;
const DECRYPTS: u32 = 1 << 17;

#[test]
fn fuzz_attestation_keys() {
    let tpm = SoftTpm::new();
    let endorsement = tpm.endorsement();
    let good = tpm.parts(ATTRIBUTES, GENERATED, CREATION);
    let key = Public::read(&good.public).unwrap().key.spki();
    let check = bolero::check!().with_type::<(u8, Vec<Edit>)>();
    check.for_each(|(choice, edits)| {
        let mut parts = good.clone();
        let all = [
            &mut parts.public,
            &mut parts.creation_data,
            &mut parts.attest,
            &mut parts.signature,
        ];
        for (at, part) in all.into_iter().enumerate() {
            if choice >> at & 1 == 1 {
                *part = mutilated(part, edits);
            }
        }
        // A TPM would sign none of it; an agent with a key of its own signs what it likes.
        let signed = (choice >> 4) % 4;
        match signed {
            0 => {}
            1 => parts = tpm.parts_of(parts.public, GENERATED, CREATION),
            2 => {
                parts.attest = about(&parts, GENERATED, CREATION);
                parts.signature = tpm.signed(&parts.attest);
            }
            _ => parts.signature = tpm.signed(&parts.attest),
        }
        if challenge(&endorsement, &parts).is_err() {
            return;
        }
        let attributes = Reader::new(&parts.public[4..]).u32().unwrap();
        assert_eq!(attributes & (LIMITED | DECRYPTS), LIMITED);
        assert_eq!(Public::read(&parts.public).unwrap().key.spki(), key);
        let attested = Writer::default()
            .sized(&name(&parts.public))
            .sized(&sha256(&parts.creation_data))
            .done();
        assert!(parts.attest.ends_with(&attested));
        assert!(
            parts
                .attest
                .starts_with(&[0xff, 0x54, 0x43, 0x47, 0x80, 0x1a])
        );
        if signed == 0 {
            assert_eq!(parts.attest, good.attest);
        }
    });
}

#[test]
fn fuzz_rsa_attestation_keys() {
    let tpm = SoftTpm::new();
    let endorsement = tpm.endorsement();
    let check = bolero::check!().with_type::<(u16, u32, Vec<u8>, Vec<u8>)>();
    check.for_each(|(bits, exponent, modulus, signature)| {
        let repeated = |bytes: &[u8]| match bytes {
            [] => Vec::new(),
            bytes => bytes.iter().copied().cycle().take(256).collect(),
        };
        let public = Writer::default()
            .u16(alg::RSA)
            .u16(alg::SHA256)
            .u32(ATTRIBUTES)
            .sized(b"")
            .u16(alg::NULL)
            .u16(alg::RSASSA)
            .u16(alg::SHA256)
            .u16(*bits | 2048)
            .u32(*exponent)
            .sized(&repeated(modulus))
            .done();
        let mut parts = tpm.parts_of(public, GENERATED, CREATION);
        parts.signature = Writer::default()
            .u16(alg::RSASSA)
            .u16(alg::SHA256)
            .sized(&repeated(signature))
            .done();
        let refused = challenge(&endorsement, &parts).map(|_| ()).unwrap_err();
        assert_eq!(refused, TpmError::Attestation(KeyError::Signature));
    });
}

#[test]
fn fuzz_endorsement_certificates() {
    let one = |text| pem::certificates(text).unwrap().remove(0);
    let certificate = one(include_str!("../../../oracle/verify/made/leaf.pem"));
    let authority = [one(include_str!("../../../oracle/verify/made/inter.pem"))];
    let now = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000);
    let stored = Writer::default()
        .bytes(&[0x10, 0x01, 0x00])
        .sized(&certificate)
        .bytes(&[0xff; 9])
        .done();
    let mut real = Endorsement::read(&stored, &[]).unwrap();
    real.check(&authority, now).unwrap();
    let check = bolero::check!().with_type::<(bool, Vec<Edit>)>();
    check.for_each(|(bare, edits)| {
        let sent = mutilated(if *bare { &certificate } else { &stored }, edits);
        let Ok(mut read) = Endorsement::read(&sent, b"a key of its own") else {
            return;
        };
        let accepted = read.check(&authority, now).is_ok();
        assert_eq!(accepted, read.verified);
        if accepted {
            assert_eq!(read.hash(), real.hash());
            assert_eq!(read.serial(), real.serial());
        }
    });
}
