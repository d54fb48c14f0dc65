//! `tbot tpm identify`.

use super::exit::{Failure, print};
use crate::crypto::pem;
use crate::env::Env;
use crate::join::tpm::{self, Identity};

/// Prints which TPM this machine has, in upstream's words; with `debug` also the key itself.
pub(super) fn identify(debug: bool, env: &Env) -> Result<(), Failure> {
    let identity = tpm::identify(env).map_err(anyhow::Error::from)?;
    print(&text(&identity, debug))
}

fn text(identity: &Identity, debug: bool) -> String {
    let mut text = format!(
        "TPM Information\nEK Public Hash: {}\nEK Certificate Detected: {}\n",
        identity.hash,
        identity.certificate.is_some()
    );
    if let Some(serial) = &identity.serial {
        text.push_str(&format!("EK Certificate Serial: {serial}\n"));
    }
    if debug {
        text.push_str("EK Public:\n");
        text.push_str(&pem::encode("PUBLIC KEY", &identity.key));
        if let Some(certificate) = &identity.certificate {
            text.push_str("EK Certificate:\n");
            text.push_str(&pem::encode("CERTIFICATE", certificate));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_upstreams() {
        let mut identity = Identity {
            hash: "aabbcc".to_owned(),
            serial: None,
            key: b"ekpub".to_vec(),
            certificate: None,
        };
        let bare = "TPM Information\nEK Public Hash: aabbcc\nEK Certificate Detected: false\n";
        assert_eq!(text(&identity, false), bare);
        let key = "EK Public:\n-----BEGIN PUBLIC KEY-----\nZWtwdWI=\n-----END PUBLIC KEY-----\n";
        assert_eq!(text(&identity, true), format!("{bare}{key}"));

        identity.certificate = Some(b"ekcert".to_vec());
        identity.serial = Some("aa:bb:cc".to_owned());
        let full = "TPM Information\nEK Public Hash: aabbcc\nEK Certificate Detected: true\n\
                    EK Certificate Serial: aa:bb:cc\n";
        assert_eq!(text(&identity, false), full);
        let certificate =
            "EK Certificate:\n-----BEGIN CERTIFICATE-----\nZWtjZXJ0\n-----END CERTIFICATE-----\n";
        assert_eq!(text(&identity, true), format!("{full}{key}{certificate}"));
    }
}
