//! What is said on one stream: which names are asked for, what was answered, and whether a request
//! wants an answer. Nothing here waits or looks anything up.
//!
//! The rules are those of Envoy's documentation of the xDS protocol. A stream that never named anything
//! asks for everything, and so does one that names `*`; an empty list of names later on is none.

use super::secrets::{Names, Secrets, Selected, TYPE_URL, Wanted};
use crate::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use crate::pb::google::rpc::Status as Problem;

/// What stands for everything among names.
const EVERYTHING: &str = "*";
/// The most bytes of names that one stream may ask for.
const MAX_NAMES: usize = 256 * 1024;
/// How much of what a client writes is repeated, in characters.
const REPEATED: usize = 200;

/// What a request asks of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// An answer, in any case.
    Answer,
    /// Nothing: what was sent is in use, or a newer answer is under way.
    Nothing,
}

/// A request that cannot be answered. It ends the stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    /// It is for another type than secrets.
    #[error("the type \"{0}\" is not served here: ask for {TYPE_URL}")]
    Type(String),
    /// It asks for more names than anybody has.
    #[error("more than {MAX_NAMES} bytes of resource names on one stream")]
    Names,
    /// Some of the names stand for nothing.
    #[error("unknown resource names: {}", shown(&.0.join(", ")))]
    Unknown(Vec<String>),
}

/// One of the two forms of the protocol.
pub(super) trait Exchange: Default + Send + 'static {
    type Request: Send;
    type Response: Send;
    /// Takes a request into account.
    fn request(&mut self, request: Self::Request) -> Result<Step, Invalid>;
    /// What is asked for; nothing before the first request.
    fn wanted(&self) -> &Wanted;
    /// The next response; `None` if it says nothing new and `must` does not ask for one.
    fn respond(
        &mut self,
        selected: Selected,
        must: bool,
        version: String,
        nonce: String,
    ) -> Result<Option<Self::Response>, Invalid>;
}

/// A type that is served, as the client wrote it; empty where the method says it all.
fn served(type_url: &str) -> Result<(), Invalid> {
    if type_url.is_empty() || type_url == TYPE_URL {
        Ok(())
    } else {
        Err(Invalid::Type(shown(type_url)))
    }
}

/// Names as asked for; empty ones count for nothing.
fn names(given: Vec<String>) -> impl Iterator<Item = String> {
    given.into_iter().filter(|name| !name.is_empty())
}

fn bounded(names: &Names) -> Result<(), Invalid> {
    let bytes: usize = names.iter().map(String::len).sum();
    if bytes > MAX_NAMES {
        return Err(Invalid::Names);
    }
    Ok(())
}

/// What a client wrote, for a line of ours.
fn shown(text: &str) -> String {
    text.chars()
        .take(REPEATED)
        .flat_map(char::escape_debug)
        .collect()
}

/// What became of the responses of one stream: a client that accepts none would fill the log.
#[derive(Debug, Default)]
struct Verdicts {
    told: bool,
}

impl Verdicts {
    fn take(&mut self, problem: Option<&Problem>) {
        let Some(Problem { code, message, .. }) = problem else {
            return;
        };
        let problem = shown(message);
        if std::mem::replace(&mut self.told, true) {
            tracing::debug!(code, problem, "An Envoy did not accept secrets again");
        } else {
            tracing::warn!(
                code,
                problem,
                "An Envoy did not accept the secrets that it was sent; more of its stream is told with --debug"
            );
        }
    }
}

/// The form in which each response holds everything that is asked for.
#[derive(Debug, Default)]
pub(super) struct Whole {
    wanted: Wanted,
    /// Whether any request had a name: from then on, none means none.
    named: bool,
    sent: Option<(String, Secrets)>,
    verdicts: Verdicts,
}

impl Exchange for Whole {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn request(&mut self, request: DiscoveryRequest) -> Result<Step, Invalid> {
        served(&request.type_url)?;
        if let Some((nonce, _)) = &self.sent
            && *nonce != request.response_nonce
        {
            // It was written before the last response was read, and the next one will say the same.
            tracing::debug!("Ignoring a request that answers an older response");
            return Ok(Step::Nothing);
        }
        self.verdicts.take(request.error_detail.as_ref());
        let mut names: Names = names(request.resource_names).collect();
        bounded(&names)?;
        self.named |= !names.is_empty();
        let all = names.remove(EVERYTHING) || !self.named;
        let asked = Wanted { all, names };
        // Until the first response, every request may change what it will hold.
        let news = self.sent.is_none() || self.wanted != asked;
        self.wanted = asked;
        Ok(if news && !self.wanted.is_empty() {
            Step::Answer
        } else {
            Step::Nothing
        })
    }

    fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    fn respond(
        &mut self,
        selected: Selected,
        must: bool,
        version: String,
        nonce: String,
    ) -> Result<Option<DiscoveryResponse>, Invalid> {
        let Selected { secrets, unknown } = selected;
        // There is no other way to say so in this form.
        if !unknown.is_empty() {
            return Err(Invalid::Unknown(unknown));
        }
        if !must && self.sent.as_ref().is_some_and(|(_, sent)| *sent == secrets) {
            return Ok(None);
        }
        let response = DiscoveryResponse {
            version_info: version,
            resources: secrets.values().map(|secret| secret.any.clone()).collect(),
            type_url: TYPE_URL.to_owned(),
            nonce: nonce.clone(),
        };
        self.sent = Some((nonce, secrets));
        Ok(Some(response))
    }
}

/// The form in which each response holds what changed.
#[derive(Debug, Default)]
pub(super) struct Delta {
    begun: bool,
    wanted: Wanted,
    /// What the next response has to speak of, even if nothing changed: what was asked for since the
    /// last one, and what a client that let go of it may still have to keep.
    due: Names,
    sent: Secrets,
    verdicts: Verdicts,
}

impl Exchange for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<Step, Invalid> {
        served(&request.type_url)?;
        self.verdicts.take(request.error_detail.as_ref());
        let first = !std::mem::replace(&mut self.begun, true);
        let mut answer = first;
        if first
            && names(request.resource_names_subscribe.clone())
                .next()
                .is_none()
        {
            self.wanted.all = true;
        }
        for name in names(request.resource_names_subscribe) {
            answer = true;
            if name == EVERYTHING {
                self.wanted.all = true;
            } else {
                self.due.insert(name.clone());
                self.wanted.names.insert(name);
            }
        }
        for name in names(request.resource_names_unsubscribe) {
            if name == EVERYTHING {
                self.wanted.all = false;
                let named = &self.wanted.names;
                self.sent.retain(|name, _| named.contains(name));
                self.due.retain(|name| named.contains(name));
            } else if self.wanted.names.remove(&name) && self.wanted.all {
                // It cannot know whether it has this one for its name only.
                self.due.insert(name);
                answer = true;
            } else if !self.wanted.all {
                self.due.remove(&name);
                self.sent.remove(&name);
            }
        }
        if first {
            // What it kept of an earlier stream may be gone.
            let kept = request.initial_resource_versions.into_keys();
            let asked = kept.filter(|name| self.wanted.all || self.wanted.names.contains(name));
            self.due.extend(asked);
        }
        bounded(&self.wanted.names)?;
        bounded(&self.due)?;
        Ok(if answer { Step::Answer } else { Step::Nothing })
    }

    fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    fn respond(
        &mut self,
        selected: Selected,
        must: bool,
        version: String,
        nonce: String,
    ) -> Result<Option<DeltaDiscoveryResponse>, Invalid> {
        let Selected { secrets, .. } = selected;
        let due = std::mem::take(&mut self.due);
        let resources: Vec<Resource> = secrets
            .iter()
            .filter(|(name, secret)| due.contains(*name) || self.sent.get(*name) != Some(*secret))
            .map(|(name, secret)| Resource {
                version: secret.version(),
                resource: Some(secret.any.clone()),
                name: name.clone(),
            })
            .collect();
        let spoken_of: Names = due.into_iter().chain(self.sent.keys().cloned()).collect();
        let gone = spoken_of
            .into_iter()
            .filter(|name| !secrets.contains_key(name));
        let removed_resources: Vec<String> = gone.collect();
        if !must && resources.is_empty() && removed_resources.is_empty() {
            return Ok(None);
        }
        self.sent = secrets;
        Ok(Some(DeltaDiscoveryResponse {
            system_version_info: version,
            resources,
            type_url: TYPE_URL.to_owned(),
            nonce,
            removed_resources,
        }))
    }
}
