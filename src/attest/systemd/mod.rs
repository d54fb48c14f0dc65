//! The `systemd` attestor: which service a process belongs to, asked of systemd itself over D-Bus.

pub(crate) mod bus;
mod unit;

use std::sync::Arc;

use async_trait::async_trait;

use self::bus::Manager;
use super::plan::disabled;
use super::{AttestError, Attestor, AttestorKind, Peer};
use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsSystemd};
use crate::yaml::{Fields, Tree};

/// The YAML key.
const NAME: &str = "systemd";

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl AttestorKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>> {
        let mut fields = section?;
        let enabled = fields.bool("enabled").unwrap_or(false);
        fields.finish();
        enabled.then(|| Arc::new(Systemd::default()) as Arc<dyn Attestor>)
    }

    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree {
        configured.map_or_else(disabled, Attestor::emit)
    }
}

/// The attestor. Connects when it is first asked and keeps the connection.
#[derive(Debug, Default)]
pub struct Systemd {
    manager: Manager,
}

#[async_trait]
impl Attestor for Systemd {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError> {
        let service = self
            .manager
            .service_of(peer)
            .await
            .map_err(AttestError::of(NAME, peer))?;
        attributes.systemd = Some(WorkloadAttrsSystemd {
            attested: true,
            service,
        });
        Ok(())
    }

    fn emit(&self) -> Tree {
        Tree::map([("enabled", Some(Tree::Bool(true)))])
    }
}
