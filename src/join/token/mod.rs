//! Join method `token`: a shared secret that joins one bot once.

pub mod verify;

use async_trait::async_trait;

use super::{JoinError, JoinMethod, Proof, Renewal};

/// Join method `token`.
#[derive(Debug)]
pub struct Token;

#[async_trait]
impl JoinMethod for Token {
    fn name(&self) -> &'static str {
        "token"
    }

    fn renewal(&self) -> Renewal {
        Renewal::Certificate
    }

    async fn prepare(&self) -> Result<Proof, JoinError> {
        Ok(Proof::Token)
    }
}
