//! A kubelet that is slow, late and wrong, and many who ask it at once.

use super::*;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const UID: &str = "9b5ee4b7-4b4c-4f52-9bd8-0d6b6f1d3c2a";
const ID: &str = "76f4fe4f06cb3021b649257c1c291f285892c95ac6f3fdb61f9fdee87fbf46ec";

/// Answers each list with the next of its answers, the last one for ever.
struct Server {
    kubernetes: Arc<Kubernetes>,
    asked: Arc<AtomicUsize>,
    port: u16,
}

async fn kubelet(answers: impl IntoIterator<Item = String>, delay: Duration) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let answers = Arc::new(Mutex::new(answers.into_iter().collect::<VecDeque<_>>()));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let answers = Arc::clone(&answers);
            tokio::spawn(async move {
                let mut request = [0; 2048];
                let length = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..length]).to_lowercase();
                assert!(request.starts_with("get /pods http/1.1\r\n"), "{request}");
                assert!(!request.contains("authorization"), "{request}");
                sleep(delay).await;
                let answer = {
                    let mut answers = answers.lock().unwrap();
                    let last = answers.len() == 1;
                    let next = if last {
                        answers.front().cloned()
                    } else {
                        answers.pop_front()
                    };
                    next.unwrap()
                };
                drop(stream.write_all(answer.as_bytes()).await);
            });
        }
    });
    Server {
        kubernetes: Arc::new(attestor(port, Some("127.0.0.1"))),
        asked,
        port,
    }
}

fn attestor(port: u16, node: Option<&str>) -> Kubernetes {
    let source = format!("kubelet: {{read_only_port: {port}}}");
    let node_name = crate::yaml::parse(&source).unwrap();
    let problems = crate::yaml::Problems::new();
    let mut fields = Fields::new(&node_name, "", &problems).unwrap();
    let settings = Settings::parse(fields.section("kubelet")).unwrap();
    let env = node.map(|node| ("TELEPORT_NODE_NAME", node));
    Kubernetes::new(settings, &env.into_iter().collect(), Clock::system())
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn list(pods: &str) -> String {
    http(
        "200 OK",
        &format!(r#"{{"kind": "PodList", "items": [{pods}]}}"#),
    )
}

/// The pod, with this container in it.
fn pod(container: &str) -> String {
    format!(
        r#"{{"metadata": {{"uid": "{UID}", "name": "web", "namespace": "shop"}},
        "spec": {{"serviceAccountName": "sa"}}, "status": {{"containerStatuses":
        [{{"name": "main", "image": "i", "imageID": "i", "containerID": "containerd://{container}"}}]}}}}"#
    )
}

#[tokio::test]
async fn many_callers_cost_one_list() {
    let server = kubelet([list(&pod(ID))], Duration::from_millis(100)).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let kubernetes = Arc::clone(&server.kubernetes);
        callers.spawn(async move { kubernetes.seen(UID, ID).await.unwrap().pod_name });
    }
    for name in callers.join_all().await {
        assert_eq!(name, "web");
    }
    assert_eq!(server.asked.load(Ordering::Relaxed), 1);
    // Another one a moment later does not ask either, but one that misses something does.
    server.kubernetes.seen(UID, ID).await.unwrap();
    assert_eq!(server.asked.load(Ordering::Relaxed), 1);
    let later = server.kubernetes.lists.after(Some(Instant::now())).await;
    assert!(later.is_ok());
    assert_eq!(server.asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn what_comes_late_is_waited_for_by_all_together() {
    let answers = [list(""), list(&pod("other")), list(&pod(ID))];
    let server = kubelet(answers, Duration::ZERO).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let kubernetes = Arc::clone(&server.kubernetes);
        callers.spawn(async move { kubernetes.seen(UID, ID).await.unwrap().container });
    }
    for container in callers.join_all().await {
        assert_eq!(container.unwrap().name, "main");
    }
    assert_eq!(server.asked.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_the_others_their_list() {
    let server = kubelet([list(&pod(ID))], Duration::from_millis(100)).await;
    let hasty = Arc::clone(&server.kubernetes);
    let hasty = tokio::spawn(async move { drop(hasty.seen(UID, ID).await) });
    let asked = Arc::clone(&server.asked);
    while asked.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    let patient = server.kubernetes.seen(UID, ID);
    hasty.abort();
    assert_eq!(patient.await.unwrap().pod_name, "web");
}

#[tokio::test(start_paused = true)]
async fn waiting_ends() {
    for (pods, expected) in [(pod("other"), "web"), (String::new(), "")] {
        let kubernetes = attestor(1, Some("n1"));
        let text = format!(r#"{{"kind": "PodList", "items": [{pods}]}}"#);
        let start = Instant::now();
        let lists = |_seen| async { Ok(Arc::new(list::List::of(&text))) };
        let seen = kubernetes.seen_in(UID, ID, lists).await;
        match (expected, seen) {
            ("", Err(error)) => {
                let error = error.to_string();
                assert!(error.contains("does not know pod"), "{error}");
                assert!(error.contains("TELEPORT_NODE_NAME"), "{error}");
            }
            (name, Ok(found)) => {
                assert_eq!((&*found.pod_name, found.container), (name, None));
            }
            (_, Err(error)) => panic!("{error}"),
        }
        let waited = start.elapsed();
        assert!((27..=30).contains(&waited.as_secs()), "{waited:?}");
    }
}

#[tokio::test]
async fn every_wrong_answer_is_told_and_ends_the_attempt() {
    let truncated =
        "HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{\"kind\": \"PodList\", \"items\": [";
    for (answer, expected) in [
        (
            http("401 Unauthorized", ""),
            "does not accept questions without a token",
        ),
        (
            http("403 Forbidden", "Forbidden (user=x)"),
            "`get` on `nodes/proxy`",
        ),
        (http("500 Internal Server Error", "{}"), "answered 500"),
        (http("302 Found", ""), "answered 302"),
        (http("200 OK", "<html>login</html>"), "sent no list of pods"),
        (
            http("200 OK", r#"{"kind": "Status"}"#),
            "sent no list of pods",
        ),
        (truncated.to_owned(), "127.0.0.1"),
        ("SSH-2.0-x\r\n".to_owned(), "127.0.0.1"),
    ] {
        let server = kubelet([answer], Duration::ZERO).await;
        let error = server
            .kubernetes
            .seen(UID, ID)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(server.asked.load(Ordering::Relaxed), 1, "{error}");
        // The next one a moment later is told the same without another question.
        let again = server
            .kubernetes
            .seen(UID, ID)
            .await
            .unwrap_err()
            .to_string();
        assert_eq!((again, server.asked.load(Ordering::Relaxed)), (error, 1));
    }
}

#[tokio::test]
async fn a_huge_list_is_read_and_an_endless_one_is_not() {
    // Fields that nobody needs, 8 MiB of them.
    let filler = format!(
        r#"{{"metadata": {{"uid": "x", "name": "x", "annotations": {{"a": "{}"}}}}}},"#,
        "y".repeat(64 * 1024)
    );
    let pods = filler.repeat(128) + &pod(ID);
    let server = kubelet([list(&pods)], Duration::ZERO).await;
    assert!(server.kubernetes.seen(UID, ID).await.is_ok());

    let endless = format!(
        "HTTP/1.1 200 OK\r\n\r\n{{\"kind\": \"{}",
        "y".repeat(70 << 20)
    );
    let server = kubelet([endless], Duration::ZERO).await;
    let error = server
        .kubernetes
        .seen(UID, ID)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("more than 64 MiB"), "{error}");
}

#[tokio::test]
async fn a_kubelet_that_is_down_or_unknown_is_told() {
    let server = kubelet([], Duration::ZERO).await;
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    assert_ne!(server.port, closed);
    let down = attestor(closed, Some("127.0.0.1"));
    let error = down.seen(UID, ID).await.unwrap_err().to_string();
    assert!(error.contains("cannot be reached"), "{error}");
    let lost = attestor(closed, None);
    let error = lost.seen(UID, ID).await.unwrap_err().to_string();
    assert!(error.contains("TELEPORT_NODE_NAME is not set"), "{error}");
}
