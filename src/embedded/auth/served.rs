//! Applications, databases and Kubernetes clusters as agents see them: listed page by page, and
//! routed to in certificates. Whom the roles do not show a resource, it does not exist.

use prost::Message as _;

use super::predicate::Predicate;
use super::roles::RoleSet;
use crate::crypto::random;
use crate::embedded::access::Access;
use crate::embedded::store::{Resource, Tx};
use crate::embedded::{ClusterState, SERVER_VERSION};
use crate::pb::proto::{
    ListResourcesRequest, ListResourcesResponse, PaginatedResource, RouteToDatabase,
    UserCertsRequest, paginated_resource,
};
use crate::pb::types as wire;
use crate::refusal::Refusal;

/// The largest page, in resources; also the page of a request that names no size.
const MAX_PAGE: usize = 1000;
/// The size from which on a page is full, in bytes: clients read messages of 4 MiB.
const FULL_PAGE: usize = 1024 * 1024;

/// What an agent looks for, and what stands for it here.
struct Served {
    /// The type in requests; each resource stands for its one server.
    server: &'static str,
    /// The kind of the resource.
    kind: &'static str,
    /// What roles select it by.
    selector: &'static str,
    message: fn(&ClusterState, Resource) -> paginated_resource::Resource,
}

const APP: Served = Served {
    server: "app_server",
    kind: "app",
    selector: "app_labels",
    message: app_server,
};
const DATABASE: Served = Served {
    server: "db_server",
    kind: "db",
    selector: "db_labels",
    message: db_server,
};
const KUBE_CLUSTER: Served = Served {
    server: "kube_server",
    kind: "kube_cluster",
    selector: "kubernetes_labels",
    message: kube_server,
};

/// One page of what `roles` let their holder see.
pub(super) fn list(
    state: &ClusterState,
    tx: &Tx<'_>,
    roles: &[String],
    request: &ListResourcesRequest,
) -> Result<ListResourcesResponse, Refusal> {
    let wanted = request.resource_type.as_str();
    let served = [&APP, &DATABASE, &KUBE_CLUSTER]
        .into_iter()
        .find(|served| served.server == wanted)
        .ok_or_else(|| match wanted {
            "" => Refusal::bad_parameter("missing parameter resource type"),
            other => Refusal::unimplemented(format!(
                "resource type {other:?} is not listed by this cluster"
            )),
        })?;
    let access = Access::of(tx, roles)?;
    if let Some(verb) = ["list", "read"]
        .iter()
        .find(|verb| access.denies(served.server, verb))
    {
        let text = format!("access denied to perform action {verb:?} on {wanted:?}");
        return Err(Refusal::denied(text));
    }
    let limit = match usize::try_from(request.limit) {
        Ok(0) => MAX_PAGE,
        Ok(limit) => limit.min(MAX_PAGE),
        Err(_negative) => return Err(Refusal::bad_parameter("nonpositive parameter limit")),
    };
    let predicate = Predicate::parse(&request.predicate_expression).map_err(|problem| {
        Refusal::bad_parameter(format!("failed to parse predicate expression: {problem}"))
    })?;
    let matches = |resource: &Resource| {
        let mut labels = request.labels.iter();
        access.sees(served.selector, &resource.labels)
            && labels.all(|(key, value)| resource.labels.get(key) == Some(value))
            && predicate.holds(&resource.name, &resource.labels)
    };
    let mut page = ListResourcesResponse::default();
    let mut size = 0;
    tx.each_from(served.kind, &request.start_key, |resource| {
        if !matches(&resource) {
            return true;
        }
        if page.resources.len() == limit || size >= FULL_PAGE {
            page.next_key = resource.name;
            return false;
        }
        let resource = PaginatedResource {
            resource: Some((served.message)(state, resource)),
        };
        size += resource.encoded_len();
        page.resources.push(resource);
        true
    })?;
    Ok(page)
}

/// What a certificate is for beside its cluster; by default nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Routes {
    /// A Kubernetes cluster; empty if none.
    pub(super) kube_cluster: String,
    /// An application.
    pub(super) app: Option<AppRoute>,
    /// A database.
    pub(super) database: Option<RouteToDatabase>,
}

/// The way to an application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AppRoute {
    /// Its name.
    pub(super) name: String,
    /// The host name that leads to it.
    pub(super) public_addr: String,
    /// A new session, 64 hexadecimal digits.
    pub(super) session: String,
}

impl Routes {
    /// Where `request` wants to go, as far as the roles lead there.
    pub(super) fn of(
        state: &ClusterState,
        tx: &Tx<'_>,
        roles: &RoleSet,
        request: &UserCertsRequest,
    ) -> Result<Self, Refusal> {
        let access = Access::of(tx, &roles.names)?;
        let find = |served: &Served, name: &str| -> Result<Option<Resource>, Refusal> {
            let found = tx.get(served.kind, name)?;
            Ok(found.filter(|found| access.sees(served.selector, &found.labels)))
        };
        let mut routes = Self::default();
        let name = &request.kubernetes_cluster;
        if !name.is_empty() {
            find(&KUBE_CLUSTER, name)?.ok_or_else(|| {
                Refusal::bad_parameter(format!(
                    "Kubernetes cluster {name:?} is not registered in this Teleport cluster; \
                     create the kube_cluster, or a role that sees its labels"
                ))
            })?;
            routes.kube_cluster.clone_from(name);
        }
        let app = request.route_to_app.as_ref();
        if let Some(route) = app.filter(|route| !route.name.is_empty()) {
            let elsewhere = !route.cluster_name.is_empty() && route.cluster_name != state.name;
            let found = find(&APP, &route.name)?
                .filter(|_| !elsewhere)
                .ok_or_else(|| Refusal::not_found(format!("app {:?} not found", route.name)))?;
            let special = [
                &route.aws_role_arn,
                &route.azure_identity,
                &route.gcp_service_account,
                &route.aws_credential_process_credentials,
            ];
            if special.iter().any(|text| !text.is_empty()) || route.target_port != 0 {
                return Err(Refusal::unimplemented(
                    "this cluster makes no certificates for cloud consoles and single ports",
                ));
            }
            routes.app = Some(AppRoute {
                public_addr: public_addr(state, &found),
                name: found.name,
                session: hex::encode(random::<32>()),
            });
        }
        let database = request.route_to_database.as_ref();
        if let Some(route) = database.filter(|route| !route.service_name.is_empty()) {
            let found = find(&DATABASE, &route.service_name)?.ok_or_else(|| {
                Refusal::not_found(format!("database {:?} not found", route.service_name))
            })?;
            routes.database = Some(database_route(roles, route, &found)?);
        }
        Ok(routes)
    }
}

/// The route, with the protocol that the database has in truth.
fn database_route(
    roles: &RoleSet,
    route: &RouteToDatabase,
    database: &Resource,
) -> Result<RouteToDatabase, Refusal> {
    let protocol = database.spec_text("/protocol");
    if !route.roles.is_empty() {
        return Err(Refusal::unimplemented(
            "this cluster makes no certificates for roles inside of databases",
        ));
    }
    if protocol == "mongodb" && route.username.is_empty() {
        return Err(Refusal::bad_parameter(format!(
            "must provide database user name to generate certificate for database {:?}",
            route.service_name
        )));
    }
    // A Teleport cluster lets its database service find this out; here is none.
    let lists =
        |names: &[String], wanted: &str| names.iter().any(|name| name == "*" || name == wanted);
    for (what, key, allowed, denied, wanted) in [
        (
            "user",
            "db_users",
            &roles.database_users,
            &roles.denied_database_users,
            &route.username,
        ),
        (
            "name",
            "db_names",
            &roles.database_names,
            &roles.denied_database_names,
            &route.database,
        ),
    ] {
        if !wanted.is_empty() && (lists(denied, wanted) || !lists(allowed, wanted)) {
            return Err(Refusal::denied(format!(
                "access to db denied: no role allows the database {what} {wanted:?} (`{key}`)"
            )));
        }
    }
    Ok(RouteToDatabase {
        protocol: protocol.to_owned(),
        ..route.clone()
    })
}

/// The host name of an application: its own, or one below the proxy's.
fn public_addr(state: &ClusterState, app: &Resource) -> String {
    match app.spec_text("/public_addr") {
        "" => {
            let addr = state.public_addr.as_str();
            let proxy = addr.rsplit_once(':').map_or(addr, |(host, _port)| host);
            format!("{}.{proxy}", app.name)
        }
        addr => addr.to_owned(),
    }
}

fn metadata(resource: &Resource) -> wire::Metadata {
    wire::Metadata {
        name: resource.name.clone(),
        namespace: "default".to_owned(),
        description: resource.description.clone(),
        labels: resource.labels.clone().into_iter().collect(),
        expires: resource.expires.map(Into::into),
        revision: resource.revision.clone(),
    }
}

fn app_server(state: &ClusterState, app: Resource) -> paginated_resource::Resource {
    let metadata = metadata(&app);
    let spec = wire::AppSpecV3 {
        uri: app.spec_text("/uri").to_owned(),
        public_addr: public_addr(state, &app),
    };
    paginated_resource::Resource::AppServer(wire::AppServerV3 {
        kind: APP.server.to_owned(),
        sub_kind: String::new(),
        version: app.version.clone(),
        metadata: Some(metadata.clone()),
        spec: Some(wire::AppServerSpecV3 {
            version: SERVER_VERSION.to_owned(),
            hostname: state.name.clone(),
            host_id: state.name.clone(),
            app: Some(wire::AppV3 {
                kind: app.kind,
                sub_kind: app.sub_kind,
                version: app.version,
                metadata: Some(metadata),
                spec: Some(spec),
            }),
        }),
    })
}

fn db_server(state: &ClusterState, database: Resource) -> paginated_resource::Resource {
    let metadata = metadata(&database);
    let spec = wire::DatabaseSpecV3 {
        protocol: database.spec_text("/protocol").to_owned(),
        uri: database.spec_text("/uri").to_owned(),
    };
    paginated_resource::Resource::DatabaseServer(wire::DatabaseServerV3 {
        kind: DATABASE.server.to_owned(),
        sub_kind: String::new(),
        version: database.version.clone(),
        metadata: Some(metadata.clone()),
        spec: Some(wire::DatabaseServerSpecV3 {
            version: SERVER_VERSION.to_owned(),
            hostname: state.name.clone(),
            host_id: state.name.clone(),
            database: Some(wire::DatabaseV3 {
                kind: database.kind,
                sub_kind: database.sub_kind,
                version: database.version,
                metadata: Some(metadata),
                spec: Some(spec),
            }),
        }),
    })
}

fn kube_server(state: &ClusterState, cluster: Resource) -> paginated_resource::Resource {
    let metadata = metadata(&cluster);
    let aws = cluster.spec.get("aws").filter(|aws| aws.is_object());
    let aws = aws.map(|_| wire::KubeAws {
        region: cluster.spec_text("/aws/region").to_owned(),
        account_id: cluster.spec_text("/aws/account_id").to_owned(),
        name: cluster.spec_text("/aws/name").to_owned(),
    });
    paginated_resource::Resource::KubernetesServer(wire::KubernetesServerV3 {
        kind: KUBE_CLUSTER.server.to_owned(),
        sub_kind: String::new(),
        version: cluster.version.clone(),
        metadata: Some(metadata.clone()),
        spec: Some(wire::KubernetesServerSpecV3 {
            version: SERVER_VERSION.to_owned(),
            hostname: state.name.clone(),
            host_id: state.name.clone(),
            cluster: Some(wire::KubernetesClusterV3 {
                kind: cluster.kind,
                sub_kind: cluster.sub_kind,
                version: cluster.version,
                metadata: Some(metadata),
                spec: Some(wire::KubernetesClusterSpecV3 { aws }),
            }),
        }),
    })
}
