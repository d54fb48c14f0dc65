//! From a configuration file (`version: v2`; v1 is converted), command line flags and environment variables to a
//! [`Plan`]: everything decided, nothing touched.
//!
//! Flags and variables are an [`Overlay`] on the tree that the file gave, so one validator judges
//! all of them, and every problem of a run is reported at once.

mod join_uri;
mod lifetime;
mod onboarding;
mod overlay;
mod plan;
mod root;
mod services;
mod v1;

use crate::env::Env;
use crate::yaml::{self, Node, Problem, Problems, Severity, Value};

pub use overlay::{OnboardingFlags, Origin, Overlay, ServiceFlags};
pub use plan::{Onboarding, Plan, PlannedService, Server};

/// The directory of the bot's own state when none is configured.
pub const DEFAULT_STORAGE: &str = "/var/lib/teleport/bot";

/// A configuration text and what to call it in messages.
#[derive(Clone)]
pub struct Source {
    /// The file's path, `<stdin>` or the flag that carried the text.
    pub name: String,
    /// The YAML text. May hold secrets.
    pub text: String,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A plan and what the user should know although it can be used.
#[derive(Debug)]
pub struct Loaded {
    /// The plan.
    pub plan: Plan,
    /// One line each, to be logged as warnings.
    pub warnings: Vec<String>,
    /// One line each, to be logged as errors although nothing stops: two services write to one
    /// place, which upstream announces as fatal and lets pass.
    pub conflicts: Vec<String>,
}

/// Everything that is wrong, one line each, in the order of the file; warnings included.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Invalid(pub Vec<String>);

/// Makes the plan from a text (none: flags only), an overlay and the environment.
///
/// # Errors
/// All problems, rendered.
pub fn load(source: Option<&Source>, overlay: &Overlay, env: &Env) -> Result<Loaded, Invalid> {
    let name = source.map_or("command line", |source| source.name.as_str());
    let mut tree = match source {
        Some(source) => read(source)?,
        None => Node::made(Value::Mapping(vec![(
            yaml::Key::made("version"),
            Node::made_text("v2"),
        )])),
    };
    let problems = Problems::new();
    if v1::is(&tree) {
        problems.push(Problem {
            severity: Severity::Warning,
            span: tree.get("version").map(|version| version.span),
            path: "version".to_owned(),
            message: "the format v1 is deprecated; it is read as its v2 form".to_owned(),
            hint: Some("`tbot migrate -c FILE` prints that form".to_owned()),
        });
        v1::convert(&mut tree, &problems);
    }
    judge(name, tree, overlay, env, problems)
}

/// The plan of a v1 file; `None` if the file is of a later version and there is nothing to convert.
///
/// # Errors
/// All problems, rendered.
pub fn migrate(source: &Source, env: &Env) -> Result<Option<Loaded>, Invalid> {
    let mut tree = read(source)?;
    if !v1::is(&tree) {
        return Ok(None);
    }
    let problems = Problems::new();
    v1::convert(&mut tree, &problems);
    judge(&source.name, tree, &Overlay::default(), env, problems).map(Some)
}

/// Makes the plan from a v2 tree; `name` is what the tree is called in messages.
fn judge(
    name: &str,
    mut tree: Node,
    overlay: &Overlay,
    env: &Env,
    problems: Problems,
) -> Result<Loaded, Invalid> {
    let origins = overlay.apply(&mut tree, &problems);
    let mut conflicts = Vec::new();
    let plan = root::plan(&tree, overlay, env, &problems, &mut conflicts);
    let failed = problems.has_errors();
    let all = problems.into_sorted();
    let shown = |problem: &Problem| match problem.span {
        Some(_) => problem.render(name),
        None => format!("{}: {problem}", origins.of(&problem.path).unwrap_or(name)),
    };
    match plan {
        Some(plan) if !failed => Ok(Loaded {
            plan,
            warnings: all.iter().map(shown).collect(),
            conflicts,
        }),
        Some(_) | None => {
            let mut lines: Vec<&Problem> = all.iter().collect();
            // Errors first: they are what must be mended.
            lines.sort_by_key(|problem| problem.severity == Severity::Warning);
            Err(Invalid(lines.into_iter().map(shown).collect()))
        }
    }
}

fn read(source: &Source) -> Result<Node, Invalid> {
    parse(&source.text).map_err(|problem| Invalid(vec![problem.render(&source.name)]))
}

fn parse(text: &str) -> Result<Node, Problem> {
    let tree = yaml::parse(text)?;
    match tree.value {
        Value::Mapping(_) => Ok(tree),
        Value::Null => Err(Problem::error(
            None,
            "there is no configuration in it".to_owned(),
            Some("begin with `version: v2`; `tbot configure --help` writes one".to_owned()),
        )),
        Value::Scalar { .. } | Value::Sequence(_) => Err(Problem::error(
            Some(tree.span),
            format!("must be a mapping, not {}", tree.kind()),
            Some("begin with `version: v2`".to_owned()),
        )),
    }
}
