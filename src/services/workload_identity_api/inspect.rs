//! Tells a caller what is known about it: for whoever looks for the reason why nothing is issued.
//!
//! A service of our own, beside the standard's. What attestors see is what rules are made of, so only
//! root and the agent's own user are told, unless the owner of the socket consents to more.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::feed::PATIENCE;
use super::incoming::Caller;
use super::source::Source;
use crate::attest::{Attested, Peer};
use crate::pb::tbot::inspect::v1::inspect_service_server::InspectService;
use crate::pb::tbot::inspect::v1::{ExplainRequest, ExplainResponse, Finding};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::workload::{Selector, State};

/// The server.
#[derive(Debug)]
pub(super) struct Inspect {
    pub(super) source: Arc<Source>,
    /// Whether every caller is told about itself.
    pub(super) everybody: bool,
}

impl Inspect {
    fn may_know(&self, caller: &Caller) -> bool {
        let own = nix::unistd::geteuid().as_raw();
        self.everybody || caller.user().is_some_and(|user| user == 0 || user == own)
    }

    /// What each attestor sees of `peer`.
    async fn findings(&self, peer: &Arc<Peer>) -> Result<Vec<Finding>, Status> {
        let seen = self.source.attestors.explain(peer).await;
        let seen = seen.map_err(|gone| Status::aborted(gone.to_string()))?;
        let mut findings = Vec::new();
        for (attestor, outcome) in seen {
            let mut finding = Finding {
                attestor: attestor.to_owned(),
                ..Finding::default()
            };
            match outcome {
                Ok(attributes) => finding.attributes = Some(only(attestor, &attributes)),
                Err(problem) => finding.failure = problem,
            }
            findings.push(finding);
        }
        Ok(findings)
    }

    /// Why this caller gets no SVID; empty if it gets one.
    async fn refusal(&self, attested: &Arc<Attested>) -> String {
        let mut svids = self.source.subscribe(attested);
        let clock = &self.source.clock;
        let answer = svids.state().wait_for(|state| state.is_answer(clock.now()));
        tokio::select! {
            answer = answer => match answer.as_deref() {
                Ok(State::Refused(why) | State::Unavailable(why)) => why.to_string(),
                Ok(State::Ready(_)) => String::new(),
                Ok(State::Pending) | Err(_) => "the agent is stopping".to_owned(),
            },
            () = clock.sleep(PATIENCE / 2) => "the cluster has not answered".to_owned(),
        }
    }
}

#[tonic::async_trait]
impl InspectService for Inspect {
    async fn explain(
        &self,
        request: Request<ExplainRequest>,
    ) -> Result<Response<ExplainResponse>, Status> {
        let (caller, _permit) = self
            .source
            .admit(request.extensions())
            .map_err(|status| *status)?;
        if !self.may_know(&caller) {
            return Err(Status::permission_denied(
                "what attestors see is told to root and to the agent's own user; `explain: true` in \
                 the configuration of the service lets every caller see what is known about it",
            ));
        }
        let findings = match &caller {
            Caller::Process(peer) => self.findings(peer).await?,
            Caller::Unknown(_) => Vec::new(),
        };
        let attested = self.source.attest(&caller).await?;
        Ok(Response::new(ExplainResponse {
            findings,
            refusal: self.refusal(&attested).await,
            selector: match &self.source.selector {
                Selector::Name(name) => format!("name {name}"),
                Selector::Labels(labels) => format!("labels {labels:?}"),
            },
        }))
    }
}

/// The part of `all` that an attestor fills: the field of its name.
fn only(attestor: &str, all: &WorkloadAttrs) -> WorkloadAttrs {
    let mut part = WorkloadAttrs::default();
    match attestor {
        "unix" => part.unix.clone_from(&all.unix),
        "systemd" => part.systemd.clone_from(&all.systemd),
        "docker" => part.docker.clone_from(&all.docker),
        "podman" => part.podman.clone_from(&all.podman),
        "kubernetes" => part.kubernetes.clone_from(&all.kubernetes),
        "sigstore" => part.sigstore.clone_from(&all.sigstore),
        _ => {}
    }
    part
}
