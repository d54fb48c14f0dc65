//! Join method `token`: a shared secret that joins one bot once.

pub mod verify;

use std::sync::Arc;

use async_trait::async_trait;

use super::{JoinError, JoinMethod, Proof, Prover, Renewal, Surroundings};
use crate::pb::teleport::join::v1::{ClientParams, TokenInit, join_request};
use crate::yaml::Fields;

/// Join method `token`.
#[derive(Debug, Clone, Copy)]
pub struct Token;

impl JoinMethod for Token {
    fn name(&self) -> &'static str {
        "token"
    }

    fn renewal(&self) -> Renewal {
        Renewal::Certificate
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, code: Option<tonic::Code>) -> &'static str {
        match code {
            // The request itself is wrong: another token would not help.
            Some(tonic::Code::InvalidArgument) => {
                " (check onboarding.join_method and onboarding.token)"
            }
            _ => {
                " (a token of this method joins one bot once and expires: make a new one with \
                 `tctl tokens add --type=bot` or `tbot cluster tokens add --type=bot`)"
            }
        }
    }
}

#[async_trait]
impl Prover for Token {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, _around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        Ok(Box::new(Self))
    }
}

#[async_trait]
impl Proof for Token {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::TokenInit(TokenInit {
            client_params: Some(client_params),
        })
    }
}
