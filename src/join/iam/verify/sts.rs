//! Sending a verified request to AWS's STS.

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Full;

use super::{BODY, MAX_ANSWER, StsRequest};
use crate::join::verify::World;
use crate::outbound::{OutboundError, Target};

/// An answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// The status line without the version, for example `403 Forbidden`.
    pub(super) status: String,
    /// Whether the status is 200.
    pub(super) ok: bool,
    /// At most [`MAX_ANSWER`] bytes.
    pub(super) body: Bytes,
}

/// Sends a verified request and reads the answer.
///
/// # Errors
/// [`OutboundError`]; a status other than 200 is an answer.
pub(super) async fn send(world: &World, request: &StsRequest) -> Result<Answer, OutboundError> {
    let aws = || Target::https(&request.host);
    let target = world.sts.clone().unwrap_or_else(aws);
    let mut message = Request::post("/")
        .header(header::HOST, &request.host)
        .header(header::CONTENT_LENGTH, BODY.len());
    for (name, value) in &request.headers {
        message = message.header(name, value);
    }
    let message = message.body(Full::new(Bytes::from_static(BODY.as_bytes())))?;
    let answer = world.outbound.send(&target, message, MAX_ANSWER).await?;
    Ok(Answer {
        status: answer.status.to_string(),
        ok: answer.status == http::StatusCode::OK,
        body: answer.body,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    fn request() -> StsRequest {
        StsRequest {
            host: "sts.us-east-1.amazonaws.com".to_owned(),
            headers: vec![("x-teleport-challenge".to_owned(), "c".to_owned())],
        }
    }

    /// Answers one connection with `answer` and returns what it was asked.
    async fn serve(answer: Vec<u8>) -> (World, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(BODY.as_bytes()) {
                let mut buffer = [0; 4096];
                let count = stream.read(&mut buffer).await.unwrap();
                asked.extend(&buffer[..count]);
            }
            drop(stream.write_all(&answer).await);
            String::from_utf8(asked).unwrap()
        });
        (World::new(Some(&endpoint)).unwrap(), server)
    }

    #[tokio::test]
    async fn the_request_keeps_its_host_and_says_nothing_else() {
        let answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno".to_vec();
        let (world, server) = serve(answer).await;
        let answer = send(&world, &request()).await.unwrap();
        assert_eq!(
            (answer.status.as_str(), answer.ok),
            ("403 Forbidden", false)
        );
        assert_eq!(&answer.body[..], b"no");
        let asked = server.await.unwrap();
        assert_eq!(
            asked,
            format!(
                "POST / HTTP/1.1\r\nhost: sts.us-east-1.amazonaws.com\r\ncontent-length: 43\r\n\
                 x-teleport-challenge: c\r\n\r\n{BODY}"
            )
        );
    }

    #[tokio::test]
    async fn redirects_are_answers_and_long_answers_are_errors() {
        let redirect = b"HTTP/1.1 307 x\r\nLocation: http://evil.example/\r\n\
            Content-Length: 0\r\n\r\n";
        let (world, _server) = serve(redirect.to_vec()).await;
        assert!(!send(&world, &request()).await.unwrap().ok);
        let mut long = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
            MAX_ANSWER + 1
        );
        long += &"a".repeat(MAX_ANSWER + 1);
        let (world, _server) = serve(long.into_bytes()).await;
        assert!(matches!(
            send(&world, &request()).await,
            Err(OutboundError::Answer { .. })
        ));
        let (world, _server) = serve(b"no HTTP\r\n\r\n".to_vec()).await;
        assert!(matches!(
            send(&world, &request()).await,
            Err(OutboundError::Answer { .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_an_error_after_ten_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let world = World::new(Some(&endpoint)).unwrap();
        assert!(matches!(
            send(&world, &request()).await,
            Err(OutboundError::Timeout(_))
        ));
    }
}
