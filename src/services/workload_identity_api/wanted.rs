//! What a caller asks for, checked before anybody is troubled with it.

use tonic::Status;

use crate::pb::workload_api::JwtsvidRequest;
use crate::spiffe::SpiffeId;

/// The most audiences of one token. One is strongly recommended (`JWT-SVID.md` 3.2).
const MAX_AUDIENCES: usize = 32;
/// The most bytes of one audience: as many as the longest SPIFFE ID has.
const MAX_AUDIENCE: usize = 2048;
/// The most bytes of all audiences of one token together.
const MAX_AUDIENCE_BYTES: usize = 8 * 1024;

/// A request of `FetchJWTSVID`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WantedTokens {
    /// At least one, none empty.
    pub(super) audiences: Vec<String>,
    /// The one identity that is wanted; `None` stands for all of the caller's.
    pub(super) id: Option<SpiffeId>,
}

impl WantedTokens {
    pub(super) fn new(request: JwtsvidRequest) -> Result<Self, Box<Status>> {
        let invalid = |problem: String| Err(Box::new(Status::invalid_argument(problem)));
        let JwtsvidRequest {
            audience: audiences,
            spiffe_id,
        } = request;
        if audiences.is_empty() || audiences.iter().any(String::is_empty) {
            return invalid("audience must be specified".to_owned());
        }
        if audiences.len() > MAX_AUDIENCES {
            return invalid(format!(
                "{} audiences in one token: at most {MAX_AUDIENCES} are accepted, and one is best",
                audiences.len()
            ));
        }
        if let Some(long) = audiences.iter().find(|name| name.len() > MAX_AUDIENCE) {
            return invalid(format!(
                "an audience of {} bytes: at most {MAX_AUDIENCE} are accepted",
                long.len()
            ));
        }
        let bytes: usize = audiences.iter().map(String::len).sum();
        if bytes > MAX_AUDIENCE_BYTES {
            return invalid(format!(
                "audiences of {bytes} bytes: at most {MAX_AUDIENCE_BYTES} are accepted"
            ));
        }
        let id = match spiffe_id.as_str() {
            "" => None,
            text => match text.parse() {
                Ok(id) => Some(id),
                Err(problem) => return invalid(format!("spiffe_id: {problem}")),
            },
        };
        Ok(Self { audiences, id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn of(audiences: &[&str], id: &str) -> Result<WantedTokens, Box<Status>> {
        WantedTokens::new(JwtsvidRequest {
            audience: audiences.iter().map(|&text| text.to_owned()).collect(),
            spiffe_id: id.to_owned(),
        })
    }

    #[test]
    fn malformed_requests_are_told() {
        let long = "x".repeat(MAX_AUDIENCE + 1);
        let longest = &"x".repeat(MAX_AUDIENCE);
        for (audiences, id, word) in [
            (vec![], "", "audience"),
            (vec![""], "", "audience"),
            (vec!["a", ""], "", "audience"),
            (vec!["a"; MAX_AUDIENCES + 1], "", "33 audiences"),
            (vec!["a", &long], "", "an audience of 2049 bytes"),
            (
                vec![longest, longest, longest, longest, "a"],
                "",
                "audiences of 8193 bytes",
            ),
            (vec!["a"], "x", "spiffe_id"),
            (vec!["a"], "spiffe://", "spiffe_id"),
            (vec!["a"], "spiffe://td", "spiffe_id"),
            (vec!["a"], "spiffe://td/", "spiffe_id"),
            (vec!["a"], "spiffe://td/a?b", "spiffe_id"),
            (vec!["a"], "spiffe://td:1/a", "spiffe_id"),
            (vec!["a"], "spiffe://u@td/a", "spiffe_id"),
            (vec!["a"], "spiffe://td/\u{e4}", "spiffe_id"),
            (vec!["a"], "\u{e4}://td/a", "spiffe_id"),
            (vec!["a"], "SPIFFE://td/a", "spiffe_id"),
            (vec!["a"], "spiffe://TD/a", "spiffe_id"),
        ] {
            let status = of(&audiences, id).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{id}");
            assert!(status.message().contains(word), "{status:?}");
        }
    }

    #[test]
    fn long_audiences_are_taken_up_to_a_limit() {
        let longest = "x".repeat(MAX_AUDIENCE);
        assert!(of(&[longest.as_str(); 4], "").is_ok());
    }

    #[test]
    fn one_identity_or_all() {
        let id = |text| of(&["a"], text).unwrap().id;
        assert_eq!(id("spiffe://td/A").unwrap().to_string(), "spiffe://td/A");
        assert_ne!(id("spiffe://td/A"), id("spiffe://td/a"));
        assert_eq!(id(""), None);
    }
}
