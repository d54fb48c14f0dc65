//! Attributes of a workload by the names that rules and templates have for them.

use std::collections::HashMap;

use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;

/// Every attribute that is set, with its value as text.
pub(super) fn flat(all: &WorkloadAttrs) -> Vec<(String, String)> {
    let mut list = List(Vec::new());
    if let Some(unix) = &all.unix {
        list.add("unix.attested", unix.attested);
        list.add("unix.pid", unix.pid);
        list.add("unix.uid", unix.uid);
        list.add("unix.gid", unix.gid);
        list.optional("unix.binary_path", unix.binary_path.as_deref());
        list.optional("unix.binary_hash", unix.binary_hash.as_deref());
    }
    if let Some(systemd) = &all.systemd {
        list.add("systemd.attested", systemd.attested);
        list.text("systemd.service", &systemd.service);
    }
    if let Some(docker) = &all.docker {
        list.add("docker.attested", docker.attested);
        if let Some(container) = &docker.container {
            list.text("docker.container.name", &container.name);
            list.text("docker.container.image", &container.image);
            list.text("docker.container.image_digest", &container.image_digest);
            list.labels("docker.container.labels", &container.labels);
        }
    }
    if let Some(podman) = &all.podman {
        list.add("podman.attested", podman.attested);
        if let Some(container) = &podman.container {
            list.text("podman.container.name", &container.name);
            list.text("podman.container.image", &container.image);
            list.text("podman.container.image_digest", &container.image_digest);
            list.labels("podman.container.labels", &container.labels);
        }
        if let Some(pod) = &podman.pod {
            list.text("podman.pod.name", &pod.name);
            list.labels("podman.pod.labels", &pod.labels);
        }
    }
    if let Some(pod) = &all.kubernetes {
        list.add("kubernetes.attested", pod.attested);
        list.text("kubernetes.namespace", &pod.namespace);
        list.text("kubernetes.pod_name", &pod.pod_name);
        list.text("kubernetes.pod_uid", &pod.pod_uid);
        list.text("kubernetes.service_account", &pod.service_account);
        list.labels("kubernetes.labels", &pod.labels);
        if let Some(container) = &pod.container {
            list.text("kubernetes.container.name", &container.name);
            list.text("kubernetes.container.image", &container.image);
            list.text("kubernetes.container.image_digest", &container.image_digest);
        }
    }
    if let Some(sigstore) = &all.sigstore {
        list.add("sigstore.payloads", sigstore.payloads.len());
    }
    list.0
}

struct List(Vec<(String, String)>);

impl List {
    fn add(&mut self, name: &str, value: impl ToString) {
        self.0.push((format!("workload.{name}"), value.to_string()));
    }

    fn text(&mut self, name: &str, value: &str) {
        self.optional(name, Some(value).filter(|value| !value.is_empty()));
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    fn labels(&mut self, name: &str, labels: &HashMap<String, String>) {
        let mut all: Vec<_> = labels.iter().collect();
        all.sort();
        for (key, value) in all {
            self.add(&format!("{name}[{key:?}]"), value);
        }
    }
}
