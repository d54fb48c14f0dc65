//! SVIDs by path: the call that clusters up to version 18 have beside workload identities.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::Bundles;
use super::issue::{Access, IssueError, Svid, accept, current};
use super::jwt::JwtSvid;
use super::keys;
use crate::clock::Clock;
use crate::cluster::{Client, ClusterError, Disposition};
use crate::crypto::{PrivateKey, Purpose};
use crate::pb::teleport::machineid::v1::{
    JwtsvidRequest, JwtsvidResponse, SvidRequest, SvidResponse,
};
use crate::pb::teleport::workloadidentity::v1::credential::Credential as Kind;
use crate::pb::teleport::workloadidentity::v1::{Credential, X509svidCredential};
use crate::spiffe::jwt;

/// What an SVID is to say. The cluster's roles decide whether it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathRequest {
    /// The path of the SPIFFE ID, with its slash.
    pub path: String,
    /// What tells this identity from others of the same workload; may be empty.
    pub hint: String,
    /// DNS names of the certificate.
    pub dns: Vec<String>,
    /// IP addresses of the certificate.
    pub ips: Vec<String>,
}

/// Issues SVIDs by path.
#[derive(Debug)]
pub struct LegacyIssuer {
    access: Arc<dyn Access>,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    clock: Clock,
}

impl LegacyIssuer {
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
        }
    }

    /// An X.509-SVID, and for each audience a JWT-SVID.
    pub async fn issue(
        &self,
        wanted: &PathRequest,
        audiences: &[String],
        ttl: Duration,
    ) -> Result<(Svid, Vec<JwtSvid>), IssueError> {
        let client = self.access.client().await?;
        let (x509, tokens) = tokio::try_join!(
            self.x509(&client, wanted, ttl),
            self.tokens(&client, wanted, audiences, ttl),
        )?;
        Ok((x509, tokens))
    }

    async fn x509(
        &self,
        client: &Client,
        wanted: &PathRequest,
        ttl: Duration,
    ) -> Result<Svid, IssueError> {
        let key = keys::made(client.suite().await?.algorithm(Purpose::BotSvid)).await?;
        let request = SvidRequest {
            public_key: key.public_spki(),
            spiffe_id_path: wanted.path.clone(),
            dns_sans: wanted.dns.clone(),
            ip_sans: wanted.ips.clone(),
            hint: wanted.hint.clone(),
            ttl: prost_types::Duration::try_from(ttl).ok(),
        };
        let answer = client.sign_x509_svid(request).await.map_err(explained)?;
        let bundles = current(&self.bundles).await?;
        checked(answer, wanted, &key, &bundles, self.clock.now())
    }

    async fn tokens(
        &self,
        client: &Client,
        wanted: &PathRequest,
        audiences: &[String],
        ttl: Duration,
    ) -> Result<Vec<JwtSvid>, IssueError> {
        if audiences.is_empty() {
            return Ok(Vec::new());
        }
        let requests = audiences
            .iter()
            .map(|audience| JwtsvidRequest {
                spiffe_id_path: wanted.path.clone(),
                audiences: vec![audience.clone()],
                ttl: prost_types::Duration::try_from(ttl).ok(),
                hint: wanted.hint.clone(),
            })
            .collect();
        let answers = client.sign_jwt_svids(requests).await.map_err(explained)?;
        let bundles = current(&self.bundles).await?;
        if answers.len() != audiences.len() {
            let problem = format!(
                "it holds {} tokens for {} audiences",
                answers.len(),
                audiences.len()
            );
            return Err(IssueError::Answer(problem));
        }
        answers
            .into_iter()
            .zip(audiences)
            .map(|(answer, audience)| {
                checked_token(answer, wanted, audience, &bundles, self.clock.now())
            })
            .collect()
    }
}

/// A cluster without the call will never have it again.
fn explained(error: ClusterError) -> IssueError {
    if error.disposition() == Disposition::Unsupported {
        IssueError::Refused(
            "the cluster signs no SVIDs by path (version 18 was the last to do so): use the outputs \
             workload-identity-x509 and workload-identity-jwt with a workload_identity resource"
                .into(),
        )
    } else {
        error.into()
    }
}

fn checked(
    answer: SvidResponse,
    wanted: &PathRequest,
    key: &PrivateKey,
    bundles: &Bundles,
    now: SystemTime,
) -> Result<Svid, IssueError> {
    let credential = Credential {
        hint: answer.hint,
        workload_identity_name: wanted.path.clone(),
        spiffe_id: answer.spiffe_id,
        credential: Some(Kind::X509Svid(X509svidCredential {
            cert: answer.certificate,
            ..X509svidCredential::default()
        })),
        ..Credential::default()
    };
    let svid = accept(vec![credential], key, bundles, now)?
        .into_iter()
        .next()
        .filter(|svid| svid.id.path() == wanted.path);
    svid.ok_or_else(|| another(wanted))
}

fn checked_token(
    answer: JwtsvidResponse,
    wanted: &PathRequest,
    audience: &str,
    bundles: &Bundles,
    now: SystemTime,
) -> Result<JwtSvid, IssueError> {
    let verified = jwt::validate(&answer.jwt, audience, now, |domain| {
        (domain == bundles.trust_domain()).then(|| bundles.jwt())
    })
    .map_err(|source| IssueError::Answer(source.to_string()))?;
    if verified.id.path() != wanted.path {
        return Err(another(wanted));
    }
    Ok(JwtSvid {
        id: verified.id,
        token: answer.jwt,
        hint: answer.hint,
        not_after: verified.expires,
    })
}

fn another(wanted: &PathRequest) -> IssueError {
    IssueError::Answer(format!("it is for another path than {}", wanted.path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::KeyAlgorithm;
    use crate::workload::tests::{Authority, DOMAIN, message, start};

    fn request() -> PathRequest {
        PathRequest {
            path: "/svc/foo".into(),
            hint: String::new(),
            dns: Vec::new(),
            ips: Vec::new(),
        }
    }

    #[test]
    fn the_answer_has_to_be_what_was_asked_for() {
        let authority = Authority::new(DOMAIN);
        let bundles = Bundles::from_authority(&message(DOMAIN, &[&authority])).unwrap();
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let other = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let answer = |id: &str, key: &PrivateKey| SvidResponse {
            certificate: authority.leaf(key, &[id]),
            spiffe_id: id.to_owned(),
            hint: String::new(),
        };
        let check = |answer| checked(answer, &request(), &key, &bundles, start());
        let good = "spiffe://example.org/svc/foo";
        let svid = check(answer(good, &key)).unwrap();
        assert_eq!(svid.id.to_string(), good);
        for (answer, problem) in [
            (answer("spiffe://example.org/svc/bar", &key), "another path"),
            (answer("spiffe://example.com/svc/foo", &key), "outside"),
            (answer(good, &other), "another key"),
        ] {
            let told = check(answer).unwrap_err().to_string();
            assert!(told.contains(problem), "{told}");
        }
    }

    #[test]
    fn tokens_are_verified() {
        let authority = Authority::new(DOMAIN);
        let bundles = Bundles::from_authority(&message(DOMAIN, &[&authority])).unwrap();
        let answer = JwtsvidResponse {
            jwt: "a.b.c".into(),
            ..JwtsvidResponse::default()
        };
        let told = checked_token(answer, &request(), "x", &bundles, start());
        assert!(matches!(told, Err(IssueError::Answer(_))));
    }
}
