//! The `spiffe-svid` output: SVIDs by path, as clusters up to version 18 sign them. Superseded by
//! workload identities.

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;

use super::flags::{DESTINATION, FEDERATED_BUNDLES};
use super::svid::{Derived, Surroundings, x509_files};
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::destination::{self, Destination, DestinationPlan};
use crate::secret::Secret;
use crate::workload::{Bundles, LegacyIssuer, PathRequest};
use crate::yaml::{Fields, Tree};

/// The YAML `type`.
const NAME: &str = "spiffe-svid";
/// Files beside the tokens; no token may be called like one of them.
const TAKEN: [&str; 3] = ["svid.pem", "svid_key.pem", "svid_bundle.pem"];

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            Flag {
                name: "svid-path",
                yaml: "svid.path",
                value: FlagValue::Text,
                required: true,
                help: "The path of the SPIFFE ID, for example /svc/foo",
            },
            Flag {
                name: "svid-hint",
                yaml: "svid.hint",
                value: FlagValue::Text,
                required: false,
                help: "A hint for the workload",
            },
            Flag {
                name: "dns-san",
                yaml: "svid.sans.dns",
                value: FlagValue::List,
                required: false,
                help: "A DNS name of the certificate; repeatable",
            },
            Flag {
                name: "ip-san",
                yaml: "svid.sans.ip",
                value: FlagValue::List,
                required: false,
                help: "An IP address of the certificate; repeatable",
            },
            FEDERATED_BUNDLES,
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        fields.warn(
            "type",
            "deprecated: clusters from version 19 on sign no SVIDs by path",
            Some("use workload-identity-x509 and workload-identity-jwt with a workload_identity resource"),
        );
        let destination = destination::read(fields, "destination");
        let svid = svid(fields);
        let federated = fields.bool("include_federated_trust_bundles");
        let tokens = tokens(fields);
        Some(Box::new(Settings {
            destination: destination?,
            svid: svid?,
            federated: federated.unwrap_or(false),
            tokens: tokens?,
        }))
    }
}

/// Reads the `svid` section.
fn svid(fields: &mut Fields<'_>) -> Option<PathRequest> {
    let Some(mut section) = fields.section("svid") else {
        if !fields.has("svid") {
            fields.error("svid", "`svid` is required", Some("with a `path` below it"));
        }
        return None;
    };
    let path = section.required("path");
    if path.as_deref().is_some_and(|path| !path.starts_with('/')) {
        section.error(
            "path",
            "the path of a SPIFFE ID begins with a slash",
            Some("for example /svc/foo"),
        );
    }
    let hint = section.string("hint").unwrap_or_default();
    let (mut dns, mut ips) = (Vec::new(), Vec::new());
    if let Some(mut sans) = section.section("sans") {
        dns = sans.strings("dns").unwrap_or_default();
        ips = sans.strings("ip").unwrap_or_default();
        for ip in &ips {
            if ip.parse::<IpAddr>().is_err() {
                sans.error("ip", format!("{ip:?} is no IP address"), None);
            }
        }
        sans.finish();
    }
    section.finish();
    Some(PathRequest {
        path: path?,
        hint,
        dns,
        ips,
    })
}

/// Reads `jwts`: each for one audience, in a file of its own.
fn tokens(fields: &mut Fields<'_>) -> Option<Vec<Token>> {
    let mut tokens: Vec<Token> = Vec::new();
    for mut section in fields.sections("jwts").unwrap_or_default() {
        let audience = section.required("audience");
        let file = section.required("file_name");
        if let Some(file) = &file {
            let free = !TAKEN.contains(&file.as_str()) && tokens.iter().all(|t| t.file != *file);
            let sound = !file.contains(['/', '\0']) && !matches!(file.as_str(), "." | "..");
            if !(free && sound) {
                section.error(
                    "file_name",
                    format!("{file:?} is taken by another file, or is no file name"),
                    Some("give each token a name of its own"),
                );
            }
        }
        section.finish();
        tokens.push(Token {
            audience: audience?,
            file: file?,
        });
    }
    Some(tokens)
}

/// A JWT-SVID beside the X.509-SVID.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    audience: String,
    file: String,
}

/// A configured output.
#[derive(Debug, Clone)]
struct Settings {
    destination: Arc<dyn DestinationPlan>,
    svid: PathRequest,
    federated: bool,
    tokens: Vec<Token>,
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("{NAME}-output ({})", self.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.destination)
    }

    fn files(&self) -> Vec<String> {
        let tokens = self.tokens.iter().map(|token| token.file.clone());
        let own = TAKEN.map(str::to_owned).into_iter();
        own.chain(tokens).collect()
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let svid = &self.svid;
        let list =
            |texts: &[String]| (!texts.is_empty()).then(|| Tree::texts(texts.iter().cloned()));
        let sans = (!svid.dns.is_empty() || !svid.ips.is_empty())
            .then(|| Tree::map([("dns", list(&svid.dns)), ("ip", list(&svid.ips))]));
        let tokens: Vec<Tree> = self
            .tokens
            .iter()
            .map(|token| {
                Tree::map([
                    ("audience", Some(Tree::text(&token.audience))),
                    ("file_name", Some(Tree::text(&token.file))),
                ])
            })
            .collect();
        [
            ("destination", Some(self.destination.emit())),
            (
                "svid",
                Some(Tree::map([
                    ("path", Some(Tree::text(&svid.path))),
                    (
                        "hint",
                        (!svid.hint.is_empty()).then(|| Tree::text(&svid.hint)),
                    ),
                    ("sans", sans),
                ])),
            ),
            (
                "include_federated_trust_bundles",
                self.federated.then_some(Tree::Bool(true)),
            ),
            ("jwts", (!tokens.is_empty()).then_some(Tree::List(tokens))),
        ]
        .into_iter()
        .filter_map(|(key, tree)| Some((key.to_owned(), tree?)))
        .collect()
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(SpiffeSvid {
            destination: self.destination.build(),
            settings: self.clone(),
            surroundings: Surroundings::default(),
        }))
    }
}

/// A running output.
#[derive(Debug)]
struct SpiffeSvid {
    settings: Settings,
    destination: Arc<dyn Destination>,
    surroundings: Surroundings,
}

#[async_trait]
impl Output for SpiffeSvid {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let settings = &self.settings;
        let (bundles, _crl) = self.surroundings.look(context).await?;
        let access = Arc::new(Derived::new(context.identity.clone(), context.lifetime));
        let feeds = context.trust.follow(&context.identity, &context.clock);
        let issuer = LegacyIssuer::new(access, feeds.bundles, context.clock.clone());
        let audiences: Vec<String> = settings.tokens.iter().map(|t| t.audience.clone()).collect();
        let (svid, tokens) = issuer
            .issue(&settings.svid, &audiences, context.lifetime.ttl)
            .await?;
        let ends = tokens.iter().map(|token| token.not_after);
        let not_after = ends.fold(svid.not_after, std::cmp::min);
        let mut files = x509_files(&svid, &bundles, settings.federated)?;
        for (token, place) in tokens.into_iter().zip(&settings.tokens) {
            files.insert(place.file.clone(), Secret::new(token.token.into_bytes()));
        }
        Ok(Made { files, not_after })
    }

    async fn changed(&self, context: &Context) {
        loop {
            let news = self.surroundings.changed(context).await;
            if news.of(Bundles::local)
                || news.of(Bundles::jwt)
                || (self.settings.federated && news.of_others())
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::testing;
    use crate::yaml::emit;

    fn read(source: &str) -> (Option<Box<dyn ServicePlan>>, String) {
        testing::read(&Kind, source)
    }

    #[test]
    fn sections_read_back_with_a_warning() {
        for more in [
            "",
            "include_federated_trust_bundles: true\njwts: [{audience: a, file_name: b}]\n",
        ] {
            let source = format!(
                "destination: {{type: directory, path: /opt/x}}\nsvid: {{path: /svc/foo, hint: h, \
                 sans: {{dns: [a.example], ip: [10.0.0.1, '::1']}}}}\n{more}"
            );
            let (plan, problems) = read(&source);
            assert!(problems.contains("warning: type: deprecated"), "{problems}");
            assert_eq!(
                problems
                    .lines()
                    .filter(|line| line.contains("error"))
                    .count(),
                0
            );
            let plan = plan.unwrap();
            assert_eq!(plan.label(), "spiffe-svid-output (directory: /opt/x)");
            let text = emit::emit(&Tree::Map(plan.emit()));
            let (again, _) = read(&text);
            assert_eq!(emit::emit(&Tree::Map(again.unwrap().emit())), text);
        }
    }

    #[test]
    fn bad_sections_are_refused() {
        for (source, expected) in [
            ("a: b", "svid: `svid` is required"),
            ("svid: {}", "svid.path: "),
            ("svid: {path: svc}", "begins with a slash"),
            (
                "svid: {path: /x, sans: {ip: [a.example]}}",
                "is no IP address",
            ),
            (
                "svid: {path: /x}\njwts: [{audience: a}]",
                "jwts[0].file_name: ",
            ),
            (
                "svid: {path: /x}\njwts: [{file_name: a}]",
                "jwts[0].audience: ",
            ),
            (
                "svid: {path: /x}\njwts: [{audience: a, file_name: svid.pem}]",
                "is taken by another file",
            ),
            (
                "svid: {path: /x}\njwts: [{audience: a, file_name: t}, {audience: b, file_name: t}]",
                "jwts[1].file_name: \"t\" is taken",
            ),
            (
                "svid: {path: /x}\njwts: [{audience: a, file_name: ../t}]",
                "no file name",
            ),
        ] {
            let (_, problems) = read(&format!("destination: {{type: memory}}\n{source}\n"));
            assert!(problems.contains(expected), "{source}: {problems}");
        }
    }
}
