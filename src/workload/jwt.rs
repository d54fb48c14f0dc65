//! Asks the cluster for JWT-SVIDs. Each is for one audience set and short-lived; none is kept here
//! ([`super::tokens`] does that).

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::watch;

use super::hints::Hints;
use super::issue::{Access, IssueError, Params, Wanted, current};
use super::outcome::Caller;
use super::{Bundles, Selector};
use crate::clock::{Clock, rfc3339};
use crate::pb::teleport::workloadidentity::v1::credential::Credential as Kind;
use crate::pb::teleport::workloadidentity::v1::{Credential, JwtsvidParams, WorkloadAttrs};
use crate::spiffe::{SpiffeId, jwt};

/// The most bytes of audiences that a line of the log shows.
const SHOWN: usize = 512;

/// A JWT-SVID as the cluster issued it, verified.
#[derive(Clone)]
pub struct JwtSvid {
    /// The SPIFFE ID, equal to the token's subject.
    pub id: SpiffeId,
    /// The token. Whoever has it can use it.
    pub token: String,
    /// What tells this identity from others of the same workload; may be empty.
    pub hint: String,
    /// End of validity, as the token says.
    pub not_after: SystemTime,
}

impl fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JwtSvid({})", self.id)
    }
}

/// Issues JWT-SVIDs.
#[async_trait]
pub trait TokenIssuer: Send + Sync + fmt::Debug {
    /// One token for each identity that `selector` grants to a workload with these attributes, in
    /// the cluster's order; each names every one of `audiences`.
    async fn issue(
        &self,
        selector: &Selector,
        ttl: Duration,
        attributes: &WorkloadAttrs,
        audiences: &[String],
    ) -> Result<Vec<JwtSvid>, IssueError>;
}

/// Issues JWT-SVIDs through a cluster.
#[derive(Debug)]
pub struct JwtIssuer {
    access: Arc<dyn Access>,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    clock: Clock,
}

impl JwtIssuer {
    /// An issuer that verifies what it gets against `bundles`.
    pub fn new(
        access: Arc<dyn Access>,
        bundles: watch::Receiver<Option<Arc<Bundles>>>,
        clock: Clock,
    ) -> Self {
        Self {
            access,
            bundles,
            clock,
        }
    }

    fn checked(
        &self,
        credential: Credential,
        bundles: &Bundles,
        attributes: &WorkloadAttrs,
        audiences: &[String],
    ) -> Result<JwtSvid, String> {
        let Some(Kind::JwtSvid(issued)) = credential.credential else {
            return Err("it holds no JWT-SVID".into());
        };
        let now = self.clock.now();
        let verified = verified(&issued.jwt, audiences, bundles, now)?;
        // Others are lenient with a token's end; nothing that has passed it can be handed out.
        if verified.expires <= now {
            return Err("the token has expired: do the clocks agree?".into());
        }
        if verified.id.to_string() != credential.spiffe_id {
            return Err(format!(
                "a token of {} came for {}",
                verified.id, credential.spiffe_id
            ));
        }
        let caller = Caller::of(attributes);
        tracing::info!(
            r#type = "jwt-svid",
            spiffe_id = %verified.id,
            jti = issued.jti,
            audiences = shortened(audiences),
            hint = credential.hint,
            expires_at = %rfc3339(verified.expires),
            workload_identity_name = credential.workload_identity_name,
            workload_identity_revision = credential.workload_identity_revision,
            pid = caller.pid,
            uid = caller.uid,
            systemd_service = caller.service,
            "Issued Workload Identity Credential"
        );
        Ok(JwtSvid {
            id: verified.id,
            token: issued.jwt,
            hint: credential.hint,
            not_after: verified.expires,
        })
    }
}

/// The names of audiences for a line of the log.
fn shortened(audiences: &[String]) -> String {
    let mut names = audiences.join(",");
    if names.len() > SHOWN {
        names.truncate(names.floor_char_boundary(SHOWN));
        names.push('…');
    }
    names
}

/// Verifies a token that has to be for each of `audiences`. A cluster issues for its own trust
/// domain, whatever others it federates with.
fn verified(
    token: &str,
    audiences: &[String],
    bundles: &Bundles,
    now: SystemTime,
) -> Result<jwt::JwtSvid, String> {
    let audience = audiences.first().map(String::as_str).unwrap_or_default();
    let verified = jwt::validate(token, audience, now, |domain| {
        (domain == bundles.trust_domain()).then(|| bundles.jwt())
    })
    .map_err(|source| source.to_string())?;
    match audiences.iter().find(|name| !verified.is_for(name)) {
        Some(missing) => Err(format!("a token came without the audience {missing:?}")),
        None => Ok(verified),
    }
}

/// Whether a token that was kept is what it was: the cluster's, and for each of `audiences`.
pub(super) fn still_good(
    svid: &JwtSvid,
    audiences: &[String],
    bundles: &Bundles,
    now: SystemTime,
) -> Result<(), String> {
    let verified = verified(&svid.token, audiences, bundles, now)?;
    if verified.id == svid.id && svid.not_after <= verified.expires && now < svid.not_after {
        Ok(())
    } else {
        Err("it is another token than it was kept as, or has expired".to_owned())
    }
}

#[async_trait]
impl TokenIssuer for JwtIssuer {
    async fn issue(
        &self,
        selector: &Selector,
        ttl: Duration,
        attributes: &WorkloadAttrs,
        audiences: &[String],
    ) -> Result<Vec<JwtSvid>, IssueError> {
        let client = self.access.client().await?;
        let params = JwtsvidParams {
            audiences: audiences.to_vec(),
        };
        let wanted = Wanted {
            selector,
            ttl,
            attributes,
        };
        let credentials = wanted.ask(&client, Params::Jwt(params)).await?;
        let bundles = current(&self.bundles).await?;
        let mut hints = Hints::default();
        let mut issued = Vec::with_capacity(credentials.len());
        for mut credential in credentials {
            let name = &credential.workload_identity_name;
            credential.hint = hints.admit(credential.hint, name);
            let svid = self
                .checked(credential, &bundles, attributes, audiences)
                .map_err(IssueError::Answer)?;
            issued.push(svid);
        }
        Ok(issued)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Client;
    use crate::pb::teleport::workloadidentity::v1::JwtsvidCredential;
    use crate::workload::tests::{TokenKey, start};

    #[derive(Debug)]
    struct NoAccess;

    #[async_trait]
    impl Access for NoAccess {
        async fn client(&self) -> Result<Client, IssueError> {
            Err(IssueError::Unavailable("none".into()))
        }
    }

    #[test]
    fn a_token_that_has_expired_by_this_clock_is_no_answer() {
        let key = TokenKey::new();
        let issuer = JwtIssuer::new(
            Arc::new(NoAccess),
            watch::channel(None).1,
            Clock::simulated(start()),
        );
        let second = Duration::from_secs(1);
        for (end, good) in [
            (start() + second, true),
            (start(), false),
            (start() - second, false),
        ] {
            let token = key.token("/a", &["x"], end);
            let credential = Credential {
                spiffe_id: token.id.to_string(),
                credential: Some(Kind::JwtSvid(JwtsvidCredential {
                    jwt: token.token,
                    ..JwtsvidCredential::default()
                })),
                ..Credential::default()
            };
            let (attributes, audiences) = (WorkloadAttrs::default(), ["x".to_owned()]);
            let told = issuer.checked(credential, &key.bundles(), &attributes, &audiences);
            match told {
                Ok(svid) => assert!(good, "{svid:?}"),
                Err(why) => assert!(!good && why.contains("do the clocks agree"), "{why}"),
            }
        }
    }

    #[test]
    fn a_line_shows_whom_a_token_is_for_and_has_an_end() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            shortened(&names(&["a", "spiffe://td/b"])),
            "a,spiffe://td/b"
        );
        let long = "ä".repeat(SHOWN);
        let shown = shortened(&names(&["x", &long]));
        assert!(shown.starts_with("x,ä") && shown.ends_with("ä…"), "{shown}");
        assert!(shown.len() <= SHOWN + '…'.len_utf8());
    }
}
