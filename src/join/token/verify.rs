//! The verifying half of join method `token`: whoever knows the token's name may use it once.
//!
//! There is no proof beside the name.

use async_trait::async_trait;
use serde_json::Value;

use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Join method `token`.
#[derive(Debug)]
pub struct Token;

#[async_trait]
impl Verifier for Token {
    fn name(&self) -> &'static str {
        "token"
    }

    fn carrier(&self) -> Carrier {
        Carrier::Token
    }

    fn read(&self, spec: &mut Fields<'_>, _stored: &mut Value) {
        if spec.list("allow").is_some_and(|rules| !rules.is_empty()) {
            spec.error(
                "allow",
                "allow rules mean nothing for the join method `token`",
                Some("remove them, or write `join_method: iam`"),
            );
        }
    }

    async fn verify(
        &self,
        _joining: &Joining<'_>,
        _dialogue: &mut dyn Dialogue,
        _seen: &mut Seen,
    ) -> Result<(), Refusal> {
        Ok(())
    }
}
