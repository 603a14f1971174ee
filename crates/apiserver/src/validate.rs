//! What the API server refuses of built-in kinds: names, values of labels, and quantities that are none.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value};

use crate::status::Failure;

/// Characters of a label's value, and of a DNS label, at most.
const LABEL_CHARS_MAX: usize = 63;
/// Characters of a DNS subdomain, at most.
const SUBDOMAIN_CHARS_MAX: usize = 253;

/// A lazily made expression that holds for whole texts.
macro_rules! whole {
    ($name:ident, $pattern:expr) => {
        static $name: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(concat!("^(?:", $pattern, ")$")).expect("a pattern"));
    };
}

whole!(SERVICE, "[a-z]([-a-z0-9]*[a-z0-9])?");
whole!(SUBDOMAIN, r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*");
whole!(LABEL_VALUE, "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?");
whole!(QUANTITY, r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?");

/// Checks an object of a built-in kind.
pub(crate) fn check(kind: &str, name: &str, object: &Value) -> Result<(), Failure> {
    let (pattern, most) = match kind {
        "Service" => (&SERVICE, LABEL_CHARS_MAX),
        _ => (&SUBDOMAIN, SUBDOMAIN_CHARS_MAX),
    };
    if !pattern.is_match(name) || name.len() > most {
        let why = format!(
            "metadata.name: Invalid value: {name:?}: must match {} and have {most} characters at most",
            pattern.as_str()
        );
        return Err(Failure::invalid(kind, name, &why));
    }
    let template = &object["spec"]["template"];
    for (place, labels) in
        [("", &object["metadata"]["labels"]), ("spec.template.", &template["metadata"]["labels"])]
    {
        let values = map(labels).filter_map(|(_, value)| value.as_str());
        if let Some(bad) = values.into_iter().find(|value| !is_label(value)) {
            let why = format!(
                "{place}metadata.labels: Invalid value: {bad:?}: must match {} and have {LABEL_CHARS_MAX} characters at most",
                LABEL_VALUE.as_str()
            );
            return Err(Failure::invalid(kind, name, &why));
        }
    }
    let pod = if kind == "Pod" { &object["spec"] } else { &template["spec"] };
    match quantities(pod).find(|quantity| !QUANTITY.is_match(quantity)) {
        Some(_) => Err(Failure::bad(format!(
            "{kind} in version \"v1\" cannot be handled as a {kind}: quantities must match the regular expression \
             '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        ))),
        None => Ok(()),
    }
}

fn is_label(value: &str) -> bool {
    LABEL_VALUE.is_match(value) && value.len() <= LABEL_CHARS_MAX
}

/// What containers of a pod ask for, as text.
fn quantities(pod: &Value) -> impl Iterator<Item = &str> {
    let containers = ["initContainers", "containers"]
        .into_iter()
        .flat_map(|field| pod[field].as_array().into_iter().flatten());
    let resources =
        containers.flat_map(|container| ["requests", "limits"].map(|field| &container["resources"][field]));
    resources.flat_map(map).filter_map(|(_, value)| value.as_str())
}

fn map(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}
