//! Every registered kind has its folder and its page.

use crate::common::repository;

/// Folder below `src/` and page below `docs/reference/` for each kind of a family.
fn check(family: &str, names: impl IntoIterator<Item = &'static str>) {
    let mut some = false;
    for name in names {
        some = true;
        let folder = name.replace(['-', '/'], "_");
        let source = repository().join("src").join(family).join(&folder);
        assert!(
            source.is_dir() || source.with_extension("rs").is_file(),
            "{name}: no {}",
            source.display()
        );
        let page = repository().join(format!("docs/reference/{family}/{name}.md"));
        let text = std::fs::read_to_string(&page)
            .unwrap_or_else(|e| panic!("{name}: {}: {e}", page.display()));
        let title = text.lines().next().unwrap_or_default();
        assert!(
            title.contains(&format!("`{name}`")),
            "{}: {title}",
            page.display()
        );
    }
    assert!(some, "no {family} is registered");
}

#[test]
fn every_kind_has_a_folder_and_a_page() {
    check(
        "join",
        tbot::join::METHODS.iter().map(|method| method.name()),
    );
    check(
        "services",
        tbot::services::KINDS.iter().map(|kind| kind.name()),
    );
    check(
        "attest",
        tbot::attest::ATTESTORS.iter().map(|kind| kind.name()),
    );
    check(
        "destination",
        tbot::destination::KINDS.iter().map(|kind| kind.name()),
    );
}
