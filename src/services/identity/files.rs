//! The files of an identity output, byte for byte as upstream's agent writes them.

use super::ssh::Ssh;
use crate::destination::FileSet;
use crate::identity::Identity;
use crate::secret::Secret;
use crate::services::authorities::{Authority, bundle, terminated};

/// Everything that the files are made of.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) identity: &'a Identity,
    /// The public key as an `authorized_keys` line.
    pub(super) public_line: String,
    pub(super) hosts: &'a [Authority],
    pub(super) users: &'a [Authority],
    pub(super) databases: &'a [Authority],
    /// What the SSH texts say; `None` leaves them out.
    pub(super) ssh: Option<Ssh<'a>>,
    /// Where the files go, if that is a directory.
    pub(super) directory: Option<&'a str>,
}

/// The files, by name.
pub(super) fn render(facts: &Facts<'_>) -> FileSet {
    let identity = facts.identity;
    let key = identity.key().to_pem();
    let mut files = FileSet::new();
    let mut add = |name: String, text: String| {
        files.insert(name, Secret::new(text.into_bytes()));
    };
    add("key".into(), key.expose().clone());
    add("key.pub".into(), facts.public_line.clone());
    add("key-cert.pub".into(), identity.ssh_line().to_owned());
    add("tlscert".into(), identity.tls_pem().to_owned());
    add("teleport-host-ca.crt".into(), bundle(facts.hosts));
    add("teleport-user-ca.crt".into(), bundle(facts.users));
    add("teleport-database-ca.crt".into(), bundle(facts.databases));
    add("identity".into(), identity_file(identity, facts.hosts));
    if let Some(ssh) = &facts.ssh {
        add("known_hosts".into(), ssh.known_hosts());
        if let Some(directory) = facts.directory {
            for authority in &ssh.clusters {
                let cluster = &authority.cluster;
                add(
                    format!("{cluster}.ssh_config"),
                    ssh.cluster_config(directory, cluster),
                );
                add(
                    format!("{cluster}.known_hosts"),
                    Ssh::cluster_known_hosts(authority),
                );
            }
            add("ssh_config".into(), ssh.config(directory));
        }
    }
    files
}

/// The identity file: key, SSH certificate, TLS certificate, then every host authority's SSH keys,
/// then their TLS certificates. Readers tell the PEM blocks apart by their place.
pub(crate) fn identity_file(identity: &Identity, hosts: &[Authority]) -> String {
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
mod tests {
    use super::*;
    use crate::crypto::pem;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::identity::fixtures::{self, start};

    fn authority(of: &fixtures::Authority) -> Authority {
        Authority {
            cluster: of.cluster.clone(),
            tls: vec![of.pem.clone()],
            ssh: vec![of.ssh_line().trim_end().to_owned()],
        }
    }

    fn text(files: &FileSet, name: &str) -> String {
        String::from_utf8(files[name].expose().clone()).unwrap()
    }

    fn rendered(
        algorithm: KeyAlgorithm,
        ssh: bool,
        directory: bool,
    ) -> (Identity, FileSet, String) {
        let cluster = fixtures::Authority::new("real.example.org");
        let identity = cluster.identity(PrivateKey::generate(algorithm).unwrap(), 1, start());
        let leaf = fixtures::Authority::new("leaf.example.org");
        let hosts = [authority(&leaf), authority(&cluster)];
        let own = [authority(&cluster)];
        let files = render(&Facts {
            identity: &identity,
            public_line: identity.key().public_ssh_line().unwrap(),
            hosts: &hosts,
            users: &own,
            databases: &hosts,
            ssh: ssh.then(|| Ssh {
                clusters: own.iter().collect(),
                proxy_host: "proxy.example.org",
                proxy_address: "proxy.example.org:443",
                tls_routing: true,
                connection_upgrade: false,
                program: "/usr/local/bin/tbot",
            }),
            directory: directory.then_some("/opt/machine-id"),
        });
        let expected = format!(
            "{}{}{}@cert-authority leaf.example.org,*.leaf.example.org {} type=host\n\
             @cert-authority real.example.org,*.real.example.org {} type=host\n{}{}",
            identity.key().to_pem().expose(),
            identity.ssh_line(),
            identity.tls_pem(),
            leaf.ssh_line().trim_end(),
            cluster.ssh_line().trim_end(),
            leaf.pem,
            cluster.pem,
        );
        (identity, files, expected)
    }

    #[test]
    fn the_set_is_complete_for_every_place() {
        let base = "identity key key-cert.pub key.pub teleport-database-ca.crt teleport-host-ca.crt \
                    teleport-user-ca.crt tlscert";
        for (ssh, directory, more) in [
            (false, true, ""),
            (true, false, "known_hosts"),
            (
                true,
                true,
                "known_hosts real.example.org.known_hosts real.example.org.ssh_config ssh_config",
            ),
        ] {
            let (_, files, _) = rendered(KeyAlgorithm::EcdsaP256, ssh, directory);
            let mut expected: Vec<&str> = base.split(' ').chain(more.split_whitespace()).collect();
            expected.sort_unstable();
            assert_eq!(files.keys().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn the_identity_file_has_its_parts_in_order() {
        for (algorithm, label) in [
            (KeyAlgorithm::EcdsaP256, "PRIVATE KEY"),
            (KeyAlgorithm::Rsa2048, "RSA PRIVATE KEY"),
        ] {
            let (identity, files, expected) = rendered(algorithm, false, false);
            let file = text(&files, "identity");
            assert_eq!(file, expected);
            assert!(file.starts_with(&text(&files, "key")));
            assert!(file.ends_with('\n') && !file.contains("\n\n"));
            assert!(file.lines().all(|line| line.len() < 64 * 1024));
            let blocks = pem::decode_all(&file).unwrap();
            let labels: Vec<&str> = blocks.iter().map(|block| block.label.as_str()).collect();
            assert_eq!(labels, [label, "CERTIFICATE", "CERTIFICATE", "CERTIFICATE"]);
            assert_eq!(blocks[1].der, identity.tls().der());
            assert_eq!(text(&files, "key-cert.pub"), identity.ssh_line());
            assert_eq!(text(&files, "tlscert"), identity.tls_pem());
            assert_eq!(
                pem::certificates(&text(&files, "teleport-host-ca.crt"))
                    .unwrap()
                    .len(),
                2
            );
            assert_eq!(
                pem::certificates(&text(&files, "teleport-user-ca.crt"))
                    .unwrap()
                    .len(),
                1
            );
        }
    }

    #[test]
    fn a_missing_newline_is_added_between_parts() {
        let (identity, _, _) = rendered(KeyAlgorithm::EcdsaP256, false, false);
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
