use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::super::tests::{NOW, Signer, claims};
use super::*;

const URL: &str = "https://issuer.example.com";
const SECOND: Duration = Duration::from_secs(1);

/// Answers by URL; counts what it is asked.
#[derive(Debug, Default)]
struct Web {
    answers: Mutex<HashMap<String, Result<Vec<u8>, FetchError>>>,
    asked: AtomicUsize,
    slow: bool,
}

#[async_trait]
impl Fetch for Web {
    async fn get(&self, _issuer: &Issuer, url: &str, _most: usize) -> Result<Vec<u8>, FetchError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.slow {
            tokio::time::sleep(Duration::from_mins(1)).await;
        }
        tokio::task::yield_now().await;
        let status = 404;
        let url = url.to_owned();
        let known = self.answers.lock().unwrap().get(&url).cloned();
        known.unwrap_or(Err(FetchError::Status { url, status }))
    }
}

impl Web {
    fn answer(&self, url: &str, answer: &Value) {
        let answer = Ok(answer.to_string().into_bytes());
        self.answers.lock().unwrap().insert(url.to_owned(), answer);
    }

    fn publish(&self, keys: &Value) {
        self.answer(
            &format!("{URL}/.well-known/openid-configuration"),
            &json!({"issuer": URL, "jwks_uri": "https://issuer.example.com/jwks"}),
        );
        self.answer("https://issuer.example.com/jwks", keys);
    }

    fn break_down(&self) {
        self.answers.lock().unwrap().clear();
    }

    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

struct Lab {
    web: Arc<Web>,
    issuers: Issuers,
}

impl Lab {
    fn new() -> Self {
        Self::with(Web::default())
    }

    fn with(web: Web) -> Self {
        let web = Arc::new(web);
        let fetch: Arc<dyn Fetch> = Arc::clone(&web) as _;
        Self {
            web,
            issuers: Issuers::new(fetch),
        }
    }

    /// Verifies a token of `signer`, `at` seconds from the beginning.
    async fn check(&self, signer: &Signer, at: u32) -> Result<(), OidcError> {
        let mut claims = claims(URL, &json!("us"));
        claims["exp"] = json!(at + 300);
        claims["nbf"] = json!(0);
        claims["iat"] = json!(0);
        let expected = Expected {
            issuer: Some(URL),
            audience: "us",
            authorized_party: true,
        };
        let (token, issuer) = (signer.token(&claims), Issuer::web(URL));
        let now = NOW + at * SECOND;
        let checked = self.issuers.verify(&issuer, &token, &expected, now);
        checked.await.map(|_| ())
    }
}

#[tokio::test]
async fn keys_are_asked_for_once_an_hour() {
    let (lab, signer) = (Lab::new(), Signer::new("a"));
    lab.web.publish(&signer.set());
    lab.check(&signer, 100).await.unwrap();
    assert_eq!(lab.web.asked(), 2);
    lab.check(&signer, 3000).await.unwrap();
    assert_eq!(lab.web.asked(), 0);
    lab.check(&signer, 4000).await.unwrap();
    assert_eq!(lab.web.asked(), 2);
}

#[tokio::test]
async fn a_new_key_is_asked_for_but_not_by_every_token() {
    let (lab, old, new) = (Lab::new(), Signer::new("a"), Signer::new("b"));
    lab.web.publish(&old.set());
    lab.check(&old, 100).await.unwrap();
    lab.web.publish(&new.set());
    // Too soon after the last question.
    let unknown = lab.check(&new, 105).await.unwrap_err();
    assert!(
        matches!(unknown, OidcError::Keys(KeysError::Unknown(_))),
        "{unknown}"
    );
    assert_eq!(lab.web.asked(), 2);
    lab.check(&new, 120).await.unwrap();
    assert_eq!(lab.web.asked(), 2);
    let gone = lab.check(&old, 121).await.unwrap_err();
    assert!(
        matches!(gone, OidcError::Keys(KeysError::Unknown(_))),
        "{gone}"
    );
    assert_eq!(lab.web.asked(), 0);
}

#[tokio::test]
async fn an_issuer_that_is_away_does_not_stop_those_whose_key_is_known() {
    let (lab, signer) = (Lab::new(), Signer::new("a"));
    lab.web.publish(&signer.set());
    lab.check(&signer, 100).await.unwrap();
    lab.web.break_down();
    lab.web.asked();
    let hours = |count: u32| 100 + count * 3600;
    lab.check(&signer, hours(2)).await.unwrap();
    assert_eq!(lab.web.asked(), 1);
    lab.check(&signer, hours(2) + 1).await.unwrap();
    assert_eq!(lab.web.asked(), 0);
    lab.check(&signer, hours(23)).await.unwrap();
    let away = lab.check(&signer, hours(25)).await.unwrap_err();
    assert!(
        matches!(away, OidcError::Fetch(FetchError::Status { .. })),
        "{away}"
    );
    lab.web.publish(&signer.set());
    lab.web.asked();
    lab.check(&signer, hours(25) + 5).await.unwrap_err();
    assert_eq!(lab.web.asked(), 0);
    lab.check(&signer, hours(25) + 20).await.unwrap();
}

#[tokio::test]
async fn many_at_once_ask_once() {
    let (lab, signer) = (Lab::new(), Signer::new("a"));
    lab.web.publish(&signer.set());
    let all = (0..50).map(|_| lab.check(&signer, 100));
    let done = futures_util::future::join_all(all).await;
    assert!(done.iter().all(Result::is_ok));
    assert_eq!(lab.web.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn whoever_asked_may_go_while_others_wait() {
    let (lab, signer) = (Lab::new(), Signer::new("a"));
    lab.web.publish(&signer.set());
    let mut waiting: VecDeque<_> = (0..2).map(|_| Box::pin(lab.check(&signer, 100))).collect();
    for check in &mut waiting {
        assert!(futures_util::poll!(check).is_pending());
    }
    waiting.pop_front();
    waiting.pop_front().unwrap().await.unwrap();
    assert_eq!(lab.web.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_slow_issuer_is_given_up() {
    let web = Web {
        slow: true,
        ..Web::default()
    };
    let (lab, signer) = (Lab::with(web), Signer::new("a"));
    let began = tokio::time::Instant::now();
    let slow = lab.check(&signer, 100).await.unwrap_err();
    assert!(
        matches!(slow, OidcError::Fetch(FetchError::Timeout(_))),
        "{slow}"
    );
    assert_eq!(began.elapsed(), TIMEOUT);
}

#[tokio::test]
async fn what_the_token_itself_lacks_costs_no_question() {
    let (lab, signer) = (Lab::new(), Signer::new("a"));
    let expected = Expected {
        issuer: Some("https://other.example.com"),
        audience: "us",
        authorized_party: true,
    };
    let (token, issuer) = (signer.token(&claims(URL, &json!("us"))), Issuer::web(URL));
    let checked = lab.issuers.verify(&issuer, &token, &expected, NOW);
    assert!(matches!(checked.await, Err(OidcError::Issuer { .. })));
    assert_eq!(lab.web.asked(), 0);
}

#[tokio::test]
async fn documents_of_others_are_refused() {
    let discovery = format!("{URL}/.well-known/openid-configuration");
    let signer = Signer::new("a");
    for (document, complaint) in [
        (
            json!({"issuer": "https://evil.example.com", "jwks_uri": "https://issuer.example.com/jwks"}),
            "is for the issuer",
        ),
        (json!({"issuer": URL}), "no OpenID discovery document"),
        (json!([]), "no OpenID discovery document"),
        (
            json!({"issuer": URL, "jwks_uri": "https://x/none"}),
            "answered 404",
        ),
        (
            json!({"issuer": URL, "jwks_uri": discovery}),
            "no JSON Web Key Set",
        ),
    ] {
        let lab = Lab::new();
        lab.web.answer(&discovery, &document);
        let problem = lab.check(&signer, 100).await.unwrap_err().to_string();
        assert!(problem.contains(complaint), "{document}: {problem}");
    }
    assert!(
        FetchError::Status {
            url: String::new(),
            status: 302
        }
        .to_string()
        .contains("not followed")
    );
}
