//! `tbot man`: manual pages made from the command tree.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;

use super::args::Cli;
use super::exit::{Failure, print};

/// Writes one page for each command to `dir`, or tbot(1) to standard output.
pub(super) fn run(dir: Option<&Path>) -> Result<(), Failure> {
    let command = Cli::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return print(&String::from_utf8_lossy(&page));
    };
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(command, dir))
        .with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
    Ok(())
}
