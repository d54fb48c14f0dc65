//! Join method `token`: a shared secret that joins one bot once.

pub mod verify;

use async_trait::async_trait;

use super::{JoinError, JoinMethod, Renewal, Session};
use crate::clock::Clock;
use crate::pb::proto::Certs;
use crate::pb::types::RegisterUsingTokenRequest;

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

    async fn join(
        &self,
        session: &mut Session,
        request: RegisterUsingTokenRequest,
        _clock: &Clock,
    ) -> Result<Certs, JoinError> {
        session
            .with_token(request)
            .await
            .map_err(|source| JoinError::Cluster {
                method: self.name(),
                source,
            })
    }
}
