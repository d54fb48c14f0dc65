use super::*;
use crate::crypto::{KeyAlgorithm, PrivateKey, pem};
use crate::services::testing;
use crate::workload::tests::{Authority, DOMAIN, HOUR, message, start};
use crate::yaml::emit;

fn read(source: &str) -> (Option<Box<dyn ServicePlan>>, String) {
    testing::read(&Kind, source)
}

#[test]
fn sections_read_back() {
    for source in [
        "selector: {name: x}\ndestination: {type: directory, path: /opt/x}\n",
        "selector: {labels: {env: [a, b]}}\ndestination: {type: directory, path: /opt/x}\n\
         include_federated_trust_bundles: true\n",
    ] {
        let (plan, problems) = read(source);
        assert_eq!(problems, "");
        let plan = plan.unwrap();
        assert_eq!(plan.label(), "workload-identity-x509 (directory: /opt/x)");
        let text = emit::emit(&Tree::Map(plan.emit()));
        let (again, problems) = read(&text);
        assert_eq!(problems, "");
        assert_eq!(emit::emit(&Tree::Map(again.unwrap().emit())), text);
    }
}

#[test]
fn every_problem_is_told_in_one_run() {
    let (plan, problems) = read("include_federated_trust_bundles: maybe\n");
    assert!(plan.is_none());
    for key in ["selector", "destination", "include_federated_trust_bundles"] {
        assert!(problems.contains(&format!("{key}: ")), "{key}: {problems}");
    }
}

fn svid(authorities: [&Authority; 2], key: &PrivateKey) -> Svid {
    let id = "spiffe://example.org/svc/foo";
    let [authority, intermediate] = authorities;
    let chain = [authority.leaf(key, &[id]), intermediate.der.clone()].concat();
    Svid {
        id: id.parse().unwrap(),
        chain: chain.into(),
        key: Bytes::copy_from_slice(key.pkcs8_der().expose()),
        hint: String::new(),
        issued_at: start(),
        not_after: start() + HOUR,
        serial: "01".into(),
        name: "foo".into(),
        revision: String::new(),
    }
}

fn text(files: &FileSet, name: &str) -> String {
    String::from_utf8(files[name].expose().clone()).unwrap()
}

#[test]
fn the_files_are_those_that_spiffe_programs_read() {
    let [one, two] = ["one", "two"].map(Authority::new);
    let bundles = Bundles::from_authority(&message(DOMAIN, &[&one, &two])).unwrap();
    for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Rsa2048] {
        let key = PrivateKey::generate(algorithm).unwrap();
        let svid = svid([&one, &two], &key);
        let files = render(&svid, &bundles, &Crl::None, true).unwrap();
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(names, ["svid.pem", "svid_bundle.pem", "svid_key.pem"]);
        // PKCS#8 whatever the algorithm.
        let written = text(&files, "svid_key.pem");
        assert!(written.starts_with("-----BEGIN PRIVATE KEY-----\n"));
        let written = PrivateKey::from_pem(&written).unwrap();
        assert_eq!(written.public_spki(), key.public_spki());
        let chain = pem::certificates(&text(&files, "svid.pem")).unwrap();
        assert_eq!(chain.concat(), svid.chain);
        assert_eq!(chain.len(), 2);
        let bundle = pem::certificates(&text(&files, "svid_bundle.pem")).unwrap();
        assert_eq!(bundle, [one.der.clone(), two.der.clone()]);
    }
}

#[test]
fn a_revocation_list_is_written_where_there_is_one() {
    let authority = Authority::new("one");
    let bundles = Bundles::from_authority(&message(DOMAIN, &[&authority])).unwrap();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let svid = svid([&authority, &authority], &key);
    let crl = Crl::Signed(Bytes::from_static(b"list"));
    let files = render(&svid, &bundles, &crl, false).unwrap();
    let blocks = pem::decode_all(&text(&files, "svid_crl.pem")).unwrap();
    assert_eq!(blocks.len(), 1);
    assert_eq!(blocks[0].label, "X509 CRL");
    assert_eq!(blocks[0].der, b"list");
}

#[test]
fn only_what_stands_beside_the_svid_lets_it_be_written_again() {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let authority = Authority::new("one");
    let svid = svid([&authority, &authority], &key);
    let (old, new) = (Bytes::from_static(b"old"), Bytes::from_static(b"new"));
    let soon = start() + HOUR / 4;
    for (case, again, now, reload, local, kept) in [
        ("a federated bundle changed", true, start(), 1, &old, true),
        ("it is due", false, start(), 1, &old, false),
        ("it is due beside a change", true, soon, 1, &old, false),
        ("the operator asked", true, start(), 2, &old, false),
        ("the local bundle changed", true, start(), 1, &new, false),
    ] {
        let mut state = State {
            held: Some(Held {
                svid: svid.clone(),
                reload: 1,
                local: old.clone(),
                young_until: soon,
            }),
            again,
        };
        let taken = state.take(|held| held.is_good(now, reload, local));
        assert_eq!(taken.is_some(), kept, "{case}");
        // Issuing that fails leaves nothing that could be written again in its place.
        state.again = true;
        assert!(state.take(|_| true).is_none(), "{case}");
    }
}
