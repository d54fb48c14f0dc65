//! `kubeconfig.yaml`, character for character as client-go 0.33 writes it.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::yaml::Tree;
use crate::yaml::emit::emit_kubernetes;

/// The API by which kubectl asks a plugin for credentials.
pub(crate) const EXEC_API: &str = "client.authentication.k8s.io/v1beta1";

/// What the file says.
#[derive(Debug)]
pub(in crate::services) struct Kubeconfig<'a> {
    /// Contexts by name, each with a cluster of the same name.
    pub(in crate::services) contexts: BTreeMap<String, KubeContext>,
    /// The name of the one that counts when none is asked for; empty if there is none.
    pub(in crate::services) current: &'a str,
    /// The name of the user of every context.
    pub(in crate::services) user: &'a str,
    /// How the user is known.
    pub(in crate::services) login: Login<'a>,
    /// PEM certificates of whom to believe.
    pub(in crate::services) authorities: &'a str,
    /// The name to ask for in TLS, if it is not the address.
    pub(in crate::services) server_name: Option<&'a str>,
}

/// A cluster, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::services) struct KubeContext {
    /// Its URL.
    pub(in crate::services) server: String,
    /// The namespace that counts when none is asked for.
    pub(in crate::services) namespace: Option<String>,
}

/// How a user is known.
#[derive(Debug)]
pub(in crate::services) enum Login<'a> {
    /// kubectl asks this program, which reads the directory: always the newest certificate.
    Plugin {
        program: &'a str,
        directory: &'a str,
    },
    /// The certificate and key of now.
    Embedded { certificate: &'a str, key: &'a str },
}

impl Kubeconfig<'_> {
    /// The file's text.
    pub(in crate::services) fn render(&self) -> String {
        let text = |text: &str| Some(Tree::text(text));
        let encoded = |text: &str| Some(Tree::text(STANDARD.encode(text)));
        let clusters = self.contexts.iter().map(|(name, context)| {
            let cluster = Tree::map([
                ("certificate-authority-data", encoded(self.authorities)),
                ("server", text(&context.server)),
                ("tls-server-name", self.server_name.map(Tree::text)),
            ]);
            Tree::map([("cluster", Some(cluster)), ("name", text(name))])
        });
        let contexts = self.contexts.iter().map(|(name, context)| {
            let context = Tree::map([
                ("cluster", text(name)),
                ("namespace", context.namespace.as_ref().map(Tree::text)),
                ("user", text(self.user)),
            ]);
            Tree::map([("context", Some(context)), ("name", text(name))])
        });
        let login = match self.login {
            Login::Plugin { program, directory } => {
                let directory = format!("--destination-dir={directory}");
                let args = Tree::texts(["kube", "credentials", &directory]);
                let exec = Tree::map([
                    ("apiVersion", text(EXEC_API)),
                    ("args", Some(args)),
                    ("command", text(program)),
                    ("env", Some(Tree::Null)),
                    ("provideClusterInfo", Some(Tree::Bool(false))),
                ]);
                Tree::map([("exec", Some(exec))])
            }
            Login::Embedded { certificate, key } => Tree::map([
                ("client-certificate-data", encoded(certificate)),
                ("client-key-data", encoded(key)),
            ]),
        };
        let user = Tree::map([("name", text(self.user)), ("user", Some(login))]);
        emit_kubernetes(&Tree::map([
            ("apiVersion", text("v1")),
            ("clusters", Some(list(clusters))),
            ("contexts", Some(list(contexts))),
            ("current-context", text(self.current)),
            ("kind", text("Config")),
            ("preferences", Some(Tree::Map(Vec::new()))),
            ("users", Some(Tree::List(vec![user]))),
        ]))
    }
}

/// A list as Go shows it: none at all instead of an empty one.
fn list(items: impl Iterator<Item = Tree>) -> Tree {
    let items: Vec<Tree> = items.collect();
    if items.is_empty() {
        Tree::Null
    } else {
        Tree::List(items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tests/golden/kubeconfig`: written by client-go 0.33.0 (`clientcmd.Write`).
    fn golden(name: &str) -> String {
        let path = format!(
            "{}/tests/golden/kubeconfig/{name}.yaml",
            env!("CARGO_MANIFEST_DIR")
        );
        std::fs::read_to_string(path).unwrap()
    }

    fn contexts(names: &[&str], namespace: Option<&str>) -> BTreeMap<String, KubeContext> {
        let context = KubeContext {
            server: "https://p.example.org:3080".to_owned(),
            namespace: namespace.map(str::to_owned),
        };
        names
            .iter()
            .map(|name| ((*name).to_owned(), context.clone()))
            .collect()
    }

    #[test]
    fn it_is_what_client_go_writes() {
        let long = format!("/{}x", "with space ".repeat(12));
        let plugin = |directory, program| Login::Plugin { program, directory };
        let embedded = || Login::Embedded {
            certificate: "CERT",
            key: "KEY",
        };
        let path = "/opt/machine-id";
        let program = "/usr/local/bin/tbot";
        let name = format!("c-{}", "k".repeat(300));
        let hostile = r#"c.example.org-it's "k": #1"#;
        for (file, names, namespace, user, login) in [
            (
                "two-clusters",
                &["c.example.org-b", "c.example.org-a"][..],
                Some("team"),
                "c.example.org",
                plugin(path, program),
            ),
            ("none", &[], None, "c.example.org", plugin(path, program)),
            ("hostile-name", &[hostile], None, hostile, embedded()),
            (
                "long-path",
                &["123-a/b.c"],
                None,
                "123-a/b.c",
                plugin(&long, "/a b/tbot"),
            ),
            ("long-name", &[&name], None, &name, embedded()),
            (
                "two-lines",
                &["c-two\nlines"],
                None,
                "c-two\nlines",
                plugin("/d", "/t"),
            ),
        ] {
            let kubeconfig = Kubeconfig {
                contexts: contexts(names, namespace),
                current: names.first().copied().unwrap_or_default(),
                user,
                login,
                authorities: "-----BEGIN CERTIFICATE-----\nQUFB\n-----END CERTIFICATE-----\n",
                server_name: Some("kube-teleport-proxy-alpn.p.example.org"),
            };
            assert_eq!(kubeconfig.render(), golden(file), "{file}");
        }
    }

    #[test]
    fn without_tls_routing_the_address_is_the_name() {
        let kubeconfig = Kubeconfig {
            contexts: contexts(&["a"], None),
            current: "a",
            user: "a",
            login: Login::Embedded {
                certificate: "CERT",
                key: "KEY",
            },
            authorities: "",
            server_name: None,
        };
        assert!(!kubeconfig.render().contains("tls-server-name"));
    }
}
