//! One stream: requests come in, SVIDs are renewed, bundles change, and the caller may go.

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::{Stream, StreamExt as _};
use tonic::Status;

use super::exchange::{Exchange, Invalid, Step};
use super::secrets::{Selected, need_svids, select};
use crate::attest::Permit;
use crate::clock::rfc3339_nanos;
use crate::crypto::random;
use crate::services::trust::View;
use crate::services::workload_identity_api::feed::PATIENCE;
use crate::services::workload_identity_api::followed::Followed;
use crate::services::workload_identity_api::incoming::Caller;
use crate::services::workload_identity_api::source::Source;
use crate::workload::{Selector, State};

/// A stream and what it has said so far.
pub(super) struct Session<E: Exchange, R> {
    source: Arc<Source>,
    caller: Caller,
    requests: R,
    exchange: E,
    view: View,
    /// Taken out when an SVID is first asked for.
    svids: Option<Followed>,
    /// When patience with an answer that is due ends.
    due: Option<SystemTime>,
    _permit: Permit,
}

type Next<T> = Option<Result<T, Box<Status>>>;

impl<E, R> Session<E, R>
where
    E: Exchange,
    R: Stream<Item = Result<E::Request, Status>> + Unpin + Send,
{
    pub(super) fn new(source: Arc<Source>, caller: Caller, permit: Permit, requests: R) -> Self {
        Self {
            view: source.view.clone(),
            source,
            caller,
            requests,
            exchange: E::default(),
            svids: None,
            due: None,
            _permit: permit,
        }
    }

    /// The next response; `None` when the client hung up or ended.
    pub(super) async fn next(&mut self) -> Next<E::Response> {
        loop {
            match self.response().await {
                Ok(Some(response)) => return Some(Ok(response)),
                Ok(None) => {}
                Err(status) => return Some(Err(status)),
            }
            match self.change().await {
                Ok(true) => {}
                Ok(false) => return None,
                Err(status) => return Some(Err(status)),
            }
        }
    }

    /// Waits for anything that may be a reason to respond; `false` if nobody is there any more.
    async fn change(&mut self) -> Result<bool, Box<Status>> {
        let clock = self.source.clock.clone();
        let svids = async {
            match &mut self.svids {
                Some(svids) => svids.changed().await,
                None => std::future::pending().await,
            }
        };
        let due = self.due;
        let impatience = async {
            match due {
                Some(due) => clock.sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.caller.gone() => Ok(false),
            () = self.source.shutdown.cancelled() => Err(Box::new(stopping())),
            request = self.requests.next() => match request {
                Some(Ok(request)) => {
                    let step = self.exchange.request(request)?;
                    if step == Step::Answer && self.due.is_none() {
                        self.due = Some(clock.now() + PATIENCE);
                    }
                    Ok(true)
                }
                Some(Err(_)) | None => Ok(false),
            },
            changed = self.view.changed(false) => changed.map(|()| true).map_err(|_closed| Box::new(stopping())),
            () = svids => Ok(true),
            () = impatience => Err(Box::new(Status::unavailable(self.what_is_missing()))),
        }
    }

    /// What there is to say now, if anything.
    async fn response(&mut self) -> Result<Option<E::Response>, Box<Status>> {
        let Some(selected) = self.selected().await? else {
            return Ok(None);
        };
        let must = self.due.take().is_some();
        let nonce = hex::encode(random::<4>());
        let version = rfc3339_nanos(self.source.clock.now());
        Ok(self.exchange.respond(selected, must, version, nonce)?)
    }

    /// Everything that is asked for; `None` while something of it is still to come.
    async fn selected(&mut self) -> Result<Option<Selected>, Box<Status>> {
        let wanted = self.exchange.wanted();
        if wanted.is_empty() {
            self.due = None;
            return Ok(None);
        }
        let (Some(bundles), _) = self.view.look() else {
            return Ok(None);
        };
        if !need_svids(wanted) {
            self.svids = None;
            return Ok(Some(select(wanted, &[], &bundles)));
        }
        let svids = match &mut self.svids {
            Some(svids) => svids,
            None => {
                let attested = self.source.attest(&self.caller).await?;
                let (source, caller) = (Arc::clone(&self.source), self.caller.clone());
                self.svids.insert(Followed::new(source, caller, attested))
            }
        };
        match svids.state(&bundles)? {
            state if !state.is_answer(self.source.clock.now()) => Ok(None),
            State::Ready(svids) => Ok(Some(select(wanted, &svids, &bundles))),
            // Who asks for everything gets what there is. A selector by name promises an SVID.
            State::Refused(_)
                if wanted.names.is_empty()
                    && matches!(self.source.selector, Selector::Labels(_)) =>
            {
                Ok(Some(select(wanted, &[], &bundles)))
            }
            State::Refused(why) => {
                let refusal = Status::permission_denied(format!("no identity issued: {why}"));
                let told = self.source.answered(Err(refusal), svids.attested());
                told.map_err(Box::new)
            }
            State::Unavailable(why) => Err(Box::new(Status::unavailable(&*why))),
            State::Pending => Ok(None),
        }
    }

    fn what_is_missing(&self) -> &'static str {
        if self.view.bundles().is_none() {
            "not ready yet: waiting for the trust bundle: the agent is still joining, or cannot reach \
             its cluster"
        } else {
            "not ready yet: waiting for the cluster to issue the SVID"
        }
    }
}

impl From<Invalid> for Box<Status> {
    fn from(problem: Invalid) -> Self {
        Self::new(Status::invalid_argument(problem.to_string()))
    }
}

fn stopping() -> Status {
    Status::unavailable("the agent is stopping")
}
