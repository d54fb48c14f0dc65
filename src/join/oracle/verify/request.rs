//! The signed question of an instance, which the cluster puts in its place: it is taken apart, and what
//! goes out is written anew from an allow-list, to a host that the instance's own ID decides.

const MAX_HEADERS: usize = 32;

/// Headers that are passed on. `host` is written anew.
const PASSED: &[&str] = &[
    "accept",
    "authorization",
    "date",
    "opc-client-info",
    "opc-request-id",
    "user-agent",
    "x-date",
];

/// A question that may be put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// Names in lower case, and values.
    pub(super) headers: Vec<(String, String)>,
}

impl Question {
    /// Reads an HTTP/1.1 request without a body, for `path` of `host`.
    pub(super) fn read(bytes: &[u8], path: &str, host: &str) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_source| "it is no text")?;
        let head = text
            .strip_suffix("\r\n\r\n")
            .ok_or("it does not end with an empty line")?;
        let mut lines = head.split("\r\n");
        let first: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
        let ["GET", target, "HTTP/1.1"] = first.as_slice() else {
            return Err("it is no GET request of HTTP/1.1".to_owned());
        };
        if *target != path {
            return Err(format!("path must be {path}, got {target:?}"));
        }
        let mut headers = Vec::new();
        let mut hosts = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or("a header has no colon")?;
            let token = |c: char| c.is_ascii_alphanumeric() || c == '-';
            if name.is_empty() || !name.chars().all(token) || value.contains(char::is_control) {
                return Err("a header is malformed".to_owned());
            }
            if headers.len() + hosts.len() >= MAX_HEADERS {
                return Err("it has too many headers".to_owned());
            }
            let (name, value) = (name.to_ascii_lowercase(), value.trim().to_owned());
            match name.as_str() {
                "host" => hosts.push(value),
                "content-length" | "transfer-encoding" if value != "0" => {
                    return Err("it has a body".to_owned());
                }
                known if PASSED.contains(&known) => headers.push((name, value)),
                _ => {}
            }
        }
        match hosts.as_slice() {
            [only] if only == host => {}
            _ => return Err(format!("hostname must be {host}, got {hosts:?}")),
        }
        let signed = headers
            .iter()
            .filter(|(name, _)| name == "authorization")
            .count();
        if signed == 1 {
            Ok(Self { headers })
        } else {
            Err("it is not signed".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "auth.us-phoenix-1.oraclecloud.com";

    fn read(text: &str) -> Result<Question, String> {
        Question::read(text.as_bytes(), "/p", HOST)
    }

    #[test]
    fn what_goes_out_is_chosen_here() {
        let question = read(&format!(
            "GET /p HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Signature x\r\nX-Forwarded-For: y\r\nDate: z\r\nAccept-Encoding: gzip\r\n\r\n"
        ));
        let names: Vec<_> = question
            .unwrap()
            .headers
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["authorization", "date"]);
    }

    #[test]
    fn other_questions_are_not_put() {
        let signed = "Authorization: x\r\n";
        for (bad, expected) in [
            (String::new(), "empty line"),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\n{signed}"),
                "empty line",
            ),
            (
                format!("POST /p HTTP/1.1\r\nHost: {HOST}\r\n{signed}\r\n"),
                "no GET",
            ),
            (
                format!("GET /p HTTP/1.0\r\nHost: {HOST}\r\n{signed}\r\n"),
                "no GET",
            ),
            (
                format!("GET /q HTTP/1.1\r\nHost: {HOST}\r\n{signed}\r\n"),
                "path must be",
            ),
            (
                format!("GET /p?a HTTP/1.1\r\nHost: {HOST}\r\n{signed}\r\n"),
                "path must be",
            ),
            (
                format!("GET http://x/p HTTP/1.1\r\nHost: {HOST}\r\n{signed}\r\n"),
                "path must be",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: evil.example\r\n{signed}\r\n"),
                "hostname must be",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}:8443\r\n{signed}\r\n"),
                "hostname must be",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\nHost: {HOST}\r\n{signed}\r\n"),
                "hostname must be",
            ),
            (
                format!("GET /p HTTP/1.1\r\n{signed}\r\n"),
                "hostname must be",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\n\r\n"),
                "not signed",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\n{signed}{signed}\r\n"),
                "not signed",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\n{signed}Content-Length: 9\r\n\r\n"),
                "a body",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\n{signed}x\ny: z\r\n\r\n"),
                "malformed",
            ),
            (
                format!("GET /p HTTP/1.1\r\nHost: {HOST}\r\n{signed}x: a\nb\r\n\r\n"),
                "malformed",
            ),
            (
                format!(
                    "GET /p HTTP/1.1\r\nHost: {HOST}\r\n{}\r\n",
                    signed.repeat(40)
                ),
                "too many",
            ),
        ] {
            let error = read(&bad).unwrap_err();
            assert!(error.contains(expected), "{bad:?}: {error}");
        }
        assert!(Question::read(&[0xff], "/p", HOST).is_err());
    }
}
