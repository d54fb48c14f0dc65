//! A static program that speaks for the test: `tests/support/bridge.rs`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use spiffe::WorkloadApiClient;

use super::sandbox::OutputText as _;
use super::{eventually, repository};

/// The program, built once.
pub(crate) fn bridge() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let name = format!("bridge-{}", std::process::id());
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        Command::new(compiler)
            .args(["--edition", "2024", "-C", "target-feature=+crt-static"])
            .args(["-C", "opt-level=1", "-C", "strip=symbols", "-o"])
            .arg(&program)
            .arg(repository().join("tests/support/bridge.rs"))
            .output()
            .expect("rustc")
            .success();
        program
    })
}

/// The SPIFFE ID that the agent gives to whoever runs the bridge that listens on `socket`; or what
/// it says instead.
pub(crate) async fn identity(socket: &Path) -> Result<String, String> {
    eventually("the bridge listens", || {
        socket.exists().then_some(()).ok_or("no socket")
    });
    let ask = async {
        let client = WorkloadApiClient::connect_to(&format!("unix://{}", socket.display())).await?;
        let svid = client.fetch_x509_svid().await?;
        Ok(svid.spiffe_id().to_string())
    };
    match tokio::time::timeout(Duration::from_secs(60), ask).await {
        Ok(answer) => answer.map_err(|error: spiffe::WorkloadApiError| format!("{error:?}")),
        Err(_) => Err("no answer within 60 s".to_owned()),
    }
}
