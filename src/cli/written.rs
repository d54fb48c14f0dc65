//! An identity that an agent has written into a directory, for commands that use it.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, anyhow};

use crate::identity::file::{IdentityFile, MAX_FILE};

/// The identity of the output in `directory`, if it is good at `now`.
pub(super) fn identity(directory: &Path, now: SystemTime) -> anyhow::Result<IdentityFile> {
    let path = directory.join("identity");
    let shown = path.display();
    let mut text = String::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .with_context(|| {
            format!(
                "cannot read {shown}; is it in the destination of an output that tbot has written?"
            )
        })?;
    let identity = IdentityFile::parse(&text).with_context(|| format!("{shown} is no identity"))?;
    if let Ok(ago) = now.duration_since(identity.tls.not_after()) {
        return Err(anyhow!(
            "the identity in {shown} expired {} minutes ago: is the tbot running that renews it?",
            ago.as_secs() / 60
        ));
    }
    Ok(identity)
}
