//! The flags of `start` and `configure`: shared ones, and one subcommand for each service kind made
//! from the kind's own table. All of them become an [`Overlay`].

use std::collections::BTreeMap;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command, Error};

use crate::config::{OnboardingFlags, Overlay, ServiceFlags};
use crate::destination;
use crate::env::Env;
use crate::secret::Secret;
use crate::services::{Flag, FlagValue, KINDS, ServiceKind};
use crate::yaml::{Key, Node, Value, duration};

/// Flags of join method `bound_keypair`, and the keys of its section. The last is the name that 18.0
/// has for the first.
const BOUND_KEYPAIR: &[(&str, &str)] = &[
    ("registration-secret", "registration_secret"),
    ("registration-secret-path", "registration_secret_path"),
    ("static-key-path", "static_key_path"),
    ("initial-join-secret", "initialjoinsecret"),
];

/// What was typed after `start` or `configure`.
#[derive(Debug, Clone, Default)]
pub(super) struct AgentFlags {
    overlay: Overlay,
    auth_server: Option<String>,
    proxy_server: Option<String>,
    token: Option<Secret<String>>,
}

impl AgentFlags {
    /// The overlay, with environment variables in the place of flags that were not typed.
    pub(super) fn overlay(&self, env: &Env) -> Overlay {
        let mut overlay = self.overlay.clone();
        for (key, typed, flag, variable) in [
            (
                "auth_server",
                &self.auth_server,
                "--auth-server",
                "TELEPORT_AUTH_SERVER",
            ),
            (
                "proxy_server",
                &self.proxy_server,
                "--proxy-server",
                "TELEPORT_PROXY",
            ),
        ] {
            let value = match typed {
                Some(text) => Some((text.clone(), flag)),
                None => env.get(variable).map(|text| (text.to_owned(), variable)),
            };
            if let Some((text, origin)) = value {
                overlay.values.push((key, text, origin.to_owned()));
            }
        }
        let variable = "TELEPORT_BOT_TOKEN";
        overlay.onboarding.token = match &self.token {
            Some(token) => Some((token.clone(), "--token".to_owned())),
            None => env
                .get(variable)
                .map(|text| (Secret::new(text.to_owned()), variable.to_owned())),
        };
        overlay
    }
}

impl clap::Args for AgentFlags {
    fn augment_args(command: Command) -> Command {
        let legacy = Command::new("legacy")
            .about("Run what the configuration file says; the default")
            .args(shared(true));
        command
            .args(shared(true).into_iter().map(|arg| arg.hide(true)))
            .subcommand(legacy)
            .subcommands(KINDS.iter().map(|kind| subcommand(*kind)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for AgentFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let Some((name, inner)) = matches.subcommand() else {
            return Ok(read_shared(matches));
        };
        if shared(true)
            .iter()
            .any(|arg| given(matches, arg.get_id().as_str()))
        {
            return Err(Error::raw(
                ErrorKind::ArgumentConflict,
                format!("put the flags after the subcommand `{name}`\n"),
            ));
        }
        let mut flags = read_shared(inner);
        if let Some(kind) = KINDS.iter().find(|kind| kind.name() == name) {
            flags.overlay.service = Some(service(*kind, inner)?);
        }
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The flags that every subcommand has; `legacy` has two of its own and lacks some.
fn shared(legacy: bool) -> Vec<Arg> {
    let text = |name: &'static str, placeholder: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(placeholder).help(help)
    };
    let mut all = vec![
        text(
            "auth-server",
            "HOST:PORT",
            "Address of an auth service [env: TELEPORT_AUTH_SERVER]",
        )
        .short('a'),
        text(
            "proxy-server",
            "HOST:PORT",
            "Address of a proxy [env: TELEPORT_PROXY]",
        ),
        text(
            "token",
            "TOKEN",
            "Join token, or the absolute path of a file with it [env: TELEPORT_BOT_TOKEN]",
        ),
        text("join-method", "METHOD", "How to join"),
        text(
            "ca-pin",
            "PIN",
            "Pin of the auth service's authority; repeatable",
        )
        .action(ArgAction::Append),
        text("certificate-ttl", "DURATION", "Life of certificates").value_parser(parse_duration),
        text("renewal-interval", "DURATION", "Time between renewals").value_parser(parse_duration),
        text("diag-addr", "HOST:PORT", "Serve health and metrics there"),
        text(
            "pid-file",
            "PATH",
            "Write the process id there while running",
        ),
        text(
            "diag-socket-for-updater",
            "PATH",
            "Diagnostics socket for a managed updater",
        )
        .hide(true),
    ];
    all.extend(switch("oneshot", "Write every output once, then end"));
    if legacy {
        all.push(
            text("data-dir", "URI", "Where the bot's own identity is kept")
                .value_parser(parse_destination),
        );
        all.push(text(
            "destination-dir",
            "DIR",
            "Replace all services by an identity output to this directory",
        ));
    } else {
        all.push(
            text("storage", "URI", "Where the bot's own identity is kept")
                .value_parser(parse_destination),
        );
        all.push(text(
            "join-uri",
            "URI",
            "Address, join method and token in one: tbot+proxy+METHOD://TOKEN@HOST:PORT",
        ));
        all.extend([
            text(
                "registration-secret",
                "SECRET",
                "Secret of the first join by bound_keypair [env: TBOT_REGISTRATION_SECRET]",
            ),
            text("registration-secret-path", "PATH", "File with that secret"),
            text(
                "static-key-path",
                "PATH",
                "File with a static key for bound_keypair [env: TBOT_BOUND_KEYPAIR_STATIC_KEY]",
            ),
            text("initial-join-secret", "SECRET", "As --registration-secret").hide(true),
        ]);
    }
    all
}

/// `--name` and a hidden `--no-name`; the later one wins.
fn switch(name: &'static str, help: &'static str) -> [Arg; 2] {
    let no = format!("no-{name}");
    let yes = Arg::new(name)
        .long(name)
        .action(ArgAction::SetTrue)
        .overrides_with(no.clone())
        .help(help);
    [
        yes,
        Arg::new(no.clone())
            .long(no)
            .action(ArgAction::SetTrue)
            .hide(true),
    ]
}

fn switched(matches: &ArgMatches, name: &str) -> Option<bool> {
    let no = format!("no-{name}");
    let (yes, no) = (given(matches, name), given(matches, &no));
    (yes || no).then_some(yes)
}

/// Whether a flag was typed, for flags that not every subcommand has.
fn given(matches: &ArgMatches, id: &str) -> bool {
    matches.try_contains_id(id).unwrap_or_default()
        && matches.value_source(id) == Some(clap::parser::ValueSource::CommandLine)
}

fn one<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, id: &str) -> Option<T> {
    matches.try_get_one::<T>(id).ok().flatten().cloned()
}

fn many<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, id: &str) -> Vec<T> {
    let values = matches.try_get_many::<T>(id).ok().flatten();
    values.map(|all| all.cloned().collect()).unwrap_or_default()
}

fn read_shared(matches: &ArgMatches) -> AgentFlags {
    // An empty text is the same as a flag that was not typed.
    let text = |id: &str| one::<String>(matches, id).filter(|text| !text.is_empty());
    let mut overlay = Overlay {
        onboarding: OnboardingFlags {
            token: None,
            join_method: text("join-method").map(|name| (name, "--join-method".to_owned())),
            ca_pins: many(matches, "ca-pin"),
            bound_keypair: BOUND_KEYPAIR
                .iter()
                .filter_map(|(flag, key)| {
                    Some((*key, Secret::new(text(flag)?), format!("--{flag}")))
                })
                .collect(),
        },
        only_destination: text("destination-dir"),
        pid_file: text("pid-file").map(Into::into),
        diag_socket: text("diag-socket-for-updater").map(Into::into),
        ..Overlay::default()
    };
    for (key, flag) in [
        ("credential_ttl", "certificate-ttl"),
        ("renewal_interval", "renewal-interval"),
        ("diag_addr", "diag-addr"),
        ("join_uri", "join-uri"),
    ] {
        if let Some(value) = text(flag) {
            overlay.values.push((key, value, format!("--{flag}")));
        }
    }
    for flag in ["storage", "data-dir"] {
        if let Some(node) = one::<Node>(matches, flag) {
            overlay.storage = Some((node, format!("--{flag}")));
        }
    }
    if let Some(value) = switched(matches, "oneshot") {
        overlay
            .switches
            .push(("oneshot", value, "--oneshot".to_owned()));
    }
    AgentFlags {
        overlay,
        auth_server: text("auth-server"),
        proxy_server: text("proxy-server"),
        token: text("token").map(Secret::new),
    }
}

fn subcommand(kind: &'static dyn ServiceKind) -> Command {
    let mut command = Command::new(kind.name())
        .about(format!(
            "Add one `{}` service to those of the configuration file",
            kind.name()
        ))
        .visible_aliases(kind.aliases().iter().copied())
        .args(shared(false));
    for flag in kind.flags() {
        command = if flag.value == FlagValue::Bool {
            command.args(switch(flag.name, flag.help))
        } else {
            command.arg(argument(flag))
        };
        if flag.value == FlagValue::Destination {
            command = command.args([
                reader("reader-user", "User that may read the files; repeatable"),
                reader("reader-group", "Group that may read the files; repeatable"),
            ]);
        }
    }
    command
}

fn argument(flag: &Flag) -> Arg {
    let arg = Arg::new(flag.name)
        .long(flag.name)
        .help(flag.help)
        .required(flag.required);
    match flag.value {
        FlagValue::Text | FlagValue::Bool => arg.value_name("TEXT"),
        FlagValue::List | FlagValue::NameSelectors => {
            arg.value_name("TEXT").action(ArgAction::Append)
        }
        FlagValue::Destination => arg.value_name("URI").value_parser(parse_destination),
        FlagValue::Labels => arg
            .value_name("KEY=VALUE,…")
            .value_parser(parse_label_lists),
        FlagValue::LabelSelectors => arg
            .value_name("KEY=VALUE,…")
            .value_parser(parse_labels)
            .action(ArgAction::Append),
    }
}

fn reader(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name("NAME")
        .action(ArgAction::Append)
        .help(help)
}

/// The service that a subcommand's flags describe.
fn service(kind: &'static dyn ServiceKind, matches: &ArgMatches) -> Result<ServiceFlags, Error> {
    let mut node = Node::made(Value::Null);
    node.set("type", Node::made_text(kind.name()));
    let mut origins = BTreeMap::new();
    for flag in kind.flags() {
        let value = match flag.value {
            FlagValue::Text => one::<String>(matches, flag.name).map(Node::made_text),
            FlagValue::Bool => switched(matches, flag.name).map(|value| {
                Node::made(Value::Scalar {
                    text: value.to_string(),
                    quoted: false,
                })
            }),
            FlagValue::List => {
                let items = many::<String>(matches, flag.name);
                (!items.is_empty()).then(|| list(items.into_iter().map(Node::made_text)))
            }
            FlagValue::Destination => match one::<Node>(matches, flag.name) {
                Some(destination) => Some(with_readers(destination, matches)?),
                None => None,
            },
            FlagValue::Labels => one::<Node>(matches, flag.name),
            FlagValue::NameSelectors => {
                let names = many::<String>(matches, flag.name).into_iter();
                appended(&node, flag, "name", names.map(Node::made_text))
            }
            FlagValue::LabelSelectors => {
                let labels = many::<Node>(matches, flag.name).into_iter();
                appended(&node, flag, "labels", labels)
            }
        };
        if let Some(value) = value {
            node.set(flag.yaml, value);
            origins.insert(flag.yaml.to_owned(), format!("--{}", flag.name));
        }
    }
    Ok(ServiceFlags {
        node,
        origins,
        command: format!("subcommand {}", kind.name()),
    })
}

/// The list that `service` has where the flag belongs, with one more item `key: …` for each of
/// `values`; `None` if there are none.
fn appended(
    service: &Node,
    flag: &Flag,
    key: &str,
    values: impl Iterator<Item = Node>,
) -> Option<Node> {
    let added: Vec<Node> = values.map(|value| entry(key, value)).collect();
    let known = match service.get(flag.yaml).map(|node| &node.value) {
        Some(Value::Sequence(items)) => items.as_slice(),
        _ => &[],
    };
    (!added.is_empty()).then(|| list(known.iter().cloned().chain(added)))
}

/// A mapping with one key.
fn entry(key: &str, value: Node) -> Node {
    let mut entry = Node::made(Value::Null);
    entry.set(key, value);
    entry
}

fn with_readers(mut destination: Node, matches: &ArgMatches) -> Result<Node, Error> {
    let users = many::<String>(matches, "reader-user").into_iter();
    let groups = many::<String>(matches, "reader-group").into_iter();
    let readers: Vec<Node> = users
        .map(|name| entry("user", Node::made_text(name)))
        .chain(groups.map(|name| entry("group", Node::made_text(name))))
        .collect();
    if readers.is_empty() {
        return Ok(destination);
    }
    if destination.get("type").and_then(Node::text) != Some("directory") {
        return Err(Error::raw(
            ErrorKind::ArgumentConflict,
            "--reader-user and --reader-group need a directory as --destination\n",
        ));
    }
    destination.set("readers", list(readers));
    Ok(destination)
}

fn list(items: impl IntoIterator<Item = Node>) -> Node {
    Node::made(Value::Sequence(items.into_iter().collect()))
}

fn parse_duration(text: &str) -> Result<String, String> {
    match duration::parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; {}", duration::FORM)),
    }
}

fn parse_destination(text: &str) -> Result<Node, String> {
    if text.is_empty() {
        return Err("the path must not be empty".to_owned());
    }
    destination::from_uri(text).map(|plan| Node::from(&plan.emit()))
}

/// As [`parse_labels`], and each value is a list of one.
fn parse_label_lists(text: &str) -> Result<Node, String> {
    labels(text, |value| list([value]))
}

/// `k=v,k2=v2` with `,` or `;` between, double quotes around what holds one of them.
fn parse_labels(text: &str) -> Result<Node, String> {
    labels(text, |value| value)
}

fn labels(text: &str, shape: impl Fn(Node) -> Node) -> Result<Node, String> {
    let mut entries: Vec<(Key, Node)> = Vec::new();
    for pair in split_quoted(text)? {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
        let (key, value) = (key.trim(), value.trim());
        if key.is_empty() {
            return Err(format!("{pair:?} has no key"));
        }
        if entries.iter().any(|(known, _)| known.text == key) {
            return Err(format!("the key {key:?} is there twice"));
        }
        entries.push((Key::made(key), shape(Node::made_text(value))));
    }
    if entries.is_empty() {
        return Err("there is no KEY=VALUE in it".to_owned());
    }
    Ok(Node::made(Value::Mapping(entries)))
}

fn split_quoted(text: &str) -> Result<Vec<String>, String> {
    let mut pairs = vec![String::new()];
    let mut quoted = false;
    for c in text.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' | ';' if !quoted => pairs.push(String::new()),
            _ => {
                if let Some(pair) = pairs.last_mut() {
                    pair.push(c);
                }
            }
        }
    }
    if quoted {
        return Err("a double quote is not closed".to_owned());
    }
    pairs.retain(|pair| !pair.trim().is_empty());
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairs() {
        let node = parse_label_lists("env=a,b=\"c,d\"; e=f").unwrap();
        let Value::Mapping(entries) = &node.value else {
            panic!("a mapping");
        };
        let keys: Vec<&str> = entries.iter().map(|(key, _)| key.text.as_str()).collect();
        assert_eq!(keys, ["env", "b", "e"]);
        assert_eq!(node.get("b"), Some(&list([Node::made_text("c,d")])));
        let node = parse_labels("b=\"c,d\"").unwrap();
        assert_eq!(node.get("b"), Some(&Node::made_text("c,d")));
        for bad in ["", "a", "=b", "a=\"b", "a=b,a=c", ",;"] {
            assert!(parse_labels(bad).is_err(), "{bad}");
        }
    }
}
