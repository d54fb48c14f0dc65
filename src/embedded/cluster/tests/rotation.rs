//! Rotations as an agent sees them over the wire, phase by phase.

use std::time::Duration;

use tonic::transport::Channel;

use super::super::*;
use super::lab::{AUTH, Lab, channel};
use crate::crypto::PrivateKey;
use crate::crypto::x509::Certificate;
use crate::crypto::{KeyAlgorithm, pem};
use crate::embedded::ca::{AuthorityType, Mode as RotationMode, Phase};
use crate::embedded::workload_identity::issue;
use crate::pb::proto::auth_service_client::AuthServiceClient;
use crate::pb::proto::{Certs, PingRequest, UserCertsRequest, Watch, event};
use crate::pb::teleport::trust::v1::GetCertAuthorityRequest;
use crate::pb::teleport::trust::v1::trust_service_client::TrustServiceClient;
use crate::pb::teleport::workloadidentity::v1 as wire;
use crate::pb::types::{CertAuthorityV2, WatchKind};
use wire::issue_workload_identity_request::Credential;
use wire::workload_identity_issuance_service_client::WorkloadIdentityIssuanceServiceClient;

const WORKLOAD: &str = "kind: workload_identity\nversion: v1\nmetadata: {name: w}\n\
    spec: {spiffe: {id: /w}}\n";

/// What an agent holds: its identity, and the authorities as it last heard of them.
struct Agent {
    certs: Certs,
    key: PrivateKey,
    host: CertAuthorityV2,
    spiffe: CertAuthorityV2,
}

fn manual(to: Phase) -> Step {
    Step {
        to,
        mode: RotationMode::Manual,
        grace: Duration::from_hours(30),
    }
}

/// All trusted TLS certificates of an authority, active ones first.
fn trusted(authority: &CertAuthorityV2) -> Vec<Vec<u8>> {
    let spec = authority.spec.as_ref().unwrap();
    let sets = [&spec.active_keys, &spec.additional_trusted_keys];
    let pairs = sets.into_iter().flatten().flat_map(|set| &set.tls);
    pairs
        .flat_map(|pair| pem::certificates(std::str::from_utf8(&pair.cert).unwrap()).unwrap())
        .collect()
}

/// The key ids of all trusted JWT keys.
fn key_ids(authority: &CertAuthorityV2) -> Vec<String> {
    let spec = authority.spec.as_ref().unwrap();
    let sets = [&spec.active_keys, &spec.additional_trusted_keys];
    let pairs = sets.into_iter().flatten().flat_map(|set| &set.jwt);
    pairs
        .map(|pair| {
            let text = std::str::from_utf8(&pair.public_key).unwrap();
            issue::key_id(&crate::crypto::spki_from_pem(text).unwrap())
        })
        .collect()
}

fn is_signed_by_one_of(leaf: &Certificate, authorities: &[Vec<u8>]) -> bool {
    authorities
        .iter()
        .any(|der| leaf.is_signed_by(&Certificate::from_der(der).unwrap()))
}

fn leaf(certs: &Certs) -> Certificate {
    Certificate::from_pem(std::str::from_utf8(&certs.tls).unwrap()).unwrap()
}

async fn authority(channel: &Channel, kind: AuthorityType) -> CertAuthorityV2 {
    let request = GetCertAuthorityRequest {
        r#type: kind.name().to_owned(),
        domain: "root".to_owned(),
        include_key: false,
    };
    let mut client = TrustServiceClient::new(channel.clone());
    client
        .get_cert_authority(request)
        .await
        .unwrap()
        .into_inner()
}

impl Agent {
    async fn join(lab: &Lab) -> Self {
        lab.cluster.create("file", WORKLOAD).await.unwrap();
        let (certs, key) = lab.joined().await;
        let line = lab.connect(&[AUTH, "h2"], Some((&certs, &key))).await;
        let channel = channel(line.stream).await;
        Self {
            certs,
            key,
            host: authority(&channel, AuthorityType::Host).await,
            spiffe: authority(&channel, AuthorityType::Spiffe).await,
        }
    }

    /// A new connection, with no more trust than the agent had before.
    async fn connect(&self, lab: &Lab, certs: &Certs, key: &PrivateKey) -> io::Result<Channel> {
        let host = trusted(&self.host);
        let identity = Some((certs, key));
        let line = lab.connect_trusting(host, &[AUTH, "h2"], identity).await?;
        Ok(channel(line.stream).await)
    }

    /// Renews, has SVIDs issued, checks them with the trust it had, and looks at the authorities.
    async fn work(&mut self, lab: &Lab) {
        let channel = self.connect(lab, &self.certs, &self.key).await.unwrap();
        let mut client = AuthServiceClient::new(channel.clone());
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let request = UserCertsRequest {
            username: "bot-b".to_owned(),
            expires: Some((lab.clock.now() + Duration::from_hours(1)).into()),
            tls_public_key: key.public_pem().into_bytes(),
            ..UserCertsRequest::default()
        };
        let output = UserCertsRequest {
            role_requests: vec!["wildcard-workload-identity-issuer".to_owned()],
            use_role_requests: true,
            ..request.clone()
        };
        let output = client
            .generate_user_certs(output)
            .await
            .unwrap()
            .into_inner();
        let renewed = client
            .generate_user_certs(request)
            .await
            .unwrap()
            .into_inner();
        let user = authority(&channel, AuthorityType::User).await;
        let active = user.spec.as_ref().unwrap().active_keys.clone().unwrap();
        let signer = pem::certificates(std::str::from_utf8(&active.tls[0].cert).unwrap()).unwrap();
        for certs in [&output, &renewed] {
            assert!(is_signed_by_one_of(&leaf(certs), &signer));
        }
        let issuing = self.connect(lab, &output, &key).await.unwrap();
        let mut client = WorkloadIdentityIssuanceServiceClient::new(issuing);
        let x509 = wire::X509svidParams {
            public_key: key.public_spki(),
            use_issuer_overrides: true,
        };
        let jwt = wire::JwtsvidParams {
            audiences: vec!["a".to_owned()],
        };
        for credential in [
            Credential::X509SvidParams(x509),
            Credential::JwtSvidParams(jwt),
        ] {
            let request = wire::IssueWorkloadIdentityRequest {
                name: "w".to_owned(),
                credential: Some(credential),
                ..wire::IssueWorkloadIdentityRequest::default()
            };
            let issued = client.issue_workload_identity(request).await.unwrap();
            match issued.into_inner().credential.unwrap().credential.unwrap() {
                wire::credential::Credential::X509Svid(svid) => {
                    let leaf = Certificate::from_der(&svid.cert).unwrap();
                    assert!(is_signed_by_one_of(&leaf, &trusted(&self.spiffe)));
                }
                wire::credential::Credential::JwtSvid(svid) => {
                    let head = svid.jwt.split('.').next().unwrap();
                    let engine = &base64::engine::general_purpose::URL_SAFE_NO_PAD;
                    let head = base64::Engine::decode(engine, head).unwrap();
                    let head: serde_json::Value = serde_json::from_slice(&head).unwrap();
                    let kid = head["kid"].as_str().unwrap().to_owned();
                    assert!(key_ids(&self.spiffe).contains(&kid));
                }
            }
        }
        self.host = authority(&channel, AuthorityType::Host).await;
        self.spiffe = authority(&channel, AuthorityType::Spiffe).await;
        (self.certs, self.key) = (renewed, key);
    }

    /// Whether a call with these certificates succeeds; the handshake of TLS 1.3 alone does not
    /// tell.
    async fn is_let_in(&self, lab: &Lab, certs: &Certs, key: &PrivateKey) -> bool {
        let Ok(channel) = self.connect(lab, certs, key).await else {
            return false;
        };
        AuthServiceClient::new(channel)
            .ping(PingRequest {})
            .await
            .is_ok()
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_follows_each_phase_is_never_locked_out() {
    use Phase::{Init, Rollback, Standby, UpdateClients, UpdateServers};
    let forward = [Init, UpdateClients, UpdateServers, Standby];
    let back = [Init, UpdateClients, UpdateServers, Rollback, Standby];
    let lab = Lab::new().await;
    let mut agent = Agent::join(&lab).await;
    let line = lab
        .connect(&[AUTH, "h2"], Some((&agent.certs, &agent.key)))
        .await;
    let watch = Watch {
        kinds: vec![WatchKind {
            kind: "cert_authority".to_owned(),
            ..WatchKind::default()
        }],
        allow_partial_success: false,
    };
    let mut client = AuthServiceClient::new(channel(line.stream).await);
    let mut events = client.watch_events(watch).await.unwrap().into_inner();
    events.message().await.unwrap().unwrap();
    let state = Arc::clone(lab.cluster.state());
    for kind in [
        AuthorityType::Host,
        AuthorityType::User,
        AuthorityType::Spiffe,
        AuthorityType::Jwt,
        AuthorityType::Db,
    ] {
        for phases in [&back[..], &forward[..]] {
            let before = state.authorities.message(kind);
            for &to in phases {
                let owned = Arc::clone(&state);
                let step = move || owned.rotate(kind, manual(to), "test").map(drop);
                tokio::task::spawn_blocking(step).await.unwrap().unwrap();
                let event = events.message().await.unwrap().unwrap();
                let Some(event::Resource::CertAuthority(told)) = event.resource else {
                    unreachable!()
                };
                assert_eq!(told, state.authorities.message(kind));
                let rotation = told.spec.unwrap().rotation.unwrap();
                assert_eq!(
                    (told.sub_kind.as_str(), rotation.phase.as_str()),
                    (kind.name(), to.name())
                );
                agent.work(&lab).await;
            }
            let after = state.authorities.message(kind).spec.unwrap();
            let same = after.active_keys == before.spec.unwrap().active_keys;
            assert_eq!(same, phases.contains(&Rollback), "{kind:?}");
            let rest = after.additional_trusted_keys.unwrap();
            assert!(rest.tls.is_empty() && rest.ssh.is_empty() && rest.jwt.is_empty());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_did_not_follow_is_locked_out_at_the_end_and_not_before() {
    let lab = Lab::new().await;
    let agent = Agent::join(&lab).await;
    let state = Arc::clone(lab.cluster.state());
    let go = async |kind: AuthorityType, to: Phase| {
        let owned = Arc::clone(&state);
        let step = move || owned.rotate(kind, manual(to), "test").map(drop);
        tokio::task::spawn_blocking(step).await.unwrap().unwrap();
    };
    for to in [Phase::Init, Phase::UpdateClients, Phase::UpdateServers] {
        go(AuthorityType::User, to).await;
        assert!(
            agent.is_let_in(&lab, &agent.certs, &agent.key).await,
            "{to:?}"
        );
    }
    go(AuthorityType::User, Phase::Standby).await;
    assert!(!agent.is_let_in(&lab, &agent.certs, &agent.key).await);
    // Of the host authority the agent has not heard either: it stops trusting the listener.
    let lab = Lab::new().await;
    let agent = Agent::join(&lab).await;
    let state = Arc::clone(lab.cluster.state());
    let go = async |to: Phase| {
        let owned = Arc::clone(&state);
        let step = move || {
            owned
                .rotate(AuthorityType::Host, manual(to), "test")
                .map(drop)
        };
        tokio::task::spawn_blocking(step).await.unwrap().unwrap();
    };
    for (to, trusts) in [
        (Phase::Init, true),
        (Phase::UpdateClients, true),
        (Phase::UpdateServers, false),
        (Phase::Rollback, true),
        (Phase::Standby, true),
    ] {
        go(to).await;
        let found = agent.is_let_in(&lab, &agent.certs, &agent.key).await;
        assert_eq!(found, trusts, "{to:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_schedule_goes_on_by_itself_also_over_a_restart() {
    let Lab {
        dir,
        cluster,
        clock,
    } = Lab::new().await;
    let data_dir = dir.path().join("c");
    let state = Arc::clone(cluster.state());
    let step = Step {
        mode: RotationMode::Auto,
        ..manual(Phase::Init)
    };
    let owned = Arc::clone(&state);
    let begin = move || owned.rotate(AuthorityType::Spiffe, step, "test").map(drop);
    tokio::task::spawn_blocking(begin).await.unwrap().unwrap();
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(cluster.serve(shutdown.clone()));
    let phase = |state: &ClusterState| state.authorities.get(AuthorityType::Spiffe).phase();
    clock.sleep(Duration::from_mins(599)).await;
    assert_eq!(phase(&state), Phase::Init);
    clock.sleep(Duration::from_mins(2)).await;
    assert_eq!(phase(&state), Phase::UpdateClients);
    shutdown.cancel();
    serving.await.unwrap().unwrap();
    drop(state);
    // Nobody was there for the second step; it is taken late, the third one in time.
    clock.sleep(Duration::from_hours(15)).await;
    let cluster = Cluster::open(Config::local(data_dir, clock.clone()))
        .await
        .unwrap();
    let state = Arc::clone(cluster.state());
    assert_eq!(phase(&state), Phase::UpdateClients);
    let serving = tokio::spawn(cluster.serve(shutdown_later(&clock)));
    clock.sleep(Duration::from_mins(2)).await;
    assert_eq!(phase(&state), Phase::UpdateServers);
    clock.sleep(Duration::from_hours(5)).await;
    assert_eq!(phase(&state), Phase::Standby);
    serving.await.unwrap().unwrap();
}

/// Ends in ten hours.
fn shutdown_later(clock: &Clock) -> CancellationToken {
    let token = CancellationToken::new();
    let (ending, clock) = (token.clone(), clock.clone());
    tokio::spawn(async move {
        clock.sleep(Duration::from_hours(10)).await;
        ending.cancel();
    });
    token
}
