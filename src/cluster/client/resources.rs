//! Looking up what a certificate can lead to: applications, databases, Kubernetes clusters.
//!
//! A cluster lists them once for each agent that serves them; here each appears once.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

use super::{Client, MAX_PAGES, endless};
use crate::cluster::ClusterError;
use crate::pb::proto::paginated_resource::Resource as Listed;
use crate::pb::proto::{ListResourcesRequest, ListResourcesResponse};
use crate::pb::types::{AppSpecV3, DatabaseSpecV3, KubernetesClusterSpecV3, Metadata};

/// The label with the name that a resource had where it was discovered.
const DISCOVERED_NAME: &str = "teleport.internal/discovered-name";
/// Resources on one page, as upstream asks for them.
const PAGE: i32 = 1000;
/// The namespace of every resource.
const NAMESPACE: &str = "default";

/// A resource of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource<S> {
    /// Its name, unique among its kind in the cluster.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What it is.
    pub spec: S,
}

impl<S> Resource<S> {
    /// The name that it had where it was discovered, such as that of an EKS cluster in its region.
    pub fn discovered_name(&self) -> Option<&str> {
        self.labels.get(DISCOVERED_NAME).map(String::as_str)
    }

    fn new(metadata: Option<Metadata>, spec: Option<S>) -> Option<Self> {
        let metadata = metadata?;
        Some(Self {
            name: metadata.name,
            labels: metadata.labels.into_iter().collect(),
            spec: spec?,
        })
    }
}

/// Which resources are meant.
#[derive(Debug, Clone, Copy)]
pub enum Selection<'a> {
    /// The one of this name, or those that had this name where they were discovered.
    Name(&'a str),
    /// Those that have all of these labels.
    Labels(&'a BTreeMap<String, String>),
}

impl Client {
    /// The application of this name.
    pub async fn application(
        &self,
        name: &str,
    ) -> Result<Option<Resource<AppSpecV3>>, ClusterError> {
        let query = ListResourcesRequest {
            resource_type: "app_server".into(),
            namespace: NAMESPACE.into(),
            limit: 1,
            predicate_expression: format!("name == {}", quoted(name)),
            ..ListResourcesRequest::default()
        };
        let page = self.list_resources(query).await?.resources;
        Ok(page.into_iter().find_map(|item| match item.resource? {
            Listed::AppServer(server) => {
                let app = server.spec?.app?;
                Resource::new(app.metadata, app.spec).filter(|found| found.name == name)
            }
            Listed::DatabaseServer(_) | Listed::KubernetesServer(_) => None,
        }))
    }

    /// The databases of this name, or that had this name where they were discovered.
    pub async fn databases(
        &self,
        name: &str,
    ) -> Result<Vec<Resource<DatabaseSpecV3>>, ClusterError> {
        self.all("db_server", Selection::Name(name), |listed| match listed {
            Listed::DatabaseServer(server) => {
                let database = server.spec?.database?;
                Resource::new(database.metadata, database.spec)
            }
            Listed::AppServer(_) | Listed::KubernetesServer(_) => None,
        })
        .await
    }

    /// The Kubernetes clusters that are meant, in the cluster's order.
    pub async fn kubernetes_clusters(
        &self,
        selection: Selection<'_>,
    ) -> Result<Vec<Resource<KubernetesClusterSpecV3>>, ClusterError> {
        self.all("kube_server", selection, |listed| match listed {
            Listed::KubernetesServer(server) => {
                let cluster = server.spec?.cluster?;
                let spec = cluster.spec.unwrap_or_default();
                Resource::new(cluster.metadata, Some(spec))
            }
            Listed::AppServer(_) | Listed::DatabaseServer(_) => None,
        })
        .await
    }

    /// Every page of one kind, each resource once, at its first place.
    async fn all<S>(
        &self,
        kind: &str,
        selection: Selection<'_>,
        read: impl Fn(Listed) -> Option<Resource<S>>,
    ) -> Result<Vec<Resource<S>>, ClusterError> {
        let (predicate, labels) = match selection {
            Selection::Name(name) => (by_name(name), BTreeMap::new()),
            Selection::Labels(labels) => (String::new(), labels.clone()),
        };
        let query = ListResourcesRequest {
            resource_type: kind.to_owned(),
            namespace: NAMESPACE.into(),
            limit: PAGE,
            labels: labels.into_iter().collect(),
            predicate_expression: predicate,
            ..ListResourcesRequest::default()
        };
        let listed = pages(query, |query| self.list_resources(query)).await?;
        Ok(once(listed.into_iter().filter_map(read)))
    }
}

/// What is on every page of the answer to `query`.
async fn pages<F>(
    mut query: ListResourcesRequest,
    ask: impl Fn(ListResourcesRequest) -> F,
) -> Result<Vec<Listed>, ClusterError>
where
    F: Future<Output = Result<ListResourcesResponse, ClusterError>>,
{
    let mut listed = Vec::new();
    for _ in 0..MAX_PAGES {
        let page = ask(query.clone()).await?;
        listed.extend(page.resources.into_iter().filter_map(|item| item.resource));
        if page.next_key.is_empty() {
            return Ok(listed);
        }
        query.start_key = page.next_key;
    }
    Err(endless("ListResources"))
}

/// Each resource at its first place.
fn once<S>(resources: impl Iterator<Item = Resource<S>>) -> Vec<Resource<S>> {
    let mut seen = HashSet::new();
    resources
        .filter(|resource| seen.insert(resource.name.clone()))
        .collect()
}

/// The condition that upstream's agent asks with.
fn by_name(name: &str) -> String {
    let name = quoted(name);
    format!(
        "(name == {name}) || (labels[{}] == {name})",
        quoted(DISCOVERED_NAME)
    )
}

/// A string literal of Go, in whose syntax conditions are written: nothing in it can end it.
fn quoted(text: &str) -> String {
    let mut literal = String::from('"');
    for c in text.chars() {
        match c {
            '"' => literal.push_str("\\\""),
            '\\' => literal.push_str("\\\\"),
            '\u{7}' => literal.push_str("\\a"),
            '\u{8}' => literal.push_str("\\b"),
            '\t' => literal.push_str("\\t"),
            '\n' => literal.push_str("\\n"),
            '\u{b}' => literal.push_str("\\v"),
            '\u{c}' => literal.push_str("\\f"),
            '\r' => literal.push_str("\\r"),
            ' '..='~' => literal.push(c),
            // Of the others, what Rust shows as it is, Go shows so too.
            c if c.escape_debug().count() == 1 => literal.push(c),
            c => {
                let number = u32::from(c);
                let _written = match number {
                    0..=0x7f => write!(literal, "\\x{number:02x}"),
                    0x80..=0xffff => write!(literal, "\\u{number:04x}"),
                    _ => write!(literal, "\\U{number:08x}"),
                };
            }
        }
    }
    literal.push('"');
    literal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::proto::PaginatedResource;
    use crate::pb::types::{KubernetesClusterV3, KubernetesServerSpecV3, KubernetesServerV3};

    /// A page with one agent that serves a Kubernetes cluster of this name.
    fn page(name: &str, next: &str) -> ListResourcesResponse {
        let cluster = KubernetesClusterV3 {
            metadata: Some(Metadata {
                name: name.to_owned(),
                ..Metadata::default()
            }),
            ..KubernetesClusterV3::default()
        };
        let server = KubernetesServerV3 {
            spec: Some(KubernetesServerSpecV3 {
                cluster: Some(cluster),
                ..KubernetesServerSpecV3::default()
            }),
            ..KubernetesServerV3::default()
        };
        ListResourcesResponse {
            resources: vec![PaginatedResource {
                resource: Some(Listed::KubernetesServer(server)),
            }],
            next_key: next.to_owned(),
            ..ListResourcesResponse::default()
        }
    }

    #[tokio::test]
    async fn pages_are_followed_to_their_end_and_no_further() {
        let listed = pages(ListResourcesRequest::default(), |query| async move {
            Ok(match query.start_key.as_str() {
                "" => page("a", "1"),
                "1" => page("b", "2"),
                _ => page("a", ""),
            })
        });
        let names = listed
            .await
            .unwrap()
            .into_iter()
            .map(|listed| match listed {
                Listed::KubernetesServer(server) => {
                    let cluster = server.spec.unwrap().cluster.unwrap();
                    Resource::new(cluster.metadata, Some(())).unwrap()
                }
                other => panic!("{other:?}"),
            });
        let names: Vec<String> = once(names).into_iter().map(|found| found.name).collect();
        assert_eq!(names, ["a", "b"]);

        let endless = pages(ListResourcesRequest::default(), |_| async {
            Ok(page("a", "1"))
        });
        assert!(endless.await.is_err());
    }

    #[test]
    fn names_are_quoted_as_go_quotes_them() {
        for (name, literal) in [
            ("k1", r#""k1""#),
            ("", r#""""#),
            (
                r#"x" || true || name == "y"#,
                r#""x\" || true || name == \"y""#,
            ),
            (r"a\", r#""a\\""#),
            ("a\nb\tc\r", r#""a\nb\tc\r""#),
            ("\u{7}\u{8}\u{b}\u{c}", r#""\a\b\v\f""#),
            ("\0\u{1b}\u{7f}", r#""\x00\x1b\x7f""#),
            ("日本é", "\"日本é\""),
            ("\u{85}\u{2028}\u{feff}", r#""\u0085\u2028\ufeff""#),
            ("\u{10ffff}", r#""\U0010ffff""#),
            ("it's `so`", "\"it's `so`\""),
        ] {
            assert_eq!(quoted(name), literal, "{name:?}");
        }
        assert_eq!(
            by_name("k1"),
            r#"(name == "k1") || (labels["teleport.internal/discovered-name"] == "k1")"#
        );
    }

    #[test]
    fn a_resource_without_a_name_or_content_is_none() {
        assert!(Resource::<()>::new(None, Some(())).is_none());
        assert!(Resource::<()>::new(Some(Metadata::default()), None).is_none());
    }
}
