//! The join token: a value, or an absolute path of a file that holds it.

use std::path::{Path, PathBuf};

use super::JoinError;
use crate::crypto::sha256_hex;
use crate::secret::Secret;

/// The longest token file that is read, in bytes.
const MAX_TOKEN: u64 = 64 * 1024;

/// Where the join token comes from. It is read when it is needed, not before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The token itself. For methods other than `token` it is only a name.
    Value(Secret<String>),
    /// A file with the token; surrounding white space does not count.
    File(PathBuf),
}

impl TokenSource {
    /// Reads the YAML or command line form: an absolute path is a file, anything else a value.
    pub fn new(text: String) -> Self {
        if Path::new(&text).is_absolute() {
            Self::File(text.into())
        } else {
            Self::Value(Secret::new(text))
        }
    }

    /// The token.
    pub fn resolve(&self) -> Result<Secret<String>, JoinError> {
        match self {
            Self::Value(token) => Ok(token.clone()),
            Self::File(path) => {
                let shown = path.display();
                let unreadable = |problem: &dyn std::fmt::Display| {
                    JoinError::Token(format!("cannot read {shown}: {problem}"))
                };
                let length = std::fs::metadata(path)
                    .map_err(|source| unreadable(&source))?
                    .len();
                if length > MAX_TOKEN {
                    return Err(unreadable(&format_args!("larger than {MAX_TOKEN} bytes")));
                }
                let text = Secret::new(
                    std::fs::read_to_string(path).map_err(|source| unreadable(&source))?,
                );
                let token = text.expose().trim();
                if token.is_empty() {
                    tracing::warn!(path = %shown, "The token file is empty");
                }
                Ok(Secret::new(token.to_owned()))
            }
        }
    }
}

/// What the storage keeps of a token: enough to notice that another one is configured.
pub fn token_hash(token: &Secret<String>) -> String {
    sha256_hex(token.expose().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absolute_path_is_read_and_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, " abc \n").unwrap();
        let source = TokenSource::new(path.to_str().unwrap().to_owned());
        assert_eq!(source.resolve().unwrap().expose(), "abc");
        std::fs::remove_file(&path).unwrap();
        assert!(
            source
                .resolve()
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
    }

    #[test]
    fn a_relative_path_is_the_token() {
        let source = TokenSource::new("dir/token".to_owned());
        assert_eq!(source.resolve().unwrap().expose(), "dir/token");
        assert!(!format!("{source:?}").contains("token\""));
    }
}
