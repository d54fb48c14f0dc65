//! The section, the URI forms, and bad directories.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use super::*;
use crate::destination::{DestinationError, FileSet, contract, from_uri, read};
use crate::yaml::{Problems, emit, parse};

fn plan(yaml: &str) -> Result<Arc<dyn DestinationPlan>, String> {
    let problems = Problems::default();
    let node = parse(yaml).map_err(|problem| problem.to_string())?;
    let mut fields = Fields::new(&node, "", &problems).unwrap();
    let plan = read(&mut fields, "destination");
    fields.finish();
    let text = problems.render("tbot.yaml");
    plan.filter(|_| text.is_empty()).ok_or(text)
}

#[test]
fn a_section_is_written_back_with_its_defaults() {
    let plan = plan("destination: {type: directory, path: /opt/machine-id}").unwrap();
    assert_eq!(
        emit::emit(&plan.emit()),
        "type: directory\npath: /opt/machine-id\nsymlinks: try-secure\nacls: try\n"
    );
    assert_eq!(plan.to_string(), "directory: /opt/machine-id");
    assert_eq!(plan.key(), "file:///opt/machine-id");
}

#[test]
fn every_key_is_read() {
    let text = "destination:\n  type: directory\n  path: x/\n  symlinks: secure\n  acls: required\n  \
                readers:\n    - user: app\n    - group: 1000\n";
    let plan = plan(text).unwrap();
    let written = emit::emit(&plan.emit());
    assert_eq!(
        written,
        "type: directory\npath: x/\nsymlinks: secure\nacls: required\nreaders:\n  - user: app\n  \
         - group: \"1000\"\n"
    );
}

#[test]
fn bad_sections_are_refused() {
    for bad in [
        "destination: /opt/x",
        "destination: {path: /opt/x}",
        "destination: {type: directory}",
        "destination: {type: directory, path: ''}",
        "destination: {type: directory, path: /x, symlinks: on}",
        "destination: {type: directory, path: /x, acls: always}",
        "destination: {type: directory, path: /x, readers: [{}]}",
        "destination: {type: directory, path: /x, readers: [{user: a, group: b}]}",
        "destination: {type: nowhere}",
        "{}",
    ] {
        assert!(plan(bad).is_err(), "{bad}");
    }
}

#[test]
fn uris_are_read_as_upstream_reads_them() {
    for (uri, key) in [
        ("/opt/x", "file:///opt/x"),
        ("./x", "file://x"),
        ("x/y", "file://x/y"),
        ("file:///opt/x", "file:///opt/x"),
        ("/a%20b#c", "file:///a b"),
        ("/a?b", "file:///a"),
        ("/a b", "file:///a b"),
        ("memory://", "memory:"),
        ("memory:", "memory:"),
    ] {
        let key_of = |key: &str| key.split("://").next().unwrap_or_default().to_owned();
        let plan = from_uri(uri).unwrap();
        if uri.starts_with("memory") {
            assert!(key_of(&plan.key()).starts_with("memory"), "{uri}");
        } else {
            assert_eq!(plan.key(), key, "{uri}");
        }
    }
    for bad in [
        "",
        "file://host/x",
        "file://",
        "a:b",
        "memory:///",
        "memory://x",
        "/%zz",
        "s3://x",
    ] {
        assert!(from_uri(bad).is_err(), "{bad}");
    }
}

fn at(path: &Path) -> Settings {
    Settings {
        symlinks: Symlinks::Secure,
        ..Settings::of_path(path.to_owned())
    }
}

fn files(text: &str) -> FileSet {
    ["key", "tlscert"]
        .map(|name| {
            (
                name.to_owned(),
                format!("{name} {text}").into_bytes().into(),
            )
        })
        .into()
}

fn base() -> (tempfile::TempDir, PathBuf) {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().canonicalize().unwrap();
    (base, path)
}

#[tokio::test]
async fn keeps_the_contract() {
    let (_base, path) = base();
    contract::check(|name| at(&path.join(name)).build()).await;
}

#[tokio::test]
async fn what_is_made_is_private() {
    let (_base, path) = base();
    let path = path.join("a/b");
    let place = at(&path).build();
    place.init().await.unwrap();
    place.check_writable().await.unwrap();
    place.write(files("1")).await.unwrap();
    let mode = |name: &str| std::fs::metadata(path.join(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode(""), 0o700);
    for name in [".write-test", "key", "tlscert"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    assert_eq!(
        std::fs::metadata(path.join(".write-test")).unwrap().len(),
        0
    );
    assert_eq!(place.directory(), Some(path.as_path()));
}

#[tokio::test]
async fn unsuitable_paths_are_explained() {
    let (_base, path) = base();
    std::fs::write(path.join("file"), "mine").unwrap();
    std::fs::create_dir(path.join("real")).unwrap();
    std::os::unix::fs::symlink("real", path.join("link")).unwrap();
    for (name, says) in [
        ("file", "is not a directory"),
        ("file/below", "is not a directory"),
        ("link", "symlinks: insecure"),
        ("link/below", "symlinks: insecure"),
    ] {
        let error = at(&path.join(name)).build().init().await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(says) && text.contains(name), "{text}");
    }
    assert_eq!(std::fs::read(path.join("file")).unwrap(), b"mine");
    let insecure = Settings {
        symlinks: Symlinks::Insecure,
        ..at(&path.join("link"))
    };
    insecure.build().write(files("1")).await.unwrap();
    assert_eq!(std::fs::read(path.join("real/key")).unwrap(), b"key 1");
}

#[tokio::test]
async fn a_second_process_is_kept_off() {
    let (_base, path) = base();
    let (first, second) = (at(&path).build(), at(&path).build());
    let held = first.lock().unwrap().unwrap();
    let error = second.lock().map(|_| ()).unwrap_err();
    assert!(matches!(error, DestinationError::Locked { .. }), "{error}");
    drop(held);
    assert!(second.lock().unwrap().is_some());
}

#[tokio::test]
async fn readers_get_what_they_need_and_the_others_nothing() {
    let (_base, path) = base();
    let settings = Settings {
        readers: vec![Reader::User("4242".into()), Reader::Group("4243".into())],
        ..at(&path)
    };
    let place = settings.build();
    place.init().await.unwrap();
    place.check_writable().await.unwrap();
    place.write(files("1")).await.unwrap();
    let dir = crate::fsx::Dir::open(&path, Symlinks::Secure).unwrap();
    let ids = [acl::Reader::User(4242), acl::Reader::Group(4243)];
    if dir.access().unwrap().acl.is_none() {
        // This file system has no access control lists: nothing is wider open than without readers.
        assert_eq!(
            std::fs::metadata(path.join("key")).unwrap().mode() & 0o077,
            0
        );
        return;
    }
    assert_eq!(dir.access().unwrap().acl, Some(acl::Acl::for_folder(&ids)));
    // What someone changed by hand is put right at the next write, content or not.
    std::fs::set_permissions(path.join("key"), std::fs::Permissions::from_mode(0o666)).unwrap();
    place.write(files("1")).await.unwrap();
    for name in ["key", "tlscert", ".write-test"] {
        let Some(crate::fsx::Entry::File { access, .. }) =
            crate::fsx::Folder::look(&dir, name).unwrap()
        else {
            panic!("{name}");
        };
        assert_eq!(access.acl, Some(acl::Acl::for_file(&ids)), "{name}");
    }
}

#[tokio::test]
async fn unknown_readers_are_named() {
    let (_base, path) = base();
    let settings = Settings {
        readers: vec![Reader::User("no-such-user-here".into())],
        ..at(&path)
    };
    let error = settings.build().init().await.unwrap_err().to_string();
    assert!(error.contains("no-such-user-here"), "{error}");
}

/// A file system of a few pages; only root can mount one.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn mount() -> Option<Self> {
        let base = tempfile::tempdir().ok()?;
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=16k", "tbot-test"])
            .arg(base.path())
            .status()
            .is_ok_and(|status| status.success());
        mounted.then_some(Self(base))
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        drop(
            std::process::Command::new("umount")
                .arg("--lazy")
                .arg(self.0.path())
                .status(),
        );
    }
}

#[tokio::test]
async fn a_full_disk_leaves_what_was_there() {
    let Some(tiny) = Tiny::mount() else { return };
    let path = tiny.0.path().canonicalize().unwrap();
    let place = at(&path).build();
    place.write(files("1")).await.unwrap();
    let huge = FileSet::from([
        ("key".to_owned(), vec![b'x'; 64 * 1024].into()),
        ("tlscert".to_owned(), b"new".to_vec().into()),
    ]);
    let error = place.write(huge).await.unwrap_err().to_string();
    assert!(error.contains("key") && error.contains("space"), "{error}");
    for (name, content) in files("1") {
        assert_eq!(place.read(&name).await.unwrap(), Some(content));
    }
    place.write(files("2")).await.unwrap();
    assert_eq!(std::fs::read(path.join("key")).unwrap(), b"key 2");
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2, "no leftovers");
}
