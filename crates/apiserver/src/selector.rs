//! Which objects a list or a watch is about.

use serde_json::Value;

/// Labels and fields that an object must have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    labels: Vec<(String, bool, Option<String>)>,
    fields: Vec<(String, bool, String)>,
}

impl Selector {
    /// `a=b`, `a==b`, `a!=b`, `a`, `!a`, separated by commas; fields are paths.
    pub(crate) fn parse(labels: &str, fields: &str) -> Self {
        let terms = |text: &str| {
            let terms = text.split(',').filter(|term| !term.is_empty()).map(str::to_owned);
            terms.collect::<Vec<_>>()
        };
        let label = |term: String| match (term.split_once("!="), term.split_once('=')) {
            (Some((name, value)), _) => (name.to_owned(), false, Some(value.to_owned())),
            (None, Some((name, value))) => {
                (name.to_owned(), true, Some(value.trim_start_matches('=').to_owned()))
            }
            (None, None) => (term.trim_start_matches('!').to_owned(), !term.starts_with('!'), None),
        };
        let labels = terms(labels).into_iter().map(label);
        let fields = terms(fields)
            .into_iter()
            .map(label)
            .map(|(name, is, value)| (name, is, value.unwrap_or_default()));
        Self { labels: labels.collect(), fields: fields.collect() }
    }

    pub(crate) fn takes(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let label = |(name, is, value): &(String, bool, Option<String>)| {
            let has = labels.get(name).and_then(Value::as_str);
            let fits = value.as_ref().map_or(has.is_some(), |value| has == Some(value));
            fits == *is
        };
        let field = |(path, is, value): &(String, bool, String)| {
            let found = path.split('.').try_fold(object, |value, field| value.get(field));
            (found.and_then(Value::as_str).unwrap_or_default() == value) == *is
        };
        self.labels.iter().all(label) && self.fields.iter().all(field)
    }
}
