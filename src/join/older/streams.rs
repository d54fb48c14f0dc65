//! The calls whose proof takes more than one message (upstream `api/client/joinservice.go`).

use super::Attempt;
use super::talk::Talk;
use crate::join::JoinError;
use crate::pb::proto::register_using_bound_keypair_method_request::Payload as BoundSay;
use crate::pb::proto::register_using_bound_keypair_method_response::Response as BoundHear;
use crate::pb::proto::register_using_tpm_method_initial_request::Ek;
use crate::pb::proto::register_using_tpm_method_request::Payload as TpmSay;
use crate::pb::proto::register_using_tpm_method_response::Payload as TpmHear;
use crate::pb::proto::{
    Certs, RegisterUsingAzureMethodRequest, RegisterUsingBoundKeypairChallengeResponse,
    RegisterUsingBoundKeypairInitialRequest, RegisterUsingBoundKeypairMethodRequest,
    RegisterUsingBoundKeypairRotationResponse, RegisterUsingIamMethodRequest,
    RegisterUsingTpmMethodChallengeResponse, RegisterUsingTpmMethodInitialRequest,
    RegisterUsingTpmMethodRequest, TpmAttestationParameters,
};
use crate::pb::teleport::join::v1::challenge::Payload as Challenge;
use crate::pb::teleport::join::v1::challenge_solution::Payload as Solution;
use crate::pb::teleport::join::v1::{
    AzureChallenge, BoundKeypairChallenge, BoundKeypairInit, BoundKeypairResult,
    BoundKeypairRotationRequest, IamChallenge, TpmEncryptedCredential, TpmInit, tpm_init,
};

const NO_CHALLENGE: &str = "it sent no challenge";
const NO_CERTIFICATES: &str = "it holds no certificates";
const NO_SOLUTION: &str = "its challenge has an answer that this call cannot carry";

/// `RegisterUsingIAMMethod`: the cluster speaks first, with a challenge.
pub(super) async fn iam(mut attempt: Attempt<'_>) -> Result<Certs, JoinError> {
    let client = &mut attempt.client;
    let mut talk = Talk::open("RegisterUsingIAMMethod", attempt.method, None, |stream| {
        client.register_using_iam_method(stream)
    })
    .await?;
    let challenge = talk.hear().await?.challenge;
    if challenge.is_empty() {
        return Err(talk.unusable(NO_CHALLENGE));
    }
    let challenge = Challenge::IamChallenge(IamChallenge { challenge });
    let solution = talk
        .solve(attempt.proof, challenge, attempt.clock.now())
        .await?;
    let Solution::IamChallengeSolution(solution) = solution else {
        return Err(talk.unusable(NO_SOLUTION));
    };
    talk.say(RegisterUsingIamMethodRequest {
        sts_identity_request: solution.sts_identity_request,
        register_using_token_request: Some(attempt.request),
    })
    .await;
    let certs = talk.hear().await?.certs;
    certs.ok_or_else(|| talk.unusable(NO_CERTIFICATES))
}

/// `RegisterUsingAzureMethod`: the same shape.
pub(super) async fn azure(mut attempt: Attempt<'_>) -> Result<Certs, JoinError> {
    let client = &mut attempt.client;
    let mut talk = Talk::open("RegisterUsingAzureMethod", attempt.method, None, |stream| {
        client.register_using_azure_method(stream)
    })
    .await?;
    let challenge = talk.hear().await?.challenge;
    if challenge.is_empty() {
        return Err(talk.unusable(NO_CHALLENGE));
    }
    let challenge = Challenge::AzureChallenge(AzureChallenge { challenge });
    let solution = talk
        .solve(attempt.proof, challenge, attempt.clock.now())
        .await?;
    let Solution::AzureChallengeSolution(solution) = solution else {
        return Err(talk.unusable(NO_SOLUTION));
    };
    talk.say(RegisterUsingAzureMethodRequest {
        register_using_token_request: Some(attempt.request),
        attested_data: solution.attested_data,
        access_token: solution.access_token,
    })
    .await;
    let certs = talk.hear().await?.certs;
    certs.ok_or_else(|| talk.unusable(NO_CERTIFICATES))
}

/// `RegisterUsingTPMMethod`: the client speaks first, with what its TPM is and has made.
pub(super) async fn tpm(mut attempt: Attempt<'_>, init: TpmInit) -> Result<Certs, JoinError> {
    let first = RegisterUsingTpmMethodInitialRequest {
        join_request: Some(attempt.request),
        attestation_params: Some(TpmAttestationParameters {
            public: init.public,
            create_data: init.create_data,
            create_attestation: init.create_attestation,
            create_signature: init.create_signature,
        }),
        ek: init.ek.map(|ek| match ek {
            tpm_init::Ek::EkCert(certificate) => Ek::EkCert(certificate),
            tpm_init::Ek::EkKey(key) => Ek::EkKey(key),
        }),
    };
    let say = |payload| RegisterUsingTpmMethodRequest {
        payload: Some(payload),
    };
    let first = Some(say(TpmSay::Init(first)));
    let client = &mut attempt.client;
    let mut talk = Talk::open("RegisterUsingTPMMethod", attempt.method, first, |stream| {
        client.register_using_tpm_method(stream)
    })
    .await?;
    let Some(TpmHear::ChallengeRequest(credential)) = talk.hear().await?.payload else {
        return Err(talk.unusable(NO_CHALLENGE));
    };
    let challenge = Challenge::TpmEncryptedCredential(TpmEncryptedCredential {
        credential_blob: credential.credential_blob,
        secret: credential.secret,
    });
    let solution = talk
        .solve(attempt.proof, challenge, attempt.clock.now())
        .await?;
    let Solution::TpmSolution(solution) = solution else {
        return Err(talk.unusable(NO_SOLUTION));
    };
    let response = RegisterUsingTpmMethodChallengeResponse {
        solution: solution.solution,
    };
    talk.say(say(TpmSay::ChallengeResponse(response))).await;
    match talk.hear().await?.payload {
        Some(TpmHear::Certs(certs)) => Ok(certs),
        _ => Err(talk.unusable(NO_CERTIFICATES)),
    }
}

/// `RegisterUsingBoundKeypairMethod`: the client speaks first; challenges and at most a rotation
/// follow until there are certificates. Public keys are texts here.
pub(super) async fn bound_keypair(
    mut attempt: Attempt<'_>,
    init: BoundKeypairInit,
) -> Result<Certs, JoinError> {
    let say = |payload| RegisterUsingBoundKeypairMethodRequest {
        payload: Some(payload),
    };
    let first = say(BoundSay::Init(RegisterUsingBoundKeypairInitialRequest {
        join_request: Some(attempt.request),
        initial_join_secret: init.initial_join_secret,
        previous_join_state: init.previous_join_state,
    }));
    let client = &mut attempt.client;
    let mut talk = Talk::open(
        "RegisterUsingBoundKeypairMethod",
        attempt.method,
        Some(first),
        |stream| client.register_using_bound_keypair_method(stream),
    )
    .await?;
    loop {
        let challenge = match talk.hear().await?.response {
            Some(BoundHear::Challenge(it)) => {
                Challenge::BoundKeypairChallenge(BoundKeypairChallenge {
                    public_key: it.public_key.into_bytes(),
                    challenge: it.challenge,
                })
            }
            // This protocol does not say of which suite the new key is to be.
            Some(BoundHear::Rotation(_)) => {
                Challenge::BoundKeypairRotationRequest(BoundKeypairRotationRequest::default())
            }
            Some(BoundHear::Certs(joined)) => {
                let certs = joined.certs.ok_or_else(|| talk.unusable(NO_CERTIFICATES))?;
                let result = BoundKeypairResult {
                    join_state: joined.join_state,
                    public_key: joined.public_key.into_bytes(),
                };
                attempt.proof.settle(result).await?;
                return Ok(certs);
            }
            None => return Err(talk.unusable("it sent a message of an unknown kind")),
        };
        let now = attempt.clock.now();
        let answer = match talk.solve(attempt.proof, challenge, now).await? {
            Solution::BoundKeypairChallengeSolution(solution) => {
                BoundSay::ChallengeResponse(RegisterUsingBoundKeypairChallengeResponse {
                    solution: solution.solution,
                })
            }
            Solution::BoundKeypairRotationResponse(response) => {
                BoundSay::RotationResponse(RegisterUsingBoundKeypairRotationResponse {
                    public_key: String::from_utf8_lossy(&response.public_key).into_owned(),
                })
            }
            _ => return Err(talk.unusable(NO_SOLUTION)),
        };
        talk.say(say(answer)).await;
    }
}
