//! The `workload-identity-x509` output: an X.509-SVID, its key, the trust bundle and the revocation
//! list as PEM files.
//!
//! The SVID is issued anew when it is due and when the local bundle changes; a change of a federated
//! bundle or of the revocation list writes the same SVID again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

use super::flags::{DESTINATION, FEDERATED_BUNDLES, LABEL_SELECTOR, NAME_SELECTOR};
use super::svid::{Derived, Surroundings, only, x509_files};
use super::{Context, Flag, Made, Output, Service, ServiceKind, ServicePlan};
use crate::crypto::pem;
use crate::destination::{self, Destination, DestinationPlan, FileSet};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::renewal;
use crate::secret::Secret;
use crate::workload::crl::split;
use crate::workload::{Bundles, ClusterIssuer, Crl, Issuer, Selector, Svid};
use crate::yaml::{Fields, Tree};

/// The YAML `type`.
const NAME: &str = "workload-identity-x509";
/// What it writes.
const FILES: [&str; 4] = [
    "svid.pem",
    "svid_bundle.pem",
    "svid_crl.pem",
    "svid_key.pem",
];

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            NAME_SELECTOR,
            LABEL_SELECTOR,
            FEDERATED_BUNDLES,
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        let selector = Selector::parse(fields);
        let destination = destination::read(fields, "destination");
        let federated = fields.bool("include_federated_trust_bundles");
        Some(Box::new(Settings {
            selector: selector?,
            destination: destination?,
            federated: federated.unwrap_or(false),
        }))
    }

    fn skips_maximum_ttl(&self) -> bool {
        true
    }
}

/// A configured output.
#[derive(Debug, Clone)]
struct Settings {
    selector: Selector,
    destination: Arc<dyn DestinationPlan>,
    federated: bool,
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("{NAME} ({})", self.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.destination)
    }

    fn files(&self) -> Vec<String> {
        FILES.map(str::to_owned).into()
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let mut entries = vec![
            ("selector".to_owned(), self.selector.emit()),
            ("destination".to_owned(), self.destination.emit()),
        ];
        if self.federated {
            let key = "include_federated_trust_bundles";
            entries.push((key.to_owned(), Tree::Bool(true)));
        }
        entries
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(X509Output {
            selector: self.selector.clone(),
            federated: self.federated,
            destination: self.destination.build(),
            surroundings: Surroundings::default(),
            state: Mutex::default(),
        }))
    }
}

/// A running output.
#[derive(Debug)]
struct X509Output {
    selector: Selector,
    federated: bool,
    destination: Arc<dyn Destination>,
    surroundings: Surroundings,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was issued last; `None` while issuing anew is under way or has failed.
    held: Option<Held>,
    /// Whether the next set may hold it again.
    again: bool,
}

#[derive(Debug, Clone)]
struct Held {
    svid: Svid,
    /// The count of reloads when it was issued: a later one asks for another.
    reload: u64,
    /// The local bundle that it was issued under.
    local: Bytes,
    /// Until when it is clear that its renewal is not due.
    young_until: SystemTime,
}

impl Held {
    /// Whether it may be written again.
    fn is_good(&self, now: SystemTime, reload: u64, local: &Bytes) -> bool {
        now < self.young_until && self.reload == reload && self.local == *local
    }
}

impl State {
    /// The SVID to write again, if there is one and `good` says that nothing asks for another. Either
    /// way the next set is made of a new one.
    fn take(&mut self, good: impl Fn(&Held) -> bool) -> Option<Held> {
        let again = std::mem::take(&mut self.again);
        self.held.take().filter(|held| again && good(held))
    }
}

#[async_trait]
impl Output for X509Output {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let reload = *context.identity.reloads().borrow();
        let (bundles, crl) = self.surroundings.look(context).await?;
        let now = context.clock.now();
        let local = bundles.local();
        let again = self.state().take(|held| held.is_good(now, reload, local));
        let held = match again {
            Some(held) => held,
            None => {
                let svid = self.issue(context).await?;
                let due = renewal::due(now, svid.not_after, context.lifetime.interval, 1.0);
                Held {
                    young_until: now + due.duration_since(now).unwrap_or_default().mul_f64(0.9),
                    svid,
                    reload,
                    local: local.clone(),
                }
            }
        };
        let made = Made {
            not_after: held.svid.not_after,
            files: render(&held.svid, &bundles, &crl, self.federated)?,
        };
        self.state().held = Some(held);
        Ok(made)
    }

    async fn changed(&self, context: &Context) {
        loop {
            let news = self.surroundings.changed(context).await;
            if news.of(Bundles::local) {
                self.state().again = false;
                return;
            }
            if news.revoked || (self.federated && news.of_others()) {
                self.state().again = true;
                return;
            }
        }
    }
}

impl X509Output {
    async fn issue(&self, context: &Context) -> anyhow::Result<Svid> {
        let access = Arc::new(Derived::new(context.identity.clone(), context.lifetime));
        let feeds = context.trust.follow(&context.identity, &context.clock);
        let issuer = ClusterIssuer::new(access, feeds.bundles, context.clock.clone());
        let issued = issuer
            .issue(
                &self.selector,
                context.lifetime.ttl,
                &WorkloadAttrs::default(),
            )
            .await?;
        let svid = only(issued, |svid| svid.name.clone())?;
        tracing::info!(
            service = %context.name,
            r#type = "x509-svid",
            spiffe_id = %svid.id,
            serial_number = svid.serial,
            workload_identity_name = svid.name,
            "Issued Workload Identity Credential"
        );
        Ok(svid)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The files. The revocation lists are among them where the cluster has any, a block for each authority.
fn render(svid: &Svid, bundles: &Bundles, crl: &Crl, federated: bool) -> anyhow::Result<FileSet> {
    let mut files = x509_files(svid, bundles, federated)?;
    if let Some(lists) = crl.der() {
        let blocks = split(lists)
            .into_iter()
            .map(|list| pem::encode("X509 CRL", &list));
        let text: String = blocks.collect();
        files.insert("svid_crl.pem".to_owned(), Secret::new(text.into_bytes()));
    }
    Ok(files)
}

#[cfg(test)]
mod tests;
