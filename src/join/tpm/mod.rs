//! Join method `tpm`: the machine's TPM 2.0 opens a credential that the cluster made for it alone
//! (upstream `lib/tpm`, go-attestation). No secret is shared; what the token names is the TPM.

mod chip;
mod keys;
pub mod verify;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use self::chip::Chip;
use self::keys::{Attestation, Endorsement, KeysError};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::crypto::x509::Certificate;
use crate::env::Env;
use crate::pb::teleport::join::v1::{
    ClientParams, TpmEncryptedCredential, TpmInit, TpmSolution, challenge, challenge_solution,
    join_request, tpm_init,
};
use crate::yaml::Fields;

/// The longest that a TPM may take to make its keys. Slow ones take half a minute for one of RSA.
const PATIENCE: Duration = Duration::from_secs(180);

/// Join method `tpm`.
#[derive(Debug, Clone, Copy)]
pub struct Tpm;

impl JoinMethod for Tpm {
    fn name(&self) -> &'static str {
        "tpm"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a tpm token, that one of its allow rules has this TPM's \
         public hash or certificate serial as `tbot tpm identify` prints them, and that its \
         ekcert_allowed_cas, if any, have the TPM manufacturer's authority)"
    }
}

#[async_trait]
impl Prover for Tpm {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let env = around.env.clone();
        let attested = beside(move || Attested::begin(&env)).await?;
        Ok(Box::new(attested))
    }
}

/// A TPM with the keys of one join.
#[derive(Debug)]
struct Attested {
    endorsement: Endorsement,
    attestation: Attestation,
    /// Where the endorsement key is loaded.
    key: u32,
    /// Taken for as long as it solves a challenge.
    chip: Option<Chip>,
}

impl Attested {
    fn begin(env: &Env) -> Result<Self, KeysError> {
        let mut chip = Chip::open(env)?;
        let endorsement = Endorsement::of(&mut chip)?;
        let key = endorsement.load(&mut chip)?;
        let attestation = Attestation::create(&mut chip)?;
        Ok(Self {
            endorsement,
            attestation,
            key,
            chip: Some(chip),
        })
    }
}

#[async_trait]
impl Proof for Attested {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        let ek = match &self.endorsement.certificate {
            Some(certificate) => tpm_init::Ek::EkCert(certificate.der().to_vec()),
            None => tpm_init::Ek::EkKey(self.endorsement.spki.clone()),
        };
        join_request::Payload::TpmInit(TpmInit {
            client_params: Some(client_params),
            public: self.attestation.public.clone(),
            create_data: self.attestation.creation_data.clone(),
            create_attestation: self.attestation.attest.clone(),
            create_signature: self.attestation.signature.clone(),
            ek: Some(ek),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let challenge::Payload::TpmEncryptedCredential(credential) = challenge else {
            return Ok(None);
        };
        let mut chip = self.chip.take().ok_or_else(|| {
            proof("the cluster asked twice, but a credential is opened once in a join")
        })?;
        let (attestation, key) = (self.attestation.handle, self.key);
        let solution = beside(move || open(&mut chip, attestation, key, &credential)).await?;
        Ok(Some(challenge_solution::Payload::TpmSolution(
            TpmSolution { solution },
        )))
    }
}

/// Has the TPM open a credential. Both parts come with their lengths in front.
fn open(
    chip: &mut Chip,
    attestation: u32,
    key: u32,
    credential: &TpmEncryptedCredential,
) -> Result<Vec<u8>, KeysError> {
    let content = |bytes| {
        let mut reader = crate::crypto::tpm::Reader::new(bytes);
        let content = reader
            .sized()
            .and_then(|content| reader.end().map(|()| content));
        content.map_err(|_malformed| KeysError::Credential)
    };
    let blob = content(&credential.credential_blob)?;
    let secret = content(&credential.secret)?;
    Ok(chip.activate_credential(attestation, key, blob, secret)?)
}

/// Runs what blocks beside the async threads. A TPM that never answers is left to itself.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KeysError> + Send + 'static,
) -> Result<T, JoinError> {
    let work = tokio::task::spawn_blocking(work);
    let done = tokio::time::timeout(PATIENCE, work)
        .await
        .map_err(|_elapsed| {
            proof(&format!(
                "the TPM did not answer within {} s",
                PATIENCE.as_secs()
            ))
        })?;
    let done = done.map_err(|_panicked| proof("the work with the TPM was given up"))?;
    done.map_err(|error| proof(&error.to_string()))
}

fn proof(problem: &str) -> JoinError {
    JoinError::Proof {
        method: "tpm",
        problem: problem.to_owned(),
    }
}

/// What a token resource has to say so that this machine's TPM may join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `ek_public_hash`: hex SHA-256 of the endorsement key.
    pub hash: String,
    /// `ek_certificate_serial`: hex pairs joined by `:`; `None` where the TPM has no certificate.
    pub serial: Option<String>,
    /// The endorsement key, SubjectPublicKeyInfo DER.
    pub key: Vec<u8>,
    /// Its certificate, DER.
    pub certificate: Option<Vec<u8>>,
}

/// Reads which TPM this machine has. Blocks for as long as the TPM takes.
///
/// # Errors
/// With what is missing and what to do about it.
pub fn identify(env: &Env) -> Result<Identity, IdentifyError> {
    let mut chip = Chip::open(env).map_err(KeysError::from)?;
    let endorsement = Endorsement::of(&mut chip)?;
    Ok(Identity {
        hash: endorsement.hash(),
        serial: endorsement.certificate.as_ref().map(Certificate::serial),
        certificate: endorsement.certificate.map(|it| it.der().to_vec()),
        key: endorsement.spki,
    })
}

/// Why the TPM could not be read.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct IdentifyError(#[from] KeysError);
