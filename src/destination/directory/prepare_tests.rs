//! Who owns what, and what is a stranger. `tests/it/init.rs` tries it with real users.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;

use super::super::Settings;
use super::*;

#[test]
fn an_owner_is_two_names_or_numbers() {
    let how = |owner: &str| Preparation {
        owner: Some(owner.to_owned()),
        ..Preparation::default()
    };
    assert_eq!(owner(&how("4242:4243"), None), Ok((4242, 4243)));
    assert_eq!(owner(&how("root:root"), None), Ok((0, 0)));
    for bad in [
        "",
        "root",
        "root:",
        ":root",
        "root:root:root",
        "no-such-user:0",
    ] {
        assert!(owner(&how(bad), None).is_err(), "{bad}");
    }
    let bot = |group| Account { user: 7, group };
    let by_default = owner(&Preparation::default(), Some((bot(Some(8)), bot(None))));
    assert_eq!(by_default, Ok((7, 8)));
    assert!(owner(&Preparation::default(), Some((bot(None), bot(None)))).is_err());
}

#[test]
fn an_owner_is_not_listed_and_a_reader_only_reads() {
    let account = |user| Account { user, group: None };
    let (file, folder) = access((1, 1), Some((account(1), account(2))));
    let reader = [acl::Reader::User(2)];
    assert_eq!(file.acl, Some(Acl::for_file(&reader)));
    assert_eq!(folder.acl, Some(Acl::for_folder(&reader)));
    let (file, _) = access((1, 1), Some((account(3), account(2))));
    let bot = [acl::Reader::User(3)];
    assert_eq!(file.acl, Some(Acl::shared_file(&bot, &reader)));
    for accounts in [None, Some((account(1), account(1)))] {
        let (file, folder) = access((1, 1), accounts);
        assert_eq!((file.acl, file.mode, folder.mode), (None, 0o600, 0o700));
    }
}

#[test]
fn strangers_go_only_when_asked_and_nothing_of_ours_ever_does() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().canonicalize().unwrap();
    let elsewhere = path.join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("mine"), "").unwrap();
    let out = path.join("out");
    std::fs::create_dir_all(out.join("stranger/deep")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, out.join("stranger/deep/link")).unwrap();
    std::fs::create_dir(out.join("cockroach")).unwrap();
    let ours = [
        "ssh_config",
        "known_hosts",
        "root.ssh_config",
        "root.known_hosts",
        "kubeconfig-proxied.yaml",
        "lock",
        ".slot-0",
        "key",
        "cockroach/ca.crt",
    ];
    for name in ours.iter().chain(&["old.pem", "cockroach/old"]) {
        std::fs::write(out.join(name), *name).unwrap();
    }
    let settings = Settings {
        acls: AclMode::Off,
        ..Settings::of_path(out.clone())
    };
    let inner = Inner::new(settings);
    let files: BTreeSet<_> = ["key", "cockroach/ca.crt", "tlscert"]
        .map(str::to_owned)
        .into();
    let mut how = Preparation {
        files,
        ..Preparation::default()
    };
    prepare(&inner, &how).unwrap();
    assert!(out.join("old.pem").exists() && out.join("stranger").exists());
    assert_eq!(std::fs::metadata(out.join("tlscert")).unwrap().len(), 0);
    how.clean = true;
    prepare(&inner, &how).unwrap();
    for gone in ["old.pem", "cockroach/old", "stranger"] {
        assert!(!out.join(gone).exists(), "{gone}");
    }
    for name in ours {
        assert_eq!(std::fs::read_to_string(out.join(name)).unwrap(), name);
    }
    assert!(elsewhere.join("mine").exists(), "a link is not followed");
    let mode = |name: &str| std::fs::metadata(out.join(name)).unwrap().mode() & 0o7777;
    assert_eq!(
        (mode("key"), mode(""), mode("cockroach")),
        (0o600, 0o700, 0o700)
    );

    // What has a second name, and what is no file, is refused.
    std::fs::hard_link(elsewhere.join("mine"), out.join("link")).unwrap();
    how.files.insert("link".to_owned());
    let error = prepare(&inner, &how).unwrap_err().to_string();
    assert!(error.contains("one name"), "{error}");
    std::fs::remove_file(out.join("link")).unwrap();
    std::os::unix::fs::symlink(elsewhere.join("mine"), out.join("link")).unwrap();
    let error = prepare(&inner, &how).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}
