//! The files that outputs share, byte for byte as upstream's agent writes them.

use super::authorities::{Authorities, Authority, bundle, terminated};
use crate::crypto::KeyError;
use crate::destination::FileSet;
use crate::identity::Identity;
use crate::secret::Secret;

/// The names of a TLS certificate, its key and whom to believe, as servers' settings call them.
pub(crate) const TLS: [&str; 3] = ["tls.crt", "tls.key", "tls.cas"];

/// The identity in every form.
pub(crate) const CREDENTIALS: &[&str] = &["identity", "key", "key-cert.pub", "key.pub", "tlscert"];
/// Whom to believe, one file for each type of authority.
pub(crate) const AUTHORITIES: &[&str] = &[
    "teleport-database-ca.crt",
    "teleport-host-ca.crt",
    "teleport-user-ca.crt",
];

/// The names of several lists, as [`ServicePlan::files`](super::ServicePlan::files) gives them.
pub(crate) fn names(lists: &[&[&str]]) -> Vec<String> {
    let all = lists.iter().copied().flatten();
    all.map(|name| (*name).to_owned()).collect()
}

/// A set of files in the making.
#[derive(Debug, Default)]
pub(crate) struct Artifacts(FileSet);

impl Artifacts {
    /// The identity in every form: the key and its certificates one by one, and the `identity` file
    /// that has all of them and the authorities of `hosts`.
    pub(crate) fn of(identity: &Identity, hosts: &[Authority]) -> Result<Self, KeyError> {
        Ok(Self::default()
            .add("key", identity.key().to_pem().expose())
            .add("key.pub", identity.key().public_ssh_line()?)
            .add("key-cert.pub", identity.ssh_line())
            .add("tlscert", identity.tls_pem())
            .add("identity", identity_file(identity, hosts)))
    }

    /// Whom to believe among servers.
    pub(crate) fn hosts(self, hosts: &[Authority]) -> Self {
        self.add("teleport-host-ca.crt", bundle(hosts))
    }

    /// Whom to believe, one file for each type of authority.
    pub(crate) fn authorities(self, authorities: &Authorities) -> Self {
        self.hosts(&authorities.hosts)
            .add("teleport-user-ca.crt", bundle(&authorities.users))
            .add("teleport-database-ca.crt", bundle(&authorities.databases))
    }

    /// The TLS certificate, its key and the authorities of `hosts` under common names.
    pub(crate) fn tls(self, identity: &Identity, hosts: &[Authority]) -> Self {
        let [certificate, key, authorities] = TLS;
        self.add(certificate, identity.tls_pem())
            .add(key, identity.key().to_pem().expose())
            .add(authorities, bundle(hosts))
    }

    /// One more file.
    pub(crate) fn add(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        let text: String = text.into();
        self.0.insert(name.into(), Secret::new(text.into_bytes()));
        self
    }

    /// The files.
    pub(crate) fn files(self) -> FileSet {
        self.0
    }
}

/// The identity file: key, SSH certificate, TLS certificate, then every host authority's SSH keys,
/// then their TLS certificates. Readers tell the PEM blocks apart by their place.
fn identity_file(identity: &Identity, hosts: &[Authority]) -> String {
    let mut text = terminated(identity.key().to_pem().expose().clone());
    text.push_str(&terminated(identity.ssh_line().to_owned()));
    text.push_str(&terminated(identity.tls_pem().to_owned()));
    for authority in hosts {
        let cluster = &authority.cluster;
        for key in &authority.ssh {
            let line = [
                "@cert-authority ",
                cluster,
                ",*.",
                cluster,
                " ",
                key,
                " type=host\n",
            ];
            text.extend(line);
        }
    }
    text.push_str(&bundle(hosts));
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::crypto::pem;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::identity::fixtures::{self, start};

    /// What the fixture's authority is in an output.
    pub(crate) fn authority(of: &fixtures::Authority) -> Authority {
        Authority {
            cluster: of.cluster.clone(),
            tls: vec![of.pem.clone()],
            ssh: vec![of.ssh_line().trim_end().to_owned()],
        }
    }

    pub(crate) fn text(files: &FileSet, name: &str) -> String {
        String::from_utf8(files[name].expose().clone()).unwrap()
    }

    /// An identity of `real.example.org`, and the authorities of that cluster and a leaf.
    pub(crate) fn facts(algorithm: KeyAlgorithm) -> (Identity, Authorities) {
        let cluster = fixtures::Authority::new("real.example.org");
        let leaf = fixtures::Authority::new("leaf.example.org");
        let identity = cluster.identity(PrivateKey::generate(algorithm).unwrap(), 1, start());
        let [databases, clients] =
            [(); 2].map(|()| authority(&fixtures::Authority::new("real.example.org")));
        let authorities = Authorities {
            hosts: vec![authority(&leaf), authority(&cluster)],
            users: vec![authority(&cluster)],
            databases: vec![databases, clients],
        };
        (identity, authorities)
    }

    #[test]
    fn the_identity_file_has_its_parts_in_order() {
        for (algorithm, label) in [
            (KeyAlgorithm::EcdsaP256, "PRIVATE KEY"),
            (KeyAlgorithm::Rsa2048, "RSA PRIVATE KEY"),
        ] {
            let (identity, authorities) = facts(algorithm);
            let [leaf, root] = &authorities.hosts[..] else {
                panic!("two");
            };
            let expected = format!(
                "{}{}{}@cert-authority leaf.example.org,*.leaf.example.org {} type=host\n\
                 @cert-authority real.example.org,*.real.example.org {} type=host\n{}{}",
                identity.key().to_pem().expose(),
                identity.ssh_line(),
                identity.tls_pem(),
                leaf.ssh[0],
                root.ssh[0],
                leaf.tls[0],
                root.tls[0],
            );
            let files = Artifacts::of(&identity, &authorities.hosts).unwrap();
            let files = files
                .authorities(&authorities)
                .tls(&identity, &authorities.hosts)
                .files();
            let file = text(&files, "identity");
            assert_eq!(file, expected);
            assert!(file.starts_with(&text(&files, "key")));
            assert!(file.ends_with('\n') && !file.contains("\n\n"));
            assert!(file.lines().all(|line| line.len() < 64 * 1024));
            let blocks = pem::decode_all(&file).unwrap();
            let labels: Vec<&str> = blocks.iter().map(|block| block.label.as_str()).collect();
            assert_eq!(labels, [label, "CERTIFICATE", "CERTIFICATE", "CERTIFICATE"]);
            assert_eq!(blocks[1].der, identity.tls().der());
            for (name, same) in [
                ("key-cert.pub", identity.ssh_line()),
                ("tlscert", identity.tls_pem()),
                ("tls.crt", identity.tls_pem()),
                ("tls.key", identity.key().to_pem().expose()),
            ] {
                assert_eq!(text(&files, name), same, "{name}");
            }
            for (name, count) in [
                ("tls.cas", 2),
                ("teleport-host-ca.crt", 2),
                ("teleport-user-ca.crt", 1),
                ("teleport-database-ca.crt", 2),
            ] {
                let found = pem::certificates(&text(&files, name)).unwrap();
                assert_eq!(found.len(), count, "{name}");
            }
        }
    }

    #[test]
    fn a_missing_newline_is_added_between_parts() {
        let (identity, _) = facts(KeyAlgorithm::EcdsaP256);
        let bare = Identity::new(
            identity.key().clone(),
            identity.tls_pem().trim_end().to_owned(),
            identity.tls_authorities().to_vec(),
            identity.ssh_line().trim_end().to_owned(),
            Vec::new(),
        )
        .unwrap();
        assert_eq!(identity_file(&bare, &[]), identity_file(&identity, &[]));
    }
}
