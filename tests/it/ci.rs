//! One step of a CI job: what it leaves behind, what it says; and the pipelines of `examples/ci`.

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use tbot::yaml::{Value, parse};

use crate::common::{Cluster, Oidc, OutputText as _, Sandbox, repository};
use crate::join_methods::resources;
use crate::join_oidc::{github_claims, github_environment};

/// Every text of a YAML value.
fn texts(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Null => {}
        Value::Scalar { text, .. } => found.push(text.clone()),
        Value::Sequence(items) => items.iter().for_each(|item| texts(&item.value, found)),
        Value::Mapping(entries) => entries
            .iter()
            .for_each(|(_, node)| texts(&node.value, found)),
    }
}

/// The words of the one `tbot start` in a pipeline.
fn command(pipeline: &str) -> Vec<String> {
    let mut found = Vec::new();
    texts(&parse(pipeline).unwrap().value, &mut found);
    let mut commands = found.iter().flat_map(|text| {
        let joined = text.replace("\\\n", " ");
        joined.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    let starts = |line: &String| line.trim_start().starts_with("tbot start ");
    let line = commands.find(starts).expect("a line with tbot start");
    assert!(!commands.any(|line| starts(&line)), "several");
    assert!(
        !line.contains(['"', '\'', '$']),
        "words that a shell changes: {line}"
    );
    line.split_whitespace().skip(1).map(str::to_owned).collect()
}

#[test]
fn the_program_takes_the_command_of_every_pipeline() {
    let directory = repository().join("examples/ci");
    let readme = fs::read_to_string(directory.join("README.md")).unwrap();
    let tokens = fs::read_to_string(directory.join("tokens.yaml")).unwrap();
    let mut methods = Vec::new();
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(
            readme.contains(&format!("({name})")),
            "{name} is not in the README"
        );
        let mut words = command(&fs::read_to_string(&path).unwrap());
        assert!(words.contains(&"--oneshot".to_owned()), "{name}: {words:?}");
        "configure".clone_into(&mut words[0]);
        let sandbox = Sandbox::new();
        let configured = sandbox.tbot(&words).output().unwrap().success();
        assert!(configured.contains("oneshot: true"), "{name}: {configured}");
        assert!(configured.contains("type: memory"), "{name}: {configured}");
        let value = |flag: &str| {
            let at = words.iter().position(|word| word == flag).unwrap();
            words[at + 1].clone()
        };
        let (method, token) = (value("--join-method"), value("--token"));
        assert!(
            tokens.contains(&format!("  name: {token}\n")),
            "{name}: no token {token}"
        );
        assert!(
            tokens.contains(&format!("  join_method: {method}\n")),
            "{name}: {method}"
        );
        methods.push(method);
    }
    methods.sort_unstable();
    assert_eq!(
        methods,
        ["azure_devops", "bitbucket", "circleci", "github", "gitlab"]
    );
}

/// A job of GitHub Actions: its environment, and a directory that is its workspace.
struct Runner<'a> {
    sandbox: &'a Sandbox,
    oidc: Oidc,
    cluster: Cluster<'a>,
}

impl<'a> Runner<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let oidc = Oidc::start(sandbox, &["github.example.org"]);
        let spec = "{github: {enterprise_server_host: github.example.org, allow: [{repository: octo-org/octo-repo}]}}";
        let environment = [(
            "SSL_CERT_FILE".to_owned(),
            oidc.authority().display().to_string(),
        )];
        let resources = resources("github", Some(spec));
        let cluster = Cluster::start_among(sandbox, &resources, oidc.hosts(), &environment, &[]);
        let token = oidc
            .key
            .sign(&github_claims("https://github.example.org/_services/token"));
        oidc.hand_out(200, json!({"value": token}).to_string());
        let runner = Self {
            sandbox,
            oidc,
            cluster,
        };
        let believed = [
            runner.cluster.web_authority(),
            runner.oidc.authority().to_owned(),
        ];
        let believed: String = believed
            .iter()
            .map(|path| fs::read_to_string(path).unwrap())
            .collect();
        sandbox.write("believed.pem", believed);
        for file in ["output", "env", "summary", "path"] {
            sandbox.write(&format!("runner/{file}"), "");
        }
        sandbox.write("work/README.md", "a checkout");
        runner
    }

    /// `tbot start identity --oneshot` as a step of the job; exit code and log.
    fn step(&self, more: &[(&str, &str)], without: &[&str]) -> (Option<i32>, String) {
        let proxy = self.cluster.proxy();
        let mut command = self.sandbox.tbot([
            "--debug",
            "start",
            "identity",
            "--oneshot",
            "--proxy-server",
            &proxy,
            "--join-method",
            "github",
            "--token",
            "example-github",
            "--storage",
            "memory://",
            "--destination",
            "./identity",
        ]);
        command
            .current_dir(self.sandbox.path("work"))
            .env("SSL_CERT_FILE", self.sandbox.path("believed.pem"))
            .env("CI", "true")
            .env("GITHUB_ACTIONS", "true")
            .env("GITHUB_OUTPUT", self.sandbox.path("runner/output"))
            .env("GITHUB_ENV", self.sandbox.path("runner/env"))
            .env("GITHUB_STEP_SUMMARY", self.sandbox.path("runner/summary"))
            .env("GITHUB_PATH", self.sandbox.path("runner/path"))
            .envs(github_environment(&self.oidc))
            .envs(more.iter().copied());
        for name in without {
            command.env_remove(name);
        }
        let output = command.output().unwrap();
        let log = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&log).into_owned(),
        )
    }
}

fn everything_below(directory: &PathBuf) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(everything_below(&path));
        } else {
            found.push(path.display().to_string());
        }
    }
    found.sort();
    found
}

#[test]
fn a_job_of_github_actions_gets_an_identity_in_one_step_and_leaves_nothing_else() {
    let sandbox = Sandbox::new();
    let runner = Runner::new(&sandbox);
    let before = everything_below(&sandbox.path("work"));
    let (code, log) = runner.step(&[], &[]);
    assert_eq!(code, Some(0), "{log}");
    assert!(sandbox.path("work/identity/identity").exists());
    let added: Vec<_> = everything_below(&sandbox.path("work"))
        .into_iter()
        .filter(|path| !before.contains(path) && !path.contains("/work/identity/"))
        .collect();
    assert!(added.is_empty(), "{added:?}");
    for file in everything_below(&sandbox.path("runner")) {
        assert_eq!(fs::read(&file).unwrap(), b"", "{file}");
    }
    // Asked once, as GitHub documents it.
    let asked = runner.oidc.questions();
    let line = "GET /token?api-version=2.0&audience=teleport.cluster.local HTTP/1.1";
    assert_eq!(
        asked,
        [(line.to_owned(), "Bearer hunter2-request-token".to_owned())]
    );
    assert!(
        log.contains("repo:octo-org/octo-repo:environment:prod"),
        "{log}"
    );
    assert!(!log.contains("hunter2") && !log.contains("eyJ"), "{log}");
}

#[test]
fn a_job_that_cannot_have_a_token_is_told_why() {
    let sandbox = Sandbox::new();
    let runner = Runner::new(&sandbox);
    let names = [
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    ];
    for name in names {
        let (code, log) = runner.step(&[], &[name]);
        assert_eq!(code, Some(1), "{log}");
        assert!(
            !log.contains("retry_in"),
            "it is not worth waiting for: {log}"
        );
        assert!(
            log.contains(name) && log.contains("id-token: write"),
            "{log}"
        );
    }
    let token = "eyJ-not-for-logs";
    for (status, answer, complaint) in [
        (401, json!({"message": token}), "it answered 401"),
        (302, json!({"value": token}), "redirects are not followed"),
        (200, json!({"value": ""}), "its answer has no \"value\""),
        (200, json!([token]), "its answer has no \"value\""),
        (
            200,
            json!({"value": "x".repeat(200_000)}),
            "more than 131072 bytes",
        ),
    ] {
        runner.oidc.hand_out(status, answer.to_string());
        let (code, log) = runner.step(&[], &[]);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(complaint), "{complaint}: {log}");
        assert!(!log.contains(token) && !log.contains("hunter2"), "{log}");
    }
    let (code, log) = runner.step(&[("ACTIONS_ID_TOKEN_REQUEST_URL", "ftp://x")], &[]);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("neither https nor http"), "{log}");
}

#[test]
fn a_join_uri_says_it_all_in_one_line() {
    for (uri, expected) in [
        ("tbot+proxy+github://ci@h:443", "join_method: github\n"),
        (
            "tbot+proxy+gitlab://ci:MY_TOKEN@h:443",
            "gitlab:\n    token_env_var_name: MY_TOKEN\n",
        ),
        (
            "tbot+proxy+terraform-cloud://ci:tag@h:443",
            "terraform:\n    audience_tag: tag\n",
        ),
        (
            "tbot+auth+azuredevops://ci@h:3025",
            "join_method: azure_devops\n",
        ),
        (
            "tbot+proxy+generic-oidc://ci@h:443",
            "join_method: generic_oidc\n",
        ),
    ] {
        let sandbox = Sandbox::new();
        let words = [
            "configure",
            "identity",
            "--destination",
            "./identity",
            "--join-uri",
            uri,
        ];
        let configured = sandbox.tbot(words).output().unwrap().success();
        assert!(configured.contains(expected), "{uri}: {configured}");
    }
    let sandbox = Sandbox::new();
    let uri = "tbot+proxy+circleci://ci:x@h:443";
    let words = [
        "configure",
        "identity",
        "--destination",
        "./identity",
        "--join-uri",
        uri,
    ];
    let output = sandbox.tbot(words).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
