//! Jobs of CI systems that join with their ID token: as each provider documents its tokens.

mod refusals;
mod uses;

use std::fs;

use serde_json::{Value, json};

use crate::common::{Cluster, Oidc, Sandbox, time};
use crate::join_methods::{Case, Lab};

/// The issuer of the jobs of GitLab.
const GITLAB: &str = "https://gitlab.example.org";

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

/// How an agent gets its token.
enum Way {
    /// In a variable of this name.
    Variable(&'static str),
    /// In this member of an answer, with what the job has in its environment for that.
    Asked(&'static str, Vec<(&'static str, String)>),
}

/// A job with an ID token.
struct Job {
    oidc: Oidc,
    /// The claims that the provider documents.
    claims: Value,
    way: Way,
    case: Case,
}

impl Job {
    fn new(oidc: Oidc, claims: Value, way: Way, spec: String, elsewhere: String) -> Self {
        let authority = oidc.authority().to_owned();
        let case = Case {
            spec: Some(spec),
            elsewhere: Some(elsewhere),
            cluster: vec![("SSL_CERT_FILE".to_owned(), authority.display().to_string())],
            hosts: Some(oidc.hosts()),
            authorities: vec![authority],
            ..Case::default()
        };
        Self {
            oidc,
            claims,
            way,
            case,
        }
    }

    fn with(mut self, onboarding: &str, at: &'static str, attribute: &'static str) -> Self {
        onboarding.clone_into(&mut self.case.onboarding);
        self.case.attribute = Some((at, attribute));
        self
    }

    /// Has the agent find `token`.
    fn give(&mut self, token: &str) {
        let variables = match &self.way {
            Way::Variable(name) => vec![(*name, token.to_owned())],
            Way::Asked(member, environment) => {
                self.oidc
                    .hand_out(200, json!({ *member: token }).to_string());
                environment.clone()
            }
        };
        let variables = variables.into_iter();
        self.case.agent = variables
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
    }

    /// The case of a job whose token is good.
    fn case(mut self) -> Case {
        let token = self.oidc.key.sign(&self.claims);
        self.give(&token);
        self.case.keep = vec![Box::new(self.oidc)];
        self.case
    }

    /// One run with `token`; its exit code and everything that it printed.
    fn run(&mut self, lab: &Lab<'_>, token: &str) -> (Option<i32>, String) {
        self.give(token);
        let storage = tbot::crypto::random::<8>()
            .map(|byte| byte.to_string())
            .concat();
        let output = lab.run(&self.case, &format!("storage-{storage}"));
        let log = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&log).into_owned(),
        )
    }

    /// The claims with one of them changed.
    fn but(&self, name: &str, value: Value) -> Value {
        let mut claims = self.claims.clone();
        claims[name] = value;
        claims
    }
}

/// Claims of a job of GitHub Actions (GitHub's documentation of OpenID Connect).
pub(crate) fn github_claims(issuer: &str) -> Value {
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

pub(crate) fn github_environment(oidc: &Oidc) -> [(&'static str, String); 2] {
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

/// A job of a server of GitHub Enterprise, and its service for tokens.
fn github(sandbox: &Sandbox) -> Job {
    let oidc = Oidc::start(sandbox, &["github.example.org"]);
    let way = Way::Asked("value", github_environment(&oidc).to_vec());
    let spec = |rule: &str| {
        format!("{{github: {{enterprise_server_host: github.example.org, allow: [{{{rule}}}]}}}}")
    };
    let rule = "repository: octo-org/*, ref: refs/heads/main, environment: prod, ref_type: branch";
    let claims = github_claims("https://github.example.org/_services/token");
    let elsewhere = spec("repository: octo-org/octo-repo, environment: test");
    Job::new(oidc, claims, way, spec(rule), elsewhere).with(
        "",
        "/github/repository",
        "octo-org/octo-repo",
    )
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

fn gitlab(sandbox: &Sandbox) -> Job {
    let oidc = Oidc::start(sandbox, &["gitlab.example.org"]);
    let spec =
        |rule: &str| format!("{{gitlab: {{domain: gitlab.example.org, allow: [{{{rule}}}]}}}}");
    let rule =
        "project_path: my-group/*, ref: feature-*, ref_protected: false, user_login: sample-user";
    let elsewhere = spec("project_path: my-group/my-project, ref_protected: true");
    let claims = gitlab_claims(GITLAB, Cluster::NAME);
    Job::new(
        oidc,
        claims,
        Way::Variable("MY_TOKEN"),
        spec(rule),
        elsewhere,
    )
    .with(
        ", gitlab: {token_env_var_name: MY_TOKEN}",
        "/gitlab/project_path",
        "my-group/my-project",
    )
}

fn circleci(sandbox: &Sandbox) -> Job {
    let organization = "1fbe2b5c-f4b7-4c5a-8ac4-3b1a5c1a9f1e";
    let oidc = Oidc::start(sandbox, &["oidc.circleci.com"]);
    let more = json!({
        "oidc.circleci.com/project-id": "9e4b", "oidc.circleci.com/context-ids": ["c0", "c1"],
        "oidc.circleci.com/vcs-ref": "refs/heads/main", "oidc.circleci.com/ssh-rerun": false,
    });
    let issuer = format!("https://oidc.circleci.com/org/{organization}");
    let subject = format!("org/{organization}/project/9e4b/user/7");
    let spec = |rule: &str| {
        format!("{{circleci: {{organization_id: {organization}, allow: [{{{rule}}}]}}}}")
    };
    Job::new(
        oidc,
        claims(&issuer, organization, &subject, more),
        Way::Variable("CIRCLE_OIDC_TOKEN"),
        spec("project_id: 9e4b, context_id: c1"),
        spec("project_id: 9e4b, context_id: c2"),
    )
    .with("", "/circleci/project_id", "9e4b")
}

fn bitbucket(sandbox: &Sandbox) -> Job {
    let issuer = "https://api.bitbucket.org/2.0/workspaces/w/pipelines-config/identity/oidc";
    let audience = "ari:cloud:bitbucket::workspace/w";
    let oidc = Oidc::start(sandbox, &["api.bitbucket.org"]);
    let more = json!({
        "stepUuid": "{s}", "repositoryUuid": "{r}", "pipelineUuid": "{p}", "workspaceUuid": "{w}",
        "deploymentEnvironmentUuid": "{d}", "branchName": "main",
    });
    let spec = |rule: &str| {
        format!(
            "{{bitbucket: {{identity_provider_url: '{issuer}', audience: '{audience}', allow: [{{{rule}}}]}}}}"
        )
    };
    Job::new(
        oidc,
        claims(issuer, audience, "{r}:{s}", more),
        Way::Variable("BITBUCKET_STEP_OIDC_TOKEN"),
        spec("workspace_uuid: '{w}', deployment_environment_uuid: '{d}', branch_name: main"),
        spec("workspace_uuid: '{w}', branch_name: release"),
    )
    .with("", "/bitbucket/step_uuid", "{s}")
}

fn spacelift(sandbox: &Sandbox) -> Job {
    let host = "example.app.spacelift.io";
    let oidc = Oidc::start(sandbox, &[host]);
    let more = json!({
        "spaceId": "root-1", "callerType": "stack", "callerId": "infra", "runType": "TRACKED",
        "runId": "01G", "scope": "write",
    });
    let subject = "space:root-1:stack:infra:run_type:TRACKED:scope:write";
    let claims = claims(&format!("https://{host}"), host, subject, more);
    let spec = |globs: bool| {
        format!(
            "{{spacelift: {{hostname: {host}, enable_glob_matching: {globs}, allow: [{{space_id: 'root-*', scope: write}}]}}}}"
        )
    };
    let way = Way::Variable("SPACELIFT_OIDC_TOKEN");
    Job::new(oidc, claims, way, spec(true), spec(false)).with("", "/spacelift/caller_id", "infra")
}

fn terraform_cloud(sandbox: &Sandbox) -> Job {
    let oidc = Oidc::start(sandbox, &["app.terraform.io"]);
    let more = json!({
        "terraform_run_phase": "apply", "terraform_workspace_id": "ws-1",
        "terraform_workspace_name": "prod", "terraform_organization_id": "org-1",
        "terraform_organization_name": "my-org", "terraform_project_id": "prj-1",
        "terraform_project_name": "p", "terraform_run_id": "run-1",
        "terraform_full_workspace": "organization:my-org:project:p:workspace:prod",
    });
    let subject = "organization:my-org:project:p:workspace:prod:run_phase:apply";
    let spec =
        |rule: &str| format!("{{terraform_cloud: {{audience: custom, allow: [{{{rule}}}]}}}}");
    Job::new(
        oidc,
        claims("https://app.terraform.io", "custom", subject, more),
        Way::Variable("TFC_WORKLOAD_IDENTITY_TOKEN_TELEPORT"),
        spec("organization_name: my-org, workspace_name: prod, run_phase: apply"),
        spec("organization_name: my-org, workspace_name: prod, run_phase: plan"),
    )
    .with(
        ", terraform: {audience_tag: teleport}",
        "/terraform_cloud/workspace_name",
        "prod",
    )
}

fn azure_devops(sandbox: &Sandbox) -> Job {
    let organization = "0ca3ddd9-f0b0-4635-a98c-5866526961b6";
    let oidc = Oidc::start(sandbox, &["vstoken.dev.azure.com"]);
    let more = json!({
        "org_id": organization, "prj_id": "5a7d", "def_id": "1", "rpo_id": "org/repo",
        "rpo_uri": "https://github.com/org/repo.git", "rpo_ver": "e6b9", "rpo_ref": "refs/heads/main",
        "run_id": "12",
    });
    let issuer = format!("https://vstoken.dev.azure.com/{organization}");
    let subject = "p://my-org/my-project/my-pipeline";
    let environment = vec![
        (
            "SYSTEM_OIDCREQUESTURI",
            oidc.url("/p/_apis/distributedtask/hubs/build/oidctoken"),
        ),
        ("SYSTEM_ACCESSTOKEN", "hunter2-access-token".to_owned()),
    ];
    let spec = |rule: &str| {
        format!("{{azure_devops: {{organization_id: {organization}, allow: [{{{rule}}}]}}}}")
    };
    Job::new(
        oidc,
        claims(&issuer, "api://AzureADTokenExchange", subject, more),
        Way::Asked("oidcToken", environment),
        spec(
            "project_name: my-project, pipeline_name: my-pipeline, repository_ref: refs/heads/main",
        ),
        spec("project_name: my-project, pipeline_name: other"),
    )
    .with("", "/azure_devops/pipeline/pipeline_name", "my-pipeline")
}

fn env0(sandbox: &Sandbox) -> Job {
    let oidc = Oidc::start(sandbox, &["login.app.env0.com"]);
    let more = json!({
        "organizationId": "o1", "projectId": "p1", "projectName": "p", "templateId": "t1",
        "templateName": "t", "environmentId": "e1", "environmentName": "e", "workspaceName": "w",
        "deploymentLogId": "d1", "deploymentType": "deploy", "deployerEmail": "a@example.com",
        "env0Tag": "x",
    });
    let spec = |rule: &str| format!("{{env0: {{allow: [{{{rule}}}]}}}}");
    Job::new(
        oidc,
        claims(
            "https://login.app.env0.com/",
            "https://app.env0.com",
            "o1",
            more,
        ),
        Way::Variable("ENV0_OIDC_TOKEN"),
        spec("organization_id: o1, project_name: p, deployment_type: deploy"),
        spec("organization_id: o1, project_name: p, env0_tag: y"),
    )
    .with("", "/env0/deployer_email", "a@example.com")
}

/// Any issuer, here one that only the token resource's own authority vouches for.
fn generic_oidc(sandbox: &Sandbox) -> Job {
    let oidc = Oidc::start(sandbox, &["issuer.example.org"]);
    let authority = fs::read_to_string(oidc.authority())
        .unwrap()
        .replace('\n', "\\n");
    let issuer = "https://issuer.example.org/tenant";
    let more = json!({
        "org": {"id": "acme", "tier": 2}, "groups": ["dev", "ops"], "env": "prod", "azp": "somebody",
    });
    let spec = |rules: &str| {
        format!(
            "{{generic_oidc: {{issuer: '{issuer}', audience: us, tls_ca: \"{authority}\", {rules}}}}}"
        )
    };
    let rules = "must_match_fields: {org: {id: acme, tier: 2}}, allow_any: [\
                 {conditions: [{attribute: env, in: {values: [test, stage]}}]}, \
                 {expression: 'contains(claims.groups, \"ops\") && claims.env == \"prod\"'}]";
    let elsewhere = "must_match_fields: {org: {id: other}}";
    let claims = claims(issuer, "us", "job", more);
    let mut job = Job::new(
        oidc,
        claims,
        Way::Variable("SOME_TOKEN"),
        spec(rules),
        spec(elsewhere),
    )
    .with(
        ", generic_oidc: {command: [printenv, SOME_TOKEN], timeout: 30s}",
        "/generic_oidc/claims/env",
        "prod",
    );
    job.case.cluster.clear();
    job
}

/// Makes a job of a method.
type Make = fn(&Sandbox) -> Job;

/// The jobs of all methods with ID tokens.
const JOBS: &[(&str, Make)] = &[
    ("azure_devops", azure_devops),
    ("bitbucket", bitbucket),
    ("circleci", circleci),
    ("env0", env0),
    ("generic_oidc", generic_oidc),
    ("github", github),
    ("gitlab", gitlab),
    ("spacelift", spacelift),
    ("terraform_cloud", terraform_cloud),
];

/// A case of [`crate::join_methods`].
pub(crate) fn prepare(method: &str, sandbox: &Sandbox) -> Case {
    let found = JOBS.iter().find(|(name, _)| *name == method);
    let (_, job) = found.expect("a method with ID tokens");
    job(sandbox).case()
}
