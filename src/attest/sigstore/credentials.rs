//! Credentials for registries, where Docker and Podman keep them.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;

use crate::env::Env;
use crate::secret::Secret;

/// The longest a credential helper may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest configuration, and the longest answer of a helper, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// What a helper gives as user name if the other part is a token.
const TOKEN_USER: &str = "<token>";

/// What a registry wants to see.
#[derive(Debug)]
pub(super) enum Credential {
    /// User and password.
    Basic {
        user: String,
        password: Secret<String>,
    },
    /// A token that is exchanged for others.
    Identity(Secret<String>),
    /// A token for the registry itself.
    Registry(Secret<String>),
}

/// Why the credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is not what Docker and Podman write.
    #[error("{}: no configuration of Docker: {source}", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// An entry cannot be used.
    #[error("{}: the entry for {host} is not `user:password` in base64", path.display())]
    Entry { path: PathBuf, host: String },
    /// The helper does not work.
    #[error("credential helper {helper}: {problem}")]
    Helper { helper: String, problem: String },
}

/// `config.json` or `auth.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct File {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// Where credentials are looked for.
#[derive(Debug, Clone)]
pub(super) struct Keychain {
    /// The one that was configured, or every place where one may be.
    candidates: Vec<PathBuf>,
}

impl Keychain {
    /// The configured file; or the first that exists of those that Docker and Podman use.
    pub(super) fn new(configured: Option<&Path>, env: &Env) -> Self {
        let below = |variable: &str, rest: &str| Some(Path::new(env.get(variable)?).join(rest));
        let candidates = match configured {
            Some(path) => vec![path.to_owned()],
            None => [
                below("HOME", ".docker/config.json"),
                below("DOCKER_CONFIG", "config.json"),
                env.get("REGISTRY_AUTH_FILE").map(PathBuf::from),
                below("XDG_RUNTIME_DIR", "containers/auth.json"),
            ]
            .into_iter()
            .flatten()
            .collect(),
        };
        Self { candidates }
    }

    /// What there is for a registry, `host` or `host:port`.
    pub(super) async fn credential(
        &self,
        host: &str,
    ) -> Result<Option<Credential>, CredentialError> {
        let (candidates, asked) = (self.candidates.clone(), host.to_owned());
        // Files, and programs that ask a keyring.
        let look = move || {
            let existing = candidates.into_iter().find(|path| path.is_file());
            existing.map_or(Ok(None), |path| look_up(&path, &asked))
        };
        let ended = |ended: tokio::task::JoinError| CredentialError::Helper {
            helper: String::new(),
            problem: ended.to_string(),
        };
        tokio::task::spawn_blocking(look).await.map_err(ended)?
    }
}

fn look_up(path: &Path, host: &str) -> Result<Option<Credential>, CredentialError> {
    let unreadable = |source| CredentialError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .map_err(unreadable)?
        .take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    let file: File =
        serde_json::from_slice(&bytes).map_err(|source| CredentialError::Malformed {
            path: path.to_owned(),
            source,
        })?;
    let of_host = file.cred_helpers.iter().find(|(key, _)| names(key, host));
    let helper = of_host.map_or(file.creds_store.as_str(), |(_, helper)| helper);
    if !helper.is_empty()
        && let Some(found) = helped(helper, host)?
    {
        return Ok(Some(found));
    }
    let entry = file.auths.into_iter().find(|(key, _)| names(key, host));
    entry
        .and_then(|(_, entry)| entry.credential())
        .transpose()
        .map_err(|()| CredentialError::Entry {
            path: path.to_owned(),
            host: host.to_owned(),
        })
}

/// Whether a key of the file is about this registry. Old ones are addresses: `https://host/v1/`.
fn names(key: &str, host: &str) -> bool {
    let key = key
        .strip_prefix("https://")
        .or(key.strip_prefix("http://"))
        .unwrap_or(key);
    let key = key.split('/').next().unwrap_or_default();
    let hub = |name: &str| {
        matches!(
            name,
            "docker.io" | "index.docker.io" | "registry-1.docker.io"
        )
    };
    key == host || (hub(key) && hub(host))
}

impl Entry {
    /// `None` for an entry that only says that there is one elsewhere.
    fn credential(self) -> Option<Result<Credential, ()>> {
        if !self.registrytoken.is_empty() {
            return Some(Ok(Credential::Registry(Secret::new(self.registrytoken))));
        }
        if !self.identitytoken.is_empty() {
            return Some(Ok(Credential::Identity(Secret::new(self.identitytoken))));
        }
        if !self.auth.is_empty() {
            let decoded = STANDARD.decode(self.auth.trim()).ok();
            let text = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
            let parts = text.as_deref().and_then(|text| text.split_once(':'));
            return Some(parts.ok_or(()).map(|(user, password)| Credential::Basic {
                user: user.to_owned(),
                password: Secret::new(password.trim_end_matches('\0').to_owned()),
            }));
        }
        (!self.username.is_empty()).then(|| {
            Ok(Credential::Basic {
                user: self.username,
                password: Secret::new(self.password),
            })
        })
    }
}

/// Asks `docker-credential-<helper>`; `None` if it does not know the registry.
fn helped(helper: &str, host: &str) -> Result<Option<Credential>, CredentialError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let failed = |problem: String| CredentialError::Helper {
        helper: helper.to_owned(),
        problem,
    };
    if !helper
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    {
        return Err(failed("its name is not that of a program".to_owned()));
    }
    let asked = if host == "index.docker.io" {
        "https://index.docker.io/v1/"
    } else {
        host
    };
    let (success, output) = run(&format!("docker-credential-{helper}"), asked)
        .map_err(|source| failed(source.to_string()))?;
    if !success {
        // How helpers say it; they have no other way.
        if String::from_utf8_lossy(&output).contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed("it failed".to_owned()));
    }
    let answer: Answer =
        serde_json::from_slice(&output).map_err(|_source| failed("no JSON".to_owned()))?;
    let secret = Secret::new(answer.secret);
    Ok(Some(if answer.username == TOKEN_USER {
        Credential::Identity(secret)
    } else {
        Credential::Basic {
            user: answer.username,
            password: secret,
        }
    }))
}

/// Runs `program get` with this input, and kills it when it takes too long.
fn run(program: &str, input: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let (done, waited) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        let late = waited.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late && let Err(error) = pidfd_send_signal(pidfd, Signal::KILL) {
            tracing::debug!(%error, "A credential helper could not be killed");
        }
        late
    });
    let mut output = Vec::new();
    let asked = (child.stdin.take())
        .map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()))
        // It may know its answer without the question.
        .or_else(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(error),
        })
        .and_then(|()| match child.stdout.take() {
            Some(stdout) => stdout.take(MAX_FILE).read_to_end(&mut output),
            None => Ok(0),
        });
    let status = child.wait()?;
    drop(done);
    if guard.join().unwrap_or(false) {
        return Err(io::Error::other(format!(
            "no answer within {} s",
            PATIENCE.as_secs()
        )));
    }
    asked?;
    Ok((status.success(), output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(credential: Option<Credential>) -> String {
        match credential {
            None => "nothing".to_owned(),
            Some(Credential::Basic { user, password }) => format!("{user}:{}", password.expose()),
            Some(Credential::Identity(token)) => format!("identity {}", token.expose()),
            Some(Credential::Registry(token)) => format!("registry {}", token.expose()),
        }
    }

    #[tokio::test]
    async fn entries_are_found_by_any_way_of_writing_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(
            &path,
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "aHViOnNlY3JldDp4"},
                "r.example.org:5000": {"username": "u", "password": "p"},
                "quay.io/team": {"identitytoken": "i"},
                "ghcr.io": {"registrytoken": "r", "auth": "!"},
                "elsewhere.example.org": {},
                "broken.example.org": {"auth": "!"}}, "other": 1}"#,
        )
        .unwrap();
        let keychain = Keychain::new(Some(&path), &Env::default());
        for (host, expected) in [
            ("index.docker.io", "hub:secret:x"),
            ("r.example.org:5000", "u:p"),
            ("r.example.org", "nothing"),
            ("quay.io", "identity i"),
            ("ghcr.io", "registry r"),
            ("elsewhere.example.org", "nothing"),
            ("unknown.example.org", "nothing"),
        ] {
            let found = keychain.credential(host).await.unwrap();
            assert_eq!(shown(found), expected, "{host}");
        }
        let error = keychain.credential("broken.example.org").await.unwrap_err();
        assert!(matches!(error, CredentialError::Entry { .. }), "{error}");
    }

    #[tokio::test]
    async fn files_are_looked_for_where_docker_and_podman_keep_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, user: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = format!(r#"{{"auths": {{"x.org": {{"username": "{user}"}}}}}}"#);
            std::fs::write(&path, text).unwrap();
        };
        let root = dir.path().to_str().unwrap().to_owned();
        let env: Env = [
            ("HOME", root.clone()),
            ("DOCKER_CONFIG", format!("{root}/docker")),
            ("REGISTRY_AUTH_FILE", format!("{root}/auth.json")),
            ("XDG_RUNTIME_DIR", format!("{root}/run")),
        ]
        .into_iter()
        .collect();
        // The later a file in the search, the earlier it is written.
        let keychain = Keychain::new(None, &env);
        let found = keychain.credential("x.org").await.unwrap();
        assert_eq!(shown(found), "nothing");
        for (name, user) in [
            ("run/containers/auth.json", "podman"),
            ("auth.json", "file"),
            ("docker/config.json", "docker"),
            (".docker/config.json", "home"),
        ] {
            file(name, user);
            let found = keychain.credential("x.org").await.unwrap();
            assert_eq!(shown(found), format!("{user}:"));
        }
    }

    #[test]
    fn helpers_are_asked_and_put_down() {
        let dir = tempfile::tempdir().unwrap();
        let script = |text: &str| {
            use std::os::unix::fs::PermissionsExt as _;
            let path = dir.path().join("docker-credential-x");
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (success, output) = run(&script("echo \"$1 $(cat)\""), "x.org").unwrap();
        assert!(success);
        assert_eq!(output, b"get x.org\n");
        let (success, _) = run(&script("exit 1"), "x.org").unwrap();
        assert!(!success);
        assert!(run("/nonexistent/helper", "x.org").is_err());
        for name in ["../../bin/sh", "a b", "a/b"] {
            let error = helped(name, "x.org").unwrap_err().to_string();
            assert!(error.contains("not that of a program"), "{error}");
        }
    }
}
