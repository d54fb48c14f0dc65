//! Jobs of CI systems that join with their ID token: as each provider documents its tokens, and
//! everything that is refused.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{Cluster, Key, Mood, Oidc, Sandbox, time, unsigned};
use crate::join_methods::{Case, Lab, resources};

/// A token of the issuer with the claims of every ID token, and more.
fn claims(issuer: &str, audience: &str, subject: &str, more: Value) -> Value {
    let mut claims = json!({
        "iss": issuer, "aud": audience, "sub": subject, "jti": format!("{:x?}", tbot::crypto::random::<8>()),
        "iat": time(-5), "nbf": time(-5), "exp": time(300),
    });
    let Value::Object(more) = more else {
        panic!("claims are an object");
    };
    claims.as_object_mut().unwrap().extend(more);
    claims
}

fn case(oidc: Oidc, agent: &[(&str, String)], spec: String, elsewhere: String) -> Case {
    let variables = agent
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()));
    Case {
        spec: Some(spec),
        elsewhere: Some(elsewhere),
        agent: variables.collect(),
        cluster: vec![(
            "SSL_CERT_FILE".to_owned(),
            oidc.authority().display().to_string(),
        )],
        hosts: Some(oidc.hosts()),
        authorities: vec![oidc.authority().to_owned()],
        keep: vec![Box::new(oidc)],
        ..Case::default()
    }
}

/// Claims of a job of GitHub Actions (GitHub's documentation of OpenID Connect).
fn github_claims(issuer: &str) -> Value {
    let more = json!({
        "ref": "refs/heads/main", "sha": "2f1a", "repository": "octo-org/octo-repo",
        "repository_id": "74", "repository_owner": "octo-org", "repository_owner_id": "65",
        "run_id": "5902", "run_number": "10", "run_attempt": "2", "repository_visibility": "private",
        "actor": "octocat", "actor_id": "12", "workflow": "deploy", "head_ref": "", "base_ref": "",
        "event_name": "push", "ref_type": "branch", "environment": "prod",
        "job_workflow_ref": "octo-org/octo-repo/.github/workflows/deploy.yml@refs/heads/main",
    });
    let subject = "repo:octo-org/octo-repo:environment:prod";
    claims(issuer, "teleport.cluster.local", subject, more)
}

fn github_environment(oidc: &Oidc) -> [(&'static str, String); 2] {
    [
        (
            "ACTIONS_ID_TOKEN_REQUEST_URL",
            oidc.url("/token?api-version=2.0"),
        ),
        (
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
            "hunter2-request-token".to_owned(),
        ),
    ]
}

/// A server of GitHub Enterprise, and its service for tokens.
pub(crate) fn github(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["github.example.org"]);
    let token = oidc
        .key
        .sign(&github_claims("https://github.example.org/_services/token"));
    oidc.hand_out(200, json!({"count": 1, "value": token}).to_string());
    let spec = |rule: &str| {
        format!("{{github: {{enterprise_server_host: github.example.org, allow: [{{{rule}}}]}}}}")
    };
    let agent = github_environment(&oidc);
    let rule = "repository: octo-org/*, ref: refs/heads/main, environment: prod, ref_type: branch";
    Case {
        attribute: Some(("/github/repository", "octo-org/octo-repo")),
        ..case(
            oidc,
            &agent,
            spec(rule),
            spec("repository: octo-org/octo-repo, environment: test"),
        )
    }
}

/// Claims of a job of GitLab CI (GitLab's documentation of ID tokens).
fn gitlab_claims(issuer: &str, audience: &str) -> Value {
    let more = json!({
        "namespace_id": "72", "namespace_path": "my-group", "project_id": "20",
        "project_path": "my-group/my-project", "user_id": "1", "user_login": "sample-user",
        "user_email": "sample-user@example.com", "user_identities": [], "pipeline_id": "574",
        "pipeline_source": "push", "job_id": "302", "ref": "feature-branch-1", "ref_type": "branch",
        "ref_path": "refs/heads/feature-branch-1", "ref_protected": "false",
        "environment": "test-environment2", "environment_protected": "false",
        "deployment_tier": "testing", "environment_action": "start", "runner_id": 1,
        "runner_environment": "self-hosted", "sha": "714a", "project_visibility": "public",
        "ci_config_ref_uri": "gitlab.example.org/my-group/my-project//.gitlab-ci.yml@refs/heads/main",
        "ci_config_sha": "714a",
    });
    let subject = "project_path:my-group/my-project:ref_type:branch:ref:feature-branch-1";
    claims(issuer, audience, subject, more)
}

pub(crate) fn gitlab(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["gitlab.example.org"]);
    let token = oidc
        .key
        .sign(&gitlab_claims("https://gitlab.example.org", Cluster::NAME));
    let spec =
        |rule: &str| format!("{{gitlab: {{domain: gitlab.example.org, allow: [{{{rule}}}]}}}}");
    let rule =
        "project_path: my-group/*, ref: feature-*, ref_protected: false, user_login: sample-user";
    Case {
        attribute: Some(("/gitlab/project_path", "my-group/my-project")),
        onboarding: ", gitlab: {token_env_var_name: MY_TOKEN}".to_owned(),
        ..case(
            oidc,
            &[("MY_TOKEN", token)],
            spec(rule),
            spec("project_path: my-group/my-project, ref_protected: true"),
        )
    }
}

pub(crate) fn circleci(sandbox: &Sandbox) -> Case {
    let organization = "1fbe2b5c-f4b7-4c5a-8ac4-3b1a5c1a9f1e";
    let oidc = Oidc::start(sandbox, &["oidc.circleci.com"]);
    let more = json!({
        "oidc.circleci.com/project-id": "9e4b", "oidc.circleci.com/context-ids": ["c0", "c1"],
        "oidc.circleci.com/vcs-ref": "refs/heads/main", "oidc.circleci.com/ssh-rerun": false,
    });
    let issuer = format!("https://oidc.circleci.com/org/{organization}");
    let subject = format!("org/{organization}/project/9e4b/user/7");
    let token = oidc
        .key
        .sign(&claims(&issuer, organization, &subject, more));
    let spec = |rule: &str| {
        format!("{{circleci: {{organization_id: {organization}, allow: [{{{rule}}}]}}}}")
    };
    Case {
        attribute: Some(("/circleci/project_id", "9e4b")),
        ..case(
            oidc,
            &[("CIRCLE_OIDC_TOKEN", token)],
            spec("project_id: 9e4b, context_id: c1"),
            spec("project_id: 9e4b, context_id: c2"),
        )
    }
}

pub(crate) fn bitbucket(sandbox: &Sandbox) -> Case {
    let issuer = "https://api.bitbucket.org/2.0/workspaces/w/pipelines-config/identity/oidc";
    let audience = "ari:cloud:bitbucket::workspace/w";
    let oidc = Oidc::start(sandbox, &["api.bitbucket.org"]);
    let more = json!({
        "stepUuid": "{s}", "repositoryUuid": "{r}", "pipelineUuid": "{p}", "workspaceUuid": "{w}",
        "deploymentEnvironmentUuid": "{d}", "branchName": "main",
    });
    let token = oidc.key.sign(&claims(issuer, audience, "{r}:{s}", more));
    let spec = |rule: &str| {
        format!(
            "{{bitbucket: {{identity_provider_url: '{issuer}', audience: '{audience}', allow: [{{{rule}}}]}}}}"
        )
    };
    Case {
        attribute: Some(("/bitbucket/step_uuid", "{s}")),
        ..case(
            oidc,
            &[("BITBUCKET_STEP_OIDC_TOKEN", token)],
            spec("workspace_uuid: '{w}', deployment_environment_uuid: '{d}', branch_name: main"),
            spec("workspace_uuid: '{w}', branch_name: release"),
        )
    }
}

pub(crate) fn spacelift(sandbox: &Sandbox) -> Case {
    let host = "example.app.spacelift.io";
    let oidc = Oidc::start(sandbox, &[host]);
    let more = json!({
        "spaceId": "root-1", "callerType": "stack", "callerId": "infra", "runType": "TRACKED",
        "runId": "01G", "scope": "write",
    });
    let subject = "space:root-1:stack:infra:run_type:TRACKED:scope:write";
    let token = oidc
        .key
        .sign(&claims(&format!("https://{host}"), host, subject, more));
    let spec = |globs: bool| {
        format!(
            "{{spacelift: {{hostname: {host}, enable_glob_matching: {globs}, allow: [{{space_id: 'root-*', scope: write}}]}}}}"
        )
    };
    Case {
        attribute: Some(("/spacelift/caller_id", "infra")),
        ..case(
            oidc,
            &[("SPACELIFT_OIDC_TOKEN", token)],
            spec(true),
            spec(false),
        )
    }
}

pub(crate) fn terraform_cloud(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["app.terraform.io"]);
    let more = json!({
        "terraform_run_phase": "apply", "terraform_workspace_id": "ws-1",
        "terraform_workspace_name": "prod", "terraform_organization_id": "org-1",
        "terraform_organization_name": "my-org", "terraform_project_id": "prj-1",
        "terraform_project_name": "p", "terraform_run_id": "run-1",
        "terraform_full_workspace": "organization:my-org:project:p:workspace:prod",
    });
    let subject = "organization:my-org:project:p:workspace:prod:run_phase:apply";
    let token = oidc
        .key
        .sign(&claims("https://app.terraform.io", "custom", subject, more));
    let spec =
        |rule: &str| format!("{{terraform_cloud: {{audience: custom, allow: [{{{rule}}}]}}}}");
    Case {
        attribute: Some(("/terraform_cloud/workspace_name", "prod")),
        onboarding: ", terraform: {audience_tag: teleport}".to_owned(),
        ..case(
            oidc,
            &[("TFC_WORKLOAD_IDENTITY_TOKEN_TELEPORT", token)],
            spec("organization_name: my-org, workspace_name: prod, run_phase: apply"),
            spec("organization_name: my-org, workspace_name: prod, run_phase: plan"),
        )
    }
}

pub(crate) fn azure_devops(sandbox: &Sandbox) -> Case {
    let organization = "0ca3ddd9-f0b0-4635-a98c-5866526961b6";
    let oidc = Oidc::start(sandbox, &["vstoken.dev.azure.com"]);
    let more = json!({
        "org_id": organization, "prj_id": "5a7d", "def_id": "1", "rpo_id": "org/repo",
        "rpo_uri": "https://github.com/org/repo.git", "rpo_ver": "e6b9", "rpo_ref": "refs/heads/main",
        "run_id": "12",
    });
    let issuer = format!("https://vstoken.dev.azure.com/{organization}");
    let subject = "p://my-org/my-project/my-pipeline";
    let token = oidc.key.sign(&claims(
        &issuer,
        "api://AzureADTokenExchange",
        subject,
        more,
    ));
    oidc.hand_out(200, json!({"oidcToken": token}).to_string());
    let agent = [
        (
            "SYSTEM_OIDCREQUESTURI",
            oidc.url("/p/_apis/distributedtask/hubs/build/oidctoken"),
        ),
        ("SYSTEM_ACCESSTOKEN", "hunter2-access-token".to_owned()),
    ];
    let spec = |rule: &str| {
        format!("{{azure_devops: {{organization_id: {organization}, allow: [{{{rule}}}]}}}}")
    };
    Case {
        attribute: Some(("/azure_devops/pipeline/pipeline_name", "my-pipeline")),
        ..case(
            oidc,
            &agent,
            spec(
                "project_name: my-project, pipeline_name: my-pipeline, repository_ref: refs/heads/main",
            ),
            spec("project_name: my-project, pipeline_name: other"),
        )
    }
}

pub(crate) fn env0(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["login.app.env0.com"]);
    let more = json!({
        "organizationId": "o1", "projectId": "p1", "projectName": "p", "templateId": "t1",
        "templateName": "t", "environmentId": "e1", "environmentName": "e", "workspaceName": "w",
        "deploymentLogId": "d1", "deploymentType": "deploy", "deployerEmail": "a@example.com",
        "env0Tag": "x",
    });
    let claims = claims(
        "https://login.app.env0.com/",
        "https://app.env0.com",
        "o1",
        more,
    );
    let token = oidc.key.sign(&claims);
    let spec = |rule: &str| format!("{{env0: {{allow: [{{{rule}}}]}}}}");
    Case {
        attribute: Some(("/env0/deployer_email", "a@example.com")),
        ..case(
            oidc,
            &[("ENV0_OIDC_TOKEN", token)],
            spec("organization_id: o1, project_name: p, deployment_type: deploy"),
            spec("organization_id: o1, project_name: p, env0_tag: y"),
        )
    }
}

/// A cluster for `gitlab`, whose agent takes any token from its environment.
struct Gitlab {
    oidc: Oidc,
    case: Case,
}

impl Gitlab {
    const ISSUER: &'static str = "https://gitlab.example.org";

    fn new(sandbox: &Sandbox) -> Self {
        let oidc = Oidc::start(sandbox, &["gitlab.example.org"]);
        let spec =
            "{gitlab: {domain: gitlab.example.org, allow: [{project_path: my-group/my-project}]}}";
        let case = Case {
            spec: Some(spec.to_owned()),
            cluster: vec![(
                "SSL_CERT_FILE".to_owned(),
                oidc.authority().display().to_string(),
            )],
            hosts: Some(oidc.hosts()),
            ..Case::default()
        };
        Self { oidc, case }
    }

    fn claims() -> Value {
        gitlab_claims(Self::ISSUER, Cluster::NAME)
    }

    /// One run with `token`; its exit code and everything that it printed.
    fn run(&mut self, lab: &Lab<'_>, token: &str) -> (Option<i32>, String) {
        self.case.agent = vec![("TBOT_GITLAB_JWT".to_owned(), token.to_owned())];
        let storage = format!(
            "storage-{}",
            tbot::crypto::random::<8>().map(|b| b.to_string()).concat()
        );
        let output = lab.run(&self.case, &storage);
        let log = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&log).into_owned(),
        )
    }
}

#[test]
fn tokens_that_are_wrong_in_one_thing_are_refused_and_never_shown() {
    let sandbox = Sandbox::new();
    let mut gitlab = Gitlab::new(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &gitlab.case);
    let with = |name: &str, value: Value| {
        let mut claims = Gitlab::claims();
        claims[name] = value;
        claims
    };
    let key = &gitlab.oidc.key;
    let stranger = Key::new("first");
    let none = json!({"alg": "none", "kid": "first"});
    let tokens = [
        (
            "issuer",
            key.sign(&with("iss", json!("https://gitlab.com"))),
            "issued by",
        ),
        (
            "audience",
            key.sign(&with("aud", json!("other"))),
            "its audience is",
        ),
        (
            "claim",
            key.sign(&with("project_path", json!("evil/p"))),
            "differs in project_path",
        ),
        ("key", stranger.sign(&Gitlab::claims()), "not the issuer's"),
        (
            "kid",
            Key::new("other").sign(&Gitlab::claims()),
            "has no key",
        ),
        (
            "none",
            format!("{}.", unsigned(&none, &Gitlab::claims())),
            "\"none\" is not allowed",
        ),
        (
            "HS256",
            key.sign_with_the_public_key(&Gitlab::claims()),
            "\"HS256\" is not allowed",
        ),
        (
            "expired",
            key.sign(&with("exp", json!(time(-20)))),
            "it expired",
        ),
        (
            "not yet",
            key.sign(&with("nbf", json!(time(120)))),
            "it is valid only",
        ),
        (
            "from the future",
            key.sign(&with("iat", json!(time(120)))),
            "it is valid only",
        ),
        ("no end", key.sign(&with("exp", Value::Null)), "\"exp\""),
        (
            "oversized",
            key.sign(&with("x", json!("y".repeat(66_000)))),
            "length too large",
        ),
        ("no token", "hunter2".to_owned(), "compact JWS"),
    ];
    for (what, token, complaint) in tokens {
        let (code, log) = gitlab.run(&lab, &token);
        assert_eq!(code, Some(1), "{what}: {log}");
        assert!(log.contains(complaint), "{what}: {log}");
        let last = lab.last_join();
        assert_eq!(last["success"], false, "{what}: {last}");
        let audit = fs::read_to_string(sandbox.path("cluster/audit.jsonl")).unwrap();
        let cluster = fs::read_to_string(sandbox.path("cluster.log")).unwrap();
        for text in [&log, &audit, &cluster] {
            assert!(!text.contains(&token), "{what}: the token is in {text}");
        }
    }
    let near = lab.cluster.events("bot.join");
    let near: Vec<_> = near
        .iter()
        .filter_map(|join| join["nearest_rule"].as_str())
        .collect();
    let expected =
        "rule 1 of 1 comes closest: project_path is \"evil/p\", not \"my-group/my-project\"";
    assert_eq!(near, [expected]);
    // Nothing of that spoiled the way for the right one.
    let good = gitlab.oidc.key.sign(&Gitlab::claims());
    let (code, log) = gitlab.run(&lab, &good);
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn an_issuer_in_any_mood_lets_nobody_in_who_it_did_not_vouch_for() {
    for (mood, complaint) in [
        (Mood::Broken, "answered 500"),
        (Mood::Huge, "more than 262144 bytes"),
        (Mood::Redirecting, "redirects are not followed"),
        (Mood::Impostor, "is for the issuer"),
        (Mood::Silent, "did not answer within 10 s"),
    ] {
        let sandbox = Sandbox::new();
        let mut gitlab = Gitlab::new(&sandbox);
        let lab = Lab::start(&sandbox, "gitlab", &gitlab.case);
        gitlab.oidc.set(mood);
        let token = gitlab.oidc.key.sign(&Gitlab::claims());
        let (code, log) = gitlab.run(&lab, &token);
        assert_eq!(code, Some(1), "{mood:?}: {log}");
        assert!(log.contains(complaint), "{mood:?}: {log}");
        assert!(!log.contains(&token), "{mood:?}: {log}");
    }
}

#[test]
fn keys_rotate_and_known_ones_outlive_an_outage() {
    let sandbox = Sandbox::new();
    let mut gitlab = Gitlab::new(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &gitlab.case);
    let first = gitlab.oidc.key.sign(&Gitlab::claims());
    assert_eq!(gitlab.run(&lab, &first).0, Some(0));
    assert_eq!(gitlab.oidc.asked(), 2);
    // Nobody has to be asked for a key that is known.
    gitlab.oidc.set(Mood::Broken);
    let again = gitlab.oidc.key.sign(&Gitlab::claims());
    assert_eq!(gitlab.run(&lab, &again).0, Some(0));
    assert_eq!(gitlab.oidc.asked(), 0);
    gitlab.oidc.set(Mood::Well);
    gitlab.oidc.rotate();
    let rotated = gitlab.oidc.key.sign(&Gitlab::claims());
    // It may be too soon to ask again: within ten seconds it is not.
    crate::common::eventually("the new key is found", || {
        let (code, log) = gitlab.run(&lab, &rotated);
        if code == Some(0) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn keys_that_are_given_need_no_issuer_but_all_else_counts() {
    let sandbox = Sandbox::new();
    let mut gitlab = Gitlab::new(&sandbox);
    let spec = |domain: &str| {
        format!(
            "{{gitlab: {{{domain}static_jwks: '{}', allow: [{{sub: 'project_path:my-group/*'}}]}}}}",
            gitlab.oidc.key_set()
        )
    };
    let (open, named) = (spec(""), spec("domain: other.example.org, "));
    gitlab.case.spec = Some(open);
    let lab = Lab::start(&sandbox, "gitlab", &gitlab.case);
    gitlab.oidc.set(Mood::Broken);
    let good = gitlab.oidc.key.sign(&Gitlab::claims());
    let (code, log) = gitlab.run(&lab, &good);
    assert_eq!(code, Some(0), "{log}");
    for (token, complaint) in [
        (
            gitlab
                .oidc
                .key
                .sign(&gitlab_claims(Gitlab::ISSUER, "other")),
            "its audience is",
        ),
        (
            Key::new("first").sign(&Gitlab::claims()),
            "not the issuer's",
        ),
    ] {
        let (code, log) = gitlab.run(&lab, &token);
        assert_eq!(code, Some(1), "{log}");
        assert!(
            log.contains("validating with jwks") && log.contains(complaint),
            "{log}"
        );
    }
    assert_eq!(gitlab.oidc.asked(), 0);
    lab.cluster.create(&resources("gitlab", Some(&named)));
    let (code, log) = gitlab.run(&lab, &good);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("issued by"), "{log}");
}

/// A job of GitHub Actions: its environment, and a directory that is its workspace.
struct Job<'a> {
    sandbox: &'a Sandbox,
    oidc: Oidc,
    cluster: Cluster<'a>,
}

impl<'a> Job<'a> {
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
        let job = Self {
            sandbox,
            oidc,
            cluster,
        };
        let believed = [job.cluster.web_authority(), job.oidc.authority().to_owned()];
        let believed: String = believed
            .iter()
            .map(|path| fs::read_to_string(path).unwrap())
            .collect();
        sandbox.write("believed.pem", believed);
        for file in ["output", "env", "summary", "path"] {
            sandbox.write(&format!("runner/{file}"), "");
        }
        sandbox.write("work/README.md", "a checkout");
        job
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
    let job = Job::new(&sandbox);
    let before = everything_below(&sandbox.path("work"));
    let (code, log) = job.step(&[], &[]);
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
    let asked = job.oidc.questions();
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
    let job = Job::new(&sandbox);
    let names = [
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    ];
    for name in names {
        let (code, log) = job.step(&[], &[name]);
        assert_eq!(code, Some(1), "{log}");
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
        job.oidc.hand_out(status, answer.to_string());
        let (code, log) = job.step(&[], &[]);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(complaint), "{complaint}: {log}");
        assert!(!log.contains(token) && !log.contains("hunter2"), "{log}");
    }
    let (code, log) = job.step(&[("ACTIONS_ID_TOKEN_REQUEST_URL", "ftp://x")], &[]);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("neither https nor http"), "{log}");
}

#[test]
fn a_token_that_was_overheard_is_of_no_use_elsewhere() {
    let sandbox = Sandbox::new();
    let mut gitlab = Gitlab::new(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &gitlab.case);
    let token = gitlab.oidc.key.sign(&Gitlab::claims());
    for _ in 0..2 {
        let (code, log) = gitlab.run(&lab, &token);
        assert_eq!(code, Some(0), "{log}");
    }
    // The same from another address of this machine: something between has one of its own.
    let port = lab.cluster.proxy();
    let (_, port) = port.rsplit_once(':').unwrap();
    let elsewhere = relay(port.parse().unwrap());
    let config = format!(
        "version: v2\nproxy_server: localhost:{elsewhere}\nonboarding: {{join_method: gitlab, token: example-gitlab}}\n\
         storage: {{type: memory}}\noneshot: true\nservices: [{{type: identity, destination: {{type: memory}}}}]\n"
    );
    let config = sandbox.write("elsewhere.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command
        .arg(config)
        .env("SSL_CERT_FILE", lab.cluster.web_authority())
        .env("TBOT_GITLAB_JWT", &token);
    let output = command.output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("used before from another address"), "{log}");
    let last = lab.last_join();
    assert_eq!(last["addr.remote"], "127.0.0.9", "{last}");
    // Whom it belongs to can still use it.
    assert_eq!(gitlab.run(&lab, &token).0, Some(0));
    command
        .output()
        .unwrap()
        .status
        .code()
        .filter(|code| *code == 1)
        .expect("still refused");
}

/// A port that leads to `port`, from the address 127.0.0.9.
fn relay(port: u16) -> u16 {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap().port()).unwrap();
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let socket = tokio::net::TcpSocket::new_v4()?;
                    socket.bind("127.0.0.9:0".parse().unwrap())?;
                    let mut server = socket.connect(([127, 0, 0, 1], port).into()).await?;
                    tokio::io::copy_bidirectional(&mut client, &mut server).await
                });
            }
        });
    });
    receiver.recv().unwrap()
}

#[test]
fn token_resources_are_checked_as_a_cluster_does() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &resources("gitlab", None));
    for (method, spec, complaint) in [
        ("github", "{}", "`github` is required"),
        ("github", "{github: {}}", "must have at least one rule"),
        (
            "github",
            "{github: {allow: [{ref: x}]}}",
            "`repository`, `repository_owner` or `sub`",
        ),
        (
            "github",
            "{github: {allow: [{repositry: x, sub: y}]}}",
            "did you mean",
        ),
        (
            "github",
            "{github: {enterprise_server_host: 'https://x', allow: [{sub: y}]}}",
            "is no host",
        ),
        (
            "github",
            "{github: {enterprise_server_host: x, enterprise_slug: y, allow: [{sub: y}]}}",
            "together with",
        ),
        (
            "github",
            "{github: {static_jwks: '{}', allow: [{sub: y}]}}",
            "no JSON Web Key Set",
        ),
        (
            "gitlab",
            "{gitlab: {allow: [{ref: main}]}}",
            "a rule needs `sub`",
        ),
        (
            "gitlab",
            "{gitlab: {domain: a/b, allow: [{sub: x}]}}",
            "is no host",
        ),
        (
            "gitlab",
            "{gitlab: {allow: [{sub: x, ref_protected: 'true'}]}}",
            "`true` or `false`",
        ),
        (
            "circleci",
            "{circleci: {allow: [{project_id: x}]}}",
            "`organization_id` is required",
        ),
        (
            "circleci",
            "{circleci: {organization_id: x, allow: [{}]}}",
            "`project_id` or `context_id`",
        ),
        (
            "bitbucket",
            "{bitbucket: {allow: [{workspace_uuid: x}]}}",
            "`audience` is required",
        ),
        (
            "bitbucket",
            "{bitbucket: {audience: x, identity_provider_url: 'http://x', allow: [{workspace_uuid: x}]}}",
            "is no URL",
        ),
        (
            "bitbucket",
            "{bitbucket: {audience: x, identity_provider_url: 'https://x', allow: [{branch_name: x}]}}",
            "`workspace_uuid` or `repository_uuid`",
        ),
        (
            "spacelift",
            "{spacelift: {allow: [{space_id: x}]}}",
            "`hostname` is required",
        ),
        (
            "spacelift",
            "{spacelift: {hostname: x, allow: [{scope: write}]}}",
            "`space_id` or `caller_id`",
        ),
        (
            "terraform_cloud",
            "{terraform_cloud: {allow: [{workspace_name: x}]}}",
            "`organization_id` or `organization_name`",
        ),
        (
            "terraform_cloud",
            "{terraform_cloud: {allow: [{organization_name: x}]}}",
            "a rule needs `project_id`",
        ),
        (
            "azure_devops",
            "{azure_devops: {allow: [{sub: x}]}}",
            "`organization_id` is required",
        ),
        (
            "azure_devops",
            "{azure_devops: {organization_id: x, allow: [{pipeline_name: x}]}}",
            "`project_name` or `project_id`",
        ),
        (
            "env0",
            "{env0: {allow: [{project_id: x}]}}",
            "a rule needs `organization_id`",
        ),
    ] {
        let path = sandbox.write("wrong.yaml", resources(method, Some(spec)));
        let mut command = sandbox.tbot(["cluster", "--data-dir"]);
        command
            .arg(sandbox.path("cluster"))
            .args(["create", "-f"])
            .arg(path);
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{method} {spec}");
        assert!(told.contains(complaint), "{method} {spec}: {told}");
    }
    drop(cluster);
}
