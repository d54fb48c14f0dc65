//! Asking issuers over the network.

use async_trait::async_trait;
use http::{Request, Uri, header};
use http_body_util::Full;

use super::issuers::{Fetch, FetchError, Issuer};
use crate::outbound::{Outbound, Target, trusting};

/// Asks over HTTPS, with the system's roots or those that the issuer's join token has.
#[derive(Debug)]
pub(crate) struct Web(pub(crate) Outbound);

#[async_trait]
impl Fetch for Web {
    async fn get(&self, issuer: &Issuer, url: &str, most: usize) -> Result<Vec<u8>, FetchError> {
        let none = || FetchError::Url(super::shortened(url));
        let (target, path) = split(url, issuer.insecure).ok_or_else(none)?;
        let exchange = |problem: String| FetchError::Exchange {
            url: url.to_owned(),
            problem,
        };
        let outbound = match &issuer.authorities {
            Some(pem) => Outbound::with(trusting(pem).map_err(FetchError::Authorities)?),
            None => self.0.clone(),
        };
        let request = Request::get(path)
            .header(header::HOST, target.authority())
            .header(header::ACCEPT, "application/json")
            .body(Full::default())
            .map_err(|_source| none())?;
        let answer = outbound.send(&target, request, most).await;
        let answer = answer.map_err(|error| exchange(error.to_string()))?;
        if answer.status.as_u16() != 200 {
            return Err(FetchError::Status {
                url: url.to_owned(),
                status: answer.status.as_u16(),
            });
        }
        Ok(answer.body.into())
    }
}

/// The host and the path of a URL; without TLS only where that is allowed.
pub(super) fn split(url: &str, insecure: bool) -> Option<(Target, String)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri
        .scheme_str()
        .filter(|scheme| insecure || *scheme == "https")?;
    let target = Target::parse(&format!("{scheme}://{}", uri.authority()?))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    Some((target, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn issuers_are_asked_over_tls_unless_it_is_allowed_otherwise() {
        let path = |url, insecure| split(url, insecure).map(|(target, path)| target.url(&path));
        for url in [
            "https://a.example.com/x/.well-known/openid-configuration",
            "https://a.example.com:8443/jwks?kid=1",
        ] {
            assert_eq!(path(url, false).as_deref(), Some(url));
        }
        assert_eq!(path("http://a/x", false), None);
        assert_eq!(path("http://a/x", true).as_deref(), Some("http://a/x"));
        for url in [
            "",
            "a",
            "file:///etc/passwd",
            "https://",
            "https://u@a/x",
            "ftp://a",
        ] {
            assert_eq!(path(url, true), None, "{url}");
        }
    }
}
