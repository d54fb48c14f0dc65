//! What a join with an ID token is good for: rules and templates of workload identities see the claims,
//! and agents of older protocols bring the same token.

use std::fs;

use serde_json::{Value, json};

use super::gitlab;
use crate::common::{OutputText as _, Sandbox};
use crate::join_methods::Lab;

const IDENTITY: &str = "\
kind: workload_identity
version: v1
metadata: {name: job, labels: {app: ci}}
spec:
  rules:
    allow:
    - conditions:
      - {attribute: join.gitlab.project_path, eq: {value: my-group/my-project}}
      - {attribute: join.gitlab.ref_protected, eq: {value: 'false'}}
  spiffe: {id: '/ci/{{join.gitlab.user_login}}/{{join.gitlab.pipeline_id}}'}
";

#[test]
fn the_job_names_its_workload_identity() {
    let sandbox = Sandbox::new();
    let mut job = gitlab(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    lab.cluster.create(IDENTITY);
    let issue = |job: &super::Job| {
        let config = format!(
            "version: v2\nproxy_server: {}\nonboarding: {{join_method: gitlab, token: example-gitlab, \
             gitlab: {{token_env_var_name: MY_TOKEN}}}}\nstorage: {{type: memory}}\noneshot: true\nservices:\n\
             - {{type: workload-identity-x509, selector: {{name: job}}, destination: {{type: directory, path: {}}}}}\n",
            lab.cluster.proxy(),
            sandbox.path("svid").display(),
        );
        let mut command = sandbox.tbot(["start", "-c"]);
        command
            .arg(sandbox.write("svid.yaml", config))
            .env("SSL_CERT_FILE", lab.cluster.web_authority())
            .envs(job.case.agent.iter().cloned());
        command.output().unwrap()
    };
    let token = job.oidc.key.sign(&job.claims);
    job.give(&token);
    issue(&job).success();
    let svid = tbot::crypto::x509::Certificate::from_pem(
        &fs::read_to_string(sandbox.path("svid/svid.pem")).unwrap(),
    );
    let expected = "spiffe://test.example.org/ci/sample-user/574";
    assert_eq!(svid.unwrap().uri_sans(), [expected]);

    // The same bot from a job that the rules do not know gets none.
    let token = job
        .oidc
        .key
        .sign(&job.but("project_path", json!("my-group/other")));
    job.give(&token);
    let refused = issue(&job);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(lab.last_join()["success"], true, "it joined all the same");
}

#[test]
fn agents_of_the_older_protocol_post_their_token_to_the_proxy() {
    let sandbox = Sandbox::new();
    let job = gitlab(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    let shell = "openssl genrsa -out job.key 2048 && openssl rsa -in job.key -pubout -out job.pub";
    let mut openssl = sandbox.command("sh");
    openssl.args(["-c", shell]).output().unwrap().success();
    let public = fs::read(sandbox.path("job.pub")).unwrap();
    let post = |token: &str| {
        use base64::Engine as _;
        let public = base64::engine::general_purpose::STANDARD.encode(&public);
        // As the Go agent writes it: every key, nothing for what it does not have.
        let body = json!({
            "hostID": "", "node_name": "", "role": "Bot", "token": "example-gitlab",
            "additional_principals": null, "dns_names": null, "public_tls_key": public,
            "public_ssh_key": "", "remote_addr": "", "ec2_id": "", "id_token": token,
        });
        let body = sandbox.write("body.json", body.to_string());
        let mut curl = sandbox.command("curl");
        curl.args([
            "-s",
            "-w",
            "\n%{http_code}",
            "-H",
            "content-type: application/json",
        ])
        .arg("--cacert")
        .arg(lab.cluster.web_authority())
        .arg("--data-binary")
        .arg(format!("@{}", body.display()))
        .arg(format!(
            "https://{}/webapi/host/credentials",
            lab.cluster.proxy()
        ));
        let answer = curl.output().unwrap().success();
        let (body, status) = answer.rsplit_once('\n').unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        (status.to_owned(), body)
    };
    let (status, answer) = post(&job.oidc.key.sign(&job.claims));
    assert_eq!(status, "200", "{answer}");
    assert!(
        answer["tls"].as_str().is_some_and(|tls| !tls.is_empty()),
        "{answer}"
    );
    let (status, answer) = post(&job.oidc.key.sign(&job.but("ref", json!("main"))));
    assert_eq!(status, "403", "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("id token claims did not match any allow rules"),
        "{answer}"
    );
    let (status, answer) = post("");
    assert_eq!(status, "400", "{answer}");
}
