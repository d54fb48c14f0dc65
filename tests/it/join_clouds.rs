//! Machines of clouds that join by what their metadata service says: services that answer as each cloud
//! documents, and everything that they do wrong.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::common::{Behaviour, Metadata, Oidc, OutputText as _, Sandbox, repository, time};
use crate::join_methods::{Case, Lab};

const TENANT: &str = "66666666-7777-8888-9999-aaaaaaaaaaaa";
const SUBSCRIPTION: &str = "11111111-2222-3333-4444-555555555555";

fn owned(variables: &[(&str, String)]) -> Vec<(String, String)> {
    let variables = variables.iter();
    variables
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect()
}

/// A case whose cluster finds the cloud's services at `oidc`.
fn case(oidc: Oidc, service: Metadata, variable: (&str, String), spec: [String; 2]) -> Case {
    let [spec, elsewhere] = spec;
    Case {
        spec: Some(spec),
        elsewhere: Some(elsewhere),
        agent: owned(&[variable]),
        cluster: owned(&[("SSL_CERT_FILE", oidc.authority().display().to_string())]),
        hosts: Some(oidc.hosts()),
        authorities: vec![oidc.authority().to_owned()],
        keep: vec![Box::new(oidc), Box::new(service)],
        ..Case::default()
    }
}

fn google_claims() -> Value {
    json!({
        "iss": "https://accounts.google.com", "aud": "teleport.cluster.local", "sub": "1077", "azp": "1077",
        "email": "agent@my-project.iam.gserviceaccount.com", "email_verified": true,
        "iat": time(-5), "exp": time(3600),
        "google": {"compute_engine": {
            "instance_id": "152986662232938449", "instance_name": "example", "project_id": "my-project",
            "project_number": 739, "zone": "us-west1-b", "instance_creation_timestamp": 1_504_230_000,
        }},
    })
}

fn google(token: String) -> Metadata {
    let path = "/computeMetadata/v1/instance/service-accounts/default/identity?audience=teleport.cluster.local&format=full";
    Metadata::start("metadata-flavor: Google", vec![(path, token)])
}

pub(crate) fn gcp(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["accounts.google.com"]);
    let service = google(oidc.key.sign(&google_claims()));
    let variable = ("GCE_METADATA_HOST", service.address());
    let spec = ["us-west1", "us-west2"].map(|location| {
        format!("{{gcp: {{allow: [{{project_ids: [my-project], locations: [{location}]}}]}}}}")
    });
    Case {
        attribute: Some(("/gcp/gce/zone", "us-west1-b")),
        ..case(oidc, service, variable, spec)
    }
}

fn azure_claims() -> Value {
    let machine = format!(
        "/subscriptions/{SUBSCRIPTION}/resourcegroups/web/providers/Microsoft.Compute/virtualMachines/vm"
    );
    json!({
        "iss": format!("https://sts.windows.net/{TENANT}/"), "aud": "https://management.azure.com/",
        "sub": "principal", "tid": TENANT, "ver": "1.0", "iat": time(-5), "nbf": time(-5),
        "exp": time(86_400), "xms_mirid": machine,
    })
}

/// A service that attests nothing, as that of a container instance.
fn microsoft(token: &str) -> Metadata {
    let answer = json!({"access_token": token, "token_type": "Bearer", "expires_in": "86399"});
    Metadata::start(
        "metadata: True",
        vec![
            (
                "/metadata/versions",
                json!({"apiVersions": ["2017-03-01", "2021-12-13"]}).to_string(),
            ),
            (
                "/metadata/identity/oauth2/token?api-version=2021-12-13",
                answer.to_string(),
            ),
        ],
    )
}

pub(crate) fn azure(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["sts.windows.net"]);
    let service = microsoft(&oidc.key.sign(&azure_claims()));
    let variable = (
        "AZURE_POD_IDENTITY_AUTHORITY_HOST",
        format!("http://{}/", service.address()),
    );
    let spec = ["WEB", "batch"].map(|group| {
        format!(
            "{{azure: {{allow: [{{subscription: {SUBSCRIPTION}, resource_groups: [{group}]}}]}}}}"
        )
    });
    Case {
        attribute: Some(("/azure/tenant", TENANT)),
        onboarding: ", azure: {client_id: me}".to_owned(),
        ..case(oidc, service, variable, spec)
    }
}

fn made(name: &str) -> String {
    let path = repository().join("src/join/oracle/verify/made").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn oracles() -> Metadata {
    Metadata::start(
        "authorization: Bearer Oracle",
        vec![
            ("/opc/v2/instance/region", "phx".to_owned()),
            ("/opc/v2/identity/cert.pem", made("leaf.pem")),
            ("/opc/v2/identity/intermediate.pem", made("inter.pem")),
            ("/opc/v2/identity/key.pem", made("leaf.key")),
        ],
    )
}

fn der(pem: &str) -> String {
    STANDARD.encode(
        tbot::crypto::x509::Certificate::from_pem(pem)
            .unwrap()
            .der(),
    )
}

pub(crate) fn oracle(sandbox: &Sandbox) -> Case {
    let oidc = Oidc::start(sandbox, &["auth.us-phoenix-1.oraclecloud.com"]);
    // One answer to the exchange of the certificate and to the question for the authorities.
    let answer = json!({"token": "session", "certificates": [der(&made("root.pem"))]});
    oidc.hand_out(200, answer.to_string());
    let service = oracles();
    let variable = (
        "OCI_METADATA_BASE_URL",
        format!("http://{}/opc/v2", service.address()),
    );
    let spec = ["us-phoenix-1", "us-ashburn-1"].map(|region| {
        format!("{{oracle: {{allow: [{{tenancy: ocid1.tenancy.oc1..t, regions: [{region}]}}]}}}}")
    });
    Case {
        attribute: Some(("/oracle/instance_id", "ocid1.instance.oc1.phx.me")),
        agent_asks: true,
        ..case(oidc, service, variable, spec)
    }
}

/// What the agent says of a join that has to fail, within a minute.
fn refusal(lab: &Lab<'_>, case: &Case) -> String {
    let output = lab.run(case, "stranger");
    assert_eq!(output.status.code(), Some(1), "{}", output.text());
    output.text()
}

#[test]
fn a_metadata_service_that_misbehaves_is_told_by_its_fault() {
    let sandbox = Sandbox::new();
    let oidc = Oidc::start(&sandbox, &["accounts.google.com"]);
    let service = google(oidc.key.sign(&google_claims()));
    let variable = ("GCE_METADATA_HOST", service.address());
    let spec = "{gcp: {allow: [{project_ids: [my-project]}]}}".to_owned();
    let mut case = Case {
        spec: Some(spec),
        agent: owned(&[variable]),
        cluster: owned(&[("SSL_CERT_FILE", oidc.authority().display().to_string())]),
        hosts: Some(oidc.hosts()),
        ..Case::default()
    };
    let lab = Lab::start(&sandbox, "gcp", &case);
    for (behaviour, expected) in [
        (Behaviour::Broken, "answered 500"),
        (Behaviour::Redirecting, "redirect"),
        (Behaviour::Huge, "gave no usable answer"),
        (Behaviour::Silent, "did not answer within 10 s"),
    ] {
        service.set(behaviour);
        let told = refusal(&lab, &case);
        assert!(
            told.contains("could not reach instance metadata"),
            "{behaviour:?}: {told}"
        );
        assert!(told.contains(expected), "{behaviour:?}: {told}");
    }
    case.agent = owned(&[("GCE_METADATA_HOST", "127.0.0.1:1".to_owned())]);
    let told = refusal(&lab, &case);
    assert!(told.contains("Does tbot run on Google Cloud"), "{told}");
    assert!(
        lab.cluster.events("bot.join").is_empty(),
        "nothing was sent"
    );
    // The service itself would refuse who does not send its header.
    service.set(Behaviour::Well);
    let bare = std::process::Command::new("curl")
        .args(["-s", "-o", "/dev/null", "-w", "%{http_code}"])
        .arg(format!("http://{}/computeMetadata/v1/", service.address()))
        .output();
    assert_eq!(bare.unwrap().success(), "403");
}

#[test]
fn tokens_of_clouds_that_say_something_else_are_refused() {
    let of_google = |change: fn(&mut Value)| {
        let mut claims = google_claims();
        change(&mut claims);
        claims
    };
    let of_azure = |change: fn(&mut Value)| {
        let mut claims = azure_claims();
        change(&mut claims);
        claims
    };
    let cases = [
        (
            "gcp",
            of_google(|it| it["aud"] = "https://example.org".into()),
            "audience",
        ),
        (
            "gcp",
            of_google(|it| it["iss"] = "https://accounts.example.org".into()),
            "issued by",
        ),
        (
            "gcp",
            of_google(|it| it["exp"] = time(-60).into()),
            "expired",
        ),
        ("gcp", of_google(|it| it["google"] = json!({})), ""),
        (
            "gcp",
            of_google(|it| {
                it["google"] = json!({});
                it["email"] = "1-compute@developer.gserviceaccount.com".into();
            }),
            "default compute engine service account",
        ),
        (
            "azure",
            of_azure(|it| it["aud"] = "https://graph.microsoft.com/".into()),
            "audience",
        ),
        (
            "azure",
            of_azure(|it| it["iss"] = "https://sts.windows.net/other/".into()),
            "issued by",
        ),
        (
            "azure",
            of_azure(|it| it["tid"] = "../evil".into()),
            "names no tenant",
        ),
        (
            "azure",
            of_azure(|it| it["iat"] = time(-3600).into()),
            "ago (max allowed 600 s)",
        ),
        (
            "azure",
            of_azure(|it| it["exp"] = time(-60).into()),
            "expired",
        ),
        (
            "azure",
            of_azure(|it| {
                it["xms_mirid"] = format!(
                    "/subscriptions/{SUBSCRIPTION}/resourcegroups/web/providers/\
                     Microsoft.ManagedIdentity/userAssignedIdentities/i"
                )
                .into();
            }),
            "could not determine Azure identity",
        ),
    ];
    let sandboxes = [Sandbox::new(), Sandbox::new()];
    let labs = ["gcp", "azure"];
    for (sandbox, method) in sandboxes.iter().zip(labs) {
        let oidc = Oidc::start(sandbox, &["accounts.google.com", "sts.windows.net"]);
        let spec = match method {
            "gcp" => "{gcp: {allow: [{project_ids: [my-project]}]}}".to_owned(),
            _ => format!("{{azure: {{allow: [{{subscription: {SUBSCRIPTION}}}]}}}}"),
        };
        let mut case = Case {
            spec: Some(spec),
            cluster: owned(&[("SSL_CERT_FILE", oidc.authority().display().to_string())]),
            hosts: Some(oidc.hosts()),
            ..Case::default()
        };
        let lab = Lab::start(sandbox, method, &case);
        for (at, (_, claims, expected)) in cases.iter().enumerate().filter(|(_, it)| it.0 == method)
        {
            let token = oidc.key.sign(claims);
            let service = match method {
                "gcp" => google(token),
                _ => microsoft(&token),
            };
            case.agent = match method {
                "gcp" => owned(&[("GCE_METADATA_HOST", service.address())]),
                _ => owned(&[(
                    "AZURE_POD_IDENTITY_AUTHORITY_HOST",
                    format!("http://{}", service.address()),
                )]),
            };
            let output = lab.run(&case, &format!("storage-{at}"));
            if expected.is_empty() {
                // A pod: its service account says whose it is.
                output.success();
                continue;
            }
            assert_eq!(output.status.code(), Some(1), "{claims}: {}", output.text());
            assert!(
                output.text().contains(expected),
                "{claims}: {}",
                output.text()
            );
            assert_eq!(lab.last_join()["success"], false, "{claims}");
        }
    }
}
