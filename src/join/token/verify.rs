//! The verifying half of join method `token`: whoever knows the token's name may use it once.
//!
//! There is no proof beside the name; what is checked here is that a token came to the call that
//! its method belongs to (texts: upstream `lib/auth/join.go`).

/// Methods whose proof needs a stream of its own.
const STREAMED: &[&str] = &["iam", "azure", "tpm", "oracle", "bound_keypair"];

/// Why a token is of no use for the unary call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The method has a stream of its own; without its proof the token counts for nothing.
    #[error(
        "this token is only valid for the {0} join method but the node has connected to the wrong \
         endpoint, make sure your node is configured to use the {0} join method"
    )]
    WrongEndpoint(String),
    /// The method is real, but this cluster cannot verify it.
    #[error(
        "this cluster does not verify the join method {0:?}: use a token of method token or iam"
    )]
    Unverified(String),
}

/// Checks that a token of `method` may be used in the call that carries nothing but a token.
///
/// # Errors
/// [`TokenError`] for every method but `token`.
pub fn check(method: &str) -> Result<(), TokenError> {
    match method {
        "token" => Ok(()),
        streamed if STREAMED.contains(&streamed) => {
            Err(TokenError::WrongEndpoint(method.to_owned()))
        }
        _ => Err(TokenError::Unverified(method.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_shared_secret_needs_no_proof() {
        assert_eq!(check("token"), Ok(()));
        assert_eq!(
            check("iam"),
            Err(TokenError::WrongEndpoint("iam".to_owned()))
        );
        for method in ["github", "kubernetes", "", "TOKEN"] {
            assert_eq!(
                check(method),
                Err(TokenError::Unverified(method.to_owned()))
            );
        }
    }
}
