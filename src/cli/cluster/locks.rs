//! `tbot cluster lock` and `tbot cluster unlock`: by target, as people think of them.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Session, positive, render};
use crate::embedded::instant::rfc3339;

/// What a lock refuses.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Target {
    /// A bot with all of its instances
    #[arg(long, value_name = "NAME")]
    bot: Option<String>,
    /// One instance of a bot, by its ID
    #[arg(long, visible_alias = "bot-instance-id", value_name = "ID")]
    instance: Option<String>,
    /// A user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Whoever has a role
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// Whoever joined, or wants to join, with a token
    #[arg(long, value_name = "TOKEN")]
    join_token: Option<String>,
}

/// Arguments of `tbot cluster lock`.
#[derive(Debug, Clone, Args)]
pub(super) struct LockArgs {
    #[command(flatten)]
    target: Target,
    /// Shown to whoever is refused
    #[arg(long)]
    message: Option<String>,
    /// How long the lock holds [default: until it is removed]
    #[arg(long, value_name = "DURATION", value_parser = positive)]
    ttl: Option<Duration>,
}

impl Session<'_> {
    /// The target as locks write it. A bot to be locked has to exist: a lock on a name with a
    /// typing error would refuse nobody.
    async fn target(&self, target: &Target) -> anyhow::Result<Value> {
        if let Some(bot) = &target.bot {
            let found = self.list("bot", Some(bot)).await?;
            let user = found
                .first()
                .and_then(|bot| bot.pointer("/status/user_name"));
            return Ok(json!({"user": user.context("the bot has no user")?}));
        }
        let targets = [
            ("bot_instance_id", &target.instance),
            ("user", &target.user),
            ("role", &target.role),
            ("join_token", &target.join_token),
        ];
        for (key, value) in targets {
            if let Some(value) = value {
                return Ok(json!({ key: value }));
            }
        }
        bail!("name a target, for example --bot")
    }

    pub(super) async fn lock(&mut self, args: LockArgs) -> anyhow::Result<()> {
        let target = self.target(&args.target).await?;
        let name = Uuid::new_v4().to_string();
        let mut spec = json!({"target": target});
        if let Value::Object(spec) = &mut spec {
            spec.extend(args.message.map(|text| ("message".to_owned(), text.into())));
            let expires = args.ttl.map(|ttl| rfc3339(self.clock.now() + ttl));
            spec.extend(expires.map(|expires| ("expires".to_owned(), expires.into())));
        }
        let resource = json!({
            "kind": "lock", "version": "v2", "metadata": {"name": name}, "spec": spec,
        });
        self.create_one(&resource, false).await?;
        Ok(writeln!(self.out, "Created a lock with name {name:?}.")?)
    }

    /// Removes every lock on exactly this target.
    pub(super) async fn unlock(&mut self, target: &Target) -> anyhow::Result<()> {
        let target = self.target(target).await?;
        let locks = self.list("lock", None).await?;
        let hits = locks
            .iter()
            .filter(|lock| lock.pointer("/spec/target") == Some(&target));
        let names: Vec<String> = hits.map(|lock| render::name(lock).to_owned()).collect();
        if names.is_empty() {
            bail!("nothing locks {target} (list locks with `tbot cluster get locks`)");
        }
        for name in names {
            let message = self.remove("lock", &name).await?;
            writeln!(self.out, "{message}")?;
        }
        Ok(())
    }
}
