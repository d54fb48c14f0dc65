//! `kind: app`, `db`, `kube_cluster` and `node`: what a bigger cluster's agents serve.
//!
//! This cluster proxies nothing but SSH to nodes: such a resource says that something exists, by which name and
//! labels it is found, and what a certificate for it must say. It stands for its server as well.
//! What a Teleport cluster knows beside (upstream `api/types`, JSON names) is kept as it is.

use std::net::SocketAddr;

use super::Resource;
use crate::yaml::Fields;

/// The longest label of a DNS name, in bytes.
const DNS_LABEL: usize = 63;
/// The protocols of databases (upstream `lib/defaults`).
const PROTOCOLS: &[&str] = &[
    "cassandra",
    "clickhouse",
    "clickhouse-http",
    "cockroachdb",
    "dynamodb",
    "elasticsearch",
    "mongodb",
    "mysql",
    "opensearch",
    "oracle",
    "postgres",
    "redis",
    "snowflake",
    "spanner",
    "sqlserver",
];

const KEPT_OF_APPS: &[&str] = &[
    "aws",
    "cloud",
    "cors",
    "dynamic_labels",
    "identity_center",
    "insecure_skip_verify",
    "integration",
    "mcp",
    "required_app_names",
    "rewrite",
    "tcp_ports",
    "use_any_proxy_public_addr",
    "user_groups",
];
const KEPT_OF_DATABASES: &[&str] = &[
    "ad",
    "admin_user",
    "aws",
    "azure",
    "ca_cert",
    "dynamic_labels",
    "gcp",
    "mongo_atlas",
    "mysql",
    "oracle",
    "tls",
];
const KEPT_OF_CLUSTERS: &[&str] = &["aws", "azure", "dynamic_labels", "gcp"];
const KEPT_OF_NODES: &[&str] = &[
    "cloud_metadata",
    "cmd_labels",
    "github",
    "peer_addr",
    "proxy_ids",
    "public_addrs",
    "rotation",
    "use_tunnel",
    "version",
];

pub(super) fn check_app(fields: &mut Fields<'_>, resource: &mut Resource) {
    check_labels(fields, resource);
    let name = &resource.name;
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.chars().all(lower) || !is_dns_label(name) {
        fields.error_here(
            format!("the name {name:?} cannot be part of a host name"),
            "an application is reached below the proxy's name: use up to 63 lower-case letters, \
             digits and `-`, a letter first",
        );
    }
    fields.required("uri");
    if let Some(addr) = fields.string("public_addr")
        && !is_host(&addr)
    {
        fields.error(
            "public_addr",
            format!("{addr:?} is no host name"),
            Some("write it without scheme, port and path, or leave it out"),
        );
    }
    keep(fields, KEPT_OF_APPS);
}

pub(super) fn check_database(fields: &mut Fields<'_>, resource: &mut Resource) {
    check_labels(fields, resource);
    let name = &resource.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if !name.chars().all(plain) || !is_dns_label(name) {
        fields.error_here(
            format!("the name {name:?} cannot name a database"),
            "use up to 63 letters, digits and `-`, a letter first",
        );
    }
    if fields.required("protocol").is_some() {
        fields.one_of("protocol", PROTOCOLS);
    }
    fields.required("uri");
    keep(fields, KEPT_OF_DATABASES);
}

pub(super) fn check_kube_cluster(fields: &mut Fields<'_>, resource: &mut Resource) {
    check_labels(fields, resource);
    let name = &resource.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !name.chars().all(plain) {
        fields.error_here(
            format!("the name {name:?} cannot name a Kubernetes cluster"),
            "use letters, digits, `-`, `_` and `.`",
        );
    }
    if fields.has("kubeconfig") {
        fields.ignore("kubeconfig");
        fields.error(
            "kubeconfig",
            "this cluster connects to no Kubernetes cluster",
            Some("leave it out: it holds credentials that nobody here would use"),
        );
    }
    keep(fields, KEPT_OF_CLUSTERS);
}

pub(super) fn check_node(fields: &mut Fields<'_>, resource: &mut Resource) {
    const SUB_KINDS: &[&str] = &["", "teleport", "openssh", "openssh-ec2-ice"];
    check_labels(fields, resource);
    if !SUB_KINDS.contains(&resource.sub_kind.as_str()) {
        fields.error_here(
            format!("{:?} is no sub_kind of a node", resource.sub_kind),
            "write `openssh`, or leave it out",
        );
    }
    fields.required("hostname");
    if let Some(addr) = fields.required("addr")
        && !is_dialled(&addr)
    {
        fields.error(
            "addr",
            format!("{addr:?} is no address of an SSH server"),
            Some("write host:port with the port's number, an IPv6 address in brackets: `10.0.0.1:22`, `[::1]:22`"),
        );
    }
    keep(fields, KEPT_OF_NODES);
}

fn keep(fields: &mut Fields<'_>, keys: &[&str]) {
    for key in keys {
        fields.ignore(key);
    }
}

/// Keys of labels, as a Teleport cluster allows them for what agents serve (upstream
/// `api/types.IsValidLabelKey`).
#[must_use]
pub fn is_label_key(key: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._:*-".contains(c);
    !key.is_empty() && key.chars().all(plain)
}

fn check_labels(fields: &Fields<'_>, resource: &Resource) {
    for key in resource.labels.keys().filter(|key| !is_label_key(key)) {
        fields.error_here(
            format!("{key:?} cannot be the key of a label"),
            "use letters, digits and `/._:*-`",
        );
    }
}

fn is_dns_label(name: &str) -> bool {
    name.len() <= DNS_LABEL
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && !name.ends_with('-')
}

/// Whether it is an IP address or a name, and a port to connect to. Names of the local network need
/// not be good names of DNS.
fn is_dialled(addr: &str) -> bool {
    if let Ok(addr) = addr.parse::<SocketAddr>() {
        return addr.port() > 0;
    }
    let Some((host, port)) = addr.rsplit_once(':') else {
        return false;
    };
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let odd = |c: char| c.is_whitespace() || c.is_control() || "/:@[]?#".contains(c);
    !host.is_empty()
        && !host.contains(odd)
        && digits
        && port.parse::<u16>().is_ok_and(|port| port > 0)
}

fn is_host(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    name.split('.').all(|label| {
        !label.is_empty()
            && label.len() <= DNS_LABEL
            && label.chars().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::{Mode, apply, parse, remove, view};
    use crate::clock::Clock;
    use crate::embedded::audit::Audit;
    use crate::embedded::store::Store;

    const FILE: &str = "\
kind: app
version: v3
metadata: {name: echo, labels: {env: test}}
spec: {uri: 'http://127.0.0.1:8099', rewrite: {headers: []}}
---
kind: db
version: v3
metadata: {name: pg}
spec: {protocol: postgres, uri: 'localhost:5432', aws: {region: eu-west-1}}
---
kind: kube_cluster
version: v3
metadata: {name: k_1.x}
spec: {}
---
kind: node
version: v2
sub_kind: openssh
metadata: {name: 7f1a4a0e-6f5c-4c26-9d4e-6ad0a4a0a1c5}
spec: {addr: '10.0.0.1:22', hostname: one}
";

    #[tokio::test(start_paused = true)]
    async fn what_agents_serve_is_created_changed_and_removed_with_tctls_words() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::simulated(now);
        let store = Store::in_memory(clock.clone()).unwrap();
        let audit = Audit::in_memory(clock, "c");
        let put = |mode| {
            let parsed = parse("f.yaml", FILE, Some(now)).unwrap();
            let applied = apply(&store, &audit, parsed, mode, "me", now).unwrap();
            let lines: Vec<String> = applied.into_iter().map(|one| one.message).collect();
            lines.join("\n")
        };
        assert_eq!(
            put(Mode::Create),
            "application \"echo\" has been created\n\
             database \"pg\" has been created\n\
             kubernetes cluster \"k_1.x\" has been created\n\
             node \"7f1a4a0e-6f5c-4c26-9d4e-6ad0a4a0a1c5\" has been created"
        );
        assert!(put(Mode::Force).starts_with("application \"echo\" has been updated\n"));
        let shown = view(&store.get("app", "echo").unwrap().unwrap());
        assert_eq!(shown["spec"]["uri"], "http://127.0.0.1:8099");
        assert_eq!(shown["metadata"]["labels"]["env"], "test");
        assert_eq!(
            remove(&store, &audit, "kube_cluster", "k_1.x", "me").unwrap(),
            "kubernetes cluster \"k_1.x\" has been deleted"
        );
        let told: Vec<(String, String)> = audit
            .events()
            .iter()
            .map(|event| (event["event"].to_string(), event["code"].to_string()))
            .collect();
        let expected = [
            ("app.create", "TAP03I"),
            ("db.create", "TDB03I"),
            ("kube.create", "T3010I"),
            ("app.update", "TAP04I"),
            ("db.update", "TDB04I"),
            ("kube.update", "T3011I"),
            ("kube.delete", "T3012I"),
        ];
        assert_eq!(
            told,
            expected.map(|(event, code)| (format!("{event:?}"), format!("{code:?}")))
        );
        assert_eq!(audit.events()[0]["app_labels"]["env"], "test");
    }

    #[test]
    fn a_node_has_an_address_to_connect_to() {
        for (addr, good) in [
            ("10.0.0.1:22", true),
            ("[2001:db8::1]:22", true),
            ("build_1.example.com:3022", true),
            ("build-1", false),
            ("build-1:", false),
            ("build-1:ssh", false),
            ("build-1:0", false),
            ("10.0.0.1:0", false),
            ("build-1:+22", false),
            ("build-1:65536", false),
            (":22", false),
            ("::1:22", false),
            ("[::x]:22", false),
            ("ssh://build-1:22", false),
            ("me@build-1:22", false),
            ("build 1:22", false),
        ] {
            let file = format!(
                "kind: node\nversion: v2\nmetadata: {{name: a}}\n\
                 spec: {{addr: '{addr}', hostname: one}}\n"
            );
            match parse("f.yaml", &file, None) {
                Ok(_) => assert!(good, "{addr}"),
                Err(error) => {
                    assert!(!good, "{addr}: {error}");
                    let place = format!("f.yaml:4:14: error: node \"a\" spec.addr: {addr:?} is no");
                    assert!(error.lines.starts_with(&place), "{error}");
                    assert!(error.lines.contains("host:port"), "{error}");
                }
            }
        }
    }

    #[test]
    fn bad_ones_are_refused_with_a_reason() {
        let long = "x".repeat(64);
        for (kind, name, rest, text) in [
            ("app", "Echo", "spec: {uri: x}", "part of a host name"),
            ("app", "a.b", "spec: {uri: x}", "part of a host name"),
            ("app", &long, "spec: {uri: x}", "part of a host name"),
            ("app", "'1a'", "spec: {uri: x}", "part of a host name"),
            ("app", "a", "spec: {}", "`uri` is required"),
            ("app", "a", "spec: {uri: x, url: y}", "unknown key"),
            (
                "app",
                "a",
                "spec: {uri: x, public_addr: 'https://a.example.com'}",
                "is no host name",
            ),
            (
                "app",
                "a",
                "spec: {uri: x, public_addr: a..b}",
                "is no host name",
            ),
            (
                "db",
                "a_b",
                "spec: {protocol: mysql, uri: x}",
                "name a database",
            ),
            ("db", "a-", "spec: {protocol: mysql, uri: x}", "database"),
            ("db", "a", "spec: {uri: x}", "`protocol` is required"),
            ("db", "a", "spec: {protocol: postgre, uri: x}", "postgres"),
            ("db", "a", "spec: {protocol: mysql}", "`uri` is required"),
            ("kube_cluster", "'a b'", "spec: {}", "Kubernetes cluster"),
            ("kube_cluster", "a/b", "spec: {}", "Kubernetes cluster"),
            ("kube_cluster", "\"a\\nb\"", "spec: {}", "'\\n'"),
            (
                "kube_cluster",
                "a",
                "spec: {kubeconfig: eA==}",
                "connects to no",
            ),
            ("kube_cluster", "a", "", "`spec` is required"),
            ("node", "a", "spec: {addr: x}", "`hostname` is required"),
            (
                "node",
                "a",
                "sub_kind: other\nspec: {addr: x, hostname: y}",
                "no sub_kind",
            ),
        ] {
            let version = if kind == "node" { "v2" } else { "v3" };
            let file =
                format!("kind: {kind}\nversion: {version}\nmetadata: {{name: {name}}}\n{rest}\n");
            let lines = parse("f.yaml", &file, None).unwrap_err().lines;
            assert!(lines.contains(text), "{file}{lines}");
        }
        let file = "kind: app\nversion: v3\nmetadata: {name: a, labels: {'a b': c}}\n\
                    spec: {uri: x}\n";
        let lines = parse("f.yaml", file, None).unwrap_err().lines;
        assert!(lines.contains("the key of a label"), "{lines}");
    }
}
