//! What is said on one stream: which names are asked for, what was answered, and whether a request
//! wants an answer. Nothing here waits or looks anything up.

use super::secrets::{Names, Secrets, TYPE_URL};
use crate::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use crate::pb::google::rpc::Status as Problem;

/// What a request asks of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// An answer, in any case.
    Answer,
    /// Nothing: what was sent is in use, or a newer answer is under way.
    Nothing,
}

/// A request for another type than secrets.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the type {0:?} is not served here: ask for {TYPE_URL}")]
pub(super) struct WrongType(String);

/// One of the two forms of the protocol.
pub(super) trait Exchange: Default + Send + 'static {
    type Request: Send;
    type Response: Send;
    /// Takes a request into account.
    fn request(&mut self, request: Self::Request) -> Result<Step, WrongType>;
    /// What is asked for; `None` before the first request.
    fn names(&self) -> Option<&Names>;
    /// The next response; `None` if it says nothing new and `must` does not ask for one.
    fn respond(
        &mut self,
        secrets: &Secrets,
        must: bool,
        version: String,
        nonce: String,
    ) -> Option<Self::Response>;
}

/// A type that is served, as the client wrote it; empty where the method says it all.
pub(super) fn served(type_url: &str) -> Result<(), WrongType> {
    if type_url.is_empty() || type_url == TYPE_URL {
        Ok(())
    } else {
        Err(WrongType(type_url.to_owned()))
    }
}

/// Names as asked for; empty ones count for nothing.
pub(super) fn names(given: Vec<String>) -> Names {
    given.into_iter().filter(|name| !name.is_empty()).collect()
}

fn rejected(problem: &Problem) {
    tracing::warn!(
        code = problem.code,
        problem = %problem.message.chars().take(500).collect::<String>(),
        "An Envoy did not accept the secrets that it was sent"
    );
}

/// The form in which each response holds everything that is asked for.
#[derive(Debug, Default)]
pub(super) struct Whole {
    names: Option<Names>,
    sent: Option<(String, Secrets)>,
}

impl Exchange for Whole {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn request(&mut self, request: DiscoveryRequest) -> Result<Step, WrongType> {
        served(&request.type_url)?;
        let asked = names(request.resource_names);
        if let Some((nonce, _)) = &self.sent
            && *nonce != request.response_nonce
        {
            // It was written before the last response was read, and the next one will say the same.
            tracing::debug!("Ignoring a request that answers an older response");
            return Ok(Step::Nothing);
        }
        if let Some(problem) = &request.error_detail {
            rejected(problem);
        }
        // Until the first response, every request may change what it will hold.
        let step = if self.sent.is_none() || self.names.as_ref() != Some(&asked) {
            Step::Answer
        } else {
            Step::Nothing
        };
        self.names = Some(asked);
        Ok(step)
    }

    fn names(&self) -> Option<&Names> {
        self.names.as_ref()
    }

    fn respond(
        &mut self,
        secrets: &Secrets,
        must: bool,
        version: String,
        nonce: String,
    ) -> Option<DiscoveryResponse> {
        if !must && self.sent.as_ref().is_some_and(|(_, sent)| sent == secrets) {
            return None;
        }
        self.sent = Some((nonce.clone(), secrets.clone()));
        Some(whole(secrets, version, nonce))
    }
}

/// A response with all of `secrets`.
pub(super) fn whole(secrets: &Secrets, version_info: String, nonce: String) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info,
        resources: secrets.values().map(|secret| secret.any.clone()).collect(),
        type_url: TYPE_URL.to_owned(),
        nonce,
    }
}

/// The form in which each response holds what changed.
#[derive(Debug, Default)]
pub(super) struct Delta {
    begun: bool,
    /// None at all means everything; `None` means nothing.
    names: Option<Names>,
    /// Asked for by the last requests, and thus part of the next response even if nothing changed.
    wanted: Names,
    sent: Secrets,
}

impl Exchange for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<Step, WrongType> {
        served(&request.type_url)?;
        if let Some(problem) = &request.error_detail {
            rejected(problem);
        }
        let first = !std::mem::replace(&mut self.begun, true);
        let added: Names = names(request.resource_names_subscribe)
            .into_iter()
            .filter(|name| name != "*")
            .collect();
        let mut names = self.names.take();
        if first || !added.is_empty() {
            names.get_or_insert_default().extend(added.iter().cloned());
        }
        for name in &request.resource_names_unsubscribe {
            self.sent.remove(name);
            self.wanted.remove(name);
            // Whoever lets go of the last name does not want everything instead.
            names = names.filter(|names| names.len() != 1 || !names.contains(name));
            if let Some(names) = &mut names {
                names.remove(name);
            }
        }
        self.names = names;
        let asks = first || !added.is_empty();
        self.wanted.extend(added);
        Ok(if asks { Step::Answer } else { Step::Nothing })
    }

    fn names(&self) -> Option<&Names> {
        self.names.as_ref()
    }

    fn respond(
        &mut self,
        secrets: &Secrets,
        must: bool,
        version: String,
        nonce: String,
    ) -> Option<DeltaDiscoveryResponse> {
        let resources: Vec<Resource> = secrets
            .iter()
            .filter(|(name, secret)| {
                self.wanted.contains(*name) || self.sent.get(*name) != Some(*secret)
            })
            .map(|(name, secret)| Resource {
                version: secret.version(),
                resource: Some(secret.any.clone()),
                name: name.clone(),
            })
            .collect();
        let removed_resources: Vec<String> = self
            .sent
            .keys()
            .filter(|name| !secrets.contains_key(*name))
            .cloned()
            .collect();
        if !must && resources.is_empty() && removed_resources.is_empty() {
            return None;
        }
        self.wanted.clear();
        self.sent.clone_from(secrets);
        Some(DeltaDiscoveryResponse {
            system_version_info: version,
            resources,
            type_url: TYPE_URL.to_owned(),
            nonce,
            removed_resources,
        })
    }
}
