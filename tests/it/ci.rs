//! The pipelines of `examples/ci`: each is YAML, and the program takes the command in it.

use std::fs;

use tbot::yaml::{Value, parse};

use crate::common::{OutputText as _, Sandbox, repository};

/// Every text of a YAML value.
fn texts(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Null => {}
        Value::Scalar { text, .. } => found.push(text.clone()),
        Value::Sequence(items) => items.iter().for_each(|item| texts(&item.value, found)),
        Value::Mapping(entries) => entries
            .iter()
            .for_each(|(_, node)| texts(&node.value, found)),
    }
}

/// The words of the one `tbot start` in a pipeline.
fn command(pipeline: &str) -> Vec<String> {
    let mut found = Vec::new();
    texts(&parse(pipeline).unwrap().value, &mut found);
    let mut commands = found.iter().flat_map(|text| {
        let joined = text.replace("\\\n", " ");
        joined.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    let starts = |line: &String| line.trim_start().starts_with("tbot start ");
    let line = commands.find(starts).expect("a line with tbot start");
    assert!(!commands.any(|line| starts(&line)), "several");
    assert!(
        !line.contains(['"', '\'', '$']),
        "words that a shell changes: {line}"
    );
    line.split_whitespace().skip(1).map(str::to_owned).collect()
}

#[test]
fn the_program_takes_the_command_of_every_pipeline() {
    let directory = repository().join("examples/ci");
    let readme = fs::read_to_string(directory.join("README.md")).unwrap();
    let tokens = fs::read_to_string(directory.join("tokens.yaml")).unwrap();
    let mut methods = Vec::new();
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(
            readme.contains(&format!("({name})")),
            "{name} is not in the README"
        );
        let mut words = command(&fs::read_to_string(&path).unwrap());
        assert!(words.contains(&"--oneshot".to_owned()), "{name}: {words:?}");
        "configure".clone_into(&mut words[0]);
        let sandbox = Sandbox::new();
        let configured = sandbox.tbot(&words).output().unwrap().success();
        assert!(configured.contains("oneshot: true"), "{name}: {configured}");
        assert!(configured.contains("type: memory"), "{name}: {configured}");
        let value = |flag: &str| {
            let at = words.iter().position(|word| word == flag).unwrap();
            words[at + 1].clone()
        };
        let (method, token) = (value("--join-method"), value("--token"));
        assert!(
            tokens.contains(&format!("  name: {token}\n")),
            "{name}: no token {token}"
        );
        assert!(
            tokens.contains(&format!("  join_method: {method}\n")),
            "{name}: {method}"
        );
        methods.push(method);
    }
    methods.sort_unstable();
    assert_eq!(
        methods,
        ["azure_devops", "bitbucket", "circleci", "github", "gitlab"]
    );
}
