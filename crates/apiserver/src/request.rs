//! What a request is about, from its path and query.

use std::collections::BTreeMap;

use crate::selector::Selector;

/// The group and version of a path that asks what there is of them.
pub(crate) fn group_version(path: &str) -> Option<(&str, &str)> {
    let (group, version) = path.trim_matches('/').strip_prefix("apis/")?.split_once('/')?;
    (!version.contains('/')).then_some((group, version))
}

/// The parts of a path: `/api/v1/…` or `/apis/GROUP/VERSION/…`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Target {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: Option<String>,
    pub(crate) plural: String,
    pub(crate) name: Option<String>,
    pub(crate) subresource: Option<String>,
}

impl Target {
    /// `None` for a path that names no resource.
    pub(crate) fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let (group, version, rest) = match &parts[..] {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (*plural, None, None),
            [plural, name] => (*plural, Some(*name), None),
            [plural, name, subresource] => (*plural, Some(*name), Some(*subresource)),
            _ => return None,
        };
        Some(Self {
            group: group.into(),
            version: version.into(),
            namespace,
            plural: plural.into(),
            name: name.map(str::to_owned),
            subresource: subresource.map(str::to_owned),
        })
    }
}

/// A query's parameters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(BTreeMap<String, String>);

impl Query {
    pub(crate) fn new(parameters: BTreeMap<String, String>) -> Self {
        Self(parameters)
    }

    pub(crate) fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    pub(crate) fn says(&self, name: &str) -> bool {
        matches!(self.text(name), "true" | "1")
    }

    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.text(name).parse().ok()
    }

    pub(crate) fn selector(&self) -> Selector {
        Selector::parse(self.text("labelSelector"), self.text("fieldSelector"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_resource() {
        let target = |path: &str| Target::parse(path).unwrap();
        let pod = target("/api/v1/namespaces/n/pods/p/eviction");
        assert_eq!(
            (pod.group.as_str(), pod.namespace.as_deref(), pod.name.as_deref()),
            ("", Some("n"), Some("p"))
        );
        assert_eq!(pod.subresource.as_deref(), Some("eviction"));
        let sets = target("/apis/apps/v1/statefulsets");
        assert_eq!(
            (sets.group.as_str(), sets.namespace, sets.plural.as_str()),
            ("apps", None, "statefulsets")
        );
        assert_eq!(Target::parse("/healthz"), None);
    }
}
