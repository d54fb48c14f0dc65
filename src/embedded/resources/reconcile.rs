//! Bringing the resources of one kind to where somebody else has them, in one transaction.

use super::apply::{Verb, event, same};
use crate::embedded::audit::Audit;
use crate::embedded::store::{Put, Resource, Store, StoreError};

/// What has to happen to one resource.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// It has to be there with this content.
    Put(Box<Resource>),
    /// The one with this name has to be gone.
    Remove(String),
}

/// Reads all resources of `kind`, lets `decide` say what has to change, and does it with an audit
/// event for each; returns what has changed in truth. `by` is who did it, for the audit log.
pub fn reconcile(
    store: &Store,
    audit: &Audit,
    kind: &str,
    by: &str,
    decide: impl FnOnce(&[Resource]) -> Vec<Change>,
) -> Result<Vec<Change>, StoreError> {
    let (changed, events) = store.transaction(|tx| {
        let known = tx.list(kind)?;
        let (mut changed, mut events) = (Vec::new(), Vec::new());
        for change in decide(&known) {
            let name = match &change {
                Change::Put(resource) => &resource.name,
                Change::Remove(name) => name,
            };
            let old = known.iter().find(|old| old.name == *name);
            let (verb, resource) = match (&change, old) {
                (Change::Put(new), Some(old)) if same(old, new) => continue,
                (Change::Put(new), old) => {
                    let verb = if old.is_some() {
                        Verb::Update
                    } else {
                        Verb::Create
                    };
                    (verb, tx.put(Resource::clone(new), &Put::Upsert)?)
                }
                (Change::Remove(_), None) => continue,
                (Change::Remove(name), Some(old)) => {
                    tx.delete(kind, name)?;
                    (Verb::Delete, old.clone())
                }
            };
            events.extend(event(&resource, verb, by));
            changed.push(change);
        }
        Ok::<_, StoreError>((changed, events))
    })?;
    for event in events {
        audit.emit(event);
    }
    Ok(changed)
}
