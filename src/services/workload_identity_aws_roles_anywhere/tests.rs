use super::*;
use crate::yaml::{Problems, emit, parse};

const ARNS: &str = "role_arn: arn:aws:iam::1:role/r\n\
                    profile_arn: arn:aws:rolesanywhere:us-east-1:1:profile/p\n\
                    trust_anchor_arn: arn:aws:rolesanywhere:us-east-1:1:trust-anchor/t\n";

fn read(source: &str) -> (Option<Settings>, String) {
    let node = parse(source).unwrap();
    let problems = Problems::new();
    let mut fields = Fields::new(&node, "", &problems).unwrap();
    let plan = Settings::read(&mut fields);
    fields.finish();
    (plan, problems.render("t"))
}

fn section(more: &str) -> String {
    format!("selector: {{name: x}}\ndestination: {{type: directory, path: /opt/x}}\n{ARNS}{more}")
}

#[test]
fn sections_read_back_and_defaults_are_upstreams() {
    let (plan, problems) = read(&section(""));
    assert_eq!(problems, "");
    let plan = plan.unwrap();
    assert_eq!(
        plan.label(),
        "workload-identity-aws-roles-anywhere (directory: /opt/x)"
    );
    assert_eq!(plan.region(), "us-east-1");
    assert_eq!(plan.session, Duration::from_hours(6));
    assert_eq!(plan.interval, Duration::from_hours(1));
    assert_eq!(plan.credential_profile, "default");
    assert_eq!(plan.file, "aws_credentials");
    assert!(!plan.overwrite);
    for more in [
        "",
        "region: eu-west-1\nsession_duration: 12h\nsession_renewal_interval: 30m\n\
         credential_profile_name: a b\nartifact_name: f\noverwrite_credential_file: true\n",
    ] {
        let (plan, problems) = read(&section(more));
        assert_eq!(problems, "");
        let text = emit::emit(&Tree::Map(plan.unwrap().emit()));
        let (again, problems) = read(&text);
        assert_eq!(problems, "");
        assert_eq!(emit::emit(&Tree::Map(again.unwrap().emit())), text);
    }
}

#[test]
fn every_problem_is_told_in_one_run() {
    let (plan, problems) = read("a: b\n");
    assert!(plan.is_none());
    for key in [
        "destination",
        "selector",
        "role_arn",
        "profile_arn",
        "trust_anchor_arn",
    ] {
        assert!(
            problems.contains(&format!("error: {key}: ")),
            "{key}: {problems}"
        );
    }
}

#[test]
fn what_aws_would_refuse_is_told_before() {
    for (more, expected) in [
        (
            "region: us_east_1",
            "region: \"us_east_1\" is no AWS region",
        ),
        ("session_duration: 13h", "AWS grants no session of 13h0m0s"),
        ("session_duration: 10m", "AWS grants no session of 10m0s"),
        (
            "session_duration: 1h",
            "session_renewal_interval: credentials that live 1h0m0s",
        ),
        ("session_duration: 3600", "session_duration: "),
        ("credential_profile_name: a]", "credential_profile_name: "),
        (
            "credential_profile_name: \"a\\nb\"",
            "credential_profile_name: ",
        ),
        ("artifact_name: ../x", "artifact_name: it is no file name"),
        (
            "overwrite_credential_file: maybe",
            "overwrite_credential_file: ",
        ),
        ("credential_ttl: 1h", "credential_ttl: unknown key, ignored"),
    ] {
        let (_, problems) = read(&section(&format!("{more}\n")));
        assert!(problems.contains(expected), "{more}: {problems}");
    }
    for (from, to, expected) in [
        ("iam::1:role/r", "iam::1:user/r", "is no ARN of a role"),
        ("arn:aws:iam", "aws:iam", "is no ARN of a role"),
        ("profile/p", "trust-anchor/p", "is no ARN of a profile"),
        ("trust-anchor/t", "t", "is no ARN of a trust-anchor"),
        (
            "us-east-1:1:profile",
            "us-east-2:1:profile",
            "the profile is in \"us-east-2\" and the trust anchor in \"us-east-1\"",
        ),
        (
            "us-east-1:1:trust",
            "evil.example/:1:trust",
            "is no ARN of a trust-anchor",
        ),
    ] {
        let (plan, problems) = read(&section("").replacen(from, to, 1));
        assert!(problems.contains(expected), "{to}: {problems}");
        assert!(plan.is_none() || to.starts_with("us-east-2"), "{to}");
    }
}

#[tokio::test]
async fn outputs_that_share_a_file_keep_each_others_sections() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("aws_credentials");
    std::fs::write(&path, "[by hand]\nk = v\n").unwrap();
    let writes = (0..10).map(|number| {
        let source = format!(
            "selector: {{name: x}}\ndestination: {{type: directory, path: {}}}\n\
             {ARNS}credential_profile_name: p{number}\n",
            folder.path().display()
        );
        let (plan, problems) = read(&source);
        assert_eq!(problems, "");
        let Service::Output(output) = plan.unwrap().build() else {
            panic!("it is an output");
        };
        async move {
            let lines = format!("aws_access_key_id = {number}\n").into_bytes();
            let files = FileSet::from([("aws_credentials".to_owned(), lines.into())]);
            output.destination().init().await.unwrap();
            output.write(files).await.unwrap();
        }
    });
    futures_util::future::join_all(writes).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("[by hand]\nk = v\n"), "{text}");
    for number in 0..10 {
        let section = format!("[p{number}]\naws_access_key_id = {number}\n");
        assert!(text.contains(&section), "{section}: {text}");
    }
}

#[tokio::test]
async fn a_file_that_is_to_be_overwritten_is_not_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("aws_credentials");
    std::fs::write(&path, "hunter2").unwrap();
    for (overwrite, written) in [
        (false, None),
        (true, Some("[default]\naws_access_key_id = 1\n")),
    ] {
        let source = format!(
            "selector: {{name: x}}\ndestination: {{type: directory, path: {}}}\n\
             {ARNS}overwrite_credential_file: {overwrite}\n",
            folder.path().display()
        );
        let Service::Output(output) = read(&source).0.unwrap().build() else {
            panic!("it is an output");
        };
        output.destination().init().await.unwrap();
        let lines = b"aws_access_key_id = 1\n".to_vec();
        let files = FileSet::from([("aws_credentials".to_owned(), lines.into())]);
        assert_eq!(output.write(files).await.is_ok(), written.is_some());
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, written.unwrap_or("hunter2"));
    }
}
