//! The shape of the sources: who may import whom, and what may not be written where.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::repository;

/// Modules by ring: each may use its own ring and those before it.
const RINGS: &[&[&str]] = &[
    &[
        "backoff",
        "clock",
        "crypto",
        "env",
        "exchange",
        "expression",
        "fsx",
        "health",
        "outbound",
        "pb",
        "query",
        "refusal",
        "renewal",
        "secret",
        "spiffe",
        "ssh",
        "telemetry",
        "websocket",
        "yaml",
    ],
    &["attest", "cluster", "destination"],
    &["join"],
    &["identity", "workload"],
    &["services"],
    &["config", "diag"],
    &["app"],
    &["cli", "install"],
];

/// Beside the rings: ring 0 and the verifying halves of join methods, nothing else.
const SIDE: &str = "embedded";

/// Lines of a file, tests included, at which it has to be split.
const MAX_LINES: usize = 900;

struct Source {
    /// Relative to the repository.
    path: PathBuf,
    text: String,
}

impl Source {
    /// The module below the crate's root that the file belongs to; `None` for `main.rs`, `lib.rs`.
    fn module(&self) -> Option<String> {
        let below = self.path.strip_prefix("src").ok()?;
        let first = below.components().next()?.as_os_str().to_str()?;
        let module = first.strip_suffix(".rs").unwrap_or(first);
        (!matches!(module, "main" | "lib")).then(|| module.to_owned())
    }

    /// Lines of code before the unit tests, with their numbers; comments left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let tests = self.path.ends_with("tests.rs")
            || self.path.components().any(|c| c.as_os_str() == "tests");
        self.text
            .lines()
            .take(if tests { 0 } else { usize::MAX })
            .take_while(|line| !line.starts_with("#[cfg(test)]"))
            .enumerate()
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
            .map(|(at, line)| (at + 1, line))
    }
}

fn sources(dir: &str) -> Vec<Source> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&repository().join(dir), &mut found);
    found.sort();
    found
        .into_iter()
        .map(|path| Source {
            text: fs::read_to_string(&path).unwrap(),
            path: path.strip_prefix(repository()).unwrap().to_owned(),
        })
        .collect()
}

fn ring(module: &str) -> Option<usize> {
    RINGS.iter().position(|ring| ring.contains(&module))
}

/// The paths below `crate::` that a line names: `use crate::{a::b, c}` names `a::b` and `c`.
fn named(line: &str) -> Vec<String> {
    let mut paths: Vec<String> = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        // `not_crate::` and `$crate::` are something else.
        if line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &line[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut path = String::new();
            for c in group.chars() {
                match c {
                    '}' if depth == 0 => break,
                    ',' if depth == 0 => {
                        paths.push(std::mem::take(&mut path));
                        continue;
                    }
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                path.push(c);
            }
            paths.push(path);
        } else {
            paths.push(
                rest.chars()
                    .take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':'))
                    .collect(),
            );
        }
    }
    paths
        .iter()
        .map(|path| path.trim().to_owned())
        .filter(|path| !path.is_empty())
        .collect()
}

/// Why `from` (a module, and the file it is in) may not name `path`, if so.
fn forbidden(from: &str, file: &Path, path: &str) -> Option<String> {
    let to = path.split("::").next().unwrap_or_default();
    if from == to {
        return None;
    }
    let verifies =
        file.ends_with("verify.rs") || file.components().any(|c| c.as_os_str() == "verify");
    if verifies && from == "join" {
        return (ring(to) != Some(0)).then(|| "a verifying half uses ring 0 only".to_owned());
    }
    if from == SIDE {
        let verifier = to == "join" && path.contains("::verify");
        return (ring(to) != Some(0) && !verifier)
            .then(|| "the cluster shares no agent logic".to_owned());
    }
    if to == SIDE {
        return (from != "cli").then(|| "only the command line starts the cluster".to_owned());
    }
    match (ring(from), ring(to)) {
        (Some(from), Some(to)) if to <= from => None,
        (Some(from), Some(to)) => Some(format!("ring {from} does not know ring {to}")),
        _ => Some("a module that is in no ring".to_owned()),
    }
}

#[test]
fn imports_point_inward_only() {
    let mut wrong = Vec::new();
    for source in sources("src") {
        let Some(module) = source.module() else {
            continue;
        };
        // A group may go on over several lines.
        let code: Vec<_> = source.code().collect();
        let lines: Vec<_> = code.iter().map(|(_, line)| *line).collect();
        let joined = lines.join(" ");
        for statement in joined.split(';') {
            for path in named(statement) {
                if let Some(why) = forbidden(&module, &source.path, path.trim()) {
                    wrong.push(format!("{}: crate::{path}: {why}", source.path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_rules_catch_what_they_should() {
    let join = Path::new("src/join/iam/mod.rs");
    let verify = Path::new("src/join/iam/verify.rs");
    for (from, file, path, allowed) in [
        ("crypto", join, "secret::Secret", true),
        ("clock", join, "cluster::Channel", false),
        ("join", join, "cluster::Channel", true),
        ("join", join, "identity::Bot", false),
        ("join", verify, "cluster::Channel", false),
        ("join", verify, "crypto::random", true),
        ("embedded", join, "join::iam::verify::check", true),
        ("embedded", join, "join::iam::Config", false),
        ("embedded", join, "identity::Bot", false),
        ("services", join, "embedded::Cluster", false),
        ("cli", join, "embedded::Cluster", true),
        ("cli", join, "nowhere::X", false),
    ] {
        assert_eq!(
            forbidden(from, file, path).is_none(),
            allowed,
            "{from} -> {path}"
        );
    }
    assert_eq!(
        named("use crate::{a::B, c::{D, E}}; let x = crate::f::g(); not_crate::h"),
        ["a::B", "c::{D, E}", "f::g"].map(str::to_owned)
    );
}

#[test]
fn every_module_is_in_a_ring_and_in_the_map() {
    let lib = fs::read_to_string(repository().join("src/lib.rs")).unwrap();
    let map = fs::read_to_string(repository().join("docs/ARCHITECTURE.md")).unwrap();
    let modules: BTreeSet<_> = lib
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ").or(line.strip_prefix("mod ")))
        .map(|name| name.trim_end_matches(';'))
        .collect();
    assert!(modules.len() > 5, "{modules:?}");
    for module in modules {
        assert!(
            ring(module).is_some() || module == SIDE,
            "{module} is in no ring of tests/it/architecture.rs"
        );
        assert!(
            map.contains(&format!("| `{module}`")),
            "docs/ARCHITECTURE.md does not tell what `{module}` is for"
        );
    }
}

#[test]
fn files_stay_readable() {
    let mut long = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")) {
        let lines = source.text.lines().count();
        if lines > MAX_LINES {
            long.push(format!("{}: {lines} lines", source.path.display()));
        }
    }
    assert!(long.is_empty(), "split these: {long:#?}");
    let main = fs::read_to_string(repository().join("src/main.rs")).unwrap();
    assert!(
        main.lines().count() <= 60,
        "main.rs only parses, runs and prints"
    );
}

#[test]
fn only_the_command_line_prints() {
    let mut wrong = Vec::new();
    for source in sources("src") {
        if matches!(source.module().as_deref(), None | Some("cli")) {
            continue;
        }
        for (number, line) in source.code() {
            if [
                "println!(",
                "eprintln!(",
                "print!(",
                "eprint!(",
                "process::exit(",
            ]
            .iter()
            .any(|printing| line.contains(printing))
            {
                wrong.push(format!("{}:{number}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn decisions_never_rest_on_an_errors_text() {
    let mut wrong = Vec::new();
    for source in sources("src") {
        for (number, line) in source.code() {
            let text_of_error = [
                "err.to_string()",
                "error.to_string()",
                "e.to_string()",
                ".message()",
            ];
            // A cluster wraps what it decides about a workload in this one, and has no code for some of it.
            let only_in_words = line.contains(".contains(EVALUATION)");
            let rests = text_of_error.iter().any(|text| {
                line.contains(&format!("{text}.contains("))
                    || line.contains(&format!("{text}.starts_with("))
            });
            if rests && !only_in_words {
                wrong.push(format!("{}:{number}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
