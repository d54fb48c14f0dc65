//! `tbot kube credentials`: what a written kubeconfig has `kubectl` run for its certificate
//! (`client.authentication.k8s.io`, the exec plugins of Kubernetes).

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::exit::{Failure, print};
use super::written;
use crate::crypto::pem;
use crate::identity::file::IdentityFile;

/// How much earlier than in truth the certificate ends for `kubectl`, which then asks again.
const EARLY: Duration = Duration::from_secs(60);

/// `kube`.
#[derive(Debug, Subcommand)]
pub(super) enum KubeCommand {
    /// Print the certificate and key that kubectl uses
    Credentials(CredentialsArgs),
}

/// `kube credentials`.
#[derive(Debug, Args)]
pub(super) struct CredentialsArgs {
    /// The destination of an output of kind kubernetes
    #[arg(long, value_name = "DIR")]
    destination_dir: String,
}

/// Prints the credentials, which nobody else is to see.
pub(super) fn run(args: &CredentialsArgs, now: SystemTime) -> Result<(), Failure> {
    let given = args.destination_dir.as_str();
    let directory = match given.split_once("://") {
        None => Path::new(given),
        Some(("file", path)) => Path::new(path),
        Some((scheme, _)) => {
            return Err(Failure::usage(format!(
                "--destination-dir={given}: {scheme} is not read from here; expected a directory"
            )));
        }
    };
    let identity = written::identity(directory, now)?;
    // As upstream: a line, and an empty one.
    print(&(text(&identity, now)? + "\n\n"))
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ExecCredential {
    kind: &'static str,
    api_version: &'static str,
    spec: Spec,
    status: Credentials,
}

#[derive(Debug, Serialize)]
struct Spec {
    interactive: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Credentials {
    expiration_timestamp: String,
    client_certificate_data: String,
    client_key_data: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// The JSON that client libraries of Kubernetes read, keys in upstream's order.
fn text(identity: &IdentityFile, now: SystemTime) -> anyhow::Result<String> {
    let end = identity.tls.not_after();
    let shown = end.checked_sub(EARLY).filter(|shown| *shown > now);
    let shown = OffsetDateTime::from(shown.unwrap_or(end)).replace_nanosecond(0)?;
    let credential = ExecCredential {
        kind: "ExecCredential",
        api_version: "client.authentication.k8s.io/v1beta1",
        spec: Spec { interactive: false },
        status: Credentials {
            expiration_timestamp: shown.format(&Rfc3339)?,
            client_certificate_data: pem::encode("CERTIFICATE", identity.tls.der()),
            client_key_data: identity.key.to_pem().expose().clone(),
        },
    };
    serde_json::to_string(&credential).context("writing JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::identity::fixtures::{Authority, start};

    #[test]
    fn it_is_what_kubectl_reads_and_ends_a_minute_early() {
        let authority = Authority::new("root");
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let identity = authority.identity(key, 1, start());
        let written = [
            identity.key().to_pem().expose(),
            identity.ssh_line(),
            identity.tls_pem(),
            &authority.pem,
        ]
        .map(|part| part.trim_end().to_owned() + "\n")
        .concat();
        let file = IdentityFile::parse(&written).unwrap();
        let end = file.tls.not_after();
        let rfc3339 = |time: SystemTime| OffsetDateTime::from(time).format(&Rfc3339).unwrap();
        for (now, shown) in [
            (start(), end - EARLY),
            (end - EARLY, end),
            (end - Duration::from_secs(1), end),
        ] {
            let text = text(&file, now).unwrap();
            let rest = r#"{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1beta1","spec":{"interactive":false},"status":{"expirationTimestamp":"#;
            assert!(text.starts_with(rest), "{text}");
            let read: serde_json::Value = serde_json::from_str(&text).unwrap();
            let status = &read["status"];
            assert_eq!(status["expirationTimestamp"], rfc3339(shown));
            assert_eq!(status["clientCertificateData"], identity.tls_pem());
            assert_eq!(status["clientKeyData"], *identity.key().to_pem().expose());
        }
    }
}
