//! Every YAML that we show works: fences in the documentation and files of `examples/`.

use std::fs;
use std::path::{Path, PathBuf};

use tbot::config::{self, Overlay, Source};
use tbot::embedded::{discovery, resources};
use tbot::env::Env;

use crate::common::repository;

fn files(path: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            files(&entry.unwrap().path(), extension, found);
        }
    } else if path.extension().is_some_and(|e| e == extension) {
        found.push(path.to_owned());
    }
}

/// The fenced blocks of a language in a Markdown text, with the line that each starts at.
fn fences<'a>(markdown: &'a str, language: &str) -> Vec<(usize, &'a str)> {
    let open = format!("```{language}\n");
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = markdown[at..].find(&open) {
        let from = at + start + open.len();
        let length = markdown[from..].find("```").expect("a closed fence");
        let line = markdown[..from].lines().count() + 1;
        found.push((line, &markdown[from..from + length]));
        at = from + length + 3;
    }
    found
}

/// Why the text is neither a configuration without problems, nor a file of resources, nor one of
/// the embedded cluster.
fn problem(name: &str, text: &str) -> Option<String> {
    // For Kubernetes and for Helm, which judge them.
    if text.lines().any(|line| line.starts_with("apiVersion:")) || name.ends_with("-values.yaml") {
        return None;
    }
    if text.lines().any(|line| line.starts_with("kind:")) {
        return resources::parse(name, text, None)
            .err()
            .map(|rejected| rejected.to_string());
    }
    if text.lines().any(|line| line == "discovery_service:") {
        return discovery::config::parse(name, text)
            .err()
            .map(|error| error.to_string());
    }
    let source = Source {
        name: name.to_owned(),
        text: text.to_owned(),
    };
    match config::load(Some(&source), &Overlay::default(), &Env::of_process()) {
        Err(invalid) => Some(invalid.to_string()),
        Ok(loaded) => {
            let mut lines = loaded.plan.for_start();
            lines.extend(loaded.warnings);
            lines.extend(loaded.conflicts);
            (!lines.is_empty()).then(|| lines.join("\n"))
        }
    }
}

#[test]
fn every_yaml_we_show_is_accepted_without_a_warning() {
    let mut shown = Vec::new();
    let mut pages = vec![repository().join("README.md")];
    files(&repository().join("docs"), "md", &mut pages);
    for page in &pages {
        let text = fs::read_to_string(page).unwrap();
        for (line, yaml) in fences(&text, "yaml") {
            shown.push((format!("{}:{line}", page.display()), yaml.to_owned()));
        }
    }
    let mut examples = Vec::new();
    files(&repository().join("examples"), "yaml", &mut examples);
    for example in &examples {
        shown.push((
            example.display().to_string(),
            fs::read_to_string(example).unwrap(),
        ));
    }
    assert!(shown.len() > 10, "only {} found", shown.len());
    let wrong: Vec<_> = shown
        .iter()
        .filter_map(|(name, text)| problem(name, text))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_wrong_example_would_be_noticed() {
    for text in [
        "version: v2\nproxy_server: a:443\nonboarding: {join_method: iam, token: x}\nunknown: 1\n",
        "version: v2\nproxy_server: a:443\nonboarding: {join_method: none, token: x}\n",
        "kind: bot\nversion: v9\nmetadata: {name: x}\n",
    ] {
        assert!(problem("x", text).is_some(), "{text}");
    }
    assert_eq!(
        fences("a\n```yaml\nb: 1\n```\nc\n", "yaml"),
        [(3, "b: 1\n")]
    );
}
