//! Which one of the resources that a cluster listed is the one that was configured.

use crate::cluster::client::resources::Resource;

/// Why a name stands for no single resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoSingle {
    /// There is none, or the bot's roles do not let it see it.
    #[error(
        "{kind} {name:?} not found: does it exist, and do the output's roles allow access to it?"
    )]
    None { kind: &'static str, name: String },
    /// Several were discovered under the name.
    #[error(
        "{kind} {name:?} is ambiguous: it was discovered as {}; configure one of these full names",
        .found.join(", ")
    )]
    Several {
        kind: &'static str,
        name: String,
        /// Sorted, each as a quoted text.
        found: Vec<String>,
    },
}

/// The resource that has this name, or else the only one that was discovered under it.
pub(crate) fn single<S>(
    kind: &'static str,
    name: &str,
    mut found: Vec<Resource<S>>,
) -> Result<Resource<S>, NoSingle> {
    if let Some(at) = found.iter().position(|resource| resource.name == name) {
        return Ok(found.swap_remove(at));
    }
    found.retain(|resource| resource.discovered_name() == Some(name));
    let name = name.to_owned();
    if found.len() > 1 {
        let names = found.iter().map(|resource| format!("{:?}", resource.name));
        let mut found: Vec<String> = names.collect();
        found.sort_unstable();
        return Err(NoSingle::Several { kind, name, found });
    }
    found.pop().ok_or(NoSingle::None { kind, name })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn resource(name: &str, discovered: &str) -> Resource<()> {
        let label = ("teleport.internal/discovered-name", discovered);
        let labels = [label].map(|(key, value)| (key.to_owned(), value.to_owned()));
        Resource {
            name: name.to_owned(),
            labels: BTreeMap::from(labels),
            spec: (),
        }
    }

    #[test]
    fn the_exact_name_wins_and_a_discovered_one_has_to_be_unique() {
        let named = ["k", "k-eks-eu-1", "other"];
        for (listed, expected) in [
            (&[("k", ""), ("k-eks-eu-1", "k")][..], Ok(named[0])),
            (&[("k-eks-eu-1", "k")], Ok(named[1])),
            (&[("other", "other")], Err("\"k\" not found")),
            (&[], Err("\"k\" not found")),
            (
                &[("k-2", "k"), ("k-1", "k"), ("x\n", "k")],
                Err("discovered as \"k-1\", \"k-2\", \"x\\n\"; configure"),
            ),
        ] {
            let listed = listed.iter().map(|(name, found)| resource(name, found));
            let chosen = single("database", "k", listed.collect());
            match (chosen, expected) {
                (Ok(chosen), Ok(name)) => assert_eq!(chosen.name, name),
                (Err(error), Err(text)) => {
                    let error = error.to_string();
                    assert!(
                        error.starts_with("database ") && error.contains(text),
                        "{error}"
                    );
                }
                (chosen, _) => panic!("{chosen:?} instead of {expected:?}"),
            }
        }
    }
}
