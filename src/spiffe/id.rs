//! The grammar of SPIFFE IDs.

use std::fmt;
use std::str::FromStr;

/// The longest SPIFFE ID, in bytes (SPIFFE-ID.md section 2.3).
const MAX_ID: usize = 2048;
/// The longest trust domain name, in bytes.
const MAX_TRUST_DOMAIN: usize = 255;

/// Why a text is no SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// The scheme is not `spiffe://`.
    #[error("a SPIFFE ID begins with spiffe://")]
    Scheme,
    /// The trust domain is empty, too long or has a character outside `[a-z0-9._-]`.
    #[error("a trust domain has 1 to 255 characters of a-z, 0-9, '.', '-', '_'")]
    TrustDomain,
    /// The path has an empty, `.` or `..` segment, ends in `/`, or has a character outside
    /// `[A-Za-z0-9._-]`.
    #[error(
        "a SPIFFE path is /segment… of A-Z, a-z, 0-9, '.', '-', '_', with no empty, '.' or '..' segment"
    )]
    Path,
    /// The whole is longer than 2048 bytes.
    #[error("a SPIFFE ID has at most 2048 bytes")]
    TooLong,
}

/// A trust domain name: lower case, no scheme, no path.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// Parses a bare name such as `example.org`.
    ///
    /// # Errors
    /// [`IdError::TrustDomain`].
    pub fn new(name: &str) -> Result<Self, IdError> {
        let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        if name.is_empty() || name.len() > MAX_TRUST_DOMAIN || !name.bytes().all(valid) {
            return Err(IdError::TrustDomain);
        }
        Ok(Self(name.to_owned()))
    }

    /// The bare name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The trust domain's own SPIFFE ID, `spiffe://<name>`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A workload's SPIFFE ID: a trust domain and a path that is not the root.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    path: String,
}

impl SpiffeId {
    /// Builds an ID from a trust domain and a path such as `/svc/foo`.
    ///
    /// # Errors
    /// [`IdError::Path`] or [`IdError::TooLong`].
    pub fn new(trust_domain: TrustDomain, path: &str) -> Result<Self, IdError> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let segments = path.strip_prefix('/').ok_or(IdError::Path)?;
        for segment in segments.split('/') {
            if matches!(segment, "" | "." | "..") || !segment.bytes().all(valid) {
                return Err(IdError::Path);
            }
        }
        let id = Self {
            trust_domain,
            path: path.to_owned(),
        };
        if id.to_string().len() > MAX_ID {
            return Err(IdError::TooLong);
        }
        Ok(id)
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path, with its leading slash.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() > MAX_ID {
            return Err(IdError::TooLong);
        }
        let rest = text.strip_prefix("spiffe://").ok_or(IdError::Scheme)?;
        let slash = rest.find('/').ok_or(IdError::Path)?;
        let (name, path) = rest.split_at(slash);
        Self::new(TrustDomain::new(name)?, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip() {
        for text in [
            "spiffe://example.org/svc/foo",
            "spiffe://1.2.3.4/a",
            "spiffe://under_score/A.b-c_d/0",
        ] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_the_standard_forbids_is_refused() {
        for (text, why) in [
            ("http://example.org/a", IdError::Scheme),
            ("SPIFFE://example.org/a", IdError::Scheme),
            ("spiffe://", IdError::Path),
            ("spiffe:///a", IdError::TrustDomain),
            ("spiffe://Example.org/a", IdError::TrustDomain),
            ("spiffe://user@example.org/a", IdError::TrustDomain),
            ("spiffe://example.org:443/a", IdError::TrustDomain),
            ("spiffe://example.org", IdError::Path),
            ("spiffe://example.org/", IdError::Path),
            ("spiffe://example.org/a/", IdError::Path),
            ("spiffe://example.org/a//b", IdError::Path),
            ("spiffe://example.org/./b", IdError::Path),
            ("spiffe://example.org/../b", IdError::Path),
            ("spiffe://example.org/a%20b", IdError::Path),
            ("spiffe://example.org/a?b", IdError::Path),
            ("spiffe://example.org/a#b", IdError::Path),
        ] {
            assert_eq!(text.parse::<SpiffeId>(), Err(why), "{text}");
        }
    }

    #[test]
    fn every_byte_is_decided() {
        for byte in 0..=255_u8 {
            let character = char::from(byte);
            let path = SpiffeId::new(TrustDomain::new("a").unwrap(), &format!("/x{character}y"));
            let allowed = byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
            assert_eq!(path.is_ok(), allowed, "path byte {byte}");
            let name = TrustDomain::new(&format!("x{character}y"));
            let allowed =
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
            assert_eq!(name.is_ok(), allowed, "trust domain byte {byte}");
        }
    }

    #[test]
    fn the_length_limit_is_exact() {
        let path = |total: usize| format!("/{}", "a".repeat(total - "spiffe://td/".len()));
        let domain = TrustDomain::new("td").unwrap();
        assert!(SpiffeId::new(domain.clone(), &path(2048)).is_ok());
        assert_eq!(SpiffeId::new(domain, &path(2049)), Err(IdError::TooLong));
    }
}
