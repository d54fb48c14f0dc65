//! `tbot cluster …`: the embedded cluster and its administration, with the commands and texts of
//! `tctl`.

mod locks;
mod render;
mod rotate;
mod serve;

use std::io::{Read as _, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::exit::Mistake;
use crate::clock::Clock;
use crate::crypto::random;
use crate::embedded::admin::{self, Answer, Request};
use crate::embedded::instant::rfc3339;
use crate::env::Env;
use crate::yaml::duration;

pub use serve::ServeArgs;

/// The most that is read of one resource file.
const MAX_FILE: u64 = 1024 * 1024;
/// The life of an invite token without `--ttl`, as with `tctl`.
const INVITE: &str = "30m";

/// Arguments of `tbot cluster`.
#[derive(Debug, Clone, Args)]
pub struct ClusterArgs {
    /// Directory that holds everything of the cluster [default: /var/lib/tbot-cluster as root,
    /// else $XDG_DATA_HOME/tbot-cluster]
    #[arg(long, global = true, env = "TBOT_CLUSTER_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: ClusterCommand,
}

/// The commands of `tbot cluster`.
#[derive(Debug, Clone, Subcommand)]
enum ClusterCommand {
    /// Run a single-node cluster in the foreground
    Serve(Box<ServeArgs>),
    /// Create resources from YAML files
    Create {
        /// Replace resources that are there already
        #[arg(short, long)]
        force: bool,
        /// Files with one or more resources; `-` is the standard input
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Print resources
    Get {
        /// A kind, or one resource of it: `bot`, `token/example-bot`
        #[arg(value_name = "KIND[/NAME]")]
        resource: String,
        /// How to print them
        #[arg(long, default_value = "yaml")]
        format: Format,
    },
    /// Remove a resource
    Rm {
        /// The resource: `bot/example`
        #[arg(value_name = "KIND/NAME")]
        resource: String,
    },
    /// Show the cluster's name, version and CA pin
    Status,
    /// Invite bots with one-time secrets
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Refuse a bot, one instance of it, or another target from now on
    Lock(locks::LockArgs),
    /// Remove the locks on a target
    Unlock {
        #[command(flatten)]
        target: locks::Target,
    },
    /// Give an authority new keys, phase by phase
    Rotate(rotate::RotateArgs),
    /// Look after bots
    #[command(subcommand)]
    Bots(BotsCommand),
}

/// The commands of `tbot cluster tokens`.
#[derive(Debug, Clone, Subcommand)]
enum TokensCommand {
    /// Make a secret that lets one bot join once
    Add {
        /// Who joins: always `bot`
        #[arg(long = "type", value_name = "TYPE", default_value = "bot")]
        kind: String,
        /// The bot [default: the only one there is]
        #[arg(long, value_name = "NAME")]
        bot: Option<String>,
        /// How long the secret can be used
        #[arg(long, value_name = "DURATION", default_value = INVITE, value_parser = positive)]
        ttl: Duration,
        /// How to print it; `text` prints the secret alone [default: what to do with it]
        #[arg(long)]
        format: Option<Format>,
    },
    /// List tokens
    Ls {
        /// How to print them
        #[arg(long, default_value = "text")]
        format: Format,
        /// Show names that are secrets
        #[arg(long)]
        with_secrets: bool,
    },
    /// Remove a token
    Rm {
        /// The token
        name: String,
    },
}

/// The commands of `tbot cluster bots`.
#[derive(Debug, Clone, Subcommand)]
enum BotsCommand {
    /// List bots
    Ls {
        /// How to print them
        #[arg(long, default_value = "text")]
        format: Format,
    },
    /// Change the roles of a bot
    Update {
        /// The bot
        name: String,
        /// Roles to add, separated by commas
        #[arg(long, value_name = "ROLES", value_delimiter = ',')]
        add_roles: Vec<String>,
        /// Roles to have instead of the present ones, separated by commas
        #[arg(
            long,
            value_name = "ROLES",
            value_delimiter = ',',
            conflicts_with = "add_roles"
        )]
        set_roles: Option<Vec<String>>,
    },
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table or sentences
    Text,
    /// YAML documents
    Yaml,
    /// JSON
    Json,
}

fn positive(text: &str) -> Result<Duration, String> {
    match duration::parse(text) {
        Ok(ttl) if ttl.is_zero() => Err("must be longer than 0s".to_owned()),
        Ok(ttl) => Ok(ttl),
        Err(error) => Err(format!("{error} ({})", duration::FORM)),
    }
}

/// The data directory if none is given: the system's for root, else the user's.
fn default_data_dir(root: bool, env: &Env) -> anyhow::Result<PathBuf> {
    if root {
        return Ok(PathBuf::from("/var/lib/tbot-cluster"));
    }
    let base = match (env.get("XDG_DATA_HOME"), env.get("HOME")) {
        (Some(data), _) if data.starts_with('/') => PathBuf::from(data),
        (_, Some(home)) => PathBuf::from(home).join(".local/share"),
        _ => bail!("there is no home directory: name one with --data-dir"),
    };
    Ok(base.join("tbot-cluster"))
}

/// Runs the command. Results go to `out`, what surprises people to `err`; logs go where the
/// process sends them.
pub async fn run(
    args: ClusterArgs,
    env: &Env,
    out: &mut (dyn Write + Send),
    err: &mut (dyn Write + Send),
) -> anyhow::Result<()> {
    let data_dir = match args.data_dir {
        Some(dir) => dir,
        None => default_data_dir(nix::unistd::geteuid().is_root(), env)?,
    };
    let mut session = Session {
        data_dir,
        clock: Clock::system(),
        out,
        err,
    };
    match args.command {
        ClusterCommand::Serve(args) => return serve::run(*args, session.data_dir, env).await,
        ClusterCommand::Create { force, files } => session.create_files(&files, force).await?,
        ClusterCommand::Get { resource, format } => session.get(&resource, format).await?,
        ClusterCommand::Rm { resource } => {
            let (kind, name) = resource.split_once('/').ok_or_else(|| {
                Mistake(format!("{resource:?} names no resource: write KIND/NAME"))
            })?;
            let message = session.remove(kind, name).await?;
            writeln!(session.out, "{message}")?;
        }
        ClusterCommand::Status => session.status().await?,
        ClusterCommand::Tokens(command) => session.tokens(command).await?,
        ClusterCommand::Lock(args) => session.lock(args).await?,
        ClusterCommand::Unlock { target } => session.unlock(&target).await?,
        ClusterCommand::Rotate(args) => session.rotate(args).await?,
        ClusterCommand::Bots(command) => session.bots(command).await?,
    }
    Ok(session.out.flush()?)
}

/// One command in front of a running cluster.
struct Session<'a> {
    data_dir: PathBuf,
    clock: Clock,
    out: &'a mut (dyn Write + Send),
    err: &'a mut (dyn Write + Send),
}

impl Session<'_> {
    async fn ask(&self, request: &Request) -> anyhow::Result<Answer> {
        match admin::ask(&self.data_dir, request).await? {
            Answer::Refused {
                error,
                mistaken: true,
            } => Err(Mistake(error).into()),
            Answer::Refused { error, .. } => bail!("{error}"),
            answer => Ok(answer),
        }
    }

    async fn list(&self, kind: &str, name: Option<&str>) -> anyhow::Result<Vec<Value>> {
        let request = Request::Get {
            kind: kind.to_owned(),
            name: name.map(str::to_owned),
        };
        match self.ask(&request).await? {
            Answer::Resources { resources } => Ok(resources),
            other => bail!("the cluster answered something else: {other:?}"),
        }
    }

    async fn remove(&self, kind: &str, name: &str) -> anyhow::Result<String> {
        let request = Request::Remove {
            kind: kind.to_owned(),
            name: name.to_owned(),
        };
        match self.ask(&request).await? {
            Answer::Removed { message } => Ok(message),
            other => bail!("the cluster answered something else: {other:?}"),
        }
    }

    /// Creates the resources and tells notes; returns the lines that say what was done.
    async fn create(
        &mut self,
        files: Vec<(String, String)>,
        force: bool,
    ) -> anyhow::Result<Vec<String>> {
        let Answer::Created { applied } = self.ask(&Request::Create { files, force }).await? else {
            bail!("the cluster answered something else than was asked");
        };
        for note in applied.iter().flat_map(|applied| &applied.notes) {
            writeln!(self.err, "note: {note}")?;
        }
        Ok(applied.into_iter().map(|applied| applied.message).collect())
    }

    /// Creates one resource that a command made itself.
    async fn create_one(&mut self, resource: &Value, force: bool) -> anyhow::Result<()> {
        let file = ("command line".to_owned(), resource.to_string());
        self.create(vec![file], force).await.map(drop)
    }

    async fn create_files(&mut self, paths: &[PathBuf], force: bool) -> anyhow::Result<()> {
        let mut files = Vec::new();
        for path in paths {
            let name = path.display().to_string();
            let mut text = String::new();
            let read = if name == "-" {
                std::io::stdin()
                    .lock()
                    .take(MAX_FILE + 1)
                    .read_to_string(&mut text)
            } else {
                std::fs::File::open(path)
                    .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
            };
            let size = read.with_context(|| format!("cannot read {name}"))?;
            if size as u64 > MAX_FILE {
                bail!("{name} is larger than {MAX_FILE} bytes: that is no resource file");
            }
            files.push((
                if name == "-" {
                    "stdin".to_owned()
                } else {
                    name
                },
                text,
            ));
        }
        for line in self.create(files, force).await? {
            writeln!(self.out, "{line}")?;
        }
        Ok(())
    }

    async fn get(&mut self, resource: &str, format: Format) -> anyhow::Result<()> {
        let (kind, name) = match resource.split_once('/') {
            Some((kind, name)) => (kind, Some(name)),
            None => (resource, None),
        };
        let resources = self.list(kind, name).await?;
        let text = match format {
            Format::Yaml => render::yaml(&resources),
            Format::Json => render::json(&json!(resources)),
            Format::Text => render::resources(&resources),
        };
        Ok(self.out.write_all(text.as_bytes())?)
    }

    async fn status(&mut self) -> anyhow::Result<()> {
        let Answer::Status(status) = self.ask(&Request::Status).await? else {
            bail!("the cluster answered something else than was asked");
        };
        let mut rows = vec![
            ("Cluster".to_owned(), status.cluster),
            ("Version".to_owned(), status.version),
            ("Address".to_owned(), status.public_addr),
        ];
        for (kind, rotation) in status.authorities {
            rows.push((format!("{kind} CA"), rotation));
        }
        let pins = status.ca_pins.into_iter();
        rows.extend(pins.map(|pin| ("CA pin".to_owned(), pin)));
        Ok(self.out.write_all(render::pairs(&rows).as_bytes())?)
    }

    async fn tokens(&mut self, command: TokensCommand) -> anyhow::Result<()> {
        match command {
            TokensCommand::Add {
                kind,
                bot,
                ttl,
                format,
            } => {
                if !kind.eq_ignore_ascii_case("bot") {
                    let text =
                        format!("--type={kind}: only bots join this cluster (write --type=bot)");
                    return Err(Mistake(text).into());
                }
                self.invite(bot, ttl, format).await
            }
            TokensCommand::Ls {
                format,
                with_secrets,
            } => {
                let tokens = self.list("token", None).await?;
                let text = match format {
                    Format::Json => render::json(&json!(tokens)),
                    Format::Yaml => render::yaml(&tokens),
                    Format::Text => render::tokens(&tokens, with_secrets, self.clock.now()),
                };
                Ok(self.out.write_all(text.as_bytes())?)
            }
            TokensCommand::Rm { name } => {
                self.remove("token", &name).await?;
                Ok(writeln!(self.out, "Token {name} has been deleted")?)
            }
        }
    }

    async fn invite(
        &mut self,
        bot: Option<String>,
        ttl: Duration,
        format: Option<Format>,
    ) -> anyhow::Result<()> {
        let bots = self.list("bot", None).await?;
        let mut names = bots.iter().map(render::name);
        let bot = match (bot, names.next(), names.next()) {
            (Some(bot), ..) if bots.iter().any(|known| render::name(known) == bot) => bot,
            (Some(bot), ..) => bail!("bot {bot:?} is not found (create it first)"),
            (None, Some(only), None) => only.to_owned(),
            (None, None, _) => bail!("there is no bot to invite (create one first)"),
            (None, Some(_), Some(_)) => bail!("there are several bots: name one with --bot"),
        };
        let token = hex::encode(random::<16>());
        let expires = rfc3339(self.clock.now() + ttl);
        let resource = json!({
            "kind": "token",
            "version": "v2",
            "metadata": {"name": token, "expires": expires},
            "spec": {"roles": ["Bot"], "bot_name": bot, "join_method": "token"},
        });
        self.create_one(&resource, false).await?;
        let info = json!({"token": token, "roles": ["Bot"], "bot_name": bot, "expires": expires});
        let text = match format {
            Some(Format::Json) => render::json(&info),
            Some(Format::Yaml) => render::yaml(&[info]),
            Some(Format::Text) => format!("{token}\n"),
            None => {
                let Answer::Status(status) = self.ask(&Request::Status).await? else {
                    bail!("the cluster answered something else than was asked");
                };
                render::invitation(&token, &bot, ttl, &status)
            }
        };
        Ok(self.out.write_all(text.as_bytes())?)
    }

    async fn bots(&mut self, command: BotsCommand) -> anyhow::Result<()> {
        match command {
            BotsCommand::Ls { format } => {
                let bots = self.list("bot", None).await?;
                let text = match format {
                    Format::Json => render::json(&json!(bots)),
                    Format::Yaml => render::yaml(&bots),
                    Format::Text => render::bots(&bots),
                };
                Ok(self.out.write_all(text.as_bytes())?)
            }
            BotsCommand::Update {
                name,
                add_roles,
                set_roles,
            } => {
                let mut found = self.list("bot", Some(&name)).await?;
                let bot = found.first_mut().context("the bot is not found")?;
                let roles = bot
                    .pointer_mut("/spec/roles")
                    .context("the bot has no roles")?;
                let mut wanted = set_roles.unwrap_or_else(|| render::texts(roles));
                for role in add_roles {
                    if !wanted.contains(&role) {
                        wanted.push(role);
                    }
                }
                *roles = json!(wanted);
                let bot = bot.clone();
                self.create_one(&bot, true).await?;
                Ok(writeln!(
                    self.out,
                    "Bot {name:?} has been updated. Roles: {}",
                    wanted.join(", ")
                )?)
            }
        }
    }
}

#[cfg(test)]
mod tests;
