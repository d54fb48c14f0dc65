//! The document that Azure's metadata service attests: PKCS #7 signed data around a JSON object
//! (Microsoft, "Azure Instance Metadata Service", attested data).

use std::time::SystemTime;

use aws_lc_rs::digest;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey,
    VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cms::cert::CertificateChoices;
use cms::content_info::ContentInfo;
use cms::signed_data::{SignedData, SignerIdentifier, SignerInfo};
use der::asn1::{ObjectIdentifier, OctetStringRef};
use der::{Decode as _, Encode as _};
use serde_json::Value;
use x509_cert::spki::SubjectPublicKeyInfoRef;

use super::AzureError;
use crate::crypto::chain::{self, Usage};
use crate::crypto::x509::{COMMON_NAME, Certificate};

/// The longest document that is read, in bytes. Real ones have some 5 KiB.
const MAX_DOCUMENT: usize = 64 * 1024;

const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const MESSAGE_DIGEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.4");
const CONTENT_TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.3");
const RSA_ENCRYPTION: &str = "1.2.840.113549.1.1.1";
const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";

/// Whom Azure's clouds sign as.
const SIGNERS: &[&str] = &[
    "metadata.azure.com",
    "metadata.azure.us",
    "metadata.azure.cn",
    "metadata.microsoftazure.de",
];

/// A document that is not verified yet.
pub(super) struct Document {
    signed: SignedData,
    signer: Certificate,
    content: Vec<u8>,
}

/// What Azure vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attested {
    /// The machine.
    pub(super) vm_id: String,
    /// Its subscription.
    pub(super) subscription: String,
}

impl Document {
    /// Reads the answer of the metadata service.
    pub(super) fn read(answer: &[u8]) -> Result<Self, AzureError> {
        let malformed = AzureError::Document;
        if answer.len() > MAX_DOCUMENT {
            return Err(malformed("it is larger than any real one"));
        }
        let answer: Value =
            serde_json::from_slice(answer).map_err(|_source| malformed("it is no JSON"))?;
        let text = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default();
        if text("encoding") != "pkcs7" {
            return Err(AzureError::Encoding);
        }
        let der = STANDARD
            .decode(text("signature"))
            .map_err(|_source| malformed("its signature is no base64"))?;
        let signed = ContentInfo::from_der(&der)
            .ok()
            .filter(|info| info.content_type == SIGNED_DATA)
            .and_then(|info| info.content.decode_as::<SignedData>().ok())
            .ok_or(malformed("its signature is no PKCS #7 signed data"))?;
        let content = signed
            .encap_content_info
            .econtent
            .as_ref()
            .and_then(|content| content.decode_as::<OctetStringRef<'_>>().ok())
            .map(|content| content.as_bytes().to_vec())
            .ok_or(malformed("its signature holds no content"))?;
        let signer = signer(&signed).ok_or(malformed("it holds no certificate of its signer"))?;
        Ok(Self {
            signed,
            signer,
            content,
        })
    }

    /// The certificate that it says it is signed with.
    pub(super) fn signer(&self) -> &Certificate {
        &self.signer
    }

    /// Verifies it: Azure's signature, its chain over `intermediates` to `roots` (DER), and that it
    /// answers `challenge`.
    pub(super) fn verify(
        &self,
        challenge: &str,
        intermediates: &[Vec<u8>],
        roots: &[Vec<u8>],
        now: SystemTime,
    ) -> Result<Attested, AzureError> {
        let content: Value = serde_json::from_slice(&self.content)
            .map_err(|_source| AzureError::Document("its content is no JSON"))?;
        let text = |name: &str| {
            content
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        if text("nonce") != challenge || challenge.is_empty() {
            return Err(AzureError::Nonce);
        }
        let names = self.signer.subject(COMMON_NAME);
        if !names.iter().any(|name| is_azure(name)) {
            return Err(AzureError::Signer(names.join(", ")));
        }
        chain::verify(self.signer.der(), intermediates, roots, now, Usage::Any)?;
        let infos = self.signed.signer_infos.0.as_slice();
        let [info] = infos else {
            return Err(AzureError::Signature);
        };
        check_signature(info, &self.signed, &self.signer, &self.content)
            .ok_or(AzureError::Signature)?;
        let (vm_id, subscription) = (text("vmId"), text("subscriptionId"));
        if vm_id.is_empty() || subscription.is_empty() {
            return Err(AzureError::Document(
                "it names no machine or no subscription",
            ));
        }
        Ok(Attested {
            vm_id: vm_id.to_owned(),
            subscription: subscription.to_owned(),
        })
    }
}

/// The common name of a signer, or one below it: regions have their own.
fn is_azure(name: &str) -> bool {
    SIGNERS.iter().any(|signer| {
        name.strip_suffix(signer)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

/// The certificate that the first signature names.
fn signer(signed: &SignedData) -> Option<Certificate> {
    let info = signed.signer_infos.0.as_slice().first()?;
    let SignerIdentifier::IssuerAndSerialNumber(named) = &info.sid else {
        return None;
    };
    let found = signed
        .certificates
        .as_ref()?
        .0
        .iter()
        .find_map(|choice| match choice {
            CertificateChoices::Certificate(certificate)
                if certificate.tbs_certificate.issuer == named.issuer
                    && certificate.tbs_certificate.serial_number == named.serial_number =>
            {
                certificate.to_der().ok()
            }
            _ => None,
        })?;
    Certificate::from_der(&found).ok()
}

/// Whether the signature is the certificate's and of this content.
fn check_signature(
    info: &SignerInfo,
    signed: &SignedData,
    signer: &Certificate,
    content: &[u8],
) -> Option<()> {
    // Azure names the signature's algorithm where the digest's belongs.
    let (hash, rsa): (_, &dyn VerificationAlgorithm) =
        match info.digest_alg.oid.to_string().as_str() {
            "2.16.840.1.101.3.4.2.1" | "1.2.840.113549.1.1.11" => {
                (&digest::SHA256, &RSA_PKCS1_2048_8192_SHA256)
            }
            "2.16.840.1.101.3.4.2.2" | "1.2.840.113549.1.1.12" => {
                (&digest::SHA384, &RSA_PKCS1_2048_8192_SHA384)
            }
            "2.16.840.1.101.3.4.2.3" | "1.2.840.113549.1.1.13" => {
                (&digest::SHA512, &RSA_PKCS1_2048_8192_SHA512)
            }
            _ => return None,
        };
    let message = match &info.signed_attrs {
        None => content.to_vec(),
        Some(attributes) => {
            let only = |oid| {
                let mut found = attributes.iter().filter(|attribute| attribute.oid == oid);
                match (found.next(), found.next()) {
                    (Some(attribute), None) => attribute.values.as_slice().first(),
                    _ => None,
                }
            };
            let digested = only(MESSAGE_DIGEST)?
                .decode_as::<OctetStringRef<'_>>()
                .ok()?;
            let kind = only(CONTENT_TYPE)?.decode_as::<ObjectIdentifier>().ok()?;
            let is_content = digested.as_bytes() == digest::digest(hash, content).as_ref()
                && kind == signed.encap_content_info.econtent_type;
            if !is_content {
                return None;
            }
            attributes.to_der().ok()?
        }
    };
    let spki = signer.spki();
    let key = SubjectPublicKeyInfoRef::from_der(&spki).ok()?;
    let algorithm = match key.algorithm.oid.to_string().as_str() {
        RSA_ENCRYPTION => rsa,
        EC_PUBLIC_KEY if *hash == digest::SHA256 => &ECDSA_P256_SHA256_ASN1,
        EC_PUBLIC_KEY if *hash == digest::SHA384 => &ECDSA_P384_SHA384_ASN1,
        _ => return None,
    };
    UnparsedPublicKey::new(algorithm, key.subject_public_key.as_bytes()?)
        .verify(&message, info.signature.as_bytes())
        .ok()
}
