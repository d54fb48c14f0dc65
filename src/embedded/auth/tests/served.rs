//! What is listed to whom, and certificates that lead there.

use tonic::Code;

use super::*;
use crate::embedded::store::{Put, Resource, StoreError};
use crate::pb::proto::{
    ListResourcesRequest, ListResourcesResponse, RouteToApp, RouteToDatabase, paginated_resource,
};

/// What a real cluster had when it was recorded, and a role that sees less.
const SERVED: &str = r#"
kind: role
version: v7
metadata: {name: resources}
spec:
  allow:
    logins: [root]
    app_labels: {'*': '*'}
    db_labels: {'*': '*'}
    db_names: ['*']
    db_users: ['*']
    kubernetes_labels: {'*': '*'}
    kubernetes_groups: ['system:masters']
    rules: [{resources: [host_cert], verbs: [create]}]
  deny: {db_users: [postgres]}
---
kind: role
version: v7
metadata: {name: narrow}
spec:
  allow: {kubernetes_labels: {env: [test, 'dev-*']}, db_labels: {env: test}, db_names: [app], db_users: [alice]}
  deny: {kubernetes_labels: {team: secret}, rules: [{resources: [app_server], verbs: ['*']}]}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [access, resources, narrow]}
---
kind: app
version: v3
metadata: {name: echo, labels: {env: test}}
spec: {uri: "http://127.0.0.1:8099"}
---
kind: db
version: v3
metadata: {name: pg, description: orders, labels: {env: test}}
spec: {protocol: postgres, uri: "localhost:5432"}
---
kind: db
version: v3
metadata: {name: docs}
spec: {protocol: mongodb, uri: "localhost:27017"}
---
kind: kube_cluster
version: v3
metadata: {name: k1, labels: {env: test}}
spec: {}
---
kind: kube_cluster
version: v3
metadata: {name: k2-eks, labels: {env: prod, teleport.internal/discovered-name: k2}}
spec: {aws: {region: eu-west-1, account_id: "123456789012", name: k2}}
---
kind: kube_cluster
version: v3
metadata: {name: k3, labels: {env: dev-1, team: secret}}
spec: {}
"#;

/// A lab with [`SERVED`], the bot's own certificates, and outputs with one role each.
pub(super) async fn served() -> (Lab, Certs, Certs, Certs) {
    let lab = lab(None);
    let files = [("served.yaml".to_owned(), SERVED.to_owned())];
    lab.auth.state.create(&files, Mode::Force, "test").unwrap();
    let own = lab.join("once-and-never-again").await.unwrap();
    let wide = lab.certs(&own, lab.output(&["resources"])).await.unwrap();
    let narrow = lab.certs(&own, lab.output(&["narrow"])).await.unwrap();
    (lab, own, wide, narrow)
}

fn question(server: &str) -> ListResourcesRequest {
    ListResourcesRequest {
        resource_type: server.to_owned(),
        namespace: "default".to_owned(),
        limit: 1000,
        ..ListResourcesRequest::default()
    }
}

fn name(resource: &paginated_resource::Resource) -> String {
    use paginated_resource::Resource::{AppServer, DatabaseServer, KubernetesServer};
    let (outer, inner) = match resource {
        AppServer(server) => (
            server.metadata.clone(),
            server.spec.clone().unwrap().app.unwrap().metadata,
        ),
        DatabaseServer(server) => (
            server.metadata.clone(),
            server.spec.clone().unwrap().database.unwrap().metadata,
        ),
        KubernetesServer(server) => (
            server.metadata.clone(),
            server.spec.clone().unwrap().cluster.unwrap().metadata,
        ),
    };
    assert_eq!(outer, inner);
    inner.unwrap().name
}

impl Lab {
    async fn page(
        &self,
        by: &Certs,
        request: ListResourcesRequest,
    ) -> Result<ListResourcesResponse, Status> {
        let answer = self
            .auth
            .list_resources(self.from(Some(by), request))
            .await?;
        Ok(answer.into_inner())
    }

    async fn names(&self, by: &Certs, request: ListResourcesRequest) -> Vec<String> {
        let page = self.page(by, request).await.unwrap();
        assert_eq!(page.next_key, "");
        let resources = page.resources.iter();
        resources
            .map(|resource| name(resource.resource.as_ref().unwrap()))
            .collect()
    }
}

#[tokio::test]
async fn roles_decide_what_is_listed() {
    let (lab, own, wide, narrow) = served().await;
    for (by, server, expected) in [
        (&wide, "app_server", vec!["echo"]),
        (&wide, "db_server", vec!["docs", "pg"]),
        (&wide, "kube_server", vec!["k1", "k2-eks", "k3"]),
        (&narrow, "db_server", vec!["pg"]),
        (&narrow, "kube_server", vec!["k1"]),
        (&own, "kube_server", vec![]),
    ] {
        assert_eq!(lab.names(by, question(server)).await, expected, "{server}");
    }
    let with = |server: &str, predicate: &str, labels: &[(&str, &str)]| ListResourcesRequest {
        predicate_expression: predicate.to_owned(),
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        ..question(server)
    };
    let discovered = r#"(name == "k2") || (labels["teleport.internal/discovered-name"] == "k2")"#;
    for (request, expected) in [
        (with("kube_server", discovered, &[]), vec!["k2-eks"]),
        (with("app_server", r#"name == "echo""#, &[]), vec!["echo"]),
        (with("app_server", r#"name == "ech""#, &[]), vec![]),
        (with("kube_server", "", &[("env", "test")]), vec!["k1"]),
        (
            with("kube_server", "", &[("env", "dev-1"), ("team", "secret")]),
            vec!["k3"],
        ),
        (with("kube_server", "", &[("env", "*")]), vec![]),
        (
            with("kube_server", r#"name != "k1""#, &[("env", "test")]),
            vec![],
        ),
    ] {
        let told = format!("{request:?}");
        assert_eq!(lab.names(&wide, request).await, expected, "{told}");
    }
    let app = lab.page(&wide, question("app_server")).await.unwrap();
    let Some(paginated_resource::Resource::AppServer(app)) = app.resources[0].resource.clone()
    else {
        panic!("no application");
    };
    let app = app.spec.unwrap().app.unwrap().spec.unwrap();
    assert_eq!(app.public_addr, "echo.example.teleport.sh");
    for (by, request, code, text) in [
        (
            &narrow,
            question("app_server"),
            Code::PermissionDenied,
            r#"access denied to perform action "list" on "app_server""#,
        ),
        (&wide, question(""), Code::InvalidArgument, "resource type"),
        (&wide, question("node"), Code::Unimplemented, "\"node\""),
        (&wide, question("app"), Code::Unimplemented, "\"app\""),
        (
            &wide,
            with("app_server", "name ==", &[]),
            Code::InvalidArgument,
            "failed to parse predicate expression: character 8",
        ),
        (
            &wide,
            ListResourcesRequest {
                limit: -1,
                ..question("app_server")
            },
            Code::InvalidArgument,
            "nonpositive parameter limit",
        ),
    ] {
        let refusal = lab.page(by, request).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
        assert!(refusal.message().contains(text), "{refusal}");
    }
}

#[tokio::test]
async fn ten_thousand_come_page_by_page() {
    let (lab, _, wide, _) = served().await;
    let put = |kind: &str, name: String, half: usize, description: String| Resource {
        kind: kind.to_owned(),
        version: "v3".to_owned(),
        name,
        description,
        labels: [("half".to_owned(), format!("h{half}"))].into(),
        ..Resource::default()
    };
    let many = (0..10_000).map(|n| put("db", format!("n{n:05}"), n % 2, String::new()));
    // A page is full before it is too large for clients.
    let large = (0..20).map(|n| put("app", format!("l{n}"), 0, "d".repeat(300_000)));
    let store = &lab.auth.state.store;
    store
        .transaction(|tx| -> Result<(), StoreError> {
            many.chain(large)
                .try_for_each(|resource| tx.put(resource, &Put::Create).map(drop))
        })
        .unwrap();
    for (limit, pages) in [(1000, 5), (999, 6), (0, 5), (i32::MAX, 5), (700, 8)] {
        let mut request = ListResourcesRequest {
            limit,
            labels: [("half".to_owned(), "h1".to_owned())].into(),
            ..question("db_server")
        };
        let mut names = Vec::new();
        let mut count = 0;
        loop {
            let page = lab.page(&wide, request.clone()).await.unwrap();
            let found = page.resources.iter();
            names.extend(found.map(|found| name(found.resource.as_ref().unwrap())));
            count += 1;
            if page.next_key.is_empty() {
                break;
            }
            request.start_key = page.next_key;
        }
        let expected: Vec<String> = (0..5000).map(|n| format!("n{:05}", n * 2 + 1)).collect();
        assert_eq!(names, expected);
        assert_eq!(count, pages, "{limit}");
    }
    let page = lab.page(&wide, question("app_server")).await.unwrap();
    assert!(page.resources.len() < 10 && !page.next_key.is_empty());
}

/// The subject as the recordings show it: attributes from the last to the first, logins left out.
fn subject(certs: &Certs) -> Vec<String> {
    let attributes = [
        (oid::APP_SESSION, "1.4"),
        (oid::APP_PUBLIC_ADDR, "1.6"),
        (oid::APP_CLUSTER, "1.5"),
        (oid::APP_NAME, "1.10"),
        (oid::KUBERNETES_CLUSTER, "1.3"),
        (oid::KUBERNETES_GROUP, "1.2"),
        (oid::DATABASE_SERVICE, "2.1"),
        (oid::DATABASE_PROTOCOL, "2.2"),
        (oid::DATABASE_USER, "2.3"),
        (oid::DATABASE_NAME, "2.4"),
        (oid::DATABASE_NAMES, "2.5"),
        (oid::DATABASE_USERS, "2.6"),
        (oid::IMPERSONATOR, "2.7"),
        (oid::DISALLOW_REISSUE, "2.9"),
        (oid::CLUSTER, "1.7"),
        (ORGANIZATION, "O"),
    ];
    let certificate = certificate(certs);
    let mut all = Vec::new();
    for (oid, name) in attributes {
        let values = certificate.subject(oid);
        let values = values.into_iter().map(|value| match name {
            "1.4" => format!("{name}=<{}>", value.len()),
            _ => format!("{name}={value}"),
        });
        all.extend(values);
    }
    all
}

#[tokio::test]
async fn certificates_lead_where_the_roles_do() {
    let (lab, own, ..) = served().await;
    let common = |routed: &[&str]| {
        let mut all: Vec<String> = routed.iter().map(|&text| text.to_owned()).collect();
        let rest = [
            "1.2=system:masters",
            "2.5=*",
            "2.6=*",
            "2.7=bot-example",
            "2.9=true",
            "1.7=real.example.org",
            "O=resources",
        ];
        all.extend(rest.map(str::to_owned));
        all.sort();
        all
    };
    let app = RouteToApp {
        name: "echo".to_owned(),
        public_addr: "forged.example.org".to_owned(),
        cluster_name: "real.example.org".to_owned(),
        ..RouteToApp::default()
    };
    let database = RouteToDatabase {
        service_name: "pg".to_owned(),
        protocol: "forged".to_owned(),
        username: "alice".to_owned(),
        database: "app".to_owned(),
        roles: Vec::new(),
    };
    let base = || lab.output(&["resources"]);
    let requests = [
        (
            UserCertsRequest {
                route_to_app: Some(app),
                ..base()
            },
            common(&[
                "1.4=<64>",
                "1.6=echo.example.teleport.sh",
                "1.5=real.example.org",
                "1.10=echo",
            ]),
        ),
        (
            UserCertsRequest {
                kubernetes_cluster: "k1".to_owned(),
                ..base()
            },
            common(&["1.3=k1"]),
        ),
        (
            UserCertsRequest {
                route_to_database: Some(database),
                ..base()
            },
            common(&["2.1=pg", "2.2=postgres", "2.3=alice", "2.4=app"]),
        ),
        // What clients send who want no route.
        (
            UserCertsRequest {
                route_to_app: Some(RouteToApp::default()),
                route_to_database: Some(RouteToDatabase::default()),
                route_to_cluster: "real.example.org".to_owned(),
                ..base()
            },
            common(&[]),
        ),
    ];
    for (request, expected) in requests {
        let certs = lab.certs(&own, request).await.unwrap();
        let mut found = subject(&certs);
        found.sort();
        assert_eq!(found, expected);
        let ssh = SshCertificate::parse(std::str::from_utf8(&certs.ssh).unwrap()).unwrap();
        assert_eq!(ssh.principals(), ["root", "-teleport-internal-join"]);
    }
    let events = lab.events("cert.create");
    let identities: Vec<&Value> = events.iter().map(|event| &event["identity"]).collect();
    let [.., to_app, to_kube, to_database, plain] = identities.as_slice() else {
        panic!("{identities:?}");
    };
    let session = &lab.events("app.session.start")[0];
    assert_eq!(session["sid"], to_app["route_to_app"]["session_id"]);
    assert_eq!(session["code"], "T2007I");
    assert_eq!(
        to_app["route_to_app"]["public_addr"],
        "echo.example.teleport.sh"
    );
    assert_eq!(to_kube["kubernetes_cluster"], "k1");
    assert_eq!(to_database["route_to_database"]["service_name"], "pg");
    for key in ["route_to_app", "kubernetes_cluster", "route_to_database"] {
        assert_eq!(plain.get(key), None, "{key}");
    }
}

#[tokio::test]
async fn certificates_lead_nowhere_else() {
    let (lab, own, ..) = served().await;
    let app = || RouteToApp {
        name: "echo".to_owned(),
        ..RouteToApp::default()
    };
    let docs = || RouteToDatabase {
        service_name: "docs".to_owned(),
        ..RouteToDatabase::default()
    };
    let pg = || RouteToDatabase {
        service_name: "pg".to_owned(),
        ..RouteToDatabase::default()
    };
    let base = || lab.output(&["resources"]);
    let narrow = || lab.output(&["narrow"]);
    let cases = [
        (
            UserCertsRequest {
                route_to_app: Some(app()),
                ..narrow()
            },
            Code::NotFound,
            "app \"echo\" not found",
        ),
        (
            UserCertsRequest {
                route_to_app: Some(RouteToApp {
                    cluster_name: "leaf".to_owned(),
                    ..app()
                }),
                ..base()
            },
            Code::NotFound,
            "app \"echo\" not found",
        ),
        (
            UserCertsRequest {
                route_to_app: Some(RouteToApp {
                    aws_role_arn: "arn:aws:iam::1:role/x".to_owned(),
                    ..app()
                }),
                ..base()
            },
            Code::Unimplemented,
            "cloud consoles",
        ),
        (
            UserCertsRequest {
                kubernetes_cluster: "k3".to_owned(),
                ..narrow()
            },
            Code::InvalidArgument,
            "Kubernetes cluster \"k3\" is not registered",
        ),
        (
            UserCertsRequest {
                route_to_database: Some(docs()),
                ..narrow()
            },
            Code::NotFound,
            "database \"docs\" not found",
        ),
        (
            UserCertsRequest {
                route_to_database: Some(docs()),
                ..base()
            },
            Code::InvalidArgument,
            "must provide database user name to generate certificate for database \"docs\"",
        ),
        (
            UserCertsRequest {
                route_to_database: Some(RouteToDatabase {
                    username: "root".to_owned(),
                    ..pg()
                }),
                ..narrow()
            },
            Code::PermissionDenied,
            "database user \"root\" (`db_users`)",
        ),
        (
            UserCertsRequest {
                route_to_database: Some(RouteToDatabase {
                    username: "postgres".to_owned(),
                    ..pg()
                }),
                ..base()
            },
            Code::PermissionDenied,
            "database user \"postgres\" (`db_users`)",
        ),
        (
            UserCertsRequest {
                route_to_database: Some(RouteToDatabase {
                    database: "other".to_owned(),
                    ..pg()
                }),
                ..narrow()
            },
            Code::PermissionDenied,
            "database name \"other\" (`db_names`)",
        ),
    ];
    for (request, code, text) in cases {
        let (found, message) = refused(lab.certs(&own, request).await);
        assert_eq!(found, code, "{message}");
        assert!(message.contains(text), "{message}");
    }
}
