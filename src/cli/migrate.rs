//! `tbot migrate`: a configuration of the old format v1, in the current one.

use std::path::Path;

use super::args::Globals;
use super::configure;
use super::exit::Failure;
use super::start;
use crate::config;
use crate::env::Env;

/// Prints or writes the converted file, defaults written out.
pub(super) fn run(globals: &Globals, output: Option<&Path>, env: &Env) -> Result<(), Failure> {
    let from = globals
        .config
        .as_deref()
        .or_else(|| env.get("TBOT_CONFIG_PATH"));
    let Some(from) = from.filter(|path| !path.is_empty()) else {
        return Err(Failure::usage(
            "which file? Give -c PATH, or set TBOT_CONFIG_PATH",
        ));
    };
    if output == Some(Path::new(from)) {
        return Err(Failure::usage(format!(
            "--output is the file that is read, {from}: name another, and keep the old one until \
             the new one has run"
        )));
    }
    let loaded = config::migrate(&start::named(from)?, env)
        .map_err(start::unusable)?
        .ok_or_else(|| {
            Failure::usage(format!(
                "{from}: already of the latest version, nothing to migrate"
            ))
        })?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    configure::write(&loaded.plan, "migrate", output)
}
