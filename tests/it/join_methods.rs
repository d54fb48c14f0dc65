//! Every join method from end to end: an agent proves, a cluster verifies, the bot rejoins, and a
//! stranger is refused. A method that is registered without a case here fails.

use std::any::Any;
use std::path::PathBuf;
use std::process::Output;

use serde_json::Value;
use tbot::config::{self, Overlay, Source};
use tbot::env::Env;

use crate::common::{Cluster, Moto, OutputText as _, Sandbox, repository};
use crate::{join_clouds, join_kubernetes, join_oidc, join_tpm};

/// What a method needs to join, and what is expected of it.
#[derive(Default)]
pub(crate) struct Case {
    /// The members of the token's `spec` beside the bot and the method, as a YAML mapping of one line;
    /// `None` for a method whose token is a secret.
    pub(crate) spec: Option<String>,
    /// The same with rules that let somebody else in.
    pub(crate) elsewhere: Option<String>,
    /// More members of the agent's `onboarding`, as `, key: value`.
    pub(crate) onboarding: String,
    /// Environment of the agent.
    pub(crate) agent: Vec<(String, String)>,
    /// Environment of the cluster.
    pub(crate) cluster: Vec<(String, String)>,
    /// Arguments of the cluster.
    pub(crate) arguments: Vec<String>,
    /// The hosts file of the cluster; the agent's too, where it asks the same hosts.
    pub(crate) hosts: Option<PathBuf>,
    /// Whether the agent needs those hosts.
    pub(crate) agent_asks: bool,
    /// More authorities that the agent believes (PEM files).
    pub(crate) authorities: Vec<PathBuf>,
    /// A join attribute: where it is below `join`, and what it has to be.
    pub(crate) attribute: Option<(&'static str, &'static str)>,
    /// What has to live as long as the case.
    pub(crate) keep: Vec<Box<dyn Any + Send>>,
}

/// Prepares a case in a sandbox.
type Prepare = fn(&Sandbox) -> Case;

/// A case for every method.
const CASES: &[(&str, Prepare)] = &[
    ("azure", join_clouds::azure),
    ("azure_devops", |sandbox| {
        join_oidc::prepare("azure_devops", sandbox)
    }),
    ("bitbucket", |sandbox| {
        join_oidc::prepare("bitbucket", sandbox)
    }),
    ("bound_keypair", bound_keypair),
    ("circleci", |sandbox| {
        join_oidc::prepare("circleci", sandbox)
    }),
    ("env0", |sandbox| join_oidc::prepare("env0", sandbox)),
    ("gcp", join_clouds::gcp),
    ("generic_oidc", |sandbox| {
        join_oidc::prepare("generic_oidc", sandbox)
    }),
    ("github", |sandbox| join_oidc::prepare("github", sandbox)),
    ("gitlab", |sandbox| join_oidc::prepare("gitlab", sandbox)),
    ("iam", iam),
    ("kubernetes", join_kubernetes::kubernetes),
    ("oracle", join_clouds::oracle),
    ("spacelift", |sandbox| {
        join_oidc::prepare("spacelift", sandbox)
    }),
    ("terraform_cloud", |sandbox| {
        join_oidc::prepare("terraform_cloud", sandbox)
    }),
    ("token", |_| Case::default()),
    ("tpm", join_tpm::case),
];

fn bound_keypair(_sandbox: &Sandbox) -> Case {
    Case {
        spec: Some("{bound_keypair: {onboarding: {registration_secret: s3cret}}}".to_owned()),
        onboarding: ", bound_keypair: {registration_secret: s3cret}".to_owned(),
        attribute: Some(("/bound_keypair/recovery_mode", "standard")),
        ..Case::default()
    }
}

fn iam(sandbox: &Sandbox) -> Case {
    let moto = Moto::start(sandbox, "teleport-bot-role", "i-0abc123")
        .expect("the Python environment: make setup");
    let environment = moto
        .environment()
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let rule = |account: &str| {
        let arn = format!("arn:aws:sts::{account}:assumed-role/teleport-bot-role/i-*");
        Some(format!(
            "{{allow: [{{aws_account: '{account}', aws_arn: '{arn}'}}]}}"
        ))
    };
    Case {
        spec: rule(Moto::ACCOUNT),
        elsewhere: rule("999999999999"),
        agent: environment.to_vec(),
        arguments: vec!["--sts-endpoint".to_owned(), moto.url()],
        attribute: Some(("/iam/account", Moto::ACCOUNT)),
        keep: vec![Box::new(moto)],
        ..Case::default()
    }
}

/// The bot, and a token of the case for it.
pub(crate) fn resources(method: &str, spec: Option<&str>) -> String {
    let bot = "kind: bot\nversion: v1\nmetadata: {name: example}\nspec: {roles: []}\n";
    let Some(spec) = spec else {
        return bot.to_owned();
    };
    let members = spec
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'));
    let members = members.expect("a mapping").trim();
    let members = if members.is_empty() {
        String::new()
    } else {
        format!(", {members}")
    };
    format!(
        "{bot}---\nkind: token\nversion: v2\nmetadata: {{name: example-{method}}}\nspec: {{roles: [Bot], \
         bot_name: example, join_method: {method}{members}}}\n"
    )
}

/// A running cluster, and an agent for a case.
pub(crate) struct Lab<'a> {
    pub(crate) sandbox: &'a Sandbox,
    pub(crate) cluster: Cluster<'a>,
    pub(crate) method: &'a str,
    token: String,
}

impl<'a> Lab<'a> {
    pub(crate) fn start(sandbox: &'a Sandbox, method: &'a str, case: &Case) -> Self {
        let arguments: Vec<&str> = case.arguments.iter().map(String::as_str).collect();
        let hosts = case.hosts.clone().unwrap_or_else(|| "/etc/hosts".into());
        let resources = resources(method, case.spec.as_deref());
        let cluster = Cluster::start_among(sandbox, &resources, hosts, &case.cluster, &arguments);
        let token = match case.spec {
            Some(_) => format!("example-{method}"),
            None => cluster.invite("example", "10m"),
        };
        Self {
            sandbox,
            cluster,
            method,
            token,
        }
    }

    /// One run of the agent, with its storage in `storage`.
    pub(crate) fn run(&self, case: &Case, storage: &str) -> Output {
        let config = format!(
            "version: v2\nproxy_server: {}\nonboarding: {{join_method: {}, token: {}{}}}\n\
             storage: {{type: directory, path: {}}}\noneshot: true\nservices:\n\
             - {{type: identity, destination: {{type: directory, path: {}}}}}\n",
            self.cluster.proxy(),
            self.method,
            self.token,
            case.onboarding,
            self.sandbox.path(storage).display(),
            self.sandbox.path("out").display(),
        );
        let config = self.sandbox.write("tbot.yaml", config);
        let mut believed = std::fs::read_to_string(self.cluster.web_authority()).unwrap();
        for authority in &case.authorities {
            believed += &std::fs::read_to_string(authority).unwrap();
        }
        let believed = self.sandbox.write("believed.pem", believed);
        let mut command = match &case.hosts {
            Some(hosts) if case.agent_asks => self.sandbox.tbot_among(hosts),
            _ => self.sandbox.tbot([""; 0]),
        };
        command
            .args(["start", "-c"])
            .arg(config)
            .env("SSL_CERT_FILE", believed)
            .envs(case.agent.iter().cloned());
        command.output().unwrap()
    }

    /// The last join in the audit log.
    pub(crate) fn last_join(&self) -> Value {
        self.cluster.events("bot.join").pop().expect("a join")
    }

    /// The records of the bot's instances.
    fn instances(&self) -> Vec<Value> {
        let text = self
            .cluster
            .run(&["get", "bot_instance", "--format", "json"]);
        let listed: Value = serde_json::from_str(&text).expect("JSON");
        listed.as_array().cloned().unwrap_or_else(|| vec![listed])
    }
}

fn end_to_end(method: &str, prepare: Prepare) {
    let sandbox = Sandbox::new();
    let mut case = prepare(&sandbox);
    let _kept = std::mem::take(&mut case.keep);
    let lab = Lab::start(&sandbox, method, &case);

    lab.run(&case, "storage").success();
    let joined = lab.last_join();
    assert_eq!(joined["success"], true, "{method}: {joined}");
    assert_eq!(joined["method"], method, "{joined}");
    assert_eq!(joined["bot_name"], "example", "{joined}");
    assert!(sandbox.path("out/identity").exists());

    // With what it stored it is the same bot instance; without, another.
    lab.run(&case, "storage").success();
    assert_eq!(lab.instances().len(), 1, "{method}");
    if let Some((at, expected)) = case.attribute {
        let instance = lab.instances().remove(0);
        let latest = &instance["status"]["latest_authentications"];
        let last = latest
            .as_array()
            .and_then(|all| all.last())
            .expect("an authentication");
        let attribute = last["join_attrs"].pointer(at);
        assert_eq!(
            attribute.and_then(Value::as_str),
            Some(expected),
            "{method}: {last}"
        );
    }
    let Some(elsewhere) = &case.elsewhere else {
        return;
    };
    lab.run(&case, "another").success();
    assert_eq!(lab.instances().len(), 2, "{method}");

    lab.cluster.create(&resources(method, Some(elsewhere)));
    let refused = lab.run(&case, "stranger");
    assert_eq!(refused.status.code(), Some(1), "{method}: {refused:?}");
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        told.contains("did not match any allow rules"),
        "{method}: {told}"
    );
    assert!(
        told.contains("check that onboarding.token names"),
        "{method}: {told}"
    );
    let audited = lab.last_join();
    assert_eq!(audited["success"], false, "{method}: {audited}");
}

#[test]
fn every_registered_method_joins_rejoins_and_is_refused() {
    let registered: Vec<_> = tbot::join::METHODS
        .iter()
        .map(|method| method.name())
        .collect();
    let cases: Vec<_> = CASES.iter().map(|(name, _)| *name).collect();
    assert_eq!(registered, cases, "every method has a case in {}", file!());
    // Two at a time: each starts several processes.
    for pair in CASES.chunks(2) {
        std::thread::scope(|scope| {
            for (name, prepare) in pair {
                scope.spawn(move || end_to_end(name, *prepare));
            }
        });
    }
}

/// `TBOT_UPDATE_GOLDEN=1` writes what is missing or has changed; the difference is then reviewed.
#[test]
fn the_configuration_on_every_methods_page_is_read_as_its_golden_form() {
    let update = std::env::var_os("TBOT_UPDATE_GOLDEN").is_some();
    for method in tbot::join::METHODS {
        let name = method.name();
        let page = repository().join(format!("docs/reference/join/{name}.md"));
        let text = std::fs::read_to_string(&page).unwrap();
        let (_, fence) = text.split_once("```yaml\n").expect("a configuration");
        let (yaml, _) = fence.split_once("```").expect("a closed fence");
        assert!(
            yaml.contains(&format!("join_method: {name}\n")),
            "{}",
            page.display()
        );
        let source = Source {
            name: page.display().to_string(),
            text: yaml.to_owned(),
        };
        let loaded = config::load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
        let written = loaded.plan.to_yaml();
        let golden = repository().join(format!("tests/golden/join/{name}.yaml"));
        if update {
            std::fs::write(&golden, &written).unwrap();
        }
        let expected = std::fs::read_to_string(&golden)
            .unwrap_or_else(|error| panic!("{}: {error}: TBOT_UPDATE_GOLDEN=1", golden.display()));
        assert_eq!(written, expected, "{}", golden.display());
        let section = method.section().map(|section| format!("  {section}:\n"));
        if let Some(section) = section.filter(|section| yaml.contains(section)) {
            assert!(
                written.contains(&section),
                "{name} loses its section: {written}"
            );
        }
        let again = Source {
            name: golden.display().to_string(),
            text: written.clone(),
        };
        let again = config::load(Some(&again), &Overlay::default(), &Env::default()).unwrap();
        assert_eq!(again.plan.to_yaml(), written, "{name}");
    }
}
