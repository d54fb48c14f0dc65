//! `tbot start`: makes the plan and hands it to the agent.

use std::fs::File;
use std::io::Read;

use base64::Engine as _;

use super::args::Globals;
use super::exit::Failure;
use super::flags::AgentFlags;
use crate::app;
use crate::config::{self, Invalid, Loaded, Overlay, Source};
use crate::env::Env;
use crate::services::Sockets;
use crate::yaml::MAX_TEXT;

/// Runs the agent until it ends.
pub(super) fn run(globals: &Globals, flags: &AgentFlags, env: &Env) -> Result<(), Failure> {
    let source = source(globals, env)?;
    let mut overlay = flags.overlay(env);
    add_switches(globals, &mut overlay);
    let loaded = load(source.as_ref(), &overlay, env)?;
    let missing = loaded.plan.for_start();
    if !missing.is_empty() {
        return Err(Failure::Usage(missing));
    }
    report(&loaded);
    tracing::debug!(
        configuration = loaded.plan.to_redacted_yaml(),
        "Starting with this configuration"
    );
    let sockets = Sockets::of_process(env);
    super::runtime()?.block_on(Box::pin(app::run(loaded.plan, sockets)))?;
    Ok(())
}

/// Logs what the user should know although the plan can be used.
pub(super) fn report(loaded: &Loaded) {
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    for conflict in &loaded.conflicts {
        tracing::error!("{conflict}");
    }
}

/// The global switches that are also keys of the file.
pub(super) fn add_switches(globals: &Globals, overlay: &mut Overlay) {
    for (key, value) in [("debug", globals.debug()), ("insecure", globals.insecure())] {
        if let Some(value) = value {
            overlay.switches.push((key, value, format!("--{key}")));
        }
    }
    if globals.fips() == Some(false) {
        overlay
            .switches
            .push(("fips", false, "--no-fips".to_owned()));
    }
}

/// The plan, or every problem.
pub(super) fn load(
    source: Option<&Source>,
    overlay: &Overlay,
    env: &Env,
) -> Result<Loaded, Failure> {
    config::load(source, overlay, env).map_err(unusable)
}

/// All problems of a configuration, below one line that says what they are.
pub(super) fn unusable(invalid: Invalid) -> Failure {
    let mut lines = vec!["the configuration cannot be used".to_owned()];
    lines.extend(invalid.0);
    Failure::Usage(lines)
}

/// The configuration text that flags or variables name, if any.
pub(super) fn source(globals: &Globals, env: &Env) -> Result<Option<Source>, Failure> {
    let path = globals
        .config
        .as_deref()
        .filter(|path| !path.is_empty())
        .or_else(|| env.get("TBOT_CONFIG_PATH"));
    let encoded = globals
        .config_string
        .as_deref()
        .filter(|text| !text.is_empty())
        .or_else(|| env.get("TBOT_CONFIG"));
    match (path, encoded) {
        (Some(_), Some(_)) => Err(Failure::usage(
            "--config (TBOT_CONFIG_PATH) and --config-string (TBOT_CONFIG) are both set: keep one",
        )),
        (Some(path), None) => named(path).map(Some),
        (None, Some(encoded)) => {
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(encoded)
                .map_err(|error| {
                    Failure::usage(format!(
                        "--config-string is not standard base64 with padding: {error}"
                    ))
                })?;
            read("--config-string", bytes.as_slice()).map(Some)
        }
        (None, None) => Ok(None),
    }
}

/// The text of the file that `--config` names; `-` is standard input.
pub(super) fn named(path: &str) -> Result<Source, Failure> {
    match path {
        "-" => read("<stdin>", std::io::stdin().lock()),
        path => file(path),
    }
}

/// The text of a configuration file.
pub(super) fn file(path: &str) -> Result<Source, Failure> {
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    read(path, file)
}

fn read(name: &str, input: impl Read) -> Result<Source, Failure> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(MAX_TEXT)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    input
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(name, &error))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        Failure::usage(format!(
            "{name}: not UTF-8 text from byte {} on",
            error.utf8_error().valid_up_to()
        ))
    })?;
    Ok(Source {
        name: name.to_owned(),
        text,
    })
}

fn unreadable(name: &str, error: &std::io::Error) -> Failure {
    Failure::usage(format!(
        "cannot read the configuration {name}: {error} (check the path and that this user may read it)"
    ))
}
