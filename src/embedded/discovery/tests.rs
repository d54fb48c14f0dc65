//! Rounds of discovery against a stand-in for EKS.

use std::sync::Mutex;
use std::time::SystemTime;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::clock::Clock;
use crate::crypto::Suite;
use crate::embedded::audit::Audit;
use crate::embedded::ca::Authorities;
use crate::embedded::resources::Mode;
use crate::embedded::store::Store;

/// Answers by region and path; what is missing is 404.
type Answers = Arc<Mutex<BTreeMap<(String, String), (u16, Value)>>>;

/// One answer for `request`, whose region is in its signature.
fn answer(answers: &Answers, request: &str) -> String {
    let path = request.split_whitespace().nth(1).unwrap();
    let scope = request.split("Credential=").nth(1).unwrap();
    let region = scope.split('/').nth(2).unwrap();
    let answers = answers.lock().unwrap();
    let found = answers.get(&(region.to_owned(), path.to_owned()));
    let (status, body) = found.cloned().unwrap_or((404, json!({"message": "none"})));
    let body = body.to_string();
    format!(
        "HTTP/1.1 {status} x\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn aws(answers: Answers) -> Target {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut buffer = [0; 4096];
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(count) => asked.extend(&buffer[..count]),
                }
            }
            let answer = answer(&answers, &String::from_utf8(asked).unwrap());
            drop(stream.write_all(answer.as_bytes()).await);
        }
    });
    Target::parse(&url).unwrap()
}

struct Lab {
    state: Arc<ClusterState>,
    answers: Answers,
    discovery: Discovery,
}

const FILE: &str = "\
discovery_service:
  enabled: true
  discovery_group: g
  aws:
  - types: [eks]
    regions: [eu-west-1, us-east-1]
    tags: {env: [prod]}
";

impl Lab {
    async fn new() -> Self {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::simulated(now);
        let store = Store::in_memory(clock.clone()).unwrap();
        let state = Arc::new(ClusterState {
            name: "c".to_owned(),
            public_addr: "c:1".to_owned(),
            clock: clock.clone(),
            audit: Audit::in_memory(clock, "c"),
            authorities: Authorities::open(&store, "c", Suite::BalancedV1, now).unwrap(),
            store,
            sts_endpoint: None,
            env: Env::default(),
        });
        let answers = Answers::default();
        let config = config::parse("f", FILE).unwrap().unwrap();
        let mut discovery = Discovery::new(config, &Env::default()).unwrap();
        discovery.endpoint = Some(aws(Arc::clone(&answers)).await);
        let lab = Self {
            state,
            answers,
            discovery,
        };
        lab.list("eu-west-1", &[]);
        lab.list("us-east-1", &[]);
        lab
    }

    fn set(&self, region: &str, path: &str, status: u16, body: Value) {
        let key = (region.to_owned(), path.to_owned());
        self.answers.lock().unwrap().insert(key, (status, body));
    }

    fn list(&self, region: &str, names: &[&str]) {
        let body = json!({"clusters": names, "nextToken": null});
        self.set(region, "/clusters?maxResults=100", 200, body);
    }

    fn describe(&self, region: &str, name: &str, tags: &Value) {
        let arn = format!("arn:aws:eks:{region}:123456789012:cluster/{name}");
        let cluster = json!({"name": name, "arn": arn, "status": "ACTIVE", "tags": tags});
        let body = json!({"cluster": cluster});
        self.set(region, &format!("/clusters/{name}"), 200, body);
    }

    /// One look, and the names that are there afterwards.
    async fn look(&mut self) -> Vec<String> {
        let mut round = Round::default();
        let credentials = Credentials::new("AKID", "secret", None, None, "test");
        let matcher = self.discovery.config.matchers[0].clone();
        let state = Arc::clone(&self.state);
        self.discovery
            .regions(&state, &matcher, &credentials, &mut round)
            .await;
        self.discovery.write(&state, round).await;
        let known = self.state.store.list(KIND).unwrap();
        known.into_iter().map(|cluster| cluster.name).collect()
    }
}

fn initial(name: &str) -> char {
    name.chars().next().unwrap_or_default()
}

#[tokio::test]
async fn clusters_come_change_and_go() {
    let mut lab = Lab::new().await;
    let prod = json!({"env": "prod"});
    lab.describe("eu-west-1", "a", &prod);
    lab.describe("eu-west-1", "b", &json!({"env": "dev"}));
    lab.describe("us-east-1", "c", &prod);
    lab.list("us-east-1", &["c", "../etc"]);
    // Two pages, whose token needs an escape.
    let first = json!({"clusters": ["a"], "nextToken": "p/2="});
    lab.set("eu-west-1", "/clusters?maxResults=100", 200, first);
    let second = "/clusters?maxResults=100&nextToken=p%2F2%3D";
    lab.set("eu-west-1", second, 200, json!({"clusters": ["b", "gone"]}));
    let (a, b, c) = (
        "a-eks-eu-west-1-123456789012",
        "b-eks-eu-west-1-123456789012",
        "c-eks-us-east-1-123456789012",
    );
    assert_eq!(lab.look().await, [a, c]);
    let revision = |lab: &Lab| lab.state.store.get(KIND, a).unwrap().unwrap().revision;
    let before = revision(&lab);
    assert_eq!(lab.look().await, [a, c]);
    assert_eq!(
        revision(&lab),
        before,
        "nothing changed, nothing is written"
    );

    lab.describe("eu-west-1", "a", &json!({"env": "prod", "team": "x"}));
    lab.describe("eu-west-1", "b", &prod);
    assert_eq!(lab.look().await, [a, b, c]);
    let changed = lab.state.store.get(KIND, a).unwrap().unwrap();
    assert_eq!(changed.labels["team"], "x");

    lab.list("eu-west-1", &["b"]);
    assert_eq!(lab.look().await, [b, c]);
    let told: Vec<String> = lab
        .state
        .audit
        .events()
        .iter()
        .map(|event| {
            let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
            format!("{} {}", text("event"), initial(&text("name")))
        })
        .collect();
    assert_eq!(
        told,
        [
            "kube.create a",
            "kube.create c",
            "kube.update a",
            "kube.create b",
            "kube.delete a"
        ]
    );
}

#[tokio::test]
async fn what_cannot_be_looked_at_stays_and_stops_nothing_else() {
    let mut lab = Lab::new().await;
    let prod = json!({"env": "prod"});
    for (region, name) in [("eu-west-1", "a"), ("eu-west-1", "b"), ("us-east-1", "c")] {
        lab.describe(region, name, &prod);
    }
    lab.list("eu-west-1", &["a", "b"]);
    lab.list("us-east-1", &["c"]);
    assert_eq!(lab.look().await.len(), 3);

    // One region refuses, another has one cluster less and one that cannot be described.
    let listing = "/clusters?maxResults=100";
    let denied = json!({"message": "User is not authorized"});
    lab.set("us-east-1", listing, 403, denied);
    lab.list("eu-west-1", &["b", "d"]);
    lab.set("eu-west-1", "/clusters/b", 500, json!("oops"));
    lab.describe("eu-west-1", "d", &prod);
    let names = lab.look().await;
    let short: String = names.iter().map(|name| initial(name)).collect();
    assert_eq!(short, "bcd");

    for (status, body) in [
        (200, json!({"clusters": "c"})),
        (200, json!([])),
        (404, json!({})),
        (301, json!({})),
        // A list without an end.
        (200, json!({"clusters": [], "nextToken": "again"})),
    ] {
        lab.set("us-east-1", listing, status, body.clone());
        let again = "/clusters?maxResults=100&nextToken=again";
        lab.set("us-east-1", again, status, body);
        assert!(lab.look().await.iter().any(|name| name.starts_with('c')));
    }
    lab.list("us-east-1", &[]);
    assert_eq!(lab.look().await.len(), 2);
    lab.discovery.endpoint = Target::parse("http://127.0.0.1:1");
    assert_eq!(lab.look().await.len(), 2);
}

#[tokio::test]
async fn what_somebody_made_is_never_touched() {
    let mut lab = Lab::new().await;
    let by_hand = "kind: kube_cluster\nversion: v3\nmetadata:\n  name: a-eks-eu-west-1-123456789012\n  \
                   labels: {teleport.dev/origin: cloud, teleport.internal/discovery-group-name: g}\n\
                   spec: {}\nstatus: {discovery: {group: g}}\n";
    let files = [("f".to_owned(), by_hand.to_owned())];
    lab.state.create(&files, Mode::Create, "me").unwrap();
    let before = lab.state.store.list(KIND).unwrap();
    assert_eq!(lab.look().await.len(), 1);
    lab.describe("eu-west-1", "a", &json!({"env": "prod"}));
    lab.list("eu-west-1", &["a"]);
    assert_eq!(lab.look().await.len(), 1);
    assert_eq!(lab.state.store.list(KIND).unwrap(), before);
}

#[test]
fn a_wrong_endpoint_is_told() {
    let config = config::parse("f", FILE).unwrap().unwrap();
    let env = [("AWS_ENDPOINT_URL", "moto:5000")].into_iter().collect();
    let error = Discovery::new(config, &env).unwrap_err().to_string();
    assert!(
        error.starts_with("AWS_ENDPOINT_URL is \"moto:5000\""),
        "{error}"
    );
}
