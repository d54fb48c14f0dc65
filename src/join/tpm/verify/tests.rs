use aws_lc_rs::cipher::{AES_128, DecryptingKey, DecryptionContext, UnboundCipherKey};
use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::hmac;
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey,
};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::json;

use super::key::KeyError;
use super::*;
use crate::crypto::sha256;
use crate::crypto::tpm::{P256, Reader, Writer, alg};
use crate::join::verify::Verifier as _;
use crate::yaml::{Fields, Problems, parse};

mod fuzz;

const GENERATED: u32 = 0xff54_4347;
const CREATION: u16 = 0x801a;
const ATTRIBUTES: u32 = 0x0005_0472;

/// What a TPM can do for its agent, written down from the other side of the standard.
struct SoftTpm {
    ek: PrivateDecryptingKey,
    ak: EcdsaKeyPair,
}

/// What an agent sends of a new key.
#[derive(Clone)]
struct Parts {
    public: Vec<u8>,
    creation_data: Vec<u8>,
    attest: Vec<u8>,
    signature: Vec<u8>,
}

impl SoftTpm {
    fn new() -> Self {
        Self {
            ek: PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap(),
            ak: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
        }
    }

    fn spki(&self) -> Vec<u8> {
        let key: PublicKeyX509Der<'_> = self.ek.public_key().as_der().unwrap();
        key.as_ref().to_vec()
    }

    fn endorsement(&self) -> Endorsement {
        Endorsement::read(&[], &self.spki()).unwrap()
    }

    fn public(&self, attributes: u32, name_alg: u16, scheme: u16) -> Vec<u8> {
        let point = self.ak.public_key().as_ref();
        Writer::default()
            .u16(alg::ECC)
            .u16(name_alg)
            .u32(attributes)
            .sized(b"")
            .u16(alg::NULL)
            .u16(scheme)
            .u16(alg::SHA256)
            .u16(P256)
            .u16(alg::NULL)
            .sized(&point[1..33])
            .sized(&point[33..])
            .done()
    }

    /// The parts of a key of these attributes; `magic` and `kind` begin the attestation.
    fn parts(&self, attributes: u32, magic: u32, kind: u16) -> Parts {
        let public = self.public(attributes, alg::SHA256, alg::ECDSA);
        self.parts_of(public, magic, kind)
    }

    fn parts_of(&self, public: Vec<u8>, magic: u32, kind: u16) -> Parts {
        let creation_data = Writer::default()
            .u32(1)
            .u16(alg::SHA256)
            .u8(3)
            .bytes(&[0; 3])
            .sized(&[0; 32])
            .u8(1)
            .u16(alg::NULL)
            .sized(&[0x40, 0, 0, 7])
            .sized(&[0x40, 0, 0, 7])
            .sized(b"")
            .done();
        let mut parts = Parts {
            public,
            creation_data,
            attest: Vec::new(),
            signature: Vec::new(),
        };
        parts.attest = about(&parts, magic, kind);
        parts.signature = self.signed(&parts.attest);
        parts
    }

    fn signed(&self, attest: &[u8]) -> Vec<u8> {
        let fixed = self.ak.sign(&SystemRandom::new(), attest).unwrap();
        Writer::default()
            .u16(alg::ECDSA)
            .u16(alg::SHA256)
            .sized(&fixed.as_ref()[..32])
            .sized(&fixed.as_ref()[32..])
            .done()
    }

    /// `TPM2_ActivateCredential`; `None` where the integrity check fails.
    fn activate(&self, credential: &Credential, name: &[u8]) -> Option<Vec<u8>> {
        let wrapped = Reader::new(&credential.secret).sized().unwrap();
        let key = OaepPrivateDecryptingKey::new(self.ek.clone()).unwrap();
        let mut seed = vec![0; key.min_output_size()];
        let seed = key
            .decrypt(
                &OAEP_SHA256_MGF1SHA256,
                wrapped,
                &mut seed,
                Some(b"IDENTITY\0"),
            )
            .ok()?;
        assert_eq!(seed.len(), 16);

        let kdfa = |label: &[u8], context: &[u8], bits: u32| {
            let mut whole = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, seed));
            whole.update(&1_u32.to_be_bytes());
            whole.update(label);
            whole.update(&[0]);
            whole.update(context);
            whole.update(&bits.to_be_bytes());
            whole.sign().as_ref()[..bits as usize / 8].to_vec()
        };
        let mut object = Reader::new(Reader::new(&credential.blob).sized().unwrap());
        let integrity = object.sized().unwrap();
        let mut identity = object.rest().to_vec();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &kdfa(b"INTEGRITY", b"", 256));
        hmac::verify(&key, &[identity.as_slice(), name].concat(), integrity).ok()?;
        let cipher = UnboundCipherKey::new(&AES_128, &kdfa(b"STORAGE", name, 128)).unwrap();
        let plain = DecryptingKey::cfb128(cipher)
            .unwrap()
            .decrypt(
                &mut identity,
                DecryptionContext::Iv128(FixedLength::from([0; 16])),
            )
            .unwrap();
        Some(Reader::new(plain).sized().unwrap().to_vec())
    }
}

/// `TPMS_ATTEST` of the creation of these.
fn about(parts: &Parts, magic: u32, kind: u16) -> Vec<u8> {
    Writer::default()
        .u32(magic)
        .u16(kind)
        .sized(b"signer")
        .sized(b"")
        .bytes(&[0; 25])
        .sized(&name(&parts.public))
        .sized(&sha256(&parts.creation_data))
        .done()
}

fn name(public: &[u8]) -> Vec<u8> {
    [&[0, 0x0b], sha256(public).as_slice()].concat()
}

fn challenge(endorsement: &Endorsement, parts: &Parts) -> Result<(Expected, Credential), TpmError> {
    Expected::challenge(
        endorsement,
        &parts.public,
        &parts.creation_data,
        &parts.attest,
        &parts.signature,
    )
}

#[test]
fn only_the_tpm_of_both_keys_opens_a_credential() {
    let tpm = SoftTpm::new();
    let parts = tpm.parts(ATTRIBUTES, GENERATED, CREATION);
    let (expected, credential) = challenge(&tpm.endorsement(), &parts).unwrap();
    let solution = tpm.activate(&credential, &name(&parts.public)).unwrap();
    expected.check(&solution).unwrap();

    // Another TPM, another key in the same TPM, and the answer to an earlier join.
    assert_eq!(
        SoftTpm::new().activate(&credential, &name(&parts.public)),
        None
    );
    assert_eq!(tpm.activate(&credential, &name(b"another")), None);
    let (again, _) = challenge(&tpm.endorsement(), &parts).unwrap();
    assert_eq!(again.check(&solution), Err(TpmError::Solution));
    for wrong in [
        &[][..],
        &solution[1..],
        &[solution.as_slice(), &[0]].concat(),
        &[0; 32],
    ] {
        assert_eq!(expected.check(wrong), Err(TpmError::Solution));
    }
}

#[test]
fn keys_that_could_attest_what_is_not_so_are_refused() {
    let tpm = SoftTpm::new();
    let good = tpm.parts(ATTRIBUTES, GENERATED, CREATION);
    let endorsement = tpm.endorsement();
    let refused = |parts: &Parts| match challenge(&endorsement, parts) {
        Err(TpmError::Attestation(error)) => error,
        other => panic!("{:?}", other.map(|(_, credential)| credential)),
    };
    // Exportable (fixedTPM, fixedParent), not made inside, unrestricted, no signing key; decrypting.
    for bit in [1, 4, 5, 16, 18] {
        let parts = tpm.parts(ATTRIBUTES & !(1 << bit), GENERATED, CREATION);
        assert_eq!(refused(&parts), KeyError::Attributes, "bit {bit}");
    }
    let parts = tpm.parts(ATTRIBUTES | 1 << 17, GENERATED, CREATION);
    assert_eq!(refused(&parts), KeyError::Attributes);
    // Not a TPM's; about a quote.
    assert_eq!(
        refused(&tpm.parts(ATTRIBUTES, 0xff54_4348, CREATION)),
        KeyError::NotCreation
    );
    assert_eq!(
        refused(&tpm.parts(ATTRIBUTES, GENERATED, 0x8018)),
        KeyError::NotCreation
    );
    for public in [
        tpm.public(ATTRIBUTES, 0x000c, alg::ECDSA),
        tpm.public(ATTRIBUTES, alg::SHA256, 0x001b),
    ] {
        let parts = tpm.parts_of(public, GENERATED, CREATION);
        assert_eq!(refused(&parts), KeyError::Algorithm);
    }

    // Parts of different keys, joins and TPMs.
    let other = SoftTpm::new();
    let theirs = other.parts(ATTRIBUTES, GENERATED, CREATION);
    let mixed = |change: &dyn Fn(&mut Parts)| {
        let mut parts = good.clone();
        change(&mut parts);
        refused(&parts)
    };
    assert_eq!(
        mixed(&|it| it.public = theirs.public.clone()),
        KeyError::Name
    );
    assert_eq!(
        mixed(&|it| it.signature = theirs.signature.clone()),
        KeyError::Signature
    );
    assert_eq!(
        mixed(&|it| it.signature = other.signed(&it.attest)),
        KeyError::Signature
    );
}

#[test]
fn creation_data_belong_to_their_attestation() {
    let tpm = SoftTpm::new();
    let mut parts = tpm.parts(ATTRIBUTES, GENERATED, CREATION);
    // The locality, in the middle of well-formed data.
    let at = parts.creation_data.len() - 17;
    parts.creation_data[at] ^= 0x0f;
    let refused = challenge(&tpm.endorsement(), &parts)
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(
            refused,
            TpmError::Attestation(KeyError::CreationData | KeyError::Malformed("creation data"))
        ),
        "{refused}"
    );
}

#[test]
fn no_part_is_read_beyond_its_end() {
    let tpm = SoftTpm::new();
    let endorsement = tpm.endorsement();
    let good = tpm.parts(ATTRIBUTES, GENERATED, CREATION);
    let pick: [fn(&mut Parts) -> &mut Vec<u8>; 4] = [
        |it| &mut it.public,
        |it| &mut it.creation_data,
        |it| &mut it.attest,
        |it| &mut it.signature,
    ];
    for part in pick {
        let whole = part(&mut good.clone()).clone();
        for end in 0..whole.len() {
            let mut parts = good.clone();
            part(&mut parts).truncate(end);
            assert!(challenge(&endorsement, &parts).is_err(), "{end}");
        }
        let mut parts = good.clone();
        part(&mut parts).push(0);
        assert!(challenge(&endorsement, &parts).is_err());
        part(&mut parts).resize(MAX_PART + 1, 0);
        let refused = challenge(&endorsement, &parts).map(|_| ()).unwrap_err();
        assert!(matches!(refused, TpmError::TooLarge(_)), "{refused}");
    }
}

#[test]
fn endorsement_keys_are_named_as_everywhere() {
    let tpm = SoftTpm::new();
    let endorsement = tpm.endorsement();
    assert_eq!(endorsement.hash(), crate::crypto::sha256_hex(&tpm.spki()));
    assert_eq!(endorsement.serial(), "");

    assert!(matches!(Endorsement::read(&[], &[]), Err(TpmError::NoKey)));
    assert!(matches!(
        Endorsement::read(b"x", &[]),
        Err(TpmError::Certificate(_))
    ));
    let large = vec![0; MAX_PART + 1];
    assert!(matches!(
        Endorsement::read(&large, &[]),
        Err(TpmError::TooLarge(_))
    ));
    assert!(matches!(
        Endorsement::read(&[], &large),
        Err(TpmError::TooLarge(_))
    ));
    let no_key = Endorsement::read(&[], b"no key at all").unwrap();
    let parts = tpm.parts(ATTRIBUTES, GENERATED, CREATION);
    assert!(matches!(
        challenge(&no_key, &parts),
        Err(TpmError::Unusable(_))
    ));

    let mut bare = tpm.endorsement();
    let refused = bare
        .check(&[tpm.spki()], SystemTime::UNIX_EPOCH)
        .unwrap_err();
    assert_eq!(refused, TpmError::NoCertificate);
    assert!(!bare.verified);
}

#[test]
fn certificates_are_taken_out_of_what_surrounds_them() {
    let certificate = [0x30, 0x03, 0x02, 0x01, 0x07];
    for stored in [
        certificate.to_vec(),
        [&certificate[..], &[0xff; 9]].concat(),
        [&[0x10, 0x01, 0x00, 0x00, 0x05][..], &certificate, &[0; 4]].concat(),
        // A header that says too much.
        [&[0x10, 0x01, 0x00, 0xff, 0xff][..], &certificate].concat(),
    ] {
        assert_eq!(ek_der(&stored), certificate, "{stored:x?}");
    }
    assert_eq!(ek_der(b""), b"");
}

#[test]
fn a_serial_that_nobody_vouches_for_is_warned_of() {
    let serial = "ek_certificate_serial: \"01\"";
    for (rule, told) in [
        (format!("{{{serial}}}"), true),
        (format!("{{ek_public_hash: aa, {serial}}}"), false),
        ("{ek_public_hash: aa}".to_owned(), false),
    ] {
        let node = parse(&format!("tpm: {{allow: [{rule}]}}")).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "spec", &problems).unwrap();
        Tpm.read(&mut fields, &mut json!({}));
        fields.finish();
        let lines = problems.into_sorted();
        let lines: Vec<_> = lines.iter().map(|line| line.render("f")).collect();
        assert_eq!(lines.len(), usize::from(told), "{lines:?}");
        for line in &lines {
            assert!(
                line.contains("warning") && line.contains("ekcert_allowed_cas"),
                "{line}"
            );
        }
    }
}

#[test]
fn rules_let_in_whom_they_name() {
    let tpm = SoftTpm::new();
    let endorsement = tpm.endorsement();
    let hash = endorsement.hash();
    let near = |allow: Value| endorsement.allowed_by(Some(&allow)).err();
    assert_eq!(near(json!([{"ek_public_hash": hash}])), None);
    assert_eq!(
        near(json!([{"ek_public_hash": "aa"}, {"description": "mine", "ek_public_hash": hash}])),
        None
    );
    assert_eq!(
        near(
            json!([{"ek_public_hash": "aa"}, {"ek_public_hash": hash, "ek_certificate_serial": "01"}])
        ),
        Some(
            "rule 1 differs in ek_public_hash; rule 2 differs in ek_certificate_serial".to_owned()
        )
    );
    for nothing in [
        json!([]),
        json!([{}]),
        json!([{"description": "all"}]),
        json!(null),
        json!([7]),
    ] {
        assert!(near(nothing.clone()).is_some(), "{nothing}");
    }
    assert!(endorsement.allowed_by(None).is_err());
}

#[test]
fn authorities_of_a_token_are_certificates() {
    assert_eq!(authorities::<&str>(&[]), Ok(Vec::new()));
    for (text, expected) in [
        ("", "ekcert_allowed_cas[0]: no pem block found"),
        (
            "-----BEGIN PUBLIC KEY-----\nMA==\n-----END PUBLIC KEY-----\n",
            "not 'CERTIFICATE'",
        ),
        (
            "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n",
            "malformed",
        ),
        ("-----BEGIN CERTIFICATE-----\n", "does not end"),
    ] {
        let problem = authorities(&[text]).unwrap_err();
        assert!(problem.contains(expected), "{problem}");
    }
}
