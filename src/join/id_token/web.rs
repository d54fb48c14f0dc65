//! Asking the service that hands out ID tokens.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Uri, header};
use http_body_util::Full;

use crate::cluster::dial::{self, Dialer as _};
use crate::cluster::network::{Network, Settings};
use crate::cluster::trust::Trust;
use crate::exchange::ask_for_bytes;
use crate::join::{JoinError, Surroundings};
use crate::secret::Secret;

/// The longest that an answer may take, from connecting to its last byte.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer that is read, in bytes. Tokens have some 2 KiB.
const MAX_ANSWER: usize = 128 * 1024;

/// What is asked.
#[derive(Debug)]
pub(in crate::join) struct Question<'a> {
    /// The join method.
    pub(in crate::join) method: &'static str,
    /// The HTTP method.
    pub(in crate::join) verb: Method,
    /// Where, with the query.
    pub(in crate::join) url: &'a str,
    /// What the job may ask with. It is sent to that host alone: redirects are not followed.
    pub(in crate::join) bearer: &'a Secret<String>,
    /// The value of `Accept`.
    pub(in crate::join) accept: &'static str,
    /// The member of the answer that is the token.
    pub(in crate::join) member: &'static str,
}

/// Asks, over a forward proxy where the environment names one, with the system's roots.
pub(in crate::join) async fn ask(
    around: &Surroundings<'_>,
    question: &Question<'_>,
) -> Result<Secret<String>, JoinError> {
    let asked = tokio::time::timeout(TIMEOUT, Box::pin(exchange(around, question)));
    let found = asked
        .await
        .unwrap_or_else(|_elapsed| Err(format!("no answer within {} s", TIMEOUT.as_secs())));
    found.map_err(|problem| JoinError::Proof {
        method: question.method,
        problem: format!("no ID token from {}: {problem}", host(question.url)),
    })
}

/// What may be shown of the URL: its path and query are the provider's own business.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    // A name and a password may stand before it.
    authority.rsplit('@').next().unwrap_or_default()
}

async fn exchange(
    around: &Surroundings<'_>,
    question: &Question<'_>,
) -> Result<Secret<String>, String> {
    let uri: Uri = question
        .url
        .parse()
        .map_err(|_source| "its URL is none".to_owned())?;
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    let (secure, port) = match uri.scheme_str() {
        Some("https") => (true, "443"),
        Some("http") => (false, "80"),
        _ => return Err("its URL is neither https nor http".to_owned()),
    };
    if authority.is_empty() || authority.contains('@') {
        return Err("its URL has no host, or more than one".to_owned());
    }
    let address = crate::cluster::ping::with_port(&authority, port);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::builder()
        .method(&question.verb)
        .uri(path)
        .header(header::HOST, &authority)
        .header(header::ACCEPT, question.accept)
        .header(header::CONTENT_TYPE, "application/json")
        .header(
            header::AUTHORIZATION,
            format!("Bearer {}", question.bearer.expose()),
        )
        .body(Full::<Bytes>::default())
        .map_err(|_source| "the token to ask with is no header".to_owned())?;
    let trust = Trust::default();
    let settings = Settings::from_env(around.env)?;
    let network = Network::new(settings, trust.clone(), around.clock.clone());
    let answer = if secure {
        let name = dial::server_name(&address).map_err(|error| error.to_string())?;
        let config = trust.web(around.clock, &[b"http/1.1"]);
        let config = config.map_err(|error| error.to_string())?;
        let stream = dial::tls(&network, &address, name, config).await;
        let stream = stream.map_err(|error| error.to_string())?;
        ask_for_bytes(stream, request, MAX_ANSWER).await
    } else {
        let stream = network.dial(&address).await;
        let stream = stream.map_err(|error| error.to_string())?;
        ask_for_bytes(stream, request, MAX_ANSWER).await
    };
    let answer = answer.map_err(|error| error.to_string())?;
    if !answer.status().is_success() {
        return Err(format!(
            "it answered {}{}",
            answer.status(),
            if answer.status().is_redirection() {
                ", and redirects are not followed"
            } else {
                ""
            }
        ));
    }
    token(answer.body(), question.member)
}

/// The token in the answer. Of the answer itself nothing is repeated: it may hold the token.
fn token(body: &[u8], member: &str) -> Result<Secret<String>, String> {
    let answer: serde_json::Value =
        serde_json::from_slice(body).map_err(|_source| "its answer is no JSON".to_owned())?;
    let token = answer.get(member).and_then(serde_json::Value::as_str);
    token
        .filter(|token| !token.is_empty())
        .map(|token| Secret::new(token.to_owned()))
        .ok_or_else(|| format!("its answer has no {member:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_hold_a_token_or_are_described_without_it() {
        assert_eq!(
            token(br#"{"value": "a.b.c"}"#, "value").unwrap().expose(),
            "a.b.c"
        );
        for body in [
            "",
            "a.b.c",
            "[]",
            "{}",
            r#"{"value": ""}"#,
            r#"{"value": 1, "x": "a.b.c"}"#,
        ] {
            let problem = token(body.as_bytes(), "value").map(|_| ()).unwrap_err();
            assert!(!problem.contains("a.b.c"), "{problem}");
        }
    }

    #[test]
    fn only_the_host_of_a_url_is_shown() {
        for (url, shown) in [
            ("https://h.example.com:8443/a?token=x", "h.example.com:8443"),
            ("https://h?x", "h"),
            ("https://user:password@h/x", "h"),
            ("nonsense", "nonsense"),
            ("", ""),
        ] {
            assert_eq!(host(url), shown);
        }
    }
}
