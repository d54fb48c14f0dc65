//! `tbot cluster rotate`, with the flags of `tctl auth rotate`.

use std::time::Duration;

use anyhow::bail;
use clap::Args;

use super::Session;
use crate::embedded::admin::{Answer, Request};
use crate::yaml::duration;

/// The grace period without the flag, as with `tctl`.
const GRACE: &str = "30h";

/// Arguments of `tbot cluster rotate`.
#[derive(Debug, Clone, Args)]
pub(super) struct RotateArgs {
    #[arg(
        long = "type",
        value_name = "TYPE",
        help = "The authority: host, user, spiffe, jwt, db, db_client or bound_keypair"
    )]
    kind: String,
    /// How long the rotation takes by schedule, a third for each phase; with 0s it is over at
    /// once, and every agent has to join anew
    #[arg(long, value_name = "DURATION", default_value = GRACE, value_parser = period)]
    grace_period: Duration,
    /// Go from phase to phase by hand
    #[arg(long)]
    manual: bool,
    #[arg(
        long,
        value_name = "PHASE",
        help = "The phase to go to, by hand: init, update_clients, update_servers, standby or \
                rollback [default: init]"
    )]
    phase: Option<String>,
}

fn period(text: &str) -> Result<Duration, String> {
    duration::parse(text).map_err(|error| format!("{error} ({})", duration::FORM))
}

impl Session<'_> {
    pub(super) async fn rotate(&mut self, args: RotateArgs) -> anyhow::Result<()> {
        let request = Request::Rotate {
            kind: args.kind.clone(),
            phase: args.phase.clone(),
            manual: args.manual,
            grace: args.grace_period.as_secs(),
        };
        let Answer::Rotated { phase } = self.ask(&request).await? else {
            bail!("the cluster answered something else than was asked");
        };
        let kind = args.kind;
        let told = match args.phase {
            Some(_) => format!("The {kind} authority is in rotation phase {phase:?} now."),
            None if phase == "standby" => format!("The {kind} authority has new keys now."),
            None => format!("The rotation of the {kind} authority has begun."),
        };
        writeln!(
            self.out,
            "{told} `tbot cluster status` tells how it stands."
        )?;
        Ok(())
    }
}
