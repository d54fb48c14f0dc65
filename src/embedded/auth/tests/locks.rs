//! Locks on join tokens, streams that end, and answers that got lost.

use tokio_stream::StreamExt as _;

use super::*;
use crate::embedded::store::Resource;

impl Lab {
    fn lock(&self, name: &str, target: &str) {
        let lock = format!(
            "kind: lock\nversion: v2\nmetadata: {{name: {name}}}\nspec: {{target: {{{target}}}}}\n"
        );
        let files = [("lock.yaml".to_owned(), lock)];
        self.auth
            .state
            .create(&files, Mode::Create, "test")
            .unwrap();
    }

    async fn ask(&self, by: &Certs) -> Result<(), Status> {
        let request = GetCertAuthoritiesRequest {
            r#type: "host".to_owned(),
            include_key: false,
        };
        let request = self.from(Some(by), request);
        self.auth.get_cert_authorities(request).await.map(drop)
    }
}

#[tokio::test]
async fn a_lock_on_a_token_holds_for_what_came_through_it() {
    let lab = lab(Some(sts("123456789012", "200 OK").await));
    let other = "kind: token\nversion: v2\nmetadata: {name: another-and-never-again}\n\
        spec: {roles: [Bot], bot_name: example, join_method: token}\n";
    let files = [("token.yaml".to_owned(), other.to_owned())];
    lab.auth.state.create(&files, Mode::Create, "test").unwrap();
    let by_secret = lab.join("once-and-never-again").await.unwrap();
    let by_other = lab.join("another-and-never-again").await.unwrap();
    let by_iam = lab.iam(None, "example-bot").await.unwrap();
    let output = lab
        .certs(&by_secret, lab.output(&["access"]))
        .await
        .unwrap();
    lab.lock("one", "join_token: once-and-never-again");
    let text = "lock targeting JoinToken:\"once-and-never-again\" is in force";
    for by in [&by_secret, &output] {
        assert_eq!(lab.ask(by).await.unwrap_err().message(), text);
    }
    for request in [lab.renewal(&key()), lab.output(&["access"])] {
        let (code, message) = refused(lab.certs(&by_secret, request).await);
        assert_eq!((code, message.as_str()), (Code::PermissionDenied, text));
    }
    for by in [&by_other, &by_iam] {
        lab.ask(by).await.unwrap();
    }
    lab.lock("two", "join_token: example-bot");
    assert!(lab.ask(&by_iam).await.is_err());
    assert!(lab.iam(None, "example-bot").await.is_err());
    lab.ask(&by_other).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn streams_end_when_their_caller_may_not_call_any_more() {
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let kind = WatchKind {
        kind: "cert_authority".to_owned(),
        ..WatchKind::default()
    };
    let watch = Watch {
        kinds: vec![kind],
        allow_partial_success: false,
    };
    let events = lab.auth.watch_events(lab.from(Some(&own), watch)).await;
    let mut events = events.unwrap().into_inner();
    events.next().await.unwrap().unwrap();
    lab.lock("other", "user: bot-other");
    let begun = lab.clock.now();
    let next = tokio::time::timeout(Duration::from_hours(24), events.next()).await;
    let status = next.unwrap().unwrap().map(drop).unwrap_err();
    assert_eq!(
        status.message(),
        "access denied: the client certificate has expired"
    );
    let waited = lab.clock.now().duration_since(begun).unwrap();
    assert_eq!(waited.as_secs() / 60, 60);
    assert!(events.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_lock_ends_a_stream_at_once() {
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let caller = caller(&lab.from(Some(&own), ())).unwrap();
    let state = &lab.auth.state;
    let endless = tokio_stream::pending::<Result<(), Status>>();
    let mut stream = WhileAllowed::new(state, caller, endless);
    let soon = Duration::from_secs(30);
    assert!(tokio::time::timeout(soon, stream.next()).await.is_err());
    lab.lock("mine", "user: bot-example");
    let next = tokio::time::timeout(soon, stream.next()).await.unwrap();
    let status = next.unwrap().unwrap_err();
    assert_eq!(
        status.message(),
        "lock targeting User:\"bot-example\" is in force"
    );
}

#[tokio::test]
async fn a_repeated_answer_prolongs_the_record() {
    let lab = lab(None);
    let first = lab.join("once-and-never-again").await.unwrap();
    let record = || -> Resource {
        let mut all = lab.auth.state.store.list("bot_instance").unwrap();
        all.pop().unwrap()
    };
    let mut request = lab.renewal(&key());
    lab.certs(&first, request.clone()).await.unwrap();
    let before = record();
    let end = lab.clock.now() + Duration::from_hours(9);
    request.expires = Some(end.into());
    let again = certificate(&lab.certs(&first, request).await.unwrap());
    assert_eq!(again.subject(oid::GENERATION), ["2"]);
    let after = record();
    assert!(after.expires.unwrap() > again.not_after());
    assert_eq!(
        after.status["latest_authentications"],
        before.status["latest_authentications"]
    );
}
