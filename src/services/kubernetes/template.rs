//! Names and labels made for each cluster: the part of Go's templates that they need.

use std::collections::BTreeMap;

use crate::yaml::Fields;

/// What a user may write.
pub(in crate::services) const HINT: &str =
    "use {{.ClusterName}}, {{.KubeName}} and {{index .Labels \"KEY\"}}";
/// What upstream's agent names contexts by.
const DEFAULT: &str = "{{.ClusterName}}-{{.KubeName}}";

/// A template, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::services) struct Template {
    source: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Cluster,
    Kubernetes,
    /// A label of the Kubernetes cluster; nothing if it has none.
    Label(String),
}

impl Template {
    /// Reads the template of a name under `key`; `Ok(None)` if there is none. Problems go to `fields`.
    ///
    /// # Errors
    /// There was a problem.
    pub(in crate::services) fn read(
        fields: &mut Fields<'_>,
        key: &str,
    ) -> Result<Option<Self>, ()> {
        let Some(source) = fields.string(key) else {
            return Ok(None);
        };
        Self::parse(&source)
            .map(Some)
            .map_err(|problem| fields.error(key, problem, Some(HINT)))
    }

    /// What upstream's agent names contexts by: both names, with `-` between.
    pub(in crate::services) fn both_names() -> Self {
        Self {
            source: DEFAULT.to_owned(),
            parts: vec![Part::Cluster, Part::Text("-".to_owned()), Part::Kubernetes],
        }
    }

    /// Reads a template.
    ///
    /// # Errors
    /// What is wrong with it, as text for the user.
    pub(in crate::services) fn parse(source: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = source;
        while let Some((text, after)) = rest.split_once("{{") {
            parts.push(Part::Text(text.to_owned()));
            let (action, after) = after
                .split_once("}}")
                .ok_or_else(|| "a `{{` is not closed by `}}`".to_owned())?;
            parts.push(read(action.trim())?);
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| !matches!(part, Part::Text(text) if text.is_empty()));
        Ok(Self {
            source: source.to_owned(),
            parts,
        })
    }

    /// As it was written.
    pub(in crate::services) fn source(&self) -> &str {
        &self.source
    }

    /// The text, if it is the same for every cluster.
    pub(in crate::services) fn fixed(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// The text for one Kubernetes cluster.
    pub(in crate::services) fn render(
        &self,
        cluster: &str,
        kubernetes: &str,
        labels: &BTreeMap<String, String>,
    ) -> String {
        let text = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Cluster => cluster.to_owned(),
            Part::Kubernetes => kubernetes.to_owned(),
            Part::Label(key) => labels.get(key).cloned().unwrap_or_default(),
        };
        self.parts.iter().map(text).collect()
    }
}

fn read(action: &str) -> Result<Part, String> {
    match action {
        ".ClusterName" => return Ok(Part::Cluster),
        ".KubeName" => return Ok(Part::Kubernetes),
        _ => {}
    }
    let label = action
        .strip_prefix("index ")
        .and_then(|rest| rest.trim_start().strip_prefix(".Labels "))
        .map(str::trim)
        .and_then(|key| key.strip_prefix('"')?.strip_suffix('"'))
        .filter(|key| !key.contains(['"', '\\']));
    if let Some(key) = label {
        return Ok(Part::Label(key.to_owned()));
    }
    let simple = |key: &str| {
        let mut bytes = key.bytes();
        bytes
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    match action.strip_prefix(".Labels.") {
        Some(key) if simple(key) => Ok(Part::Label(key.to_owned())),
        Some(_) | None => Err(format!("`{{{{{action}}}}}` is not known here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_the_cluster_and_its_labels() {
        let labels = [("env", "prod"), ("a/b.c", "x")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let labels = BTreeMap::from(labels);
        for (template, name) in [
            (DEFAULT, "root-k1"),
            ("{{ .KubeName }}", "k1"),
            ("k8s/{{.KubeName}}@{{index .Labels \"env\"}}", "k8s/k1@prod"),
            ("{{index .Labels \"a/b.c\"}}{{.Labels.env}}", "xprod"),
            ("{{index .Labels \"none\"}}x", "x"),
            ("fixed", "fixed"),
            ("", ""),
        ] {
            let read = Template::parse(template).unwrap();
            assert_eq!(read.render("root", "k1", &labels), name, "{template}");
            assert_eq!(read.source(), template);
            assert_eq!(read.fixed().is_some(), ["fixed", ""].contains(&template));
        }
        assert_eq!(Template::parse(DEFAULT).unwrap(), Template::both_names());
        for bad in [
            "{{.KubeName",
            "{{}}",
            "{{.Name}}",
            "{{index .Labels env}}",
            "{{index .Labels \"a\" | upper}}",
            "{{.Labels.a-b}}",
            "{{if .KubeName}}x{{end}}",
        ] {
            assert!(Template::parse(bad).is_err(), "{bad}");
        }
    }
}
