//! Where the bundle of another trust domain comes from.

use http::Uri;
use serde_json::Value;

use crate::outbound::Target;
use crate::spiffe::SpiffeId;

/// The longest URL that is taken, in bytes.
const MAX_URL: usize = 2048;

/// Why nobody can be asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SourceError {
    /// The URL is none of a bundle endpoint (`SPIFFE_Federation.md` section 5.2).
    #[error(
        "{0:?} is no URL of a bundle endpoint: expected https://HOST[:PORT]/PATH without a user \
         and without a fragment"
    )]
    Url(String),
    /// The stored resource does not say.
    #[error("the resource names no usable bundle source: create it again")]
    Missing,
}

/// A bundle endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Where to connect.
    pub(super) target: Target,
    /// Path and query.
    pub(super) path: String,
}

impl Endpoint {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`SourceError::Url`].
    pub(crate) fn parse(url: &str) -> Result<Self, SourceError> {
        Self::read(url).ok_or_else(|| SourceError::Url(url.chars().take(MAX_URL).collect()))
    }

    fn read(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let authority = uri.authority()?;
        let host = uri.host().filter(|host| !host.is_empty())?;
        let plain = url.len() <= MAX_URL
            && uri.scheme_str() == Some("https")
            && !authority.as_str().contains('@')
            && (authority.as_str() == host || uri.port_u16().is_some())
            && !url.contains('#');
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        plain.then(|| Self {
            target: Target::https_at(host, uri.port_u16().unwrap_or(443)),
            path: path.to_owned(),
        })
    }

    /// Where a redirect leads: to another URL of the same kind, or another path of the same host.
    ///
    /// # Errors
    /// [`SourceError::Url`].
    pub(super) fn redirected(&self, location: &str) -> Result<Self, SourceError> {
        if location.starts_with("//") {
            return Self::parse(&format!("https:{location}"));
        }
        if location.starts_with('/') {
            return Self::parse(&self.target.url(location));
        }
        Self::parse(location)
    }
}

/// Where a bundle comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// It stands in the resource.
    Static {
        /// The document.
        bundle: String,
    },
    /// From an endpoint that web PKI vouches for.
    HttpsWeb {
        /// The endpoint.
        endpoint: Endpoint,
    },
    /// From an endpoint that shows an X.509-SVID. Teleport does not have this.
    HttpsSpiffe {
        /// The endpoint.
        endpoint: Endpoint,
        /// Whom it has to be.
        id: SpiffeId,
        /// The bundle to begin with, where the endpoint vouches for itself.
        initial: Option<String>,
    },
}

impl Source {
    /// Reads the spec of a stored resource.
    ///
    /// # Errors
    /// [`SourceError`].
    pub(crate) fn read(spec: &Value) -> Result<Self, SourceError> {
        let text = |pointer: &str| {
            let value = spec.pointer(&format!("/bundle_source/{pointer}"));
            value.and_then(Value::as_str)
        };
        if let Some(bundle) = text("static/bundle") {
            let bundle = bundle.to_owned();
            return Ok(Self::Static { bundle });
        }
        if let Some(url) = text("https_web/bundle_endpoint_url") {
            let endpoint = Endpoint::parse(url)?;
            return Ok(Self::HttpsWeb { endpoint });
        }
        let url = text("https_spiffe/bundle_endpoint_url").ok_or(SourceError::Missing)?;
        Ok(Self::HttpsSpiffe {
            endpoint: Endpoint::parse(url)?,
            id: text("https_spiffe/endpoint_spiffe_id")
                .and_then(|id| id.parse().ok())
                .ok_or(SourceError::Missing)?,
            initial: text("https_spiffe/initial_bundle").map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_of_bundle_endpoints_are_taken() {
        for (good, url) in [
            ("https://a.example", "https://a.example/"),
            ("https://a.example:443/b", "https://a.example/b"),
            (
                "https://a.example:8443/b?c=d",
                "https://a.example:8443/b?c=d",
            ),
            ("https://[::1]:1/", "https://[::1]:1/"),
        ] {
            let endpoint = Endpoint::parse(good).unwrap();
            assert_eq!(endpoint.target.url(&endpoint.path), url);
        }
        let long = format!("https://a/{}", "b".repeat(MAX_URL));
        for bad in [
            "",
            ":::::",
            "a.example",
            "http://a.example/b",
            "spiffe://a.example/b",
            "https:///b",
            "https://user@a.example/b",
            "https://user:secret@a.example/b",
            "https://a.example/b#c",
            "https://a.example:/b",
            "https://a.example:99999/b",
            "https://a b/",
            &long,
        ] {
            assert!(Endpoint::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn redirects_lead_to_endpoints_only() {
        let endpoint = Endpoint::parse("https://a.example:8443/b").unwrap();
        for (location, url) in [
            ("/c?d", Some("https://a.example:8443/c?d")),
            ("//b.example/c", Some("https://b.example/c")),
            ("https://b.example/c", Some("https://b.example/c")),
            ("http://b.example/c", None),
            ("https://u@b.example/c", None),
            ("c", None),
            ("", None),
        ] {
            let found = endpoint.redirected(location).ok();
            let found = found.map(|found| found.target.url(&found.path));
            assert_eq!(found.as_deref(), url, "{location}");
        }
    }
}
