//! What tests of several kinds share.

use super::{ServiceKind, ServicePlan};
use crate::yaml::{Fields, Problems, Tree, emit, parse};

/// Reads a section; its label and the section as it is written back, or what is wrong with it.
pub(crate) fn plan(kind: &dyn ServiceKind, yaml: &str) -> Result<String, String> {
    let problems = Problems::default();
    let node = parse(yaml).map_err(|problem| problem.to_string())?;
    let mut fields = Fields::new(&node, "services[0]", &problems).ok_or("no mapping")?;
    let plan = kind.parse(&mut fields);
    fields.finish();
    let text = problems.render("tbot.yaml");
    let plan = plan.filter(|_| text.is_empty()).ok_or(text)?;
    let section = emit::emit(&Tree::Map(plan.emit()));
    Ok(format!("{}\n{section}", plan.label()))
}

/// Reads a section; the plan, and everything that is wrong with the section or noteworthy.
pub(crate) fn read(kind: &dyn ServiceKind, yaml: &str) -> (Option<Box<dyn ServicePlan>>, String) {
    let node = parse(yaml).unwrap();
    let problems = Problems::new();
    let mut fields = Fields::new(&node, "", &problems).unwrap();
    // Whoever reads the list has read it.
    fields.ignore("type");
    let plan = kind.parse(&mut fields);
    fields.finish();
    (plan, problems.render("t"))
}
