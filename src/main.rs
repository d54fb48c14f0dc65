//! The `tbot` command.

fn main() {}
