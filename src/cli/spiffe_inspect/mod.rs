//! `tbot spiffe-inspect`: asks a SPIFFE Workload API what it gives to this process, and shows it.
//!
//! `address.rs` says where it is, `ask.rs` calls it, `found.rs` writes the answers down.

mod address;
mod ask;
mod attributes;
mod found;

use std::io::{self, Write as _};

use anyhow::bail;

pub(super) use self::address::Address;
use self::found::Found;
use super::args::InspectOutput;
use crate::clock::Clock;

/// Inspects the Workload API at `address` and shows what it gives. Anything that a workload would miss
/// is an error, told after the report.
pub(super) async fn run(address: Address, output: InspectOutput) -> anyhow::Result<()> {
    let endpoint = address.to_string();
    tracing::info!(path = endpoint, "Inspecting SPIFFE Workload API Endpoint");
    let clock = Clock::system();
    let found = match (ask::inspect(&address).await, output) {
        (Ok(found), _) => found,
        (Err(failure), InspectOutput::Text) => return Err(failure),
        (Err(failure), InspectOutput::Json) => Found {
            failures: vec![failure],
            ..Found::default()
        },
    };
    if found.failures.is_empty() {
        tracing::info!(
            bundles_count = found.bundles.len(),
            svids_count = found.svids.len(),
            "Received X.509 SVID context from Workload API"
        );
    }
    let now = clock.now();
    let report = match output {
        InspectOutput::Text => found.text(now),
        InspectOutput::Json => format!("{:#}\n", found.json(&endpoint, now)),
    };
    match io::stdout().lock().write_all(report.as_bytes()) {
        // A reader that went away (`… | head -1`) is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    let problems = found.problems(now);
    if !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::net::UnixListener;

    use super::*;

    async fn failure(path: &Path) -> String {
        let address = Address::Unix(path.to_owned());
        format!("{:#}", run(address, InspectOutput::Text).await.unwrap_err())
    }

    #[tokio::test]
    async fn what_is_missing_is_named_with_its_remedy() {
        let error = Address::of(None, None).unwrap_err().to_string();
        assert!(error.contains("--path"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        assert!(failure(&path).await.contains("is tbot running"));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(failure(&path).await.contains("nobody answers"));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert!(failure(&path).await.contains("cannot connect to"));
    }

    #[tokio::test]
    async fn a_peer_that_hangs_up_or_speaks_something_else_is_told() {
        use tokio::io::AsyncWriteExt as _;
        let directory = tempfile::tempdir().unwrap();
        for (name, greeting) in [("closes", ""), ("ssh", "SSH-2.0-OpenSSH_9.2\r\n")] {
            let path = directory.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            let serve = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(greeting.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            };
            let (error, ()) = tokio::join!(failure(&path), serve);
            assert!(
                error.contains("does not speak the SPIFFE Workload API"),
                "{name}: {error}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_endpoint_does_not_hang_the_command() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let calls = "FetchX509SVID, FetchX509Bundles, FetchJWTSVID, FetchJWTBundles";
        let told = failure(&path).await;
        assert!(
            told.contains(&format!("{calls}: no answer within 12 s")),
            "{told}"
        );
    }
}
