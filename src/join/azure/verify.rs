//! The verifying half of join method `azure` (upstream `lib/join/azurejoin`): a document that Azure
//! signed for this very join says which machine it is, and the access token of the machine's identity
//! says where that machine belongs.

mod attested;
mod machine;

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::{Map, Value, json};

use self::attested::{Attested, Document};
use self::machine::Place;
use crate::crypto::chain::Untrusted;
use crate::crypto::pem;
use crate::crypto::x509::{Certificate, split};
use crate::join::verify::oidc::issuers::Issuer;
use crate::join::verify::oidc::used::Replayed;
use crate::join::verify::oidc::{Claims, Expected, OidcError, expiry};
use crate::join::verify::{
    Carrier, Dialogue, Joining, Seen, Verifier, World, admitted, rules, section, set,
};
use crate::outbound::{OutboundError, Target};
use crate::pb::teleport::join::v1::{
    AzureChallenge, AzureChallengeSolution, challenge, challenge_solution,
};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Whom the access token is for.
const AUDIENCE: &str = "https://management.azure.com/";
/// Who issues access tokens, by tenant.
const ISSUER: &str = "https://sts.windows.net";
/// The longest access token that is read, in bytes.
const MAX_TOKEN: usize = 64 * 1024;
/// How old an access token may be that comes alone: nothing ties it to this join.
const MAX_AGE: Duration = Duration::from_mins(10);
/// How far Azure's clock may be ahead.
const LEEWAY: Duration = Duration::from_secs(30);
/// Where Microsoft publishes the certificates of its issuers.
pub(super) const ISSUERS: &str = "http://www.microsoft.com";
/// The longest of them, in bytes.
pub(super) const MAX_CERTIFICATE: usize = 64 * 1024;
/// The roots that Azure's attested documents lead to (Microsoft, "Azure Certificate Authority
/// details": `DigiCert` Global Root CA, G2 and G3, Microsoft ECC and RSA Root 2017).
const ROOTS: &str = include_str!("verify/roots.pem");

/// Why a machine is refused.
#[derive(Debug, thiserror::Error)]
enum AzureError {
    /// The document is not as documented.
    #[error("attested document: {0}")]
    Document(&'static str),
    /// It is signed in another way.
    #[error("unsupported signature type of the attested document: it has to be pkcs7")]
    Encoding,
    /// It was made for another join.
    #[error("challenge is missing or does not match")]
    Nonce,
    /// Somebody else signed it.
    #[error("certificate common name does not match allow-list ({0})")]
    Signer(String),
    /// Its signer is not Azure's.
    #[error("the signer of the attested document is not trusted: {0}")]
    Untrusted(#[from] Untrusted),
    /// It was not signed by its signer.
    #[error("the signature of the attested document does not verify")]
    Signature,
    /// The token is none, or names no tenant.
    #[error("access token: {0}")]
    Token(&'static str),
    /// The token does not verify.
    #[error("Failed to validate token claims: {0}")]
    Claims(#[from] OidcError),
    /// The token came alone and is old.
    #[error(
        "token-only Azure join rejected: access token was issued {} s ago (max allowed {} s)",
        .0.as_secs(), MAX_AGE.as_secs()
    )]
    Stale(Duration),
    /// The token came alone, and before from elsewhere.
    #[error(transparent)]
    Replayed(#[from] Replayed),
    /// The two halves are of different subscriptions.
    #[error("subscription ID mismatch between attested data and access token")]
    Subscription,
    /// Nobody knows where the machine belongs.
    #[error("could not determine Azure identity from token claims")]
    NoIdentity,
    /// Azure does not know the machine.
    #[error("no VM found with matching VM ID")]
    NoMachine,
    /// Azure does not say.
    #[error(
        "management.azure.com answered {0} when asked for the machine: its identity needs the permission Microsoft.Compute/virtualMachines/read"
    )]
    LookUp(StatusCode),
    /// Azure cannot be asked.
    #[error(transparent)]
    Outbound(#[from] OutboundError),
}

impl AzureError {
    fn refusal(&self) -> Refusal {
        match self {
            Self::Outbound(_) | Self::Claims(OidcError::Fetch(_)) => {
                Refusal::unavailable(self.to_string())
            }
            Self::Document(_) => Refusal::bad_parameter(self.to_string()),
            _ => Refusal::denied(self.to_string()),
        }
    }
}

/// Join method `azure`.
#[derive(Debug)]
pub struct Azure;

#[async_trait]
impl Verifier for Azure {
    fn name(&self) -> &'static str {
        "azure"
    }

    fn carrier(&self) -> Carrier {
        Carrier::Azure
    }

    fn challenge(&self) -> String {
        crate::join::verify::azure_challenge()
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let missing = (
            "`azure` is required for the join method `azure`",
            "add `azure: {allow: [{subscription: …}]}`",
        );
        section(self.name(), missing, spec, stored, |section| {
            let missing = (
                "the \"azure\" join method requires defined azure allow rules",
                "add `- subscription: ID`",
            );
            json!({"allow": rules(section, missing, read_rule)})
        });
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let question = challenge::Payload::AzureChallenge(AzureChallenge {
            challenge: joining.challenge.to_owned(),
        });
        let solution = match dialogue.ask(question).await? {
            challenge_solution::Payload::AzureChallengeSolution(solution)
                if !solution.access_token.is_empty() =>
            {
                solution
            }
            _ => return Err(Refusal::bad_parameter("missing parameter AccessToken")),
        };
        let (vm_id, tenant, place) = Box::pin(identify(joining, &solution))
            .await
            .map_err(|error| error.refusal().context("checking azure request"))?;
        let attributes = json!({
            "subscription": place.subscription,
            "resource_group": place.resource_group,
            "tenant": tenant,
        });
        seen.attributes = attributes.as_object().cloned();
        seen.metadata = attributes;
        admit(joining.spec.pointer("/azure/allow"), &tenant, &place).map_err(|near| {
            seen.near = Some(near);
            let text = format!(
                "instance {vm_id} did not match any allow rules in token {}",
                joining.token
            );
            Refusal::denied(text).context("checking azure request")
        })
    }
}

fn read_rule(rule: &mut Fields<'_>) -> Value {
    let mut stored = json!({});
    for key in ["subscription", "tenant"] {
        if let Some(text) = rule.string(key).filter(|text| !text.is_empty()) {
            set(&mut stored, key, text);
        }
    }
    if let Some(groups) = rule
        .strings("resource_groups")
        .filter(|groups| !groups.is_empty())
    {
        set(&mut stored, "resource_groups", groups);
    }
    if stored.get("subscription").is_none() && stored.get("tenant").is_none() {
        rule.error_here(
            "a rule needs `subscription` or `tenant`",
            "without one it would let in everybody's machines",
        );
    }
    stored
}

/// The machine's ID (empty if it is not attested), its tenant and its place.
async fn identify(
    joining: &Joining<'_>,
    solution: &AzureChallengeSolution,
) -> Result<(String, String, Place), AzureError> {
    let token = &solution.access_token;
    if token.len() > MAX_TOKEN {
        return Err(AzureError::Token("it is larger than any real one"));
    }
    let attested = if solution.attested_data.is_empty() {
        None
    } else {
        Some(attested(joining, solution).await?)
    };
    let claims = claims(joining, token).await?;
    if attested.is_none() {
        check_age(&claims, joining.now)?;
    }
    let expires = expiry(&claims).unwrap_or(joining.now);
    let used = &joining.world.used;
    used.note(token, joining.address, joining.again, expires, joining.now)?;
    let tenant = text(&claims, "tid").to_owned();
    let place = match (machine::of_claims(&claims), &attested) {
        (Some(place), Some(attested))
            if !place
                .subscription
                .eq_ignore_ascii_case(&attested.subscription) =>
        {
            return Err(AzureError::Subscription);
        }
        (Some(place), _) => place,
        (
            None,
            Some(Attested {
                vm_id,
                subscription,
            }),
        ) => machine::look_up(joining.world, subscription, vm_id, token).await?,
        (None, None) => return Err(AzureError::NoIdentity),
    };
    let vm_id = attested.map(|attested| attested.vm_id).unwrap_or_default();
    Ok((vm_id, tenant, place))
}

/// What Azure attests of the machine.
async fn attested(
    joining: &Joining<'_>,
    solution: &AzureChallengeSolution,
) -> Result<Attested, AzureError> {
    let document = Document::read(&solution.attested_data)?;
    let intermediates = if solution.intermediate.is_empty() {
        // Agents of the older protocol have no place for it.
        issuer(joining.world, document.signer())
            .await?
            .into_iter()
            .collect()
    } else {
        let parts = split(&solution.intermediate).ok_or(AzureError::Document(
            "its intermediate certificates are no DER",
        ))?;
        parts
            .into_iter()
            .take(16)
            .map(<[u8]>::to_vec)
            .collect::<Vec<_>>()
    };
    let roots = joining.world.azure_roots.clone().unwrap_or_else(roots);
    document.verify(joining.challenge, &intermediates, &roots, joining.now)
}

fn roots() -> Vec<Vec<u8>> {
    pem::certificates(ROOTS).unwrap_or_default()
}

/// The certificate of `certificate`'s issuer, from where it says; `None` where it says nothing or
/// another place than Microsoft's.
async fn issuer(world: &World, certificate: &Certificate) -> Result<Option<Vec<u8>>, AzureError> {
    let (Some(path), Some(target)) = (issuer_path(certificate), Target::parse(ISSUERS)) else {
        return Ok(None);
    };
    let request = Request::get(path)
        .header(header::HOST, target.authority())
        .body(Full::default())
        .map_err(OutboundError::from)?;
    let answer = world
        .outbound
        .send(&target, request, MAX_CERTIFICATE)
        .await?;
    Ok((answer.status == StatusCode::OK).then(|| answer.body.to_vec()))
}

/// The path of the certificate of `certificate`'s issuer at [`ISSUERS`], if it is there.
pub(super) fn issuer_path(certificate: &Certificate) -> Option<String> {
    certificate.issuer_urls().into_iter().find_map(|url| {
        let rest = url
            .strip_prefix("http://")
            .or_else(|| url.strip_prefix("https://"))?;
        let path = rest.strip_prefix("www.microsoft.com")?;
        let name = path.strip_prefix("/pkiops/certs/")?.strip_suffix(".crt")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.%() ".contains(c);
        (!name.is_empty() && name.chars().all(plain)).then(|| path.replace(' ', "%20"))
    })
}

/// The certificate that an attested document says it is signed with; for agents, who fetch its chain.
pub(super) fn signer(attested: &[u8]) -> Result<Certificate, String> {
    let document = Document::read(attested).map_err(|error| error.to_string())?;
    Ok(document.signer().clone())
}

/// Whether a text has the form of a tenant's ID, a UUID. It comes from a token that nobody has
/// verified, and names who has to.
fn is_tenant(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

/// The verified claims of an access token.
async fn claims(joining: &Joining<'_>, token: &str) -> Result<Claims, AzureError> {
    let unverified = crate::crypto::jws::Token::parse(token)
        .map_err(OidcError::from)?
        .claims;
    let tenant = text(&unverified, "tid");
    // It becomes part of a URL.
    if !is_tenant(tenant) {
        return Err(AzureError::Token("it names no tenant"));
    }
    let issuer = format!("{ISSUER}/{tenant}/");
    let expected = Expected {
        issuer: Some(&issuer),
        audience: AUDIENCE,
        authorized_party: false,
    };
    let from = Issuer::web(issuer.as_str());
    let issuers = &joining.world.issuers;
    Ok(issuers.verify(&from, token, &expected, joining.now).await?)
}

fn check_age(claims: &Claims, now: SystemTime) -> Result<(), AzureError> {
    let issued = claims
        .get("iat")
        .and_then(Value::as_u64)
        .unwrap_or_default();
    let issued = SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(issued))
        .ok_or(AzureError::Token("it was issued at no time"))?;
    match now.duration_since(issued) {
        Ok(age) if age > MAX_AGE => Err(AzureError::Stale(age)),
        Err(ahead) if ahead.duration() > LEEWAY => {
            Err(AzureError::Token("it has a future IssuedAt claim"))
        }
        _ => Ok(()),
    }
}

fn text<'a>(claims: &'a Map<String, Value>, name: &str) -> &'a str {
    claims.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// Whether a rule lets the machine in; otherwise what each differs in.
fn admit(allow: Option<&Value>, tenant: &str, place: &Place) -> Result<(), String> {
    admitted(allow, |rule| differs(rule, tenant, place))
}

fn differs(rule: &Value, tenant: &str, place: &Place) -> Vec<&'static str> {
    let text = |key: &str| rule.get(key).and_then(Value::as_str);
    let mut miss = Vec::new();
    if text("subscription").is_some_and(|wanted| wanted != place.subscription) {
        miss.push("subscription");
    }
    if text("tenant").is_some_and(|wanted| wanted != tenant) {
        miss.push("tenant");
    }
    if text("subscription").is_none() && text("tenant").is_none() {
        miss.push("subscription and tenant: it has neither");
    }
    // Azure's names of resource groups are not case sensitive, and it writes them in either.
    let groups = rule.get("resource_groups").and_then(Value::as_array);
    let in_group = groups.is_none_or(|groups| {
        let mut groups = groups.iter().filter_map(Value::as_str);
        groups.any(|group| group.to_lowercase() == place.resource_group.to_lowercase())
    });
    if !in_group {
        miss.push("resource_groups");
    }
    miss
}

#[cfg(test)]
mod tests;
