//! The file of `tbot cluster serve --config`: a `teleport.yaml`, of which the section
//! `discovery_service` is read.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::embedded::resources::selector;
use crate::yaml::{self, Fields, Problems, Severity};

/// How often AWS is asked if the file does not say, as upstream.
const POLL_INTERVAL: Duration = Duration::from_mins(5);
/// The shortest interval.
const SHORTEST: Duration = Duration::from_secs(1);
/// What else such a file holds; none of it means anything to this cluster.
const OTHERS: &[&str] = &[
    "app_service",
    "auth_service",
    "db_service",
    "debug_service",
    "jamf_service",
    "kubernetes_service",
    "okta_service",
    "proxy_service",
    "ssh_service",
    "teleport",
    "version",
    "windows_desktop_service",
];
/// Clouds that are not looked at here.
const CLOUDS: &[&str] = &["azure", "gcp", "kubernetes", "access_graph"];
/// `*`: the regions that every AWS account has without asking for them. To ask AWS for the others
/// would need a permission that the role of the guide does not have.
const REGIONS: &[&str] = &[
    "ap-northeast-1",
    "ap-northeast-2",
    "ap-northeast-3",
    "ap-south-1",
    "ap-southeast-1",
    "ap-southeast-2",
    "ca-central-1",
    "eu-central-1",
    "eu-north-1",
    "eu-west-1",
    "eu-west-2",
    "eu-west-3",
    "sa-east-1",
    "us-east-1",
    "us-east-2",
    "us-west-1",
    "us-west-2",
];

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{lines}")]
pub struct ConfigError {
    /// One line for each problem: `file:line:column: error: path: cause (remedy)`.
    pub lines: String,
}

/// What to look for, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What tells the resources of this discovery from those of others; may be empty.
    pub discovery_group: String,
    /// How long to wait between two looks.
    pub poll_interval: Duration,
    /// Where to look; not empty.
    pub matchers: Vec<Matcher>,
}

/// One entry of `aws`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matcher {
    /// Regions by name; not empty.
    pub regions: Vec<String>,
    /// Which clusters: patterns by tag, as in roles.
    pub tags: BTreeMap<String, Vec<String>>,
    /// A role to take on, for another account.
    pub assume_role_arn: Option<String>,
    /// What that role wants to hear.
    pub external_id: Option<String>,
}

/// Reads the text of `file` (any name, for messages); `None` if discovery is not enabled in it.
pub fn parse(file: &str, text: &str) -> Result<Option<Config>, ConfigError> {
    let node = yaml::parse(text).map_err(|problem| ConfigError {
        lines: problem.render(file),
    })?;
    let problems = Problems::new();
    let config = Fields::new(&node, "", &problems).and_then(|mut top| {
        for key in OTHERS {
            top.ignore(key);
        }
        let config = match top.section("discovery_service") {
            Some(section) => service(section),
            None => None,
        };
        top.finish();
        config
    });
    let mut lines = Vec::new();
    for mut problem in problems.into_sorted() {
        // A misspelt key must not widen what is discovered.
        if problem.severity == Severity::Warning {
            problem.severity = Severity::Error;
        }
        lines.push(problem.render(file));
    }
    if lines.is_empty() {
        return Ok(config);
    }
    Err(ConfigError {
        lines: lines.join("\n"),
    })
}

fn service(mut fields: Fields<'_>) -> Option<Config> {
    let enabled = fields.bool("enabled").unwrap_or(false);
    let discovery_group = fields.string("discovery_group").unwrap_or_default();
    let poll_interval = fields.duration("poll_interval").unwrap_or(POLL_INTERVAL);
    if poll_interval < SHORTEST {
        fields.error(
            "poll_interval",
            "AWS would be asked without a pause",
            Some("write 1s or more, or leave it out for 5m"),
        );
    }
    for cloud in CLOUDS {
        if fields.has(cloud) {
            fields.ignore(cloud);
            fields.error(
                cloud,
                "this cluster discovers EKS clusters only",
                Some("leave it out"),
            );
        }
    }
    let matchers: Vec<Matcher> = fields
        .sections("aws")
        .unwrap_or_default()
        .into_iter()
        .map(matcher)
        .collect();
    if enabled && matchers.is_empty() {
        fields.error(
            "aws",
            "there is nothing to discover",
            Some("add `- types: [eks]` with `regions`"),
        );
    }
    fields.finish();
    enabled.then_some(Config {
        discovery_group,
        poll_interval,
        matchers,
    })
}

fn matcher(mut fields: Fields<'_>) -> Matcher {
    let types = fields.strings("types").unwrap_or_default();
    if types.is_empty() {
        fields.error("types", "`types` is required", Some("write `types: [eks]`"));
    }
    if let Some(other) = types.iter().find(|name| *name != "eks") {
        fields.error(
            "types",
            format!("{other:?} is not discovered by this cluster"),
            Some("write `types: [eks]`"),
        );
    }
    let mut regions = fields.strings("regions").unwrap_or_default();
    if regions.is_empty() {
        fields.error(
            "regions",
            "`regions` is required",
            Some("name regions, or write `['*']` for those that every account has"),
        );
    }
    if regions.iter().any(|region| region == "*") {
        regions = REGIONS.iter().map(|&region| region.to_owned()).collect();
    }
    if let Some(odd) = regions.iter().find(|region| !is_region(region)) {
        fields.error(
            "regions",
            format!("{odd:?} is no AWS region"),
            Some("write for example `eu-west-1`"),
        );
    }
    regions.sort();
    regions.dedup();
    let tags = selector(&mut fields, "tags")
        .unwrap_or_else(|| BTreeMap::from([("*".to_owned(), vec!["*".to_owned()])]));
    let assume_role_arn = fields.string("assume_role_arn");
    if let Some(arn) = assume_role_arn
        .as_ref()
        .filter(|arn| !arn.starts_with("arn:") || !arn.contains(":role/"))
    {
        fields.error(
            "assume_role_arn",
            format!("{arn:?} is no ARN of a role"),
            Some("write for example `arn:aws:iam::123456789012:role/discovery`"),
        );
    }
    let external_id = fields.string("external_id");
    if external_id.is_some() && assume_role_arn.is_none() {
        fields.error(
            "external_id",
            "there is no role that wants to hear it",
            Some("add `assume_role_arn`"),
        );
    }
    fields.finish();
    Matcher {
        regions,
        tags,
        assume_role_arn,
        external_id,
    }
}

/// Regions stand in host names.
fn is_region(name: &str) -> bool {
    let mut words = name.split('-');
    let word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
    let number = words.next_back().is_some_and(|last| {
        !last.is_empty() && last.len() <= 2 && last.bytes().all(|byte| byte.is_ascii_digit())
    });
    number && name.len() <= 32 && words.clone().count() >= 2 && words.all(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file of the guide, without its empty places.
    const GUIDE: &str = r#"
version: v3
teleport:
  join_params: {token_name: "/tmp/token", method: token}
  proxy_server: "teleport.example.com:443"
auth_service: {enabled: false}
proxy_service: {enabled: false}
ssh_service: {enabled: false}
discovery_service:
  enabled: true
  discovery_group: "aws-prod"
  aws:
  - types: ["eks"]
    regions: ["*"]
    tags:
      "env": "prod"
kubernetes_service:
  enabled: true
  resources:
  - labels: {"env": "prod"}
"#;

    #[test]
    fn the_file_of_the_guide_is_read() {
        let config = parse("teleport.yaml", GUIDE).unwrap().unwrap();
        assert_eq!(config.discovery_group, "aws-prod");
        assert_eq!(config.poll_interval, Duration::from_mins(5));
        let [matcher] = config.matchers.as_slice() else {
            panic!("one matcher");
        };
        assert_eq!(matcher.regions, REGIONS);
        assert_eq!(matcher.tags["env"], ["prod"]);
        for region in REGIONS {
            assert!(is_region(region), "{region}");
        }
        let off = GUIDE.replace(
            "enabled: true\n  discovery_group",
            "enabled: no\n  discovery_group",
        );
        assert_eq!(parse("f", &off).unwrap(), None);
        assert_eq!(parse("f", "version: v3\n").unwrap(), None);
        let full = "discovery_service:\n  enabled: yes\n  poll_interval: 30s\n  aws:\n  - types: [eks]\n    \
                    regions: [us-gov-west-1, eu-west-1, eu-west-1]\n    assume_role_arn: arn:aws:iam::1:role/x\n    \
                    external_id: e\n";
        let full = parse("f", full).unwrap().unwrap();
        assert_eq!(full.matchers[0].regions, ["eu-west-1", "us-gov-west-1"]);
        assert_eq!(full.matchers[0].tags["*"], ["*"]);
        assert_eq!(full.poll_interval, Duration::from_secs(30));
    }

    #[test]
    fn every_mistake_is_told() {
        for (section, text) in [
            ("{enabled: true}", "nothing to discover"),
            ("{enabled: true, aws: []}", "nothing to discover"),
            ("{enabled: true, aws: {types: [eks]}}", "a list"),
            ("{enabled: maybe}", "`true` or `false`"),
            (
                "{enabled: true, aws: [{regions: [eu-west-1]}]}",
                "`types` is required",
            ),
            (
                "{enabled: true, aws: [{types: [eks]}]}",
                "`regions` is required",
            ),
            (
                "{enabled: true, aws: [{types: [ec2, eks], regions: [eu-west-1]}]}",
                "\"ec2\" is not discovered",
            ),
            (
                "{enabled: true, aws: [{types: [eks], regions: [evil.example.com/x]}]}",
                "no AWS region",
            ),
            (
                "{enabled: true, aws: [{types: [eks], regions: [eu-west-1], tag: {a: b}}]}",
                "tag",
            ),
            (
                "{enabled: true, aws: [{types: [eks], regions: [eu-west-1], tags: {a: '{{b}}'}}]}",
                "no pattern",
            ),
            (
                "{enabled: true, aws: [{types: [eks], regions: [eu-west-1], external_id: x}]}",
                "no role",
            ),
            (
                "{enabled: true, aws: [{types: [eks], regions: [eu-west-1], assume_role_arn: x}]}",
                "no ARN",
            ),
            (
                "{enabled: true, poll_interval: 0s, aws: [{types: [eks], regions: [eu-west-1]}]}",
                "without a pause",
            ),
            (
                "{enabled: true, azure: [], aws: [{types: [eks], regions: [eu-west-1]}]}",
                "EKS clusters only",
            ),
        ] {
            let file = format!("discovery_service: {section}\n");
            let lines = parse("f.yaml", &file).unwrap_err().lines;
            assert!(lines.contains(text), "{file}{lines}");
            assert!(lines.starts_with("f.yaml:1:"), "{lines}");
        }
        assert!(parse("f.yaml", "discovery: {}\n").is_err());
        assert!(parse("f.yaml", "- a\n").is_err());
        assert!(parse("f.yaml", "a: [\n").is_err());
    }
}
