//! The `workload-identity-api` service: the SPIFFE Workload API on a unix socket.
//!
//! `listener.rs` opens the socket, `permissions.rs` says for whom, `door.rs` lets in who connects,
//! `floods.rs` sees who does so too fast, `gate.rs` has the kernel keep those out, `threads.rs` has a thread for
//! each user of the others, `incoming.rs` pins them, `authority.rs` lets clients in that name the socket's path as
//! authority. `source.rs` is what every call draws on, `grpc.rs` the form of messages, `feed.rs` the streams, `followed.rs` what one caller may have, `spiffe.rs` the calls of the standard, `wanted.rs` what is asked of them and
//! `message.rs` what their messages hold; `sds/` says the same to Envoy, `server.rs` puts all of it on
//! the socket. Issuing, caching and following bundles are
//! [`crate::workload`]'s.

mod authority;
mod door;
mod feed;
mod floods;
mod followed;
mod gate;
mod grpc;
mod incoming;
mod inspect;
mod listener;
mod message;
mod pace;
mod permissions;
mod sds;
mod server;
mod source;
mod spiffe;
mod threads;
mod wanted;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use tonic_health::server::HealthReporter;

use self::listener::{Bound, Listen, ListenError};
use self::permissions::Permissions;
use self::server::{serve, tell};
use self::source::Source;
use super::flags::NAME_SELECTOR;
use super::svid::Derived;
use super::trust::View;
use super::{Context, Flag, FlagValue, Server, Service, ServiceKind, ServicePlan};
use crate::attest;
use crate::destination::DestinationPlan;
use crate::workload::{
    Access, Bundles, Cache, ClusterIssuer, Freshness, JwtIssuer, Memo, Selector, Tokens,
};
use crate::yaml::{Fields, Tree};

/// The YAML `type`.
const NAME: &str = "workload-identity-api";
/// How often the freshness of what is served is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How long open calls may take to end when the service stops.
const DRAIN: Duration = Duration::from_secs(3);

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["workload-api"]
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            Flag {
                name: "listen",
                yaml: "listen",
                value: FlagValue::Text,
                required: true,
                help: "Where to listen, for example unix:///opt/machine-id/workload.sock",
            },
            NAME_SELECTOR,
            Flag {
                name: "label-selector",
                yaml: "selector.labels",
                value: FlagValue::Labels,
                required: false,
                help: "Labels of the workload identities to issue, as key=value,key2=value2",
            },
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        let listen = fields
            .required("listen")
            .and_then(|text| match Listen::parse(&text) {
                Ok((listen, None)) => Some(listen),
                Ok((listen, Some(warning))) => {
                    fields.warn("listen", warning, Some("write unix:///path/to.sock"));
                    Some(listen)
                }
                Err(problem) => {
                    fields.error(
                        "listen",
                        problem,
                        Some("for example unix:///opt/machine-id/workload.sock"),
                    );
                    None
                }
            });
        let permissions = Permissions::parse(fields);
        if let (Some(Listen::Tcp(_)), Some(permissions)) = (&listen, &permissions)
            && *permissions != Permissions::default()
        {
            fields.error(
                "socket",
                "TCP has neither a mode nor an owner",
                Some("remove the section, or listen on unix:///path/to.sock"),
            );
        }
        let explain = fields.bool("explain").unwrap_or(false);
        let attestors = attest::Plan::parse(fields);
        let selector = Selector::parse(fields);
        Some(Box::new(Plan {
            listen: listen?,
            permissions: permissions?,
            explain,
            attestors: attestors?,
            selector: selector?,
        }))
    }

    fn skips_maximum_ttl(&self) -> bool {
        true
    }
}

#[derive(Debug, Clone)]
struct Plan {
    listen: Listen,
    permissions: Permissions,
    explain: bool,
    attestors: attest::Plan,
    selector: Selector,
}

impl ServicePlan for Plan {
    fn label(&self) -> String {
        format!("{NAME}:{}", self.listen)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        None
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let sections = [
            ("listen", Some(Tree::text(self.listen.to_string()))),
            ("socket", self.permissions.emit()),
            // Upstream knows neither this key nor the one before.
            ("explain", self.explain.then_some(Tree::Bool(true))),
            ("attestors", Some(self.attestors.emit())),
            ("selector", Some(self.selector.emit())),
        ];
        sections
            .into_iter()
            .filter_map(|(key, tree)| Some((key.to_owned(), tree?)))
            .collect()
    }

    fn build(&self) -> Service {
        Service::Server(Box::new(WorkloadApi {
            plan: self.clone(),
            bound: None,
        }))
    }
}

impl Plan {
    async fn bind(&self, context: &Context) -> Result<Bound, ListenError> {
        let bind = self
            .listen
            .bind(&self.permissions, &context.sockets, &context.name);
        bind.await
    }
}

/// The running service.
#[derive(Debug)]
struct WorkloadApi {
    plan: Plan,
    bound: Option<Bound>,
}

#[async_trait]
impl Server for WorkloadApi {
    async fn bind(&mut self, context: &Context) -> anyhow::Result<()> {
        self.bound = Some(self.plan.bind(context).await?);
        Ok(())
    }

    async fn run(mut self: Box<Self>, context: Context) -> anyhow::Result<()> {
        let bound = match self.bound.take() {
            Some(bound) => bound,
            None => self.plan.bind(&context).await?,
        };
        let heard = context.trust.follow(&context.identity, &context.clock);
        // What is issued anew is held against what the cluster says now.
        let bundles = heard.bundles.clone();
        let view = View::new(heard, context.shelf.beside(context.clock.now()));
        let access: Arc<dyn Access> =
            Arc::new(Derived::new(context.identity.clone(), context.lifetime));
        let jwt = JwtIssuer::new(Arc::clone(&access), bundles.clone(), context.clock.clone());
        let tokens = Tokens::new(
            Arc::new(jwt),
            self.plan.selector.clone(),
            context.lifetime.ttl,
            context.clock.clone(),
            context.shelf.clone(),
        );
        let issuer =
            ClusterIssuer::new(access, bundles.clone(), context.clock.clone()).with_keys_ahead();
        let cache = Cache::beside(
            Arc::new(issuer),
            context.clock.clone(),
            context.lifetime.interval,
            context.shelf.clone(),
        );
        let source = Arc::new(Source {
            cache: cache.clone(),
            tokens: tokens.clone(),
            view: view.clone(),
            x509_bundles: Memo::default(),
            jwt_bundles: Memo::default(),
            attestors: self.plan.attestors.build(),
            selector: self.plan.selector.clone(),
            ttl: context.lifetime.ttl,
            interval: context.lifetime.interval,
            clock: context.clock.clone(),
            shutdown: context.shutdown.clone(),
            calls: Source::limit(),
            nobody: Arc::default(),
        });
        tracing::info!(listen = %self.plan.listen, "Workload API is listening");
        if matches!(self.plan.listen, Listen::Unix(_)) {
            attest::tell_what_is_hidden();
        }
        let health = HealthReporter::new();
        tell(&health, false).await;
        let serve = serve(source, &bound, health.clone(), self.plan.explain);
        let work = async {
            tokio::join!(
                cache.run(),
                tokens.run(),
                report(&context, &cache, view.clone(), &health),
                renew_on_change(&context, &cache, &tokens, view.clone()),
                view.keep_on(&context.shelf),
            )
        };
        let late = async {
            context.shutdown.cancelled().await;
            context.clock.sleep(DRAIN).await;
        };
        tokio::select! {
            served = serve => served.with_context(|| format!("serving {}", self.plan.listen))?,
            _ = work => {}
            () = late => {}
        }
        drop(bound);
        Ok(())
    }
}

/// The service is healthy once it could serve, and as long as what it serves is fresh.
async fn report(context: &Context, cache: &Cache, mut view: View, health: &HealthReporter) {
    while view.look().0.is_none() {
        if view.changed(false).await.is_err() {
            return std::future::pending().await;
        }
    }
    let mut told = None;
    loop {
        let now = context.clock.now();
        let trouble = match cache.freshness() {
            Freshness::Missing(why) => Some(why),
            Freshness::Until(deadline) => {
                context.health.fresh_until(deadline);
                None
            }
            Freshness::Idle => {
                context.health.fresh_until(now + context.lifetime.ttl);
                None
            }
        };
        if told.as_ref() != Some(&trouble) {
            match &trouble {
                Some(why) => context
                    .health
                    .unhealthy(format!("a caller has no SVID: {why}")),
                None => context.health.healthy(),
            }
            tell(health, trouble.is_none()).await;
            told = Some(trouble);
        }
        context.clock.sleep(LOOK).await;
    }
}

/// A new authority, and the operator's wish, renew every SVID ahead of time.
async fn renew_on_change(context: &Context, cache: &Cache, tokens: &Tokens, mut view: View) {
    let mut reloads = context.identity.reloads();
    let mut known: Option<Arc<Bundles>> = None;
    loop {
        let current = view.look().0;
        if let (Some(known), Some(current)) = (&known, &current) {
            if known.local() != current.local() {
                tracing::info!("The cluster's SPIFFE authority changed: renewing every SVID");
                cache.renew_all();
            }
            if known.jwt() != current.jwt() {
                tokens.renew_all();
            }
        }
        known = current;
        tokio::select! {
            changed = view.changed(false) => if changed.is_err() { return },
            reload = reloads.changed() => match reload {
                Ok(()) => {
                    cache.renew_all();
                    tokens.renew_all();
                }
                Err(_) => return,
            },
        }
    }
}

#[cfg(test)]
mod tests;
