//! Server-side apply: each manager owns the fields that it has applied; what it leaves out goes, unless another one owns it too.
//!
//! Sets of fields are kept as the API tells them, in `fieldsV1`: `f:NAME` for a field, `k:{…}` for an item of a list by its keys,
//! `v:…` for an item of a set, `.` for the thing itself.

use serde_json::{Map, Value, json};

/// Lists whose items have keys, by the list's name. In the real API a field's schema says so.
const KEYS: [(&str, &[&str]); 11] = [
    ("containers", &["name"]),
    ("initContainers", &["name"]),
    ("volumes", &["name"]),
    ("env", &["name"]),
    ("volumeMounts", &["mountPath"]),
    ("ports", &["containerPort", "protocol"]),
    ("ports", &["port", "protocol"]),
    ("conditions", &["type"]),
    ("ownerReferences", &["uid"]),
    ("groups", &["name"]),
    ("imagePullSecrets", &["name"]),
];

/// Lists of values, each of which is owned by itself.
const SETS: [&str; 1] = ["finalizers"];

/// Maps that are owned as a whole.
const ATOMIC: [&str; 3] = ["selector", "matchLabels", "nodeSelector"];

/// Fields of metadata that nobody owns.
const UNOWNED: [&str; 9] = [
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "managedFields",
    "deletionGracePeriodSeconds",
];

/// The keys of the items of list `name`, if they have any.
fn keys_of(name: &str, items: &[Value]) -> Option<&'static [&'static str]> {
    let named = KEYS.iter().filter(|(list, _)| *list == name).map(|(_, keys)| *keys);
    let mut fitting = named.filter(|keys| items.iter().all(|item| item.get(keys[0]).is_some()));
    fitting.next().filter(|_| !items.is_empty())
}

/// Whether `value` is what `item`, of a set of fields, names by its JSON.
fn is_item(value: &Value, item: &str) -> bool {
    serde_json::from_str::<Value>(item).is_ok_and(|item| item == *value)
}

/// How an item is named in a set of fields. A protocol that is not told is TCP.
fn item_key(keys: &[&str], item: &Value) -> String {
    let value = |key: &str| item.get(key).cloned().unwrap_or_else(|| json!("TCP"));
    let named: Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), value(key))).collect();
    format!("k:{}", Value::Object(named))
}

/// The fields that an applied object names, at its top.
pub(crate) fn fields_of(object: &Value) -> Value {
    let mut fields = Map::new();
    for (name, value) in object.as_object().into_iter().flatten() {
        match name.as_str() {
            "apiVersion" | "kind" => {}
            "metadata" => {
                let mut owned = value.clone();
                owned
                    .as_object_mut()
                    .into_iter()
                    .for_each(|meta| meta.retain(|name, _| !UNOWNED.contains(&name.as_str())));
                if owned.as_object().is_some_and(|owned| !owned.is_empty()) {
                    fields.insert("f:metadata".into(), fields_within("metadata", &owned));
                }
            }
            _ => drop(fields.insert(format!("f:{name}"), fields_within(name, value))),
        }
    }
    Value::Object(fields)
}

fn fields_within(name: &str, value: &Value) -> Value {
    match value {
        Value::Object(map) if !ATOMIC.contains(&name) => {
            map.iter().map(|(name, value)| (format!("f:{name}"), fields_within(name, value))).collect()
        }
        Value::Array(items) if SETS.contains(&name) => {
            items.iter().map(|item| (format!("v:{item}"), json!({}))).collect()
        }
        Value::Array(items) => match keys_of(name, items) {
            Some(keys) => items
                .iter()
                .map(|item| {
                    let mut fields = fields_within("", item);
                    fields["."] = json!({});
                    (item_key(keys, item), fields)
                })
                .collect(),
            None => json!({}),
        },
        _ => json!({}),
    }
}

/// Puts `applied` into `live`.
pub(crate) fn merge(name: &str, live: &mut Value, applied: &Value) {
    match (live, applied) {
        (Value::Object(live), Value::Object(applied)) if !ATOMIC.contains(&name) => {
            for (name, value) in applied {
                merge(name, live.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(live), Value::Array(applied)) if SETS.contains(&name) => {
            let new: Vec<Value> = applied.iter().filter(|item| !live.contains(item)).cloned().collect();
            live.extend(new);
        }
        (Value::Array(live), Value::Array(items)) if keys_of(name, items).is_some() => {
            let keys = keys_of(name, items).unwrap_or_default();
            for item in items {
                let key = item_key(keys, item);
                match live.iter_mut().find(|there| item_key(keys, there) == key) {
                    Some(there) => merge("", there, item),
                    None => live.push(item.clone()),
                }
            }
        }
        (live, applied) => *live = applied.clone(),
    }
}

/// The part of `fields` that is not in `others`.
pub(crate) fn without(fields: &Value, others: &Value) -> Value {
    let mut rest = Map::new();
    for (name, inner) in fields.as_object().into_iter().flatten() {
        match others.get(name) {
            None => drop(rest.insert(name.clone(), inner.clone())),
            Some(other) => {
                let left = without(inner, other);
                if left.as_object().is_some_and(|left| !left.is_empty()) {
                    rest.insert(name.clone(), left);
                }
            }
        }
    }
    Value::Object(rest)
}

/// Removes `fields` from `live`: what has nothing left in it goes, too.
pub(crate) fn remove(live: &mut Value, fields: &Value) {
    for (name, inner) in fields.as_object().into_iter().flatten() {
        let leaf = inner.as_object().is_none_or(Map::is_empty);
        match (name.split_once(':'), &mut *live) {
            (Some(("f", field)), Value::Object(map)) if leaf => drop(map.remove(field)),
            (Some(("f", field)), Value::Object(map)) => {
                if let Some(value) = map.get_mut(field) {
                    remove(value, inner);
                }
            }
            (Some(("v", item)), Value::Array(items)) => items.retain(|there| !is_item(there, item)),
            (Some(("k", key)), Value::Array(items)) => {
                let named: Value = serde_json::from_str(key).unwrap_or_default();
                let keys: Vec<&str> =
                    named.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
                let whole = inner.get(".").is_some();
                if whole {
                    items.retain(|there| item_key(&keys, there) != format!("k:{key}"));
                } else if let Some(there) =
                    items.iter_mut().find(|there| item_key(&keys, there) == format!("k:{key}"))
                {
                    remove(there, inner);
                }
            }
            _ => {}
        }
    }
}

/// The leaves of `fields` whose values differ between `live` and `applied`, as paths.
pub(crate) fn differing(path: &str, fields: &Value, live: &Value, applied: &Value) -> Vec<String> {
    let inner = fields.as_object().filter(|inner| !inner.is_empty());
    let Some(inner) = inner else {
        return if live == applied { Vec::new() } else { vec![path.to_owned()] };
    };
    let mut all = Vec::new();
    for (name, fields) in inner {
        let (live, applied) = (part(live, name), part(applied, name));
        if let (Some(live), Some(applied)) = (live, applied) {
            all.extend(differing(
                &format!("{path}.{}", name.split_once(':').map_or("", |(_, name)| name)),
                fields,
                live,
                applied,
            ));
        }
    }
    all
}

/// What a name in a set of fields stands for.
pub(crate) fn part<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match name.split_once(':')? {
        ("f", field) => value.get(field),
        ("v", item) => value.as_array()?.iter().find(|there| is_item(there, item)),
        (_, key) => {
            let named: Value = serde_json::from_str(key).ok()?;
            let keys: Vec<&str> = named.as_object()?.iter().map(|(key, _)| key.as_str()).collect();
            value.as_array()?.iter().find(|there| item_key(&keys, there) == format!("k:{key}"))
        }
    }
}

/// The part of `fields` that is in `others`, too: a thing and what is in it are different fields.
pub(crate) fn common(fields: &Value, others: &Value) -> Value {
    let is_leaf = |value: &Value| value.as_object().is_none_or(Map::is_empty);
    let mut both = Map::new();
    for (name, inner) in fields.as_object().into_iter().flatten() {
        let Some(other) = others.get(name) else { continue };
        let shared = common(inner, other);
        if !is_leaf(&shared) || (is_leaf(inner) && is_leaf(other)) {
            both.insert(name.clone(), shared);
        }
    }
    Value::Object(both)
}

/// The part of `fields` that `object` has.
pub(crate) fn existing(fields: &Value, object: &Value) -> Value {
    let mut all = Map::new();
    for (name, inner) in fields.as_object().into_iter().flatten() {
        let leaf = inner.as_object().is_none_or(Map::is_empty);
        let there = if name == "." { Some(object) } else { part(object, name) };
        match there {
            Some(_) if leaf => drop(all.insert(name.clone(), inner.clone())),
            Some(there) => {
                let left = existing(inner, there);
                if left.as_object().is_some_and(|left| !left.is_empty()) {
                    all.insert(name.clone(), left);
                }
            }
            None => {}
        }
    }
    Value::Object(all)
}
