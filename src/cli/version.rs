//! `tbot version`.

/// One line: product, version, commit, compiler.
pub(super) fn line() -> String {
    format!(
        "tbot v{} git:{} rust{}\n",
        env!("CARGO_PKG_VERSION"),
        option_env!("TBOT_GIT_REF").unwrap_or_default(),
        env!("CARGO_PKG_RUST_VERSION"),
    )
}
