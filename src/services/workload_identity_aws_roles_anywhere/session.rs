//! The call to IAM Roles Anywhere: one request, no redirects, bounded in time and size.

use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{StatusCode, Uri};
use http_body_util::Full;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncRead, AsyncWrite};

use super::credentials::Session;
use super::sign::Signed;
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::dial::{self, Dialer, host_of};
use crate::cluster::trust::Trust;
use crate::env::Env;
use crate::exchange;
use crate::join::iam;
use crate::secret::Secret;

/// The longest that the call may take, from connecting to the last byte.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer that is read, in bytes. Real ones have 2 KiB.
const MAX_ANSWER: usize = 256 * 1024;
/// The longest text of an error answer that is passed on, in characters.
const MAX_REASON: usize = 300;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// A variable of the environment names no usable endpoint.
    #[error("{variable} is {value:?}, which is no http or https URL with a host and no path")]
    Endpoint {
        variable: &'static str,
        value: String,
    },
    /// No connection.
    #[error("cannot reach IAM Roles Anywhere: {0}")]
    Unreachable(#[from] ClusterError),
    /// It broke, or something else than HTTP came.
    #[error("IAM Roles Anywhere at {address} gave no usable answer: {problem}")]
    Answer { address: String, problem: String },
    /// AWS said no.
    #[error(
        "IAM Roles Anywhere refused ({status}): {reason}. Does the trust anchor hold the cluster's \
         SPIFFE authority (svid_bundle.pem), is the profile enabled and does it list the role, and \
         does the role trust rolesanywhere.amazonaws.com?"
    )]
    Refused { status: StatusCode, reason: String },
}

/// Where the call goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    secure: bool,
    /// `host:port`, to connect to.
    address: String,
    /// What the `Host` header says.
    pub(super) host: String,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

impl Endpoint {
    /// AWS's own in `region`, or the one that the environment names, as it does for AWS's SDKs.
    pub(super) fn new(region: &str, env: &Env) -> Result<Self, SessionError> {
        let ignored = env
            .get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
            .is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let named = ["AWS_ENDPOINT_URL_ROLESANYWHERE", "AWS_ENDPOINT_URL"]
            .into_iter()
            .filter(|_| !ignored)
            .find_map(|variable| Some((variable, env.get(variable)?)));
        if let Some((variable, value)) = named {
            return Self::parse(value).ok_or_else(|| SessionError::Endpoint {
                variable,
                value: value.to_owned(),
            });
        }
        let host = format!("rolesanywhere.{region}.{}", iam::domain(region));
        Ok(Self {
            secure: true,
            address: format!("{host}:443"),
            host,
        })
    }

    fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        let plain = !authority.host().is_empty()
            && !authority.as_str().contains('@')
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none();
        let port = authority.port_u16();
        let address = format!(
            "{}:{}",
            authority.host(),
            port.unwrap_or(if secure { 443 } else { 80 })
        );
        plain.then(|| Self {
            secure,
            address,
            host: authority.as_str().to_owned(),
        })
    }

    /// Sends a signed request and reads the credentials in the answer.
    pub(super) async fn create_session(
        &self,
        dialer: &dyn Dialer,
        clock: &Clock,
        signed: Signed,
        body: String,
    ) -> Result<Session, SessionError> {
        let exchange = async {
            if self.secure {
                let trust = Trust::default().web(clock, &[b"http/1.1"])?;
                let name = dial::server_name(host_of(&self.address))?;
                let stream = dial::tls(dialer, &self.address, name, trust).await?;
                self.ask(stream, signed, body).await
            } else {
                let stream = dialer.dial(&self.address).await;
                let stream = stream.map_err(|source| self.unusable(&source))?;
                self.ask(stream, signed, body).await
            }
        };
        let (status, answer) = tokio::time::timeout(TIMEOUT, Box::pin(exchange))
            .await
            .unwrap_or_else(|_elapsed| {
                Err(self.unusable(&format!("nothing within {} s", TIMEOUT.as_secs())))
            })?;
        if !status.is_success() {
            let reason = reason(&answer);
            return Err(SessionError::Refused { status, reason });
        }
        read(&answer, clock.now()).map_err(|problem| self.unusable(&problem))
    }

    async fn ask<S>(
        &self,
        stream: S,
        signed: Signed,
        body: String,
    ) -> Result<(StatusCode, Bytes), SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let mut request = http::Request::post(signed.target);
        for (name, value) in signed.headers {
            request = request.header(name, value);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|source| self.unusable(&source))?;
        let answer = exchange::ask_for_bytes(stream, request, MAX_ANSWER)
            .await
            .map_err(|source| self.unusable(&source))?;
        Ok((answer.status(), answer.into_body()))
    }

    fn unusable(&self, problem: &dyn fmt::Display) -> SessionError {
        SessionError::Answer {
            address: self.address.clone(),
            problem: problem.to_string(),
        }
    }
}

/// What AWS gives as the reason of a refusal.
fn reason(answer: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(alias = "Message")]
        message: String,
    }
    let text = match serde_json::from_slice::<Refusal>(answer) {
        Ok(refusal) => refusal.message,
        Err(_not_json) => String::from_utf8_lossy(answer).into_owned(),
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let text: String = words.join(" ").chars().take(MAX_REASON).collect();
    if text.is_empty() {
        "without a reason".to_owned()
    } else {
        text.trim_end_matches('.').to_owned()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(default)]
    credential_set: Vec<Set>,
}

#[derive(Deserialize)]
struct Set {
    credentials: Credentials,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Credentials {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
    expiration: String,
}

/// The credentials in an answer. The error text has nothing of it.
fn read(answer: &[u8], now: SystemTime) -> Result<Session, &'static str> {
    let answer: Answer =
        serde_json::from_slice(answer).map_err(|_source| "it is not the expected JSON")?;
    let set = answer.credential_set.into_iter().next();
    let credentials = set.ok_or("it holds no credentials")?.credentials;
    let session = Session {
        access_key_id: credentials.access_key_id,
        secret_access_key: Secret::new(credentials.secret_access_key),
        token: Secret::new(credentials.session_token),
        expiration: OffsetDateTime::parse(&credentials.expiration, &Rfc3339)
            .map_err(|_source| "its expiration is no time")?
            .into(),
    };
    // They become values of lines.
    let fits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    let values = [
        &session.access_key_id,
        session.secret_access_key.expose(),
        session.token.expose(),
    ];
    if !values.into_iter().all(|value| fits(value)) {
        return Err("its credentials hold nothing, blanks or control characters");
    }
    if session.expiration <= now {
        return Err("its credentials have expired already: do the clocks agree?");
    }
    Ok(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(region: &str, variables: &[(&str, &str)]) -> Result<Endpoint, String> {
        let env: Env = variables.iter().copied().collect();
        Endpoint::new(region, &env).map_err(|error| error.to_string())
    }

    #[test]
    fn the_endpoint_is_awss_unless_the_environment_says_another() {
        const OWN: &str = "AWS_ENDPOINT_URL_ROLESANYWHERE";
        const ALL: &str = "AWS_ENDPOINT_URL";
        for (region, variables, secure, address, host) in [
            (
                "eu-west-1",
                &[][..],
                true,
                "rolesanywhere.eu-west-1.amazonaws.com:443",
                "rolesanywhere.eu-west-1.amazonaws.com",
            ),
            (
                "cn-north-1",
                &[],
                true,
                "rolesanywhere.cn-north-1.amazonaws.com.cn:443",
                "rolesanywhere.cn-north-1.amazonaws.com.cn",
            ),
            (
                "eu-west-1",
                &[(OWN, "http://127.0.0.1:5000"), (ALL, "https://other")],
                false,
                "127.0.0.1:5000",
                "127.0.0.1:5000",
            ),
            (
                "eu-west-1",
                &[(ALL, "https://vpce.example/")],
                true,
                "vpce.example:443",
                "vpce.example",
            ),
            (
                "x",
                &[
                    (ALL, "https://o"),
                    ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "TRUE"),
                ],
                true,
                "rolesanywhere.x.amazonaws.com:443",
                "rolesanywhere.x.amazonaws.com",
            ),
        ] {
            let expected = Endpoint {
                secure,
                address: address.to_owned(),
                host: host.to_owned(),
            };
            assert_eq!(endpoint(region, variables), Ok(expected), "{variables:?}");
        }
        for bad in [
            "x",
            "ftp://x",
            "http://",
            "http://x/y",
            "http://a@x",
            "http://x?y",
        ] {
            let told = endpoint("x", &[(OWN, bad)]).unwrap_err();
            assert!(told.starts_with(OWN), "{told}");
        }
    }

    fn answer(secret: &str, expiration: &str) -> String {
        format!(
            r#"{{"credentialSet":[{{"credentials":{{"accessKeyId":"A","secretAccessKey":"{secret}",
            "sessionToken":"T","expiration":"{expiration}"}}}}],"subjectArn":"x"}}"#
        )
    }

    #[test]
    fn answers_are_believed_only_if_they_make_sense() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let good = answer("s/+", "2023-11-14T23:13:20Z");
        let session = read(good.as_bytes(), now).unwrap();
        assert_eq!(session.secret_access_key.expose(), "s/+");
        assert_eq!(session.expiration, now + Duration::from_hours(1));
        for (bad, expected) in [
            ("{}".to_owned(), "no credentials"),
            (r#"{"credentialSet":[]}"#.to_owned(), "no credentials"),
            ("<html>".to_owned(), "JSON"),
            (answer("", "2023-11-14T23:13:20Z"), "hold nothing"),
            (answer("a\\nb = c", "2023-11-14T23:13:20Z"), "control"),
            (answer("hunter2", "tomorrow"), "no time"),
            (answer("hunter2", "2023-11-14T22:13:20Z"), "clocks"),
        ] {
            let told = read(bad.as_bytes(), now).unwrap_err();
            assert!(told.contains(expected), "{told}");
        }
    }

    #[test]
    fn refusals_are_one_line() {
        for (answer, expected) in [
            (
                r#"{"message":"Untrusted certificate."}"#,
                "Untrusted certificate",
            ),
            (r#"{"Message":"a\nb"}"#, "a b"),
            ("", "without a reason"),
            ("<html>\n no </html>", "<html> no </html>"),
        ] {
            assert_eq!(reason(answer.as_bytes()), expected);
        }
        assert_eq!(reason(&[b'x'; 5000]).len(), MAX_REASON);
    }
}
