//! Asks the cluster for X.509-SVIDs and believes none of its answer unchecked.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tonic::Code;

use super::Bundles;
use super::hints::Hints;
use super::keys::{self, Keys};
use super::selector::Selector;
use crate::clock::Clock;
use crate::cluster::{Client, ClusterError, Disposition};
use crate::crypto::x509::{self, Certificate};
use crate::crypto::{PrivateKey, Purpose, Suite};
use crate::pb::teleport::workloadidentity::v1::credential::Credential as Kind;
use crate::pb::teleport::workloadidentity::v1::issue_workload_identities_request::Credential as ManyParams;
use crate::pb::teleport::workloadidentity::v1::issue_workload_identity_request::Credential as OneParams;
use crate::pb::teleport::workloadidentity::v1::{
    Credential, IssueWorkloadIdentitiesRequest, IssueWorkloadIdentityRequest, JwtsvidParams,
    WorkloadAttrs, X509svidCredential, X509svidParams,
};
use crate::spiffe::{SpiffeId, TrustDomain};

/// How far the cluster's clock may be ahead of this machine's before a certificate counts as not
/// valid yet.
const SKEW: Duration = Duration::from_mins(5);
/// How long the cluster's suite is believed before it is asked for again. A change of suite is rare
/// and every suite's keys stay acceptable for a while.
const SUITE_KEPT: Duration = Duration::from_mins(10);
/// The most SVIDs that one answer may hold; clusters stop at 10.
const MAX_SVIDS: usize = 64;
/// The longest intermediate chain that is passed on.
const MAX_CHAIN: usize = 8;

/// An X.509-SVID with its key, checked. Immutable; cloning shares the bytes.
#[derive(Clone)]
pub struct Svid {
    /// The SPIFFE ID, equal to the leaf's URI name.
    pub id: SpiffeId,
    /// Leaf and intermediates, DER, one after the other.
    pub chain: Bytes,
    /// Unencrypted PKCS#8.
    pub key: Bytes,
    /// What tells this identity from others of the same workload; may be empty.
    pub hint: String,
    /// When it came, by this machine's clock. The certificate itself is backdated.
    pub issued_at: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// The leaf's serial number, hex pairs joined by `:`.
    pub serial: String,
    /// The resource that it was issued by.
    pub name: String,
    /// That resource's revision.
    pub revision: String,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Svid({}, {})", self.id, self.serial)
    }
}

/// Why there is no SVID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The cluster decided that this caller gets nothing: no matching rule, no such resource, no
    /// right to use it. What was issued before is withdrawn.
    #[error("{0}")]
    Refused(String),
    /// The cluster cannot be reached or has trouble; what was issued before stays in use.
    #[error("{0}")]
    Unavailable(String),
    /// The answer does not hold what was asked for. Nothing of it is used.
    #[error("the cluster's answer is not usable: {0}")]
    Answer(String),
}

impl From<ClusterError> for IssueError {
    fn from(error: ClusterError) -> Self {
        Self::from(&error)
    }
}

impl From<&ClusterError> for IssueError {
    fn from(error: &ClusterError) -> Self {
        // Only a decision about this workload withdraws what is held: an identity that the cluster
        // does not know for a moment is the agent's trouble, not the workload's.
        match (error.disposition(), error.code()) {
            (_, Some(Code::Unauthenticated)) | (Disposition::Retry, _) => {
                Self::Unavailable(error.to_string())
            }
            (Disposition::Refused | Disposition::Unsupported, _) => {
                Self::Refused(error.to_string())
            }
        }
    }
}

/// Issues SVIDs for one workload.
#[async_trait]
pub trait Issuer: Send + Sync + fmt::Debug {
    /// One answer: at least one SVID, all with the same fresh key, in the cluster's order.
    async fn issue(
        &self,
        selector: &Selector,
        ttl: Duration,
        attributes: &WorkloadAttrs,
    ) -> Result<Vec<Svid>, IssueError>;
}

/// Gives a client that may issue, renewing the identity behind it where that is due.
#[async_trait]
pub trait Access: Send + Sync + fmt::Debug {
    /// The client.
    async fn client(&self) -> Result<Client, IssueError>;
}

/// Issues through a cluster.
#[derive(Debug)]
pub struct ClusterIssuer {
    access: Arc<dyn Access>,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    clock: Clock,
    suite: Mutex<Option<(Suite, SystemTime)>>,
    ahead: Option<Keys>,
}

impl ClusterIssuer {
    /// An issuer that checks what it gets against `bundles`.
    pub fn new(
        access: Arc<dyn Access>,
        bundles: watch::Receiver<Option<Arc<Bundles>>>,
        clock: Clock,
    ) -> Self {
        Self {
            access,
            bundles,
            clock,
            suite: Mutex::new(None),
            ahead: None,
        }
    }

    /// The same, with keys made ahead: for those that issue again and again.
    #[must_use]
    pub fn with_keys_ahead(mut self) -> Self {
        self.ahead = Some(Keys::default());
        self
    }

    async fn suite(&self, client: &Client) -> Result<Suite, IssueError> {
        let now = self.clock.now();
        let known = *self.suite.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((suite, until)) = known
            && now < until
        {
            return Ok(suite);
        }
        let suite = client.suite().await?;
        *self.suite.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((suite, now + SUITE_KEPT));
        Ok(suite)
    }
}

/// The bundles, once there are some.
pub(super) async fn current(
    bundles: &watch::Receiver<Option<Arc<Bundles>>>,
) -> Result<Arc<Bundles>, IssueError> {
    let mut bundles = bundles.clone();
    let known = bundles.wait_for(Option::is_some).await;
    known
        .ok()
        .and_then(|bundles| bundles.clone())
        .ok_or_else(|| IssueError::Unavailable("the agent is stopping".into()))
}

/// What is asked for, whatever its form.
pub(super) struct Wanted<'a> {
    pub(super) selector: &'a Selector,
    pub(super) ttl: Duration,
    pub(super) attributes: &'a WorkloadAttrs,
}

/// The form of what is asked for.
pub(super) enum Params {
    X509(X509svidParams),
    Jwt(JwtsvidParams),
}

impl Wanted<'_> {
    /// Asks for one identity by its name, or for all that the labels select.
    pub(super) async fn ask(
        &self,
        client: &Client,
        params: Params,
    ) -> Result<Vec<Credential>, ClusterError> {
        let requested_ttl = prost_types::Duration::try_from(self.ttl).ok();
        let workload_attrs = Some(self.attributes.clone());
        match self.selector {
            Selector::Name(name) => {
                let request = IssueWorkloadIdentityRequest {
                    name: name.clone(),
                    credential: Some(match params {
                        Params::X509(params) => OneParams::X509SvidParams(params),
                        Params::Jwt(params) => OneParams::JwtSvidParams(params),
                    }),
                    workload_attrs,
                    requested_ttl,
                    ..IssueWorkloadIdentityRequest::default()
                };
                Ok(vec![client.issue_workload_identity(request).await?])
            }
            Selector::Labels(labels) => {
                let request = IssueWorkloadIdentitiesRequest {
                    label_selectors: Selector::label_selectors(labels),
                    credential: Some(match params {
                        Params::X509(params) => ManyParams::X509SvidParams(params),
                        Params::Jwt(params) => ManyParams::JwtSvidParams(params),
                    }),
                    workload_attrs,
                    requested_ttl,
                };
                client.issue_workload_identities(request).await
            }
        }
    }
}

#[async_trait]
impl Issuer for ClusterIssuer {
    async fn issue(
        &self,
        selector: &Selector,
        ttl: Duration,
        attributes: &WorkloadAttrs,
    ) -> Result<Vec<Svid>, IssueError> {
        let client = self.access.client().await?;
        let suite = self.suite(&client).await?;
        let algorithm = suite.algorithm(Purpose::BotSvid);
        let key = match &self.ahead {
            Some(keys) => keys.take(algorithm).await?,
            None => keys::made(algorithm).await?,
        };
        let params = X509svidParams {
            public_key: key.public_spki(),
            // Only a cluster that has an override for its issuer takes notice.
            use_issuer_overrides: true,
        };
        let wanted = Wanted {
            selector,
            ttl,
            attributes,
        };
        let credentials = wanted.ask(&client, Params::X509(params)).await?;
        let bundles = current(&self.bundles).await?;
        accept(credentials, &key, &bundles, self.clock.now())
    }
}

/// Checks an answer. One bad credential rejects it whole: a cluster that mixes them up is not to
/// be believed about the others.
pub(super) fn accept(
    credentials: Vec<Credential>,
    key: &PrivateKey,
    bundles: &Bundles,
    now: SystemTime,
) -> Result<Vec<Svid>, IssueError> {
    if credentials.is_empty() {
        return Err(IssueError::Refused(
            "no workload identity with the selector's labels may be issued to this workload".into(),
        ));
    }
    if credentials.len() > MAX_SVIDS {
        let problem = format!("it holds {} credentials", credentials.len());
        return Err(IssueError::Answer(problem));
    }
    let secret = Bytes::copy_from_slice(key.pkcs8_der().expose());
    let mut svids: Vec<Svid> = Vec::with_capacity(credentials.len());
    let mut hints = Hints::default();
    for credential in credentials {
        let name = credential.workload_identity_name.clone();
        let mut svid = checked(credential, key, &secret, bundles, now).map_err(|problem| {
            IssueError::Answer(format!("workload identity {name:?}: {problem}"))
        })?;
        svid.hint = hints.admit(svid.hint, &name);
        svids.push(svid);
    }
    Ok(svids)
}

fn checked(
    credential: Credential,
    key: &PrivateKey,
    secret: &Bytes,
    bundles: &Bundles,
    now: SystemTime,
) -> Result<Svid, String> {
    let Some(Kind::X509Svid(x509)) = credential.credential else {
        return Err("it is no X.509-SVID".into());
    };
    let leaf = Certificate::from_der(&x509.cert).map_err(|source| source.to_string())?;
    if !leaf.is_for(key) {
        return Err("its certificate is for another key".into());
    }
    let id: SpiffeId = credential
        .spiffe_id
        .parse()
        .map_err(|source| format!("{:?}: {source}", credential.spiffe_id))?;
    if leaf.uri_sans() != [credential.spiffe_id.as_str()] {
        return Err(format!("its certificate's URI names are not {id} alone"));
    }
    in_domain(&id, bundles.trust_domain())?;
    if leaf.is_ca() {
        return Err("its certificate is an authority".into());
    }
    if leaf.not_after() <= now {
        return Err("its certificate has expired: do the clocks agree?".into());
    }
    if leaf.not_before() > now + SKEW {
        return Err("its certificate is not valid yet: do the clocks agree?".into());
    }
    if x509.chain.len() > MAX_CHAIN {
        return Err(format!("it has {} intermediates", x509.chain.len()));
    }
    let chain = x509
        .chain
        .iter()
        .map(|der| Certificate::from_der(der))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| format!("intermediate: {source}"))?;
    if !is_anchored(&leaf, &chain, bundles.authorities()) {
        return Err("its certificate does not lead to the cluster's SPIFFE authorities".into());
    }
    let ders = std::iter::once(leaf.der()).chain(chain.iter().map(Certificate::der));
    Ok(Svid {
        id,
        chain: ders.flatten().copied().collect(),
        key: secret.clone(),
        hint: credential.hint,
        issued_at: now,
        not_after: leaf.not_after(),
        serial: leaf.serial(),
        name: credential.workload_identity_name,
        revision: credential.workload_identity_revision,
    })
}

/// Checks what was issued earlier as if it came now.
pub(super) fn still_good(svid: &Svid, bundles: &Bundles, now: SystemTime) -> Result<(), String> {
    let key = PrivateKey::from_pkcs8(&svid.key).map_err(|source| source.to_string())?;
    let ders = x509::split(&svid.chain).unwrap_or_default();
    let (leaf, chain) = ders.split_first().ok_or("it holds no certificate")?;
    let credential = Credential {
        spiffe_id: svid.id.to_string(),
        credential: Some(Kind::X509Svid(X509svidCredential {
            cert: leaf.to_vec(),
            chain: chain.iter().map(|der| der.to_vec()).collect(),
            ..X509svidCredential::default()
        })),
        ..Credential::default()
    };
    checked(credential, &key, &svid.key, bundles, now).map(drop)
}

/// Whether the authorities of `bundles` vouch for `svid`. Its issuer did when it came, but may be gone.
pub(super) fn leads_to(svid: &Svid, bundles: &Bundles) -> bool {
    let ders = x509::split(&svid.chain).unwrap_or_default();
    let certificates: Result<Vec<_>, _> =
        ders.iter().map(|der| Certificate::from_der(der)).collect();
    certificates.is_ok_and(|certificates| {
        certificates
            .split_first()
            .is_some_and(|(leaf, chain)| is_anchored(leaf, chain, bundles.authorities()))
    })
}

fn in_domain(id: &SpiffeId, domain: &TrustDomain) -> Result<(), String> {
    if id.trust_domain() == domain {
        Ok(())
    } else {
        Err(format!(
            "{id} is outside of the cluster's trust domain {domain}"
        ))
    }
}

/// Whether signatures lead from `leaf` through `chain` to an authority.
///
/// A cluster may issue under another certificate for its own key, signed by a hierarchy that the
/// bundle does not hold, or by that key: an intermediate with an authority's key is as good as that
/// authority, and so is an issuer that is not sent along.
fn is_anchored(leaf: &Certificate, chain: &[Certificate], authorities: &[Certificate]) -> bool {
    let vouched = |by: &dyn Fn(&Certificate) -> bool| authorities.iter().any(by);
    let mut current = leaf;
    for next in chain {
        if vouched(&|authority| current.is_signed_by(authority)) {
            return true;
        }
        if !current.is_signed_by(next) {
            return false;
        }
        if vouched(&|authority| authority.spki() == next.spki()) {
            return true;
        }
        current = next;
    }
    vouched(&|authority| current.is_signed_with_key_of(authority))
}
