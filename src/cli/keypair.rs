//! `tbot keypair create`: the key that a bot of join method `bound_keypair` proves itself with, to be
//! registered in its token.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::exit::{Failure, print};
use crate::clock::Clock;
use crate::cluster::network::{Network, Settings};
use crate::cluster::ping;
use crate::cluster::trust::Trust;
use crate::crypto::{PrivateKey, Purpose, random};
use crate::destination::{self, Destination};
use crate::env::Env;
use crate::join::bound_keypair::Keys;

/// `keypair`.
#[derive(Debug, Subcommand)]
pub(super) enum KeypairCommand {
    /// Make a key and print its public half, to be registered in a token
    Create(CreateArgs),
}

/// `keypair create`.
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// The proxy, which is asked for the kind of key that its cluster wants
    #[arg(long, value_name = "HOST:PORT")]
    proxy_server: String,
    /// The bot's storage, where the key is kept
    #[arg(long, value_name = "URI", required_unless_present = "is_static")]
    storage: Option<String>,
    /// Make a new key even if there is one
    #[arg(long)]
    overwrite: bool,
    /// How the key is shown
    #[arg(long, value_enum, default_value_t = Form::Text)]
    format: Form,
    /// Make a key that is not kept in the storage and never replaced; it is shown, unless a path for
    /// it is given
    #[arg(long = "static", id = "is_static", conflicts_with = "storage")]
    is_static: bool,
    /// Where the static key is written
    #[arg(long, value_name = "PATH", requires = "is_static")]
    static_key_path: Option<PathBuf>,
}

/// The forms of what is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For people.
    Text,
    /// One JSON object in a line.
    Json,
}

/// What is shown.
#[derive(Serialize)]
struct Shown {
    public_key: String,
    /// A static key that is kept nowhere else.
    #[serde(skip_serializing_if = "Option::is_none")]
    private_key: Option<String>,
}

/// Makes the key, or finds the one that is there, and shows its public half.
pub(super) async fn create(args: &CreateArgs, insecure: bool, env: &Env) -> Result<(), Failure> {
    let maker = Maker {
        address: &args.proxy_server,
        settings: Settings::from_env(env).map_err(Failure::usage)?,
        insecure,
    };
    let shown = match (&args.static_key_path, &args.storage) {
        (Some(path), _) => in_file(args, path, maker).await?,
        (None, Some(uri)) => {
            let plan = destination::from_uri(uri)
                .map_err(|problem| Failure::usage(format!("--storage: {problem}")))?;
            in_storage(args, &plan.build(), maker).await?
        }
        (None, None) => {
            let key = maker.key().await?;
            Shown {
                private_key: Some(key.to_pem().expose().clone()),
                ..Shown::of(&key)?
            }
        }
    };
    print(&shown.text(args.format)?)
}

async fn in_storage(
    args: &CreateArgs,
    storage: &Arc<dyn Destination>,
    maker: Maker<'_>,
) -> anyhow::Result<Shown> {
    // An agent that runs there has the key in its memory.
    let _lock = storage.lock()?;
    storage.init().await?;
    if !storage.is_persistent() {
        bail!("--storage: a key in memory is lost when this command ends, choose another storage");
    }
    let clock = Clock::system();
    let known = Keys::load(storage, clock.now()).await;
    match known {
        Ok(known) => {
            if let (Some(key), false) = (known.active(), args.overwrite) {
                tracing::info!("There is a key already, --overwrite makes a new one");
                return Shown::of(key);
            }
            if known.any() && !args.overwrite {
                bail!(
                    "--storage: there are keys of a bot that may have joined with one of them; start it \
                     again, or lose them with --overwrite"
                );
            }
        }
        Err(error) if args.overwrite => tracing::warn!(%error, "Replacing what is there"),
        Err(error) => return Err(error.into()),
    }
    let key = maker.key().await?;
    let keys = Keys::unbound(key.clone(), clock.now());
    keys.replace(storage).await?;
    tracing::info!("The key is stored");
    Shown::of(&key)
}

async fn in_file(args: &CreateArgs, path: &Path, maker: Maker<'_>) -> anyhow::Result<Shown> {
    let shown = path.display();
    match std::fs::read_to_string(path) {
        Ok(text) if !args.overwrite => {
            let key = PrivateKey::from_pem(&text)
                .with_context(|| format!("{shown} is there and holds no key (see --overwrite)"))?;
            tracing::info!("There is a key already, --overwrite makes a new one");
            return Shown::of(&key);
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound && !args.overwrite => {
            return Err(anyhow!(error).context(format!("read {shown}")));
        }
        Ok(_) | Err(_) => {}
    }
    let key = maker.key().await?;
    write(path, key.to_pem().expose()).with_context(|| format!("write {shown}"))?;
    tracing::info!(path = %shown, "The key is stored");
    Shown::of(&key)
}

/// Puts a private file in the place of `path`, whole.
fn write(path: &Path, text: &str) -> io::Result<()> {
    // A name of its own: what is left of a run that was killed is in nobody's way.
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}.new", hex::encode(random::<8>())));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(&draft, path));
    if written.is_err() {
        // What is left of it must not stop the next attempt.
        drop(std::fs::remove_file(&draft));
    }
    written
}

/// Makes keys of the kind that a cluster wants.
struct Maker<'a> {
    address: &'a str,
    settings: Settings,
    insecure: bool,
}

impl Maker<'_> {
    async fn key(self) -> anyhow::Result<PrivateKey> {
        let trust = Trust {
            insecure: self.insecure,
            ..Trust::default()
        };
        let clock = Clock::system();
        let network = Network::new(self.settings, trust.clone(), clock.clone());
        let found = ping::find(&clock, &network, &trust, self.address).await?;
        Ok(PrivateKey::generate(
            found.suite.algorithm(Purpose::BoundKeypair),
        )?)
    }
}

impl Shown {
    fn of(key: &PrivateKey) -> anyhow::Result<Self> {
        Ok(Self {
            public_key: key.public_ssh_line()?.trim().to_owned(),
            private_key: None,
        })
    }

    fn text(&self, form: Form) -> anyhow::Result<String> {
        if form == Form::Json {
            return Ok(serde_json::to_string(self)? + "\n");
        }
        let mut text = String::new();
        if let Some(key) = &self.private_key {
            text += &format!(
                "\nThe private key. Keep it secret: whoever has it is the bot.\n\n{key}\n\
                 As the value of TBOT_BOUND_KEYPAIR_STATIC_KEY:\n\n\t{}\n",
                STANDARD.encode(key)
            );
        }
        text += &format!(
            "\nThe bot can join once its token has this public key in\n\
             `spec.bound_keypair.onboarding.initial_public_key`:\n\n\t{}\n\n",
            self.public_key
        );
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::KeyAlgorithm;

    #[test]
    fn a_key_is_shown_in_both_forms() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let line = key.public_ssh_line().unwrap();
        let shown = Shown::of(&key).unwrap();
        let json = shown.text(Form::Json).unwrap();
        assert_eq!(json, format!("{{\"public_key\":\"{}\"}}\n", line.trim()));
        let text = shown.text(Form::Text).unwrap();
        assert!(text.contains(&format!("\n\t{line}")), "{text}");
        assert!(!text.contains("PRIVATE"));
        let pem = key.to_pem().expose().clone();
        let shown = Shown {
            private_key: Some(pem.clone()),
            ..shown
        };
        let text = shown.text(Form::Text).unwrap();
        assert!(text.contains(&pem) && text.contains(&STANDARD.encode(&pem)));
    }

    #[tokio::test]
    async fn keys_that_a_bot_may_be_bound_to_are_not_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let uri = format!("file://{}", dir.path().display());
        let storage = destination::from_uri(&uri).unwrap().build();
        storage.init().await.unwrap();
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let mut keys = Keys::default();
        keys.add(key, Clock::system().now());
        keys.store(&storage).await.unwrap();
        let args = CreateArgs {
            proxy_server: "127.0.0.1:1".to_owned(),
            storage: Some(uri),
            overwrite: false,
            format: Form::Text,
            is_static: false,
            static_key_path: None,
        };
        let maker = Maker {
            address: &args.proxy_server,
            settings: Settings::from_env(&Env::default()).unwrap(),
            insecure: true,
        };
        let refused = in_storage(&args, &storage, maker).await.map(|_shown| ());
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("--overwrite"), "{text}");
    }

    #[test]
    fn a_key_file_is_private_and_replaced_whole() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(dir.path().join("key.new"), "of a run that was killed").unwrap();
        for text in ["first", "second"] {
            write(&path, text).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(write(&dir.path().join("none/key"), "text").is_err());
    }
}
