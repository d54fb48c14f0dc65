//! A cluster's authorities as outputs write them.

use anyhow::{Context as _, ensure};

use crate::cluster::feature::Feature;
use crate::crypto::pem;
use crate::identity::{Handle, Identity};
use crate::pb::types::CertAuthorityV2;

/// Whom an output's reader is to believe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Authorities {
    /// Of servers, leaf clusters included.
    pub(crate) hosts: Vec<Authority>,
    /// Of users.
    pub(crate) users: Vec<Authority>,
    /// Of databases.
    pub(crate) databases: Vec<Authority>,
}

impl Authorities {
    /// As the cluster lists them; one that has no such list is taken at what it sent with the bot's
    /// own certificates.
    pub(crate) async fn fetch(identity: &Handle) -> anyhow::Result<Self> {
        let listed = async {
            tokio::try_join!(
                identity.authorities("host"),
                identity.authorities("user"),
                identity.authorities("db"),
            )
        };
        let listed = identity
            .lacking()
            .optional(Feature::Authorities, listed.await)?;
        match listed {
            Some((hosts, users, databases)) => Ok(Self {
                hosts: Authority::read_all(&hosts)?,
                users: Authority::read_all(&users)?,
                databases: Authority::read_all(&databases)?,
            }),
            None => {
                let own = identity.identity().borrow().clone();
                let own = own.context("the bot has not joined the cluster yet")?;
                Self::learned(&own, identity.host_authorities().await?)
            }
        }
    }

    /// What came with the bot's certificates: those of users, then those of hosts, among which
    /// `hosts` are (upstream 18.0.0, order of `Certs`).
    fn learned(own: &Identity, hosts: Vec<String>) -> anyhow::Result<Self> {
        check_cluster_name(own.cluster())?;
        let ders = |text: &String| pem::certificates(text).unwrap_or_default();
        let of_hosts: Vec<Vec<u8>> = hosts.iter().flat_map(ders).collect();
        let users: Vec<String> = own
            .tls_authorities()
            .iter()
            .filter(|text| !ders(text).iter().any(|der| of_hosts.contains(der)))
            .cloned()
            .collect();
        let ssh = own
            .ssh_authorities()
            .iter()
            .map(|line| public_key(line).context("the bot's SSH authorities are unreadable"))
            .collect::<anyhow::Result<Vec<_>>>()?;
        // Each authority has as many keys for SSH as certificates for TLS. Where that is not so,
        // nothing tells the two apart, and both are the cluster's.
        let (ssh_of_users, ssh_of_hosts) = if ssh.len() == own.tls_authorities().len() {
            ssh.split_at_checked(users.len()).unwrap_or((&ssh, &ssh))
        } else {
            (ssh.as_slice(), ssh.as_slice())
        };
        let authority = |tls: Vec<String>, ssh: &[String]| Authority {
            cluster: own.cluster().to_owned(),
            tls: tls.into_iter().map(terminated).collect(),
            ssh: ssh.to_vec(),
        };
        Ok(Self {
            hosts: vec![authority(hosts, ssh_of_hosts)],
            users: vec![authority(users, ssh_of_users)],
            databases: Vec::new(),
        })
    }
}

/// The public halves of one cluster's authority of one type: first the keys that sign, then those
/// that are trusted beside them during a rotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Authority {
    /// The cluster's name.
    pub(crate) cluster: String,
    /// PEM certificates, each ending in a newline.
    pub(crate) tls: Vec<String>,
    /// SSH keys as `<type> <base64>`, without newline.
    pub(crate) ssh: Vec<String>,
}

impl Authority {
    /// Reads the cluster's answers, in their order.
    pub(crate) fn read_all(answers: &[CertAuthorityV2]) -> anyhow::Result<Vec<Self>> {
        answers.iter().map(Self::read).collect()
    }

    fn read(answer: &CertAuthorityV2) -> anyhow::Result<Self> {
        let spec = answer
            .spec
            .as_ref()
            .context("the cluster sent an authority without content")?;
        check_cluster_name(&spec.cluster_name)?;
        let unreadable = || {
            format!(
                "the cluster sent an unreadable authority of {}",
                spec.cluster_name
            )
        };
        let mut tls = Vec::new();
        let mut ssh = Vec::new();
        let sets = [&spec.active_keys, &spec.additional_trusted_keys];
        for set in sets.into_iter().flatten() {
            for pair in &set.tls {
                let pem = std::str::from_utf8(&pair.cert).with_context(unreadable)?;
                tls.push(terminated(pem.to_owned()));
            }
            for pair in &set.ssh {
                let line = std::str::from_utf8(&pair.public_key).with_context(unreadable)?;
                ssh.push(public_key(line).with_context(unreadable)?);
            }
        }
        Ok(Self {
            cluster: spec.cluster_name.clone(),
            tls,
            ssh,
        })
    }
}

/// The key of an `authorized_keys` line, without its comment.
fn public_key(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let (kind, body) = words.next().zip(words.next())?;
    Some(format!("{kind} {body}"))
}

/// Every TLS certificate of `authorities`, one after the other.
pub(crate) fn bundle(authorities: &[Authority]) -> String {
    authorities
        .iter()
        .flat_map(|authority| &authority.tls)
        .map(String::as_str)
        .collect()
}

/// `text`, ending in a newline.
pub(crate) fn terminated(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// Cluster names become file names and words of `ssh_config`, so nothing else may hide in them.
pub(crate) fn check_cluster_name(name: &str) -> anyhow::Result<()> {
    ensure!(
        !name.is_empty()
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
        "the cluster name {name:?} cannot be a file name"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::types::{CaKeySet, CertAuthoritySpecV2, SshKeyPair, TlsKeyPair};

    pub(crate) fn answer(cluster: &str, active: &str, additional: Option<&str>) -> CertAuthorityV2 {
        let keys = |tag: &str| CaKeySet {
            ssh: vec![SshKeyPair {
                public_key: format!("ssh-ed25519 {tag} comment\n").into_bytes(),
                ..SshKeyPair::default()
            }],
            tls: vec![TlsKeyPair {
                cert: format!("cert {tag}").into_bytes(),
                ..TlsKeyPair::default()
            }],
            ..CaKeySet::default()
        };
        CertAuthorityV2 {
            spec: Some(CertAuthoritySpecV2 {
                cluster_name: cluster.to_owned(),
                active_keys: Some(keys(active)),
                additional_trusted_keys: additional.map(keys),
                ..CertAuthoritySpecV2::default()
            }),
            ..CertAuthorityV2::default()
        }
    }

    #[test]
    fn active_keys_come_before_additional_ones_and_comments_go() {
        let read = Authority::read_all(&[answer("c", "new", Some("old")), answer("b", "x", None)]);
        let read = read.unwrap();
        assert_eq!(read[0].ssh, ["ssh-ed25519 new", "ssh-ed25519 old"]);
        assert_eq!(bundle(&read), "cert new\ncert old\ncert x\n");
    }

    #[test]
    fn hostile_names_and_keys_are_refused() {
        for name in ["", "a/b", "../x", "a\nHost *", "a b", "a'b", ".hidden"] {
            assert!(
                Authority::read_all(&[answer(name, "x", None)]).is_err(),
                "{name:?}"
            );
        }
        let mut bad = answer("c", "x", None);
        bad.spec.as_mut().unwrap().active_keys.as_mut().unwrap().ssh[0].public_key =
            b"one".to_vec();
        assert!(Authority::read_all(&[bad, CertAuthorityV2::default()]).is_err());
    }

    #[test]
    fn authorities_of_the_bots_own_certificates_are_told_apart() {
        use crate::crypto::{KeyAlgorithm, PrivateKey};
        use crate::identity::fixtures::{Authority as Signer, start};

        let [user, host] = [Signer::new("root"), Signer::new("root")];
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let own = user.identity(key.clone(), 1, start());
        let own = |ssh: Vec<String>| {
            Identity::new(
                key.clone(),
                own.tls_pem().to_owned(),
                vec![user.pem.clone(), host.pem.clone()],
                own.ssh_line().to_owned(),
                ssh,
            )
            .unwrap()
        };
        let lines = [user.ssh_line(), host.ssh_line()];
        let keys = lines.each_ref().map(|line| public_key(line).unwrap());
        let learned = |ssh: Vec<String>| Authorities::learned(&own(ssh), vec![host.pem.clone()]);

        let found = learned(lines.to_vec()).unwrap();
        assert_eq!(found.hosts[0].cluster, "root");
        assert_eq!(bundle(&found.hosts), terminated(host.pem.clone()));
        assert_eq!(bundle(&found.users), terminated(user.pem.clone()));
        assert_eq!(found.users[0].ssh, keys[..1]);
        assert_eq!(found.hosts[0].ssh, keys[1..]);
        assert!(found.databases.is_empty());

        // Not as many as there are certificates: better one too many than none.
        let found = learned(vec![lines[1].clone()]).unwrap();
        assert_eq!(found.hosts[0].ssh, keys[1..]);
        assert!(learned(vec!["one".to_owned(), "two".to_owned()]).is_err());
    }
}
