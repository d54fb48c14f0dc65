//! A place in memory: nothing survives the process.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;

use super::{Destination, DestinationError, DestinationKind, DestinationPlan, FileSet, Lock};
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

/// The kind `memory`.
#[derive(Debug)]
pub(super) struct Memory;

/// A configured place in memory.
#[derive(Debug)]
struct Settings;

/// Files in memory.
#[derive(Debug, Default)]
struct Place(RwLock<FileSet>);

impl DestinationKind for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn parse(&self, _fields: &mut Fields<'_>) -> Option<Arc<dyn DestinationPlan>> {
        Some(Arc::new(Settings))
    }

    fn parse_uri(&self, uri: &str) -> Option<Result<Arc<dyn DestinationPlan>, String>> {
        match super::scheme(uri)? {
            ("memory", "" | "//") => Some(Ok(Arc::new(Settings))),
            ("memory", _) => Some(Err(format!(
                "{uri:?}: memory takes no host and no path, write memory://"
            ))),
            _ => None,
        }
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("memory")
    }
}

impl DestinationPlan for Settings {
    /// Every place in memory is its own, so that two never count as shared.
    fn key(&self) -> String {
        format!("memory://{:p}", std::ptr::from_ref(self))
    }

    fn emit(&self) -> Tree {
        Tree::map([("type", Some(Tree::text("memory")))])
    }

    fn build(&self) -> Arc<dyn Destination> {
        Arc::new(Place::default())
    }
}

#[async_trait]
impl Destination for Place {
    async fn init(&self) -> Result<(), DestinationError> {
        Ok(())
    }

    async fn check_writable(&self) -> Result<(), DestinationError> {
        Ok(())
    }

    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        let mut held = self.0.write().unwrap_or_else(PoisonError::into_inner);
        held.extend(files);
        Ok(())
    }

    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        let held = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(held.get(name).cloned())
    }

    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        Ok(None)
    }

    fn is_persistent(&self) -> bool {
        false
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::contract;

    #[tokio::test]
    async fn keeps_the_contract() {
        contract::check(|_name| Settings.build()).await;
    }
}
