//! What a watcher is told: changes of authorities and of federations.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::services::no_secrets;
use crate::embedded::ca::AuthorityType;
use crate::embedded::store::{Change, Store, StoreError};
use crate::embedded::{ClusterState, federation};
use crate::pb::proto::{Event, Operation, Watch, event};
use crate::pb::types;
use crate::refusal::Refusal;

/// Events that wait for a slow watcher before it is cut off.
const BUFFER: usize = 16;

/// What somebody watches.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Watched {
    authorities: BTreeSet<AuthorityType>,
    federations: bool,
}

impl Watched {
    /// Reads a request.
    pub(super) fn new(watch: &Watch, cluster: &str) -> Result<Self, Refusal> {
        let mut watched = Self {
            authorities: BTreeSet::new(),
            federations: false,
        };
        if watch.kinds.is_empty() {
            return Err(Refusal::bad_parameter("can't setup global watch"));
        }
        for kind in &watch.kinds {
            match kind.kind.as_str() {
                "cert_authority" => {
                    no_secrets(kind.load_secrets)?;
                    let all = AuthorityType::ALL.into_iter();
                    watched.authorities.extend(all.filter(|authority| {
                        let named = kind.filter.get(authority.name());
                        kind.filter.is_empty() || named.is_some_and(|name| name == cluster)
                    }));
                }
                federation::KIND => watched.federations = true,
                _ if watch.allow_partial_success => {}
                other => {
                    let text = format!("watcher object {other:?} is not supported by this cluster");
                    return Err(Refusal::bad_parameter(text));
                }
            }
        }
        Ok(watched)
    }

    /// The events from now on, the first of which says that this is so.
    pub(super) fn follow(self, state: &Arc<ClusterState>) -> ReceiverStream<Result<Event, Status>> {
        let (authorities, store) = (state.authorities.clone(), state.store.clone());
        let (mut changes, mut writes) = (authorities.subscribe(), store.changes());
        let Self {
            authorities: kinds,
            federations,
        } = self;
        let all = move || -> Vec<_> {
            let kinds = kinds.iter();
            kinds.map(|kind| authorities.message(*kind)).collect()
        };
        let mut known = all();
        let (events, stream) = mpsc::channel(BUFFER);
        tokio::spawn(async move {
            let init = Event {
                r#type: Operation::Init.into(),
                resource: None,
            };
            if events.send(Ok(init)).await.is_err() {
                return;
            }
            loop {
                let told = tokio::select! {
                    () = events.closed() => return,
                    told = changes.changed() => match told {
                        Ok(()) => {
                            let current = all();
                            let news = current.iter().filter(|one| !known.contains(one));
                            let news = news.cloned().map(event::Resource::CertAuthority);
                            let news = news.map(put).collect();
                            known = current;
                            news
                        }
                        Err(_gone) => return,
                    },
                    told = writes.recv(), if federations => match told {
                        Ok(change) if change.kind == federation::KIND => {
                            match federation_event(&store, change).await {
                                Ok(event) => event.into_iter().collect(),
                                Err(_told) => return,
                            }
                        }
                        Ok(_other) => Vec::new(),
                        // Who missed some watches again and reads everything.
                        Err(_missed) => return,
                    },
                };
                for event in told {
                    // Somebody who does not read is cut off and watches again.
                    if events.try_send(Ok(event)).is_err() {
                        return;
                    }
                }
            }
        });
        ReceiverStream::new(stream)
    }
}

fn put(resource: event::Resource) -> Event {
    Event {
        r#type: Operation::Put.into(),
        resource: Some(resource),
    }
}

/// What a write to a federation is to a watcher; nothing if a later one says it better.
async fn federation_event(store: &Store, change: Change) -> Result<Option<Event>, StoreError> {
    if change.deleted {
        let header = types::ResourceHeader {
            kind: change.kind,
            metadata: Some(types::Metadata {
                name: change.name,
                ..types::Metadata::default()
            }),
            ..types::ResourceHeader::default()
        };
        return Ok(Some(Event {
            r#type: Operation::Delete.into(),
            resource: Some(event::Resource::ResourceHeader(header)),
        }));
    }
    let store = store.clone();
    let read = move || store.get(&change.kind, &change.name);
    // The process is ending if the work is cut off.
    let found = tokio::task::spawn_blocking(read).await.unwrap_or(Ok(None));
    let found = found.inspect_err(|error| {
        tracing::error!(%error, "a federation cannot be read for a watcher");
    })?;
    let message = found.as_ref().map(federation::to_message);
    Ok(message.map(|message| put(event::Resource::SpiffeFederation(message))))
}
