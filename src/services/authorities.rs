//! A cluster's authorities as outputs write them.

use anyhow::{Context as _, ensure};

use crate::pb::types::{CaKeySet, CertAuthorityV2};

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
    pub(crate) fn read_all(answers: Vec<CertAuthorityV2>) -> anyhow::Result<Vec<Self>> {
        answers.into_iter().map(Self::read).collect()
    }

    fn read(answer: CertAuthorityV2) -> anyhow::Result<Self> {
        let spec = answer
            .spec
            .context("the cluster sent an authority without content")?;
        check_cluster_name(&spec.cluster_name)?;
        let sets: Vec<CaKeySet> = [spec.active_keys, spec.additional_trusted_keys]
            .into_iter()
            .flatten()
            .collect();
        let unreadable = || {
            format!(
                "the cluster sent an unreadable authority of {}",
                spec.cluster_name
            )
        };
        let mut tls = Vec::new();
        let mut ssh = Vec::new();
        for set in sets {
            for pair in set.tls {
                let pem = String::from_utf8(pair.cert).with_context(unreadable)?;
                tls.push(terminated(pem));
            }
            for pair in set.ssh {
                let line = String::from_utf8(pair.public_key).with_context(unreadable)?;
                let mut words = line.split_whitespace();
                let (kind, body) = words.next().zip(words.next()).with_context(unreadable)?;
                ssh.push(format!("{kind} {body}"));
            }
        }
        Ok(Self {
            cluster: spec.cluster_name,
            tls,
            ssh,
        })
    }
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
    use crate::pb::types::{CertAuthoritySpecV2, SshKeyPair, TlsKeyPair};

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
        let read = Authority::read_all(vec![
            answer("c", "new", Some("old")),
            answer("b", "x", None),
        ]);
        let read = read.unwrap();
        assert_eq!(read[0].ssh, ["ssh-ed25519 new", "ssh-ed25519 old"]);
        assert_eq!(bundle(&read), "cert new\ncert old\ncert x\n");
    }

    #[test]
    fn hostile_names_and_keys_are_refused() {
        for name in ["", "a/b", "../x", "a\nHost *", "a b", "a'b", ".hidden"] {
            assert!(
                Authority::read_all(vec![answer(name, "x", None)]).is_err(),
                "{name:?}"
            );
        }
        let mut bad = answer("c", "x", None);
        bad.spec.as_mut().unwrap().active_keys.as_mut().unwrap().ssh[0].public_key =
            b"one".to_vec();
        assert!(Authority::read_all(vec![bad, CertAuthorityV2::default()]).is_err());
    }
}
