//! What the three streams of the Workload API send.

use std::sync::Arc;

use bytes::Bytes;
use tonic::Status;

use crate::pb::workload_api::{JwtBundlesResponse, X509BundlesResponse, X509svidResponse};
use crate::services::workload_identity_api::feed::Content;
use crate::services::workload_identity_api::followed::Followed;
use crate::services::workload_identity_api::grpc::packet;
use crate::services::workload_identity_api::message::{entry, federated};
use crate::services::workload_identity_api::source::Source;
use crate::workload::crl::split;
use crate::workload::{Bundles, State};

/// `FetchX509SVID`.
pub(super) struct Svids(pub(super) Followed);

impl Content for Svids {
    async fn changed(&mut self) {
        self.0.changed().await;
    }

    fn packet(
        &mut self,
        source: &Source,
        bundles: &Arc<Bundles>,
        crl: Option<&Bytes>,
    ) -> Result<Option<Bytes>, Box<Status>> {
        match self.0.state(bundles)? {
            state if !state.is_answer(source.clock.now()) => Ok(None),
            State::Ready(svids) => Ok(svids.message(bundles, crl, || {
                Some(packet(&X509svidResponse {
                    svids: svids.iter().map(|svid| entry(svid, bundles)).collect(),
                    crl: crl.map(split).unwrap_or_default(),
                    federated_bundles: federated(bundles).collect(),
                }))
            })),
            State::Refused(why) => {
                let text = format!("no identity issued: {why}");
                Err(Box::new(Status::permission_denied(text)))
            }
            State::Unavailable(why) => Err(Box::new(Status::unavailable(&*why))),
            State::Pending => Ok(None),
        }
    }

    fn missing(&self) -> &'static str {
        "the cluster to issue the SVID"
    }
}

/// `FetchX509Bundles`.
pub(super) struct X509Bundles;

impl Content for X509Bundles {
    async fn changed(&mut self) {
        std::future::pending::<()>().await;
    }

    fn packet(
        &mut self,
        source: &Source,
        bundles: &Arc<Bundles>,
        crl: Option<&Bytes>,
    ) -> Result<Option<Bytes>, Box<Status>> {
        Ok(source.x509_bundles.message(bundles, crl, || {
            // The own trust domain wins over a federated one of the same name.
            let local = (bundles.trust_domain().id(), bundles.local().clone());
            Some(packet(&X509BundlesResponse {
                crl: crl.map(split).unwrap_or_default(),
                bundles: federated(bundles).chain([local]).collect(),
            }))
        }))
    }

    fn missing(&self) -> &'static str {
        "the revocation list"
    }
}

/// `FetchJWTBundles`.
pub(super) struct JwtBundles;

impl Content for JwtBundles {
    const REVOCATIONS: bool = false;

    async fn changed(&mut self) {
        std::future::pending::<()>().await;
    }

    fn packet(
        &mut self,
        source: &Source,
        bundles: &Arc<Bundles>,
        _crl: Option<&Bytes>,
    ) -> Result<Option<Bytes>, Box<Status>> {
        Ok(source.jwt_bundles.message(bundles, None, || {
            let local = (bundles.trust_domain(), bundles.jwt());
            let bundles = bundles.federated_jwt().chain([local]);
            Some(packet(&JwtBundlesResponse {
                bundles: bundles
                    .map(|(domain, keys)| (domain.id(), keys.jwks()))
                    .collect(),
            }))
        }))
    }

    fn missing(&self) -> &'static str {
        "the trust bundle"
    }
}
