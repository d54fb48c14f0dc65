//! What outputs of an impersonated identity have in common: where they write, which roles they act
//! with, and how they ask the cluster.

use std::sync::Arc;

use super::authorities::Authorities;
use super::{Context, Lifetime};
use crate::cluster::Client;
use crate::destination::{self, DestinationPlan};
use crate::identity::{Issued, Request, Target};
use crate::yaml::{Fields, Tree};

/// The keys that they share.
#[derive(Debug, Clone)]
pub(crate) struct Impersonated {
    pub(crate) destination: Arc<dyn DestinationPlan>,
    /// Empty means every role that the bot may impersonate.
    pub(crate) roles: Vec<String>,
}

impl Impersonated {
    /// Reads `destination` and `roles`.
    pub(crate) fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let roles = fields.strings("roles").unwrap_or_default();
        Self::with(fields, roles)
    }

    /// Reads `destination` alone, for kinds that act with every role.
    pub(crate) fn with_every_role(fields: &mut Fields<'_>) -> Option<Self> {
        Self::with(fields, Vec::new())
    }

    fn with(fields: &mut Fields<'_>, roles: Vec<String>) -> Option<Self> {
        Some(Self {
            destination: destination::read(fields, "destination")?,
            roles,
        })
    }

    /// The section: the shared keys, then `own` without those that are `None`.
    pub(crate) fn emit<'k>(
        &self,
        own: impl IntoIterator<Item = (&'k str, Option<Tree>)>,
    ) -> Vec<(String, Tree)> {
        let roles = (!self.roles.is_empty()).then(|| Tree::texts(self.roles.iter()));
        [
            ("destination", Some(self.destination.emit())),
            ("roles", roles),
        ]
        .into_iter()
        .chain(own)
        .filter_map(|(key, tree)| Some((key.to_owned(), tree?)))
        .collect()
    }

    /// A certificate that leads to `target`.
    pub(crate) fn request(&self, lifetime: Lifetime, target: Target) -> Request {
        Request {
            roles: self.roles.clone(),
            ttl: lifetime.ttl,
            target,
            ..Request::default()
        }
    }

    /// A client that sees what the output's roles see. Outputs with the same roles share it.
    pub(crate) async fn client(&self, context: &Context) -> anyhow::Result<Client> {
        let request = self.request(context.lifetime, Target::Cluster);
        Ok(Box::pin(context.identity.derived(&request)).await?)
    }

    /// An identity that leads to `target`, and whom its holder is to believe.
    pub(crate) async fn issue(
        &self,
        context: &Context,
        target: Target,
    ) -> anyhow::Result<(Issued, Authorities)> {
        let request = self.request(context.lifetime, target);
        let issued = async { Ok(Box::pin(context.identity.issue(&request)).await?) };
        tokio::try_join!(issued, Box::pin(Authorities::fetch(&context.identity)))
    }
}
