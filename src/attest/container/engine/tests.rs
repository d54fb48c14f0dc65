//! Engines that answer in every way but the right one.

use super::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;

#[test]
fn addresses_are_read() {
    for good in ["unix:///var/run/docker.sock", "unix:///x"] {
        assert_eq!(Address::parse(good).unwrap().to_string(), good);
    }
    for (bad, expected) in [
        ("", "no address of a unix socket"),
        ("/var/run/docker.sock", "no address of a unix socket"),
        ("tcp://127.0.0.1:2375", "no address of a unix socket"),
        ("UNIX:///x", "no address of a unix socket"),
        (
            "unix://var/run/docker.sock",
            "a slash missing before the path",
        ),
        ("unix:///", "a slash missing"),
        ("unix://", "a slash missing"),
    ] {
        let problem = Address::parse(bad).unwrap_err();
        assert!(problem.contains(expected), "{bad}: {problem}");
    }
}

/// What comes of asking an engine that sends `answer` and then hangs or closes.
async fn asked(answer: &str, hangs: bool) -> Result<serde_json::Value, EngineError> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("e.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = [0; 1024];
        let length = stream.read(&mut asked).await.unwrap();
        assert!(asked[..length].starts_with(b"GET /x/json HTTP/1.1\r\nhost: localhost\r\n"));
        // An answer that is too long is not waited for.
        drop(stream.write_all(answer.as_bytes()).await);
        if hangs {
            std::future::pending::<()>().await;
        }
    };
    let address = Address(socket);
    let ask = address.get("/x/json");
    let mut ask = std::pin::pin!(ask);
    tokio::select! {
        answer = &mut ask => answer,
        () = serve => ask.await,
    }
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn a_good_answer_is_read() {
    let answer = asked(&http("200 OK", r#"{"a": 1}"#), false).await.unwrap();
    assert_eq!(answer["a"], 1);
}

#[tokio::test]
async fn every_other_answer_is_told_apart() {
    let huge = http("200 OK", &" ".repeat(MAX_ANSWER + 1));
    let refusal = http("404 Not Found", r#"{"message": "no such\n container: x"}"#);
    for (answer, expected) in [
        (
            refusal.as_str(),
            "does not know /x/json: no such container: x",
        ),
        (
            &http("500 Oh", "no\n\nspace"),
            "answered 500 Internal Server Error: no space",
        ),
        (&http("403 F", ""), "answered 403 Forbidden"),
        (&http("201 Created", "{}"), "answered 201 Created"),
        (&http("200 OK", "<html>"), "not the expected answer"),
        (&http("200 OK", ""), "not the expected answer"),
        (huge.as_str(), "more than 4194304 bytes"),
        ("SSH-2.0-x\r\n", "no answer in HTTP"),
        ("", "no answer in HTTP"),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{",
            "no answer in HTTP",
        ),
    ] {
        let error = asked(answer, false).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("e.sock"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_engine_is_given_up() {
    for answer in ["", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"] {
        let error = asked(answer, true).await.unwrap_err();
        assert!(matches!(error, EngineError::TooSlow { .. }), "{error}");
    }
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_told_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("e.sock");
    let address = Address(socket.clone());
    let error = address.ask("/").await.unwrap_err().to_string();
    assert!(error.contains("can the agent see its socket"), "{error}");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let error = address.ask("/").await.unwrap_err().to_string();
    assert!(error.contains("the engine does not run"), "{error}");
}

#[test]
fn an_engines_words_are_cut() {
    assert_eq!(reason(&[b'x'; 5000]).len(), MAX_REASON);
    assert_eq!(reason(b"\xff{\n\t\"a\"  :"), "\u{fffd}{ \"a\" :");
}
