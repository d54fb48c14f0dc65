//! The way to the Kubernetes API, and what its refusals mean.

use std::error::Error as _;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::client::AuthError;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::Status;
use kube::{Api, Client, Config};
use tokio::sync::Mutex;

use crate::env::Env;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a whole answer may take.
const ANSWER: Duration = Duration::from_secs(30);

/// Which API, and which namespace of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Way {
    /// `None` takes it from the surroundings: see [`connect`].
    pub(super) namespace: Option<String>,
    pub(super) kubeconfig_path: Option<PathBuf>,
    pub(super) kubeconfig_context: Option<String>,
}

/// A client for the Secrets of one namespace.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) api: Api<Secret>,
    pub(super) namespace: String,
    /// Whose credentials these are, for texts.
    pub(super) credentials: String,
    /// What RBAC has to grant, for texts.
    pub(super) verbs: &'static str,
}

/// The way to the API, and the client once it is made.
pub(super) struct Connection {
    way: Way,
    env: Env,
    verbs: &'static str,
    /// Also keeps two writers of this process apart.
    access: Mutex<Option<Access>>,
}

impl Connection {
    /// `verbs` is the list of what RBAC has to grant.
    pub(super) fn new(way: Way, env: Env, verbs: &'static str) -> Self {
        Self {
            way,
            env,
            verbs,
            access: Mutex::new(None),
        }
    }

    /// Does `work` with the client. After a failure the client is made anew the next time: its
    /// credentials may have been replaced.
    pub(super) async fn with<T, F: Future<Output = Result<T, String>>>(
        &self,
        work: impl FnOnce(Access) -> F,
    ) -> Result<T, String> {
        let mut held = self.access.lock().await;
        let access = match held.take() {
            Some(access) => access,
            None => connect(&self.way, &self.env, self.verbs).await?,
        };
        let done = work(access.clone()).await?;
        *held = Some(access);
        Ok(done)
    }
}

/// The Secret; `None` if it is not there.
pub(super) async fn get(access: &Access, name: &str) -> Result<Option<Secret>, String> {
    match answered(access.api.get_opt(name)).await? {
        Ok(found) => Ok(found),
        Err(kube::Error::Api(status)) => Err(refused(&status, Verb::Get, access)),
        Err(error) => Err(unanswered(&error)),
    }
}

/// Waits for an answer, and not for ever.
pub(super) async fn answered<T>(
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<Result<T, kube::Error>, String> {
    tokio::time::timeout(ANSWER, request)
        .await
        .map_err(|_elapsed| {
            format!(
                "the Kubernetes API gave no answer within {} s",
                ANSWER.as_secs()
            )
        })
}

/// Makes a client: by the configured kubeconfig, else by the one that `KUBECONFIG` names, else as
/// the pod that this process runs in. The namespace is the configured one, else `POD_NAMESPACE`,
/// else the one of the credentials.
///
/// # Errors
/// What is missing or unusable, as text without anything of a kubeconfig's content.
async fn connect(way: &Way, env: &Env, verbs: &'static str) -> Result<Access, String> {
    let options = KubeConfigOptions {
        context: way.kubeconfig_context.clone(),
        ..KubeConfigOptions::default()
    };
    let named = match &way.kubeconfig_path {
        Some(path) => Some((path.display().to_string(), Kubeconfig::read_from(path))),
        None => match (env.get("KUBECONFIG"), Kubeconfig::from_env()) {
            (Some(paths), Ok(Some(config))) => Some((paths.to_owned(), Ok(config))),
            (Some(paths), Err(error)) => Some((paths.to_owned(), Err(error))),
            _ => None,
        },
    };
    let (mut config, credentials) = match named {
        Some((path, read)) => {
            let made = match read {
                Ok(read) => Config::from_custom_kubeconfig(read, &options).await,
                Err(error) => Err(error),
            };
            let config =
                made.map_err(|error| format!("kubeconfig {path}: {}", unusable(&error)))?;
            (config, format!("the kubeconfig {path}"))
        }
        None if way.kubeconfig_context.is_some() => {
            return Err(
                "kubeconfig_context is set, but no kubeconfig: set kubeconfig_path or KUBECONFIG"
                    .to_owned(),
            );
        }
        None => {
            let config = Config::incluster_env().map_err(|error| {
                format!(
                    "no way to the Kubernetes API: this is no pod with a service account ({error}), \
                     and neither kubeconfig_path nor KUBECONFIG names a kubeconfig"
                )
            })?;
            (config, "the pod's service account".to_owned())
        }
    };
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(ANSWER);
    config.reset_reader_on_write = true;
    // The runner of outputs tries again, in its own time.
    config.default_retry = false;
    let namespace = way
        .namespace
        .clone()
        .or_else(|| env.get("POD_NAMESPACE").map(str::to_owned))
        .unwrap_or_else(|| config.default_namespace.clone());
    // A credential plugin of the kubeconfig runs here, for as long as it likes.
    let made = tokio::task::spawn_blocking(move || Client::try_from(config));
    let client = tokio::time::timeout(ANSWER, made)
        .await
        .map_err(|_elapsed| {
            let seconds = ANSWER.as_secs();
            format!("the credential plugin of {credentials} gives nothing within {seconds} s")
        })?
        .map_err(|_ended| "the credentials could not be made ready".to_owned())?
        .map_err(|error| unanswered(&error))?;
    Ok(Access {
        api: Api::namespaced(client, &namespace),
        namespace,
        credentials,
        verbs,
    })
}

/// What is wrong with a kubeconfig. A parser shows what it stumbles over, which may be a token.
fn unusable(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::Parse(_) => {
            "is not the YAML of a kubeconfig (its content is not shown)".to_owned()
        }
        KubeconfigError::LoadContext(name) => format!("has no context {name:?}"),
        KubeconfigError::CurrentContextNotSet => {
            "has no current-context: set one, or kubeconfig_context".to_owned()
        }
        other => other.to_string(),
    }
}

/// Why there is no answer, as one line. Left out is what may hold credentials or content: the command
/// line, the variables and the output of a credential plugin, and the text of a parser.
pub(super) fn unanswered(error: &kube::Error) -> String {
    let plugin = match error {
        kube::Error::SerdeError(_) => return "the answer is not one of the Kubernetes API".into(),
        kube::Error::Auth(auth) => Some(auth),
        kube::Error::Service(inner) => inner.downcast_ref::<AuthError>(),
        _ => None,
    };
    match plugin {
        Some(AuthError::AuthExecRun { out, .. }) => {
            return format!("the kubeconfig's credential plugin failed ({})", out.status);
        }
        Some(AuthError::AuthExecParse(_) | AuthError::ParseTokenKey(_)) => {
            return "the output of the kubeconfig's credential plugin cannot be read".to_owned();
        }
        _ => {}
    }
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        let text = deeper.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = deeper.source();
    }
    line
}

/// What was asked for, as RBAC names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// Read the Secret.
    Get,
    /// Change it.
    Patch,
    /// Change it where there is none yet, which takes both verbs.
    Create,
    /// Make one.
    Make,
    /// Replace it.
    Update,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "`get`",
            Self::Patch => "`patch`",
            Self::Create => "`create` and `patch`",
            Self::Make => "`create`",
            Self::Update => "`update`",
        }
    }
}

/// What a refusal means, with its remedy.
pub(super) fn refused(status: &Status, verb: Verb, access: &Access) -> String {
    let (namespace, credentials) = (&access.namespace, &access.credentials);
    let kind = status.details.as_ref().map(|details| details.kind.as_str());
    let message = &status.message;
    match status.code {
        401 => format!(
            "the Kubernetes API does not accept {credentials} (401): {message}; is it expired, or of \
             another cluster?"
        ),
        403 => format!(
            "{credentials} may not {} secrets in the namespace {namespace} (403): {message}; bind it \
             to a Role with the rule {{apiGroups: [\"\"], resources: [secrets], verbs: [{}]}}",
            verb.name(),
            access.verbs,
        ),
        404 if kind == Some("namespaces") => {
            format!("there is no namespace {namespace}: create it, or set another `namespace`")
        }
        409 => match held(status) {
            Some(fields) => format!(
                "another field manager keeps other values there ({fields}): have it give them up, or \
                 write to a Secret of its own"
            ),
            None => format!("it changes all the time (409): {message}"),
        },
        code => format!("the Kubernetes API answers {code}: {message}"),
    }
}

/// The fields that another manager holds, if that is why an apply was refused.
pub(super) fn held(status: &Status) -> Option<String> {
    let causes = &status.details.as_ref()?.causes;
    let fields: Vec<String> = causes
        .iter()
        .filter(|cause| cause.reason == "FieldManagerConflict")
        .map(|cause| format!("{}: {}", cause.field, cause.message))
        .collect();
    (!fields.is_empty()).then(|| fields.join(", "))
}
