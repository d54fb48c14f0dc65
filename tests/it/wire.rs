//! What `proto/` declares equals the facts recorded of the published protocol.
//!
//! `tests/wire-facts.tsv` has one fact a line: `field message number name type label`,
//! `enum name number value`, `rpc service/method request response direction`. A wrong number here
//! would be a certificate that a cluster cannot read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
};

use crate::common::repository;

fn protos(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            protos(&path, found);
        } else if path.extension().is_some_and(|e| e == "proto") {
            found.push(path);
        }
    }
}

/// Our files and the standard ones they import, compiled as the build does.
fn files() -> Vec<FileDescriptorProto> {
    let root = repository().join("proto");
    let mut found = Vec::new();
    protos(&root, &mut found);
    found.sort();
    protox::compile(&found, [&root]).unwrap().file
}

/// Every fact that the files declare, in the words of the table.
fn declared(files: &[FileDescriptorProto]) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for file in files {
        let package = file.package();
        if package.starts_with("google.protobuf") || file.name().starts_with("spiffe/") {
            continue;
        }
        for message in &file.message_type {
            message_facts(package, message, &mut facts);
        }
        for declared in &file.enum_type {
            enum_facts(package, declared, &mut facts);
        }
        for service in &file.service {
            for method in &service.method {
                let direction = match (method.client_streaming(), method.server_streaming()) {
                    (false, false) => "unary",
                    (false, true) => "server_stream",
                    (true, false) => "client_stream",
                    (true, true) => "bidi",
                };
                facts.insert(format!(
                    "rpc\t{package}.{}/{}\t{}\t{}\t{direction}",
                    service.name(),
                    method.name(),
                    method.input_type().trim_start_matches('.'),
                    method.output_type().trim_start_matches('.'),
                ));
            }
        }
    }
    facts
}

fn message_facts(scope: &str, message: &DescriptorProto, facts: &mut BTreeSet<String>) {
    let name = format!("{scope}.{}", message.name());
    let maps: BTreeMap<_, _> = message
        .nested_type
        .iter()
        .filter(|nested| {
            nested
                .options
                .as_ref()
                .is_some_and(prost_types::MessageOptions::map_entry)
        })
        .map(|nested| (format!(".{name}.{}", nested.name()), nested))
        .collect();
    for field in &message.field {
        let (kind, label) = match maps.get(field.type_name()) {
            Some(entry) => {
                let [key, value] = [0, 1].map(|at| type_of(&entry.field[at]));
                (value.clone(), format!("map<{key},{value}>"))
            }
            None => (type_of(field), label_of(message, field)),
        };
        let (number, field) = (field.number(), field.name());
        facts.insert(format!("field\t{name}\t{number}\t{field}\t{kind}\t{label}"));
    }
    for nested in &message.nested_type {
        if !maps.contains_key(&format!(".{name}.{}", nested.name())) {
            message_facts(&name, nested, facts);
        }
    }
    for declared in &message.enum_type {
        enum_facts(&name, declared, facts);
    }
}

fn enum_facts(scope: &str, declared: &EnumDescriptorProto, facts: &mut BTreeSet<String>) {
    for value in &declared.value {
        facts.insert(format!(
            "enum\t{scope}.{}\t{}\t{}",
            declared.name(),
            value.number(),
            value.name()
        ));
    }
}

fn label_of(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    if field.label() == Label::Repeated {
        "repeated".to_owned()
    } else if field.proto3_optional() {
        "proto3_optional".to_owned()
    } else if let Some(oneof) = field.oneof_index {
        let oneof = &message.oneof_decl[usize::try_from(oneof).unwrap()];
        format!("oneof:{}", oneof.name())
    } else {
        "optional".to_owned()
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_owned(),
        other => other
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    }
}

fn recorded() -> BTreeSet<String> {
    fs::read_to_string(repository().join("tests/wire-facts.tsv"))
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with("file\t"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_declared_fact_is_a_recorded_one() {
    let recorded = recorded();
    let readme = fs::read_to_string(repository().join("proto/README.md")).unwrap();
    let declared = declared(&files());
    assert!(
        declared.len() > 300,
        "only {} facts declared",
        declared.len()
    );
    let unknown: Vec<_> = declared
        .difference(&recorded)
        .filter(|fact| {
            let subject = fact.split('\t').nth(1).unwrap();
            !readme.contains(&format!("`{subject}`"))
        })
        .collect();
    assert!(
        unknown.is_empty(),
        "not in tests/wire-facts.tsv, and proto/README.md does not say why:\n{unknown:#?}"
    );
}

#[test]
fn the_reasons_in_the_readme_are_still_needed() {
    let recorded = recorded();
    let declared = declared(&files());
    let readme = fs::read_to_string(repository().join("proto/README.md")).unwrap();
    let listed = readme
        .split_once("## Not in the table")
        .expect("the section exists")
        .1;
    for subject in listed.split('`').skip(1).step_by(2) {
        assert!(
            declared
                .difference(&recorded)
                .any(|fact| fact.split('\t').nth(1) == Some(subject)),
            "proto/README.md excuses {subject}, which is not declared or in the table by now"
        );
    }
}

#[test]
fn a_wrong_number_would_be_noticed() {
    let mut files = files();
    let certs = files
        .iter_mut()
        .flat_map(|file| &mut file.message_type)
        .find(|message| message.name() == "Certs")
        .unwrap();
    certs.field[0].number = Some(99);
    assert!(!declared(&files).is_subset(&recorded()));
    assert!(declared(&files).contains("field\tproto.Certs\t99\tSSH\tbytes\toptional"));
}
