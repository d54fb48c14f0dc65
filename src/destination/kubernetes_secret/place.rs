//! A Secret at work.

use std::fmt;
use std::future::Future;
use std::path::Path;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Secret as Object;
use kube::api::{Patch, PatchParams};

use super::Settings;
use super::client::{self, Access, Connection, Verb, answered, get};
use super::object::{self, MANAGER};
use crate::destination::{Destination, DestinationError, FileSet, Lock};
use crate::env::Env;
use crate::secret::Secret;

/// How often a write is begun anew because the Secret changed meanwhile.
pub(super) const ATTEMPTS: u32 = 5;
/// What RBAC has to grant.
const VERBS: &str = "get, create, patch";

/// A Kubernetes Secret.
pub(super) struct Place {
    settings: Settings,
    connection: Connection,
}

/// Whether an apply is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Keep nothing: everything is checked as if.
    Dry,
    /// Keep what is sent.
    Real,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.settings).finish()
    }
}

/// How a request ended that the API refused.
pub(super) enum Refusal {
    /// The Secret is not what it was when it was read: read it again.
    Stale(String),
    /// Something that reading again does not mend.
    Final(String),
}

impl Place {
    pub(super) fn new(settings: Settings, env: Env) -> Self {
        Self {
            connection: Connection::new(settings.way.clone(), env, VERBS),
            settings,
        }
    }

    async fn with<T, F: Future<Output = Result<T, String>>>(
        &self,
        work: impl FnOnce(Access) -> F,
    ) -> Result<T, DestinationError> {
        let outcome = self.connection.with(work).await;
        outcome.map_err(|problem| DestinationError::Unsuitable {
            path: self.settings.to_string(),
            problem,
        })
    }

    /// Reads the Secret, changes what is to be changed and applies it; begins anew if someone else
    /// was faster.
    async fn apply(&self, access: &Access, files: &FileSet, mode: Mode) -> Result<(), String> {
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            let live = get(access, &self.settings.name).await?;
            let wanted = object::wanted(live.as_ref(), files, &self.settings, &access.namespace)?;
            match patch(access, &self.settings.name, &wanted, live.is_some(), mode).await {
                Ok(()) => return Ok(()),
                Err(Refusal::Stale(problem)) => last = problem,
                Err(Refusal::Final(problem)) => return Err(problem),
            }
        }
        Err(last)
    }
}

async fn patch(
    access: &Access,
    name: &str,
    wanted: &Object,
    exists: bool,
    mode: Mode,
) -> Result<(), Refusal> {
    let params = PatchParams::apply(MANAGER);
    let params = match mode {
        Mode::Dry => params.dry_run(),
        Mode::Real => params,
    };
    let verb = if exists { Verb::Patch } else { Verb::Create };
    let patch = Patch::Apply(wanted);
    let sent = access.api.patch(name, &params, &patch);
    match answered(sent).await.map_err(Refusal::Final)? {
        Ok(_applied) => Ok(()),
        Err(kube::Error::Api(status)) => {
            let problem = client::refused(&status, verb, access);
            let changed = status.code == 409 && client::held(&status).is_none();
            // It was there when it was read.
            let deleted = status.code == 404 && exists;
            Err(if changed || deleted {
                Refusal::Stale(problem)
            } else {
                Refusal::Final(problem)
            })
        }
        Err(error) => Err(Refusal::Final(client::unanswered(&error))),
    }
}

#[async_trait]
impl Destination for Place {
    async fn init(&self) -> Result<(), DestinationError> {
        self.check_writable().await
    }

    /// The same apply as a write, without keeping it: every permission, limit and owner is asked.
    async fn check_writable(&self) -> Result<(), DestinationError> {
        self.with(async |access| self.apply(&access, &FileSet::new(), Mode::Dry).await)
            .await
    }

    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        if files.is_empty() {
            return Ok(());
        }
        self.with(async |access| self.apply(&access, &files, Mode::Real).await)
            .await
    }

    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        let found = self
            .with(async |access| get(&access, &self.settings.name).await)
            .await?;
        let mut data = found.and_then(|found| found.data).unwrap_or_default();
        Ok(data.remove(name).map(|value| Secret::new(value.0)))
    }

    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        Ok(None)
    }

    fn is_persistent(&self) -> bool {
        true
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}
