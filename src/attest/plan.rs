//! The `attestors` section of a service.

use std::sync::Arc;

use super::{ATTESTORS, Attestor, Attestors, unix};
use crate::yaml::{Fields, Tree};

/// The order in which a configuration file lists the sections (upstream writes it so).
const WRITTEN: &[&str] = &[
    "kubernetes",
    "podman",
    "docker",
    "systemd",
    "unix",
    "sigstore",
];

/// The configured attestors. Nothing was touched yet.
#[derive(Debug, Clone)]
pub struct Plan {
    attestors: Vec<Arc<dyn Attestor>>,
}

impl Default for Plan {
    /// `unix` with its defaults, nothing else.
    fn default() -> Self {
        Self {
            attestors: vec![Arc::new(unix::Unix::default())],
        }
    }
}

impl Plan {
    /// Reads the `attestors` key of a service; problems go to `fields`, and `None` comes back then.
    pub fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        if !fields.has("attestors") {
            fields.ignore("attestors");
            return Some(Self::default());
        }
        let mut section = fields.section("attestors")?;
        let mut attestors = Vec::new();
        for kind in ATTESTORS {
            attestors.extend(kind.parse(section.section(kind.name())));
        }
        let sound = !section.problems().has_errors();
        section.finish();
        sound.then_some(Self { attestors })
    }

    /// The `attestors` section as written in a configuration file, defaults included.
    pub fn emit(&self) -> Tree {
        let section = |name: &&'static str| {
            let kind = ATTESTORS.iter().find(|kind| kind.name() == *name)?;
            let configured = self.attestors.iter().find(|a| a.name() == *name);
            Some(((*name).to_owned(), kind.emit(configured.map(AsRef::as_ref))))
        };
        Tree::Map(WRITTEN.iter().filter_map(section).collect())
    }

    /// The attestors, ready to run.
    pub fn build(&self) -> Attestors {
        Attestors::new(self.attestors.iter().map(Arc::clone))
    }
}

/// The section of an attestor that is on. One that is off may be unfinished: of it, only keys are told that are
/// none of its `keys`, since one of them may have been meant to turn it on.
pub(super) fn enabled<'a>(section: Option<Fields<'a>>, keys: &[&str]) -> Option<Fields<'a>> {
    let mut fields = section?;
    if fields.bool("enabled").unwrap_or(false) {
        return Some(fields);
    }
    for key in keys {
        fields.ignore(key);
    }
    fields.finish();
    None
}

/// `enabled: false`, how a configuration file shows an attestor that is off.
pub(super) fn disabled() -> Tree {
    Tree::map([("enabled", Some(Tree::Bool(false)))])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn read(source: &str) -> (Option<Plan>, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "", &problems).unwrap();
        let plan = Plan::parse(&mut fields);
        fields.finish();
        (plan, problems.render("t"))
    }

    const DEFAULTS: &str = "kubernetes:\n  enabled: false\npodman:\n  enabled: false\n\
        docker:\n  enabled: false\nsystemd:\n  enabled: false\nunix:\n  \
        binary_hash_max_size_bytes: 1073741824\nsigstore:\n  enabled: false\n";

    #[test]
    fn the_defaults_are_written_as_upstream_writes_them() {
        for source in ["listen: x\n", "attestors:\n", "attestors: {}\n"] {
            let node = parse(source).unwrap();
            let problems = Problems::new();
            let mut fields = Fields::new(&node, "", &problems).unwrap();
            let plan = Plan::parse(&mut fields).unwrap();
            assert_eq!(emit::emit(&plan.emit()), DEFAULTS, "{source}");
        }
    }

    #[test]
    fn what_is_configured_reads_back() {
        let source = "attestors:\n  systemd:\n    enabled: true\n  unix:\n    \
            binary_hash_max_size_bytes: -1\n  docker:\n    enabled: true\n  \
            podman:\n    enabled: false\n    addr: x\n";
        let (plan, problems) = read(source);
        assert_eq!(problems, "");
        let text = emit::emit(&plan.unwrap().emit());
        let enabled = DEFAULTS
            .replace("systemd:\n  enabled: false", "systemd:\n  enabled: true")
            .replace(
                "docker:\n  enabled: false",
                "docker:\n  enabled: true\n  addr: unix:///var/run/docker.sock",
            )
            .replace("1073741824", "-1");
        assert_eq!(text, enabled);
    }

    #[test]
    fn problems_are_told_by_name() {
        for (source, expected) in [
            ("attestors: {unix: {binary_hash_max_size_bytes: -2}}", "-1"),
            ("attestors: {systemd: {enabled: 1}}", "true"),
            (
                "attestors: {podman: {enabled: true}}",
                "attestors.podman.addr: ",
            ),
            (
                "attestors: {podman: {enabled: true, addr: 'unix://run/x'}}",
                "a slash missing",
            ),
            (
                "attestors: {docker: {enabled: true, addr: 'tcp://x:1'}}",
                "attestors.docker.addr: ",
            ),
            (
                "attestors: {kubernetes: {enabled: true, kubelet: {secure_port: 70000}}}",
                "attestors.kubernetes.kubelet.secure_port: ",
            ),
            (
                "attestors: {sigstore: {enabled: true, credentials_path: /nonexistent}}",
                "attestors.sigstore.credentials_path: ",
            ),
            ("attestors: [unix]", "must be a mapping"),
            ("attestors: {unix: 3}", "must be a mapping"),
        ] {
            let (plan, problems) = read(source);
            assert!(plan.is_none(), "{source}");
            assert!(problems.contains(expected), "{source}: {problems}");
        }
    }

    #[test]
    fn unknown_keys_warn_only() {
        for (source, meant) in [
            ("attestors: {systemdd: {enabled: true}}", "systemd"),
            ("attestors: {docker: {enable: true, addr: x}}", "enabled"),
            ("attestors: {podman: {enable: true}}", "enabled"),
            ("attestors: {kubernetes: {enable: true}}", "enabled"),
            ("attestors: {sigstore: {enable: true}}", "enabled"),
        ] {
            let (plan, problems) = read(source);
            assert!(plan.is_some(), "{source}");
            let hint = format!("did you mean `{meant}`?");
            assert!(problems.contains(&hint), "{source}: {problems}");
        }
    }
}
