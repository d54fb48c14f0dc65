//! `tbot init`: makes the directory of an output ready for an agent that another user runs.

use std::collections::BTreeSet;
use std::path::Path;

use super::args::{Globals, InitArgs};
use super::exit::Failure;
use super::start;
use crate::config::{Overlay, Plan};
use crate::destination::{DestinationPlan, Preparation};
use crate::env::Env;
use crate::fsx::clean;

/// Checks the configuration, picks the destination and prepares it.
pub(super) fn run(globals: &Globals, args: &InitArgs, env: &Env) -> Result<(), Failure> {
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let source = start::source(globals, env)?;
    let mut overlay = Overlay {
        only_destination: text(&args.destination_dir),
        ..Overlay::default()
    };
    for (key, typed, variable) in [
        ("auth_server", &args.auth_server, "TELEPORT_AUTH_SERVER"),
        ("proxy_server", &args.proxy_server, "TELEPORT_PROXY"),
    ] {
        let value = text(typed).or_else(|| env.get(variable).map(str::to_owned));
        if let Some(value) = value {
            overlay.values.push((key, value, variable.to_owned()));
        }
    }
    start::add_switches(globals, &mut overlay);
    let loaded = start::load(source.as_ref(), &overlay, env)?;
    start::report(&loaded);
    let destination = pick(&loaded.plan, text(&args.init_dir).as_deref())?;
    let key = destination.key();
    let clean = args.clean();
    if clean && loaded.plan.storage.key() == key {
        return Err(Failure::usage(format!(
            "{destination} is the bot's storage too: give the output a directory of its own, or \
             leave out --clean"
        )));
    }
    // Several outputs may write to one directory.
    let mut files = BTreeSet::from([".write-test".to_owned()]);
    for service in &loaded.plan.services {
        if service.plan.destination().is_some_and(|d| d.key() == key) {
            let own = service.plan.files();
            if own.is_empty() {
                return Err(Failure::usage(format!(
                    "services of type {} cannot be prepared: what they write is not known beforehand",
                    service.kind
                )));
            }
            files.extend(own);
        }
    }
    destination.prepare(&Preparation {
        files,
        bot_user: text(&args.bot_user),
        reader_user: text(&args.reader_user),
        owner: text(&args.owner),
        clean,
    })?;
    Ok(())
}

/// The destination with the path `wanted`, or the only one there is.
fn pick<'p>(plan: &'p Plan, wanted: Option<&str>) -> Result<&'p dyn DestinationPlan, Failure> {
    let services = plan.services.iter();
    let all: Vec<&dyn DestinationPlan> = services
        .filter_map(|service| service.plan.destination().map(AsRef::as_ref))
        .collect();
    let shown: Vec<String> = all.iter().map(ToString::to_string).collect();
    let shown = shown.join(", ");
    if all.is_empty() {
        return Err(Failure::usage(
            "no service of the configuration writes to a destination: there is nothing to prepare",
        ));
    }
    match (wanted, all.as_slice()) {
        (None, [only]) => Ok(*only),
        (None, _) => Err(Failure::usage(format!(
            "which destination? Say --init-dir with one of these: {shown}"
        ))),
        (Some(path), _) => {
            let key = format!("file://{}", clean(Path::new(path)).display());
            let found = all.iter().find(|destination| destination.key() == key);
            found.copied().ok_or_else(|| {
                Failure::usage(format!(
                    "no service writes to the directory {path}; there are: {shown}"
                ))
            })
        }
    }
}
