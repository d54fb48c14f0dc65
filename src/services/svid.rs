//! What outputs of SVIDs share: with whose roles they are issued, which bundles and revocations
//! stand beside them, and when those have changed.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use async_trait::async_trait;

use super::trust::Feeds;
use super::{Context, Lifetime};
use crate::cluster::Client;
use crate::crypto::{pem, x509};
use crate::destination::FileSet;
use crate::identity::{Handle, IdentityError, Request};
use crate::secret::Secret;
use crate::workload::{Access, Bundles, Crl, IssueError, Svid};

/// The longest that an output waits for the cluster's trust bundle before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Issues with the roles that the bot may impersonate.
pub(super) struct Derived {
    handle: Handle,
    request: Request,
}

impl Derived {
    pub(super) fn new(handle: Handle, lifetime: Lifetime) -> Self {
        Self {
            handle,
            request: Request {
                ttl: lifetime.ttl,
                ..Request::default()
            },
        }
    }
}

impl fmt::Debug for Derived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Derived")
    }
}

#[async_trait]
impl Access for Derived {
    async fn client(&self) -> Result<Client, IssueError> {
        // While the bot joins, callers wait; how long is theirs to say.
        if self.handle.ready().await.is_none() {
            return Err(IssueError::Unavailable("the agent is stopping".into()));
        }
        self.handle
            .derived(&self.request)
            .await
            .map_err(|error| match &*error {
                IdentityError::Cluster(error) => error.into(),
                IdentityError::NoRoles => IssueError::Refused(error.to_string()),
                other => IssueError::Unavailable(other.to_string()),
            })
    }
}

/// The trust bundles and revocations as an output last looked at them.
#[derive(Debug, Default)]
pub(super) struct Surroundings(Mutex<Option<Seen>>);

#[derive(Debug, Clone)]
struct Seen {
    /// These remember what was looked at.
    feeds: Feeds,
    bundles: Option<Arc<Bundles>>,
}

/// What became different.
#[derive(Debug)]
pub(super) struct News {
    before: Option<Arc<Bundles>>,
    after: Option<Arc<Bundles>>,
    /// Whether the revocation list means something else.
    pub(super) revoked: bool,
}

impl News {
    /// Whether `part` of the bundles became different.
    pub(super) fn of<'a, T: PartialEq>(&'a self, part: impl Fn(&'a Bundles) -> T) -> bool {
        let [before, after] = [&self.before, &self.after].map(|all| all.as_deref().map(&part));
        before != after
    }

    /// Whether the certificates of another trust domain became different.
    pub(super) fn of_others(&self) -> bool {
        self.of(|bundles| bundles.federated_x509().collect::<Vec<_>>())
    }
}

impl Surroundings {
    /// The bundles and the revocation list, once the cluster has told them. They count as looked
    /// at: what comes later is news.
    pub(super) async fn look(&self, context: &Context) -> anyhow::Result<(Arc<Bundles>, Crl)> {
        let mut seen = self.seen(context);
        let told = async {
            // Both end only with the agent.
            seen.feeds.bundles.wait_for(Option::is_some).await.ok()?;
            let pending = |crl: &Crl| *crl != Crl::Pending;
            seen.feeds.revoked.wait_for(pending).await.ok()?;
            Some(())
        };
        tokio::select! {
            told = told => told.context("the agent is stopping")?,
            () = context.clock.sleep(PATIENCE) => {
                return Err(anyhow!(
                    "the cluster did not send its trust bundle within {} s",
                    PATIENCE.as_secs()
                ));
            }
        }
        seen.bundles
            .clone_from(&seen.feeds.bundles.borrow_and_update());
        let crl = seen.feeds.revoked.borrow_and_update().clone();
        let bundles = seen.bundles.clone().context("the trust bundle is gone")?;
        *self.lock() = Some(seen);
        Ok((bundles, crl))
    }

    /// Waits until something is different from what was looked at. It counts as looked at then.
    pub(super) async fn changed(&self, context: &Context) -> News {
        let mut seen = self.seen(context);
        let revoked = tokio::select! {
            Ok(()) = seen.feeds.bundles.changed() => false,
            Ok(()) = seen.feeds.revoked.changed() => true,
            // The agent is stopping.
            else => std::future::pending().await,
        };
        let before = seen.bundles.take();
        seen.bundles
            .clone_from(&seen.feeds.bundles.borrow_and_update());
        let after = seen.bundles.clone();
        *self.lock() = Some(seen);
        News {
            before,
            after,
            revoked,
        }
    }

    fn seen(&self, context: &Context) -> Seen {
        self.lock()
            .get_or_insert_with(|| Seen {
                feeds: context.trust.follow(&context.identity, &context.clock),
                bundles: None,
            })
            .clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The only one of the identities that the cluster granted: files hold one. `name` says of each
/// what it is.
pub(super) fn only<T>(issued: Vec<T>, name: impl Fn(&T) -> String) -> anyhow::Result<T> {
    let names: Vec<String> = issued.iter().map(name).collect();
    let mut issued = issued.into_iter();
    match (issued.next(), issued.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(anyhow!(
            "the cluster issued nothing: no workload identity with the selector's labels may be \
             issued to this bot"
        )),
        (Some(_), Some(_)) => Err(anyhow!(
            "the selector matches {} workload identities ({}) and the files hold one: name it with \
             `selector.name`, or narrow `selector.labels`",
            names.len(),
            names.join(", ")
        )),
    }
}

/// The files of an X.509-SVID: `svid.pem`, `svid_key.pem`, `svid_bundle.pem`.
pub(super) fn x509_files(
    svid: &Svid,
    bundles: &Bundles,
    federated: bool,
) -> anyhow::Result<FileSet> {
    let mut bundle = certificates(bundles.local())?;
    if federated {
        for (_, others) in bundles.federated_x509() {
            bundle.push_str(&certificates(others)?);
        }
    }
    let key = Secret::new(pem::encode("PRIVATE KEY", &svid.key));
    Ok([
        ("svid.pem", certificates(&svid.chain)?.into_bytes()),
        ("svid_key.pem", key.expose().clone().into_bytes()),
        ("svid_bundle.pem", bundle.into_bytes()),
    ]
    .into_iter()
    .map(|(name, content)| (name.to_owned(), Secret::new(content)))
    .collect())
}

/// A row of DER certificates as PEM.
fn certificates(ders: &[u8]) -> anyhow::Result<String> {
    let ders = x509::split(ders).context("a bundle or chain is no row of certificates")?;
    Ok(ders
        .into_iter()
        .map(|der| pem::encode("CERTIFICATE", der))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_identity_is_asked_for_by_name_where_there_are_several() {
        let name = |name: &&str| (*name).to_owned();
        assert_eq!(only(vec!["a"], name).unwrap(), "a");
        assert!(only(Vec::new(), name).is_err());
        let error = only(vec!["a", "b"], name).unwrap_err().to_string();
        assert!(error.contains("2 workload identities (a, b)"), "{error}");
        assert!(error.contains("selector.name"), "{error}");
    }
}
