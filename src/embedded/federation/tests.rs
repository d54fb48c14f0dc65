use std::sync::Mutex;

use async_trait::async_trait;

use super::source::Endpoint;
use super::*;
use crate::clock::Clock;
use crate::embedded::resources::Mode;
use crate::embedded::workload_identity::a_cluster;

const FRIEND: &str = "friend.example";
const MINUTE: Duration = Duration::from_mins(1);

/// An endpoint whose answer the test changes; `None` fails.
#[derive(Debug)]
struct Publisher {
    clock: Clock,
    answer: Mutex<Option<String>>,
    asked: Mutex<Vec<(SystemTime, Profile)>>,
}

#[async_trait]
impl Fetch for Publisher {
    async fn fetch(&self, _: Endpoint, profile: Profile) -> Result<String, FetchError> {
        let now = self.clock.now();
        self.asked.lock().unwrap().push((now, profile));
        let answer = self.answer.lock().unwrap().clone();
        answer.ok_or(FetchError::Redirects)
    }
}

struct Lab {
    state: Arc<ClusterState>,
    publisher: Arc<Publisher>,
    _syncer: tokio_util::task::AbortOnDropHandle<()>,
}

impl Lab {
    fn new() -> Self {
        let state = a_cluster();
        let publisher = Arc::new(Publisher {
            clock: state.clock.clone(),
            answer: Mutex::default(),
            asked: Mutex::default(),
        });
        let (running, network) = (Arc::clone(&state), Arc::clone(&publisher));
        let syncer = tokio::spawn(async move {
            let forever = CancellationToken::new();
            run(&running, network as Arc<dyn Fetch>, &forever).await;
        });
        Self {
            state,
            publisher,
            _syncer: tokio_util::task::AbortOnDropHandle::new(syncer),
        }
    }

    fn create(&self, source: &str) {
        let text = format!(
            "kind: spiffe_federation\nversion: v1\nmetadata: {{name: {FRIEND}}}\n\
             spec: {{bundle_source: {source}}}\n"
        );
        let files = [("f".to_owned(), text)];
        self.state.create(&files, Mode::Force, "test").unwrap();
    }

    fn answer(&self, answer: Option<&str>) {
        *self.publisher.answer.lock().unwrap() = answer.map(str::to_owned);
    }

    fn asked(&self) -> usize {
        self.publisher.asked.lock().unwrap().len()
    }

    fn resource(&self) -> Resource {
        self.state.store.get(KIND, FRIEND).unwrap().unwrap()
    }

    fn bundle(&self) -> Value {
        self.resource().status["current_bundle"].clone()
    }

    async fn wait(&self, time: Duration) {
        self.state.clock.sleep(time).await;
    }
}

const WEB: &str = "{https_web: {bundle_endpoint_url: 'https://friend.example/bundle'}}";

#[tokio::test(start_paused = true)]
async fn the_publisher_is_asked_at_its_hint_and_no_faster_when_it_fails() {
    let lab = Lab::new();
    let bundle = r#"{"keys":[],"spiffe_refresh_hint":600}"#;
    lab.answer(Some(bundle));
    lab.create(WEB);
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!((lab.asked(), lab.bundle()), (1, bundle.into()));
    let status = lab.resource().status;
    let now = lab.state.clock.now();
    let next = crate::embedded::instant::parse_rfc3339(status["next_sync_at"].as_str().unwrap());
    let ahead = next.unwrap().duration_since(now).unwrap();
    assert!(ahead <= 10 * MINUTE && ahead > 9 * MINUTE, "{ahead:?}");
    assert_eq!(
        status["current_bundle_synced_from"],
        lab.resource().spec["bundle_source"]
    );

    lab.wait(60 * MINUTE).await;
    assert_eq!(lab.asked(), 7);
    lab.answer(None);
    lab.wait(60 * MINUTE).await;
    assert_eq!(lab.asked(), 13, "failures are no reason to ask more often");
    assert_eq!(lab.bundle(), bundle);
    lab.answer(Some("junk"));
    lab.wait(60 * MINUTE).await;
    assert_eq!((lab.asked(), lab.bundle()), (19, bundle.into()));
    let fresh = r#"{"keys":[]}"#;
    lab.answer(Some(fresh));
    lab.wait(11 * MINUTE).await;
    assert_eq!(lab.bundle(), fresh);
    // Without a hint: every five minutes.
    let before = lab.asked();
    lab.wait(60 * MINUTE).await;
    assert!((11..=12).contains(&(lab.asked() - before)));
}

#[tokio::test(start_paused = true)]
async fn a_first_bundle_is_tried_for_sooner_and_again_when_somebody_writes() {
    let lab = Lab::new();
    lab.create(WEB);
    lab.wait(60 * MINUTE).await;
    let asked = lab.asked();
    assert!((12..40).contains(&asked), "{asked} in an hour");
    assert_eq!(lab.bundle(), Value::Null);
    lab.create(WEB);
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!(lab.asked(), asked + 1);

    lab.answer(Some(r#"{"keys":[]}"#));
    lab.create(WEB);
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!(lab.asked(), asked + 2);
    lab.create(WEB);
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!(lab.asked(), asked + 3, "with a bundle, too");
    assert_eq!(lab.bundle(), r#"{"keys":[]}"#);

    lab.state.store.delete(KIND, FRIEND).unwrap();
    lab.wait(60 * MINUTE).await;
    assert_eq!(lab.asked(), asked + 3);
}

#[test]
fn a_clock_that_is_set_back_puts_nothing_off() {
    let at = SystemTime::UNIX_EPOCH + Duration::from_hours(500_000);
    let failing = Failing {
        revision: String::new(),
        at,
        wait: 5 * MINUTE,
        row: Repeated::default(),
        waits: Backoff::new(FIRST_WAITS.0, FIRST_WAITS.1),
    };
    for now in [at, at + MINUTE, at + 60 * MINUTE] {
        assert_eq!(failing.due(now), at + 5 * MINUTE);
    }
    let back = at - 60 * MINUTE;
    assert_eq!(failing.due(back), back);
}

#[tokio::test(start_paused = true)]
async fn an_older_bundle_replaces_no_newer_one() {
    let lab = Lab::new();
    let numbered = |number: u32, hint: u32| {
        format!(r#"{{"keys":[],"spiffe_sequence":{number},"spiffe_refresh_hint":{hint}}}"#)
    };
    lab.answer(Some(&numbered(7, 60)));
    lab.create(WEB);
    for (answer, expected) in [
        (numbered(6, 61), numbered(7, 60)),
        (numbered(7, 62), numbered(7, 62)),
        (numbered(8, 60), numbered(8, 60)),
        // Who does not number bundles any more has the last word.
        (r#"{"keys":[]}"#.to_owned(), r#"{"keys":[]}"#.to_owned()),
    ] {
        lab.wait(Duration::from_secs(90)).await;
        lab.answer(Some(&answer));
        lab.wait(Duration::from_secs(90)).await;
        assert_eq!(lab.bundle(), expected, "{answer}");
    }
    // Another source has numbers of its own.
    lab.answer(Some(&numbered(8, 60)));
    lab.create(WEB);
    lab.wait(MINUTE).await;
    lab.answer(Some(&numbered(1, 60)));
    lab.create("{https_web: {bundle_endpoint_url: 'https://elsewhere.example/bundle'}}");
    lab.wait(MINUTE).await;
    assert_eq!(lab.bundle(), numbered(1, 60));
}

#[tokio::test(start_paused = true)]
async fn a_static_bundle_is_taken_as_it_is() {
    let lab = Lab::new();
    for bundle in [r#"{"keys":[]}"#, r#"{"keys":[],"spiffe_sequence":1}"#] {
        lab.create(&format!("{{static: {{bundle: '{bundle}'}}}}"));
        lab.wait(60 * MINUTE).await;
        assert_eq!(lab.bundle(), bundle);
        assert_eq!(lab.resource().status.get("next_sync_at"), None);
    }
    assert_eq!(lab.asked(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_newest_bundle_vouches_for_the_endpoint() {
    use crate::identity::fixtures::Authority;
    let lab = Lab::new();
    let authority = |name: &str| {
        let pem = Authority::new(name).pem;
        crate::crypto::pem::certificates(&pem).unwrap().remove(0)
    };
    let document = |ders: &[&Vec<u8>]| {
        use base64::Engine as _;
        let key = |der: &&Vec<u8>| {
            let der = base64::engine::general_purpose::STANDARD.encode(der);
            json!({"use": "x509-svid", "kty": "EC", "x5c": [der]})
        };
        let keys: Vec<Value> = ders.iter().map(key).collect();
        json!({"keys": keys, "spiffe_refresh_hint": 60}).to_string()
    };
    let (first, second) = (authority("first"), authority("second"));
    let source = |domain: &str, initial: &str| {
        format!(
            "{{https_spiffe: {{bundle_endpoint_url: 'https://friend.example/', \
             endpoint_spiffe_id: 'spiffe://{domain}/endpoint'{initial}}}}}"
        )
    };
    let initial = |ders: &[&Vec<u8>]| format!(", initial_bundle: '{}'", document(ders));
    let vouching = || {
        let asked = lab.publisher.asked.lock().unwrap();
        match &asked.last().unwrap().1 {
            Profile::Spiffe { authorities, .. } => authorities.clone(),
            Profile::Web => panic!("by web PKI"),
        }
    };
    lab.answer(Some(&document(&[&first, &second])));
    lab.create(&source(FRIEND, &initial(&[&first])));
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!(vouching(), std::slice::from_ref(&first));
    lab.answer(Some(&document(&[&second])));
    lab.wait(Duration::from_secs(70)).await;
    assert_eq!(vouching(), [first.clone(), second.clone()]);
    lab.wait(Duration::from_secs(70)).await;
    assert_eq!(vouching(), [second]);
    // Begun anew, after the keys were lost sight of.
    lab.create(&source(FRIEND, &initial(&[&first, &first])));
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!(vouching(), [first]);
    // The cluster itself, and somebody of whom nothing is known.
    lab.create(&source(&lab.state.name, ""));
    lab.wait(Duration::from_secs(1)).await;
    let own = lab.state.authorities.trusted_tls(AuthorityType::Spiffe);
    assert_eq!(vouching(), own);
    lab.create(&source("nobody.example", ""));
    lab.wait(Duration::from_secs(1)).await;
    assert_eq!(vouching(), Vec::<Vec<u8>>::new());
}

#[test]
fn agents_see_the_sources_that_the_wire_has() {
    let resource = |source: Value| Resource {
        name: FRIEND.to_owned(),
        spec: json!({"bundle_source": source}),
        status: json!({
            "current_bundle": "{}",
            "current_bundle_synced_at": "2026-01-01T00:00:00Z",
            "current_bundle_synced_from": source,
        }),
        ..Resource::default()
    };
    let url = json!({"bundle_endpoint_url": "https://a/"});
    let web = to_message(&resource(json!({ "https_web": url })));
    let status = web.status.unwrap();
    assert_eq!(status.current_bundle, "{}");
    assert_eq!(
        status.current_bundle_synced_at.unwrap().seconds,
        1_767_225_600
    );
    assert_eq!(status.next_sync_at, None);
    assert_eq!(
        status.current_bundle_synced_from,
        web.spec.unwrap().bundle_source
    );
    let spiffe = to_message(&resource(json!({ "https_spiffe": url })));
    let source = spiffe.spec.unwrap().bundle_source.unwrap();
    assert_eq!((source.r#static, source.https_web), (None, None));
    let fresh = Resource {
        status: Value::Null,
        ..resource(json!({}))
    };
    assert_eq!(to_message(&fresh).status, None);
}
