//! `docs/reference/spiffe.md`: complete, and no test in it is made up.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::repository;

/// How many clauses each document has.
const CLAUSES: [(&str, usize); 8] = [
    ("ID", 9),
    ("X5", 15),
    ("JW", 12),
    ("TB", 9),
    ("WE", 14),
    ("WL", 27),
    ("FE", 15),
    ("WT", 10),
];

/// The names of all functions below a directory.
fn functions(path: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let after = text.split("fn ").skip(1);
            let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            found.extend(after.filter_map(|rest| {
                let end = rest.find(|c| !name(c))?;
                Some(rest[..end].to_owned())
            }));
        }
    }
}

#[test]
fn each_clause_is_met_by_a_test_or_has_a_reason() {
    let mut known = BTreeSet::new();
    for directory in ["src", "tests/it"] {
        functions(&repository().join(directory), &mut known);
    }
    let text = fs::read_to_string(repository().join("docs/reference/spiffe.md")).unwrap();
    let mut ids = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [id, clause, state, shown] = cells[..] else {
            panic!("{line}: not four cells");
        };
        if id == "id" || id == "---" {
            continue;
        }
        assert!(!clause.is_empty() && !shown.is_empty(), "{line}");
        match state {
            "met" => {
                for test in shown.split(", ") {
                    let name = test.trim_matches('`').rsplit("::").next().unwrap();
                    assert!(known.contains(name), "{id}: there is no test {test}");
                }
            }
            "open" | "unused" => assert!(shown.ends_with('.'), "{id}: no reason"),
            other => panic!("{id}: what is {other:?}?"),
        }
        ids.push(id.to_owned());
    }
    let wanted: Vec<String> = CLAUSES
        .iter()
        .flat_map(|(name, count)| (1..=*count).map(move |number| format!("{name}-{number:02}")))
        .collect();
    assert_eq!(ids, wanted);
}
