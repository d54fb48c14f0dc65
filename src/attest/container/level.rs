//! How each engine names the cgroups of its containers.

use super::cgroup::Named;

/// Services of systemd below which pods really are: a runtime that was not told that systemd manages
/// cgroups puts them below itself. Everything else below a service was made by that service.
const RUNTIMES: &[&str] = &[
    "containerd.service",
    "cri-docker.service",
    "crio.service",
    "docker.service",
    "k3s-agent.service",
    "k3s.service",
    "kubelet.service",
    "rke2-agent.service",
    "rke2-server.service",
];

/// `docker-<id>.scope` with systemd; below `docker`, or below a user's `app.slice`, without.
pub(crate) fn docker(levels: &[&str]) -> Option<Named> {
    let id = match levels {
        [.., "docker" | "app.slice", name] if is_id(name) => Some(*name),
        [.., name] => inside(name, "docker-", ".scope").filter(|id| is_id(id)),
        [] => None,
    };
    id.map(container)
}

/// `libpod-<id>.scope` with systemd, `libpod-<id>` without, `libpod-payload-<id>` where the container
/// shares the cgroup of the unit that started it.
pub(crate) fn podman(levels: &[&str]) -> Option<Named> {
    let name = levels.last()?;
    let bare = name.strip_suffix(".scope").unwrap_or(name);
    bare.strip_prefix("libpod-payload-")
        .or_else(|| bare.strip_prefix("libpod-"))
        .filter(|id| is_id(id))
        .map(container)
}

/// A cgroup that Podman makes for itself, and that containers share where Podman may make no others:
/// `podman-<digits>.scope`.
pub(crate) fn shared_by_podman(name: &str) -> bool {
    inside(name, "podman-", ".scope").is_some_and(is_number)
}

/// A level that names the container, right below one that names the pod; or both in one, where the
/// runtime took systemd's form of a cgroup for a path.
///
/// The kubelet cannot be asked for a process of the container, so that places where others than it
/// make cgroups do not count.
pub(crate) fn kubernetes(levels: &[&str]) -> Option<Named> {
    let named = match levels {
        [outer @ .., name] if name.contains(':') => {
            let mut parts = name.split(':');
            match (parts.next(), parts.next(), parts.next(), parts.next()) {
                (Some(pod), Some(_runtime), Some(id), None) => pair(pod, id).map(|n| (outer, n)),
                _ => None,
            }
        }
        [outer @ .., pod, name] => pair(pod, name).map(|named| (outer, named)),
        _ => None,
    };
    named
        .filter(|(outer, _)| !outer.iter().any(|name| is_foreign(name)))
        .map(|(_, named)| named)
}

fn container(id: &str) -> Named {
    Named {
        id: id.to_owned(),
        pod: None,
    }
}

fn pair(pod: &str, container: &str) -> Option<Named> {
    Some(Named {
        pod: Some(pod_uid(pod)?),
        id: pods_container(container)?.to_owned(),
    })
}

/// `pod<uid>`, or `kubepods-burstable-pod<uid>.slice` with `_` for `-`.
fn pod_uid(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (parent, uid) = slice.rsplit_once("-pod")?;
            parent.contains("kubepods").then_some(uid)?
        }
        None => name.strip_prefix("pod")?,
    };
    let uid = uid.replace('_', "-");
    is_uid(&uid).then_some(uid)
}

/// `<id>`, `<runtime>-<id>` or `<runtime>-<id>.scope`. A runtime's monitor is no part of the container.
fn pods_container(name: &str) -> Option<&str> {
    let bare = name.strip_suffix(".scope").unwrap_or(name);
    let (runtime, id) = bare.rsplit_once('-').unwrap_or(("", bare));
    let of_container = runtime
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
        && !runtime.ends_with("conmon");
    (of_container && is_id(id)).then_some(id)
}

/// Whether the cgroups below this one are made by somebody who is no runtime of containers.
fn is_foreign(name: &str) -> bool {
    name.ends_with(".service") && !RUNTIMES.contains(&name)
}

fn inside<'a>(name: &'a str, prefix: &str, suffix: &str) -> Option<&'a str> {
    name.strip_prefix(prefix)?.strip_suffix(suffix)
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(is_hex)
}

/// A UUID, or the hash that stands for one in pods that are described by a file on the node.
fn is_uid(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    matches!(lengths.as_slice(), [8, 4, 4, 4, 12] | [32])
        && groups.iter().all(|group| group.bytes().all(is_hex))
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests;
