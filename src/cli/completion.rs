//! `tbot completion SHELL`.

use clap::CommandFactory as _;

use super::args::Cli;

/// The script for `shell`.
pub(super) fn script(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tbot", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
