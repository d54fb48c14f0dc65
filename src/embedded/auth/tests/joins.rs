//! Joins that are too many, too large, or too late.

use super::*;
use crate::embedded::auth::attempt::Joins;

const INVITATION: &str = "invitation-of-an-hour";

fn invite(lab: &Lab, name: &str, expires: SystemTime) {
    let expires = crate::embedded::instant::rfc3339(expires);
    let file = format!(
        "kind: token\nversion: v2\nmetadata: {{name: {name}, expires: \"{expires}\"}}\n\
         spec: {{roles: [Bot], bot_name: example, join_method: token}}\n"
    );
    let files = [("token.yaml".to_owned(), file)];
    lab.auth.state.create(&files, Mode::Create, "test").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_token_joins_until_its_expiry_and_not_after() {
    let lab = lab(None);
    let end = lab.clock.now() + Duration::from_hours(1);
    invite(&lab, INVITATION, end);
    invite(&lab, "invitation-in-time", end);
    lab.clock.sleep(Duration::from_secs(3599)).await;
    lab.join("invitation-in-time").await.unwrap();
    lab.clock.sleep(Duration::from_secs(1)).await;
    // It is still there, nobody has swept yet.
    assert_eq!(
        refused(lab.join(INVITATION).await),
        (
            Code::PermissionDenied,
            r#""" can not join the cluster with role "Bot", token expired or not found"#.to_owned()
        )
    );
    assert_eq!(lab.events("bot.join")[1]["code"], "TJ001E");
}

#[tokio::test]
async fn texts_longer_than_any_name_are_refused_and_not_repeated() {
    type Change<'a> = &'a dyn Fn(&mut RegisterUsingTokenRequest);
    let lab = lab(None);
    let long = "x".repeat(257);
    let changes: [(&str, Change<'_>); 3] = [
        ("token", &|request| request.token.clone_from(&long)),
        ("node name", &|request| request.node_name.clone_from(&long)),
        ("role", &|request| request.role.clone_from(&long)),
    ];
    for (what, change) in changes {
        let mut request = lab.join_request("once-and-never-again", &key());
        change(&mut request);
        let answer = lab.auth.register_using_token(lab.from(None, request)).await;
        assert_eq!(
            refused(answer.map(Response::into_inner)),
            (
                Code::InvalidArgument,
                format!("the {what} has more than 256 bytes")
            )
        );
    }
    let events = lab.events("bot.join");
    assert_eq!(events.len(), 3);
    assert!(events.iter().all(|event| event.to_string().len() < 1024));
    let mut request = lab.join_request("once-and-never-again", &key());
    request.public_ssh_key = format!("ssh-ed25519 {}", "A".repeat(16 * 1024)).into_bytes();
    let answer = lab.auth.register_using_token(lab.from(None, request)).await;
    let (_, text) = refused(answer.map(Response::into_inner));
    assert_eq!(text, "a public key has more than 8192 bytes");
}

#[tokio::test]
async fn joins_wait_for_their_turn_and_too_many_are_turned_away() {
    let joins = Joins::default();
    let working = joins.working.try_acquire_many(32).unwrap();
    let mut waiting = std::pin::pin!(joins.turn());
    assert!(poll_once(waiting.as_mut()).await.is_none());
    drop(working);
    assert!(waiting.await.is_ok());
    let _all = joins.known.try_acquire_many(1024).unwrap();
    let refusal = joins.enter().unwrap_err();
    assert_eq!(Status::from(refusal).code(), Code::Unavailable);
}

/// Polls once; the value if there is one.
async fn poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
