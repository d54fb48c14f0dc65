//! The `tbot` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    tbot::cli::main()
}
