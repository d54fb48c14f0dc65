//! Refusals as the wire carries them (upstream `api/trail/trail.go`): a status code, and a text
//! whose lines lead from the outermost context to the cause, each one tab deeper.

use std::fmt;

use tonic::{Code, Status};

/// Why a call is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    code: Code,
    /// The outermost context first, the cause last.
    lines: Vec<String>,
}

impl Refusal {
    fn new(code: Code, cause: impl Into<String>) -> Self {
        Self {
            code,
            lines: vec![cause.into()],
        }
    }

    /// The caller may not do this.
    pub fn denied(cause: impl Into<String>) -> Self {
        Self::new(Code::PermissionDenied, cause)
    }

    /// The request itself is wrong.
    pub fn bad_parameter(cause: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, cause)
    }

    /// What the request names does not exist.
    pub fn not_found(cause: impl Into<String>) -> Self {
        Self::new(Code::NotFound, cause)
    }

    /// This cluster cannot do this.
    pub fn unimplemented(cause: impl Into<String>) -> Self {
        Self::new(Code::Unimplemented, cause)
    }

    /// The caller used up a limit.
    pub fn limit(cause: impl Into<String>) -> Self {
        Self::new(Code::ResourceExhausted, cause)
    }

    /// The client has gone.
    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "the client went away")
    }

    /// Something that this cluster needs does not answer; trying again may help.
    pub fn unavailable(cause: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, cause)
    }

    /// Everything that has no code of its own.
    pub fn unknown(cause: impl Into<String>) -> Self {
        Self::new(Code::Unknown, cause)
    }

    /// Puts what was being done in front.
    #[must_use]
    pub fn context(mut self, doing: &str) -> Self {
        self.lines.insert(0, doing.to_owned());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, line) in self.lines.iter().enumerate() {
            if depth > 0 {
                write!(f, "\n{}", "\t".repeat(depth))?;
            }
            f.write_str(line)?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code, refusal.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_lines_in_front_each_cause_one_tab_deeper() {
        let refusal = Refusal::denied("no rule")
            .context("checking allow rules")
            .context("checking iam request");
        let status = Status::from(refusal);
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_eq!(
            status.message(),
            "checking iam request\n\tchecking allow rules\n\t\tno rule"
        );
    }
}
