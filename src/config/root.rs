//! The top level of the file, and the rules between its sections.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cluster::network::Settings;
use crate::cluster::ping;
use crate::destination::{self, DestinationPlan};
use crate::env::Env;
use crate::yaml::{Fields, Node, Problems, nearest};

use super::overlay::Overlay;
use super::plan::{Plan, Server};
use super::{DEFAULT_STORAGE, join_uri, lifetime, onboarding, services};

/// Makes the plan; `None` only if there are errors among `problems`.
pub(super) fn plan(
    tree: &Node,
    overlay: &Overlay,
    env: &Env,
    problems: &Problems,
    conflicts: &mut Vec<String>,
) -> Option<Plan> {
    let mut root = Fields::new(tree, "", problems)?;
    version(&mut root);
    let oneshot = root.bool("oneshot").unwrap_or_default();
    let debug = root.bool("debug").unwrap_or_default();
    let insecure = root.bool("insecure").unwrap_or_default();
    if root.bool("fips") == Some(true) {
        root.error(
            "fips",
            "this program is not built with a FIPS-validated module",
            Some("remove it, or use a FIPS build of upstream's agent"),
        );
    }
    let mut server = server(&mut root);
    let mut onboarding = onboarding::read(&mut root, insecure);
    join_uri::apply(&mut root, &mut server, &mut onboarding);
    let storage = storage(&mut root);
    let agent = lifetime::of_agent(&mut root, oneshot);
    let services = services::read(&mut root, agent, oneshot);
    let diag_addr = listen_address(&mut root, "diag_addr");
    if root.bool("scoped") == Some(true) {
        root.error(
            "scoped",
            "scoped mode needs a v19 cluster, which this version does not speak to",
            Some("remove it"),
        );
    }
    root.finish();
    let storage = storage?;
    let written = services.iter().filter_map(|service| {
        let destination = service.plan.destination()?;
        Some((service.name.as_str(), destination))
    });
    *conflicts = shared(std::iter::once(("storage", &storage)).chain(written));
    Some(Plan {
        server,
        network: Settings::from_env(env),
        use_proxy_address: env.get("TBOT_USE_PROXY_ADDR") == Some("yes"),
        onboarding,
        storage,
        services,
        lifetime: agent,
        oneshot,
        debug,
        diag_addr,
        diag_socket: overlay.diag_socket.clone(),
        pid_file: overlay.pid_file.clone(),
    })
}

/// Reports a version that is none; [`super::v1`] has turned older ones into this one.
fn version(root: &mut Fields<'_>) {
    let Some(other) = root.string("version").filter(|version| version != "v2") else {
        return;
    };
    let hint = match nearest(&other, ["v2"]) {
        Some(_) => "did you mean `v2`?",
        None => "write `version: v2`",
    };
    root.error(
        "version",
        format!("unrecognized config version {other:?}"),
        Some(hint),
    );
}

fn server(root: &mut Fields<'_>) -> Option<Server> {
    let proxy = cluster_address(root, "proxy_server", "example.teleport.sh:443");
    let auth = cluster_address(root, "auth_server", "auth.example.com:3025");
    match (proxy, auth) {
        (Some(proxy), None) => Some(Server::Proxy(proxy)),
        (Some(proxy), Some(_)) => {
            root.warn(
                "auth_server",
                "`proxy_server` is set too, and it is the one that is used",
                Some("remove one of them: upstream's 18.0 refuses to start with both"),
            );
            Some(Server::Proxy(proxy))
        }
        (None, Some(auth)) => Some(Server::Auth(auth)),
        (None, None) => None,
    }
}

/// The address of a cluster: a scheme before it and a missing port are tolerated, as upstream does.
fn cluster_address(root: &mut Fields<'_>, key: &str, example: &str) -> Option<String> {
    let text = root.string(key)?;
    let bare = ping::bare(&text);
    if !bare.is_empty() && (is_host_port(bare) || is_host_port(&format!("{bare}:0"))) {
        return Some(text);
    }
    let hint = format!("write host:port, for example {example}");
    root.error(key, format!("{text:?} is no address"), Some(&hint));
    None
}

fn listen_address(root: &mut Fields<'_>, key: &str) -> Option<String> {
    let text = root.string(key)?;
    if is_host_port(&text) {
        return Some(text);
    }
    let hint = "write host:port, for example 127.0.0.1:3001";
    root.error(
        key,
        format!("{text:?} is no address to listen on"),
        Some(hint),
    );
    None
}

/// `host:port` with a port number; IPv6 hosts in brackets; an empty host is every address.
pub(super) fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let bracketed = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .is_some_and(|h| h.parse::<std::net::Ipv6Addr>().is_ok());
    let plain = !host.contains(|c: char| c.is_whitespace() || "/:@[]?#".contains(c));
    (bracketed || plain) && port.parse::<u16>().is_ok()
}

fn storage(root: &mut Fields<'_>) -> Option<Arc<dyn DestinationPlan>> {
    if root.has("storage") {
        return destination::read(root, "storage");
    }
    root.ignore("storage");
    match destination::from_uri(DEFAULT_STORAGE) {
        Ok(storage) => Some(storage),
        Err(problem) => {
            root.error("storage", problem, None);
            None
        }
    }
}

/// One line for each destination that several write to.
fn shared<'p>(
    destinations: impl Iterator<Item = (&'p str, &'p Arc<dyn DestinationPlan>)>,
) -> Vec<String> {
    let mut first: HashMap<String, &str> = HashMap::new();
    let mut lines = Vec::new();
    for (name, destination) in destinations {
        let key = destination.key();
        // Two services in memory have nothing in common.
        if key.starts_with("memory") {
            continue;
        }
        if let Some(other) = first.get(key.as_str()) {
            lines.push(format!(
                "{name} and {other} write to the same destination, {destination}: give each its own"
            ));
        } else {
            first.insert(key, name);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for good in [
            "example.com:443",
            "127.0.0.1:0",
            "[::1]:3080",
            ":3001",
            "localhost:1",
        ] {
            assert!(is_host_port(good), "{good}");
        }
        for bad in [
            "example.com",
            "https://example.com:443",
            "::1:80",
            "[::g]:1",
            "a b:1",
            "a:70000",
            "a:",
            "a@b:1",
        ] {
            assert!(!is_host_port(bad), "{bad}");
        }
    }
}
