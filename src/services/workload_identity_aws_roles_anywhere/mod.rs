//! The `workload-identity-aws-roles-anywhere` output: an X.509-SVID, exchanged at AWS IAM Roles
//! Anywhere for credentials in AWS's shared credentials file.
//!
//! `sign.rs` signs the request, `session.rs` makes it, `credentials.rs` puts the answer into the file.
//! The SVID is short-lived, never written, and new for each session. Outputs of several profiles may
//! share a file.

mod arn;
mod credentials;
mod session;
mod sign;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use async_trait::async_trait;

use self::arn::{Arn, is_region};
use self::credentials::{Rest, section};
use self::session::Endpoint;
use self::sign::{Question, Signer, sign};
use super::flags::{DESTINATION, LABEL_SELECTOR, NAME_SELECTOR};
use super::svid::{Derived, Surroundings, only};
use super::{Context, Flag, FlagValue, Lifetime, Made, Output, Service, ServiceKind, ServicePlan};
use crate::cluster::network::{self, Network};
use crate::cluster::trust::Trust;
use crate::destination::{self, Destination, DestinationPlan, FileSet};
use crate::env::Env;
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::workload::{ClusterIssuer, Issuer, Selector};
use crate::yaml::{Fields, Tree, duration};

/// The YAML `type`.
const NAME: &str = "workload-identity-aws-roles-anywhere";
/// Life of the SVID that is exchanged.
const SVID_LIFE: Duration = Duration::from_mins(10);
/// What AWS grants, from and to.
const SESSION_LIFE: (Duration, Duration) = (Duration::from_mins(15), Duration::from_hours(12));
const DEFAULT_SESSION_LIFE: Duration = Duration::from_hours(6);
const DEFAULT_INTERVAL: Duration = Duration::from_hours(1);
const DEFAULT_PROFILE: &str = "default";
const DEFAULT_FILE: &str = "aws_credentials";

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flags(&self) -> &'static [Flag] {
        const fn text(
            name: &'static str,
            yaml: &'static str,
            required: bool,
            help: &'static str,
        ) -> Flag {
            Flag {
                name,
                yaml,
                value: FlagValue::Text,
                required,
                help,
            }
        }
        const FLAGS: &[Flag] = &[
            DESTINATION,
            NAME_SELECTOR,
            LABEL_SELECTOR,
            text("role-arn", "role_arn", true, "The AWS role to assume"),
            text(
                "profile-arn",
                "profile_arn",
                true,
                "The Roles Anywhere profile to use",
            ),
            text(
                "trust-anchor-arn",
                "trust_anchor_arn",
                true,
                "The Roles Anywhere trust anchor that holds the cluster's SPIFFE authority",
            ),
            text(
                "region",
                "region",
                false,
                "The AWS region to ask; that of the trust anchor if left out",
            ),
            text(
                "session-duration",
                "session_duration",
                false,
                "Life of the AWS credentials, 6h if left out",
            ),
            text(
                "session-renewal-interval",
                "session_renewal_interval",
                false,
                "Time between renewals of the AWS credentials, 1h if left out",
            ),
        ];
        FLAGS
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        Some(Box::new(Settings::read(fields)?))
    }

    fn has_lifetime(&self) -> bool {
        false
    }
}

/// A configured output.
#[derive(Debug, Clone)]
struct Settings {
    selector: Selector,
    destination: Arc<dyn DestinationPlan>,
    role: String,
    profile: String,
    trust_anchor: String,
    /// As configured.
    region: Option<String>,
    session: Duration,
    interval: Duration,
    credential_profile: String,
    file: String,
    overwrite: bool,
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let destination = destination::read(fields, "destination");
        let selector = Selector::parse(fields);
        let role = named(fields, "role_arn", "iam", "role/");
        let profile = named(fields, "profile_arn", "rolesanywhere", "profile/");
        let trust_anchor = named(fields, "trust_anchor_arn", "rolesanywhere", "trust-anchor/");
        if let (Some(profile), Some(trust_anchor)) = (&profile, &trust_anchor)
            && region_of(profile) != region_of(trust_anchor)
        {
            fields.error(
                "profile_arn",
                format!(
                    "the profile is in {:?} and the trust anchor in {:?}",
                    region_of(profile),
                    region_of(trust_anchor)
                ),
                Some("both belong to one region"),
            );
        }
        let region = fields.string("region");
        if let Some(region) = region.as_deref().filter(|region| !is_region(region)) {
            fields.error(
                "region",
                format!("{region:?} is no AWS region"),
                Some("for example us-east-1; left out, it is the trust anchor's"),
            );
        }
        let (session, interval) = times(fields);
        let credential_profile = fields.string("credential_profile_name");
        if credential_profile.as_deref().is_some_and(|name| {
            name.trim() != name || name.contains(['[', ']']) || name.contains(char::is_control)
        }) {
            fields.error(
                "credential_profile_name",
                "it cannot stand between the brackets of a section",
                None,
            );
        }
        let file = fields.string("artifact_name");
        if file
            .as_deref()
            .is_some_and(|name| matches!(name, "." | "..") || name.contains(['/', '\0']))
        {
            fields.error("artifact_name", "it is no file name", None);
        }
        let overwrite = fields.bool("overwrite_credential_file");
        Some(Self {
            selector: selector?,
            destination: destination?,
            role: role?,
            profile: profile?,
            trust_anchor: trust_anchor?,
            region,
            session,
            interval,
            credential_profile: credential_profile.unwrap_or_else(|| DEFAULT_PROFILE.to_owned()),
            file: file.unwrap_or_else(|| DEFAULT_FILE.to_owned()),
            overwrite: overwrite.unwrap_or(false),
        })
    }

    /// The region that is asked.
    fn region(&self) -> &str {
        let own = || region_of(&self.trust_anchor);
        self.region.as_deref().unwrap_or_else(own)
    }
}

/// Reads an ARN of `service` whose resource begins with `kind`.
fn named(fields: &mut Fields<'_>, key: &str, service: &str, kind: &str) -> Option<String> {
    let text = fields.required(key)?;
    let arn = Arn::parse(&text);
    let fits = arn.is_some_and(|arn| {
        let regional = service == "iam" || is_region(arn.region);
        arn.service == service && regional && arn.resource.starts_with(kind)
    });
    if !fits {
        let region = if service == "iam" { "" } else { "us-east-1" };
        fields.error(
            key,
            format!("{text:?} is no ARN of a {}", kind.trim_end_matches('/')),
            Some(&format!(
                "for example arn:aws:{service}:{region}:111111111111:{kind}…"
            )),
        );
    }
    fits.then_some(text)
}

fn region_of(arn: &str) -> &str {
    Arn::parse(arn).map_or("", |arn| arn.region)
}

/// Life of a session and time between renewals.
fn times(fields: &mut Fields<'_>) -> (Duration, Duration) {
    let given = |time: Option<Duration>| time.filter(|time| !time.is_zero());
    let session = given(fields.duration("session_duration")).unwrap_or(DEFAULT_SESSION_LIFE);
    let interval = given(fields.duration("session_renewal_interval")).unwrap_or(DEFAULT_INTERVAL);
    if !(SESSION_LIFE.0..=SESSION_LIFE.1).contains(&session) {
        fields.error(
            "session_duration",
            format!("AWS grants no session of {}", duration::format(session)),
            Some("from 15m to 12h"),
        );
    } else if interval >= session {
        fields.error(
            "session_renewal_interval",
            format!(
                "credentials that live {} would expire before the renewal every {}",
                duration::format(session),
                duration::format(interval)
            ),
            Some("let it be shorter than `session_duration`"),
        );
    }
    (session, interval)
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("{NAME} ({})", self.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.destination)
    }

    fn files(&self) -> Vec<String> {
        vec![self.file.clone()]
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let unless = |text: &String, default: &str| (text != default).then(|| Tree::text(text));
        [
            ("selector", Some(self.selector.emit())),
            ("destination", Some(self.destination.emit())),
            ("role_arn", Some(Tree::text(&self.role))),
            ("profile_arn", Some(Tree::text(&self.profile))),
            ("trust_anchor_arn", Some(Tree::text(&self.trust_anchor))),
            ("region", self.region.as_ref().map(Tree::text)),
            (
                "session_duration",
                Some(Tree::text(duration::format(self.session))),
            ),
            (
                "session_renewal_interval",
                Some(Tree::text(duration::format(self.interval))),
            ),
            (
                "credential_profile_name",
                unless(&self.credential_profile, DEFAULT_PROFILE),
            ),
            ("artifact_name", unless(&self.file, DEFAULT_FILE)),
            (
                "overwrite_credential_file",
                self.overwrite.then_some(Tree::Bool(true)),
            ),
        ]
        .into_iter()
        .filter_map(|(key, tree)| Some((key.to_owned(), tree?)))
        .collect()
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(RolesAnywhere {
            destination: self.destination.build(),
            turn: turn(self.destination.key()),
            settings: self.clone(),
            surroundings: Surroundings::default(),
            env: Env::of_process(),
        }))
    }
}

/// Whoever holds it may write to the destination of this key. Between looking at a file and
/// replacing it no other output may, or its section would be lost.
fn turn(key: String) -> Arc<tokio::sync::Mutex<()>> {
    static TURNS: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>> =
        Mutex::new(BTreeMap::new());
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(turns.entry(key).or_default())
}

/// A running output.
#[derive(Debug)]
struct RolesAnywhere {
    settings: Settings,
    destination: Arc<dyn Destination>,
    turn: Arc<tokio::sync::Mutex<()>>,
    surroundings: Surroundings,
    env: Env,
}

impl RolesAnywhere {
    /// What stands in the file now beside the credentials.
    async fn rest(&self) -> anyhow::Result<Rest> {
        let settings = &self.settings;
        let old = if settings.overwrite {
            None
        } else {
            self.destination.read(&settings.file).await?
        };
        let old = old.as_ref().map(|old| old.expose().as_slice());
        Rest::read(old, &settings.credential_profile).with_context(|| settings.file.clone())
    }
}

#[async_trait]
impl Output for RolesAnywhere {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let settings = &self.settings;
        let endpoint = Endpoint::new(settings.region(), &self.env)?;
        // What is in the way of writing is found before anything is asked for.
        drop(self.rest().await?);
        // The issuer verifies with the bundle and would wait for it without an end.
        self.surroundings.look(context).await?;
        let access = Arc::new(Derived::new(context.identity.clone(), context.lifetime));
        let feeds = context.trust.follow(&context.identity, &context.clock);
        let issuer = ClusterIssuer::new(access, feeds.bundles, context.clock.clone());
        let issued = issuer
            .issue(&settings.selector, SVID_LIFE, &WorkloadAttrs::default())
            .await?;
        let svid = only(issued, |svid| svid.name.clone())?;
        let body = format!(r#"{{"durationSeconds":{}}}"#, settings.session.as_secs());
        let signed = sign(
            &Question {
                host: &endpoint.host,
                region: settings.region(),
                profile: &settings.profile,
                role: &settings.role,
                trust_anchor: &settings.trust_anchor,
                body: &body,
            },
            &Signer {
                chain: &svid.chain,
                key: &svid.key,
            },
            context.clock.now(),
        )?;
        let network = network::Settings::from_env(&self.env).map_err(|problem| anyhow!(problem))?;
        let network = Network::new(network, Trust::default(), context.clock.clone());
        let session =
            Box::pin(endpoint.create_session(&network, &context.clock, signed, body)).await?;
        tracing::info!(
            service = %context.name,
            spiffe_id = %svid.id,
            serial_number = svid.serial,
            role = settings.role,
            expires_at = %crate::clock::rfc3339(session.expiration),
            "Exchanged an SVID for AWS credentials"
        );
        let mut files = FileSet::new();
        files.insert(settings.file.clone(), section(&session));
        Ok(Made {
            files,
            not_after: session.expiration,
        })
    }

    /// Puts the lines of the section into the file, as it is by now.
    async fn write(&self, mut files: FileSet) -> anyhow::Result<()> {
        let _turn = self.turn.lock().await;
        let rest = self.rest().await?;
        for lines in files.values_mut() {
            *lines = rest.with(lines.expose());
        }
        Ok(self.destination.write(files).await?)
    }

    fn interval(&self, _lifetime: Lifetime) -> Duration {
        self.settings.interval
    }
}

#[cfg(test)]
mod tests;
