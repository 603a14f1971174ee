use serde_json::{Map, Value};

use super::{DEFINITIONS, LISTS, MAPS, ONES};

/// Formats of strings that the parser can hold. Others are annotations, as JSON Schema has them by default.
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Takes away what constrains nothing, but that the parser would refuse.
pub(super) fn rewrite(schema: &mut Value) {
    let Value::Object(keywords) = schema else { return };
    drop_if(keywords, "uniqueItems", |value| *value == Value::Bool(false));
    drop_if(keywords, "unevaluatedProperties", |value| *value == Value::Bool(true));
    drop_if(keywords, "unevaluatedItems", |value| *value == Value::Bool(true));
    drop_if(keywords, "format", |value| value.as_str().is_some_and(|format| !FORMATS.contains(&format)));
    every_year(keywords);
    for keyword in MAPS.into_iter().chain(DEFINITIONS) {
        if let Some(Value::Object(map)) = keywords.get_mut(keyword) {
            map.values_mut().for_each(rewrite);
        }
    }
    for keyword in LISTS {
        if let Some(Value::Array(list)) = keywords.get_mut(keyword) {
            list.iter_mut().for_each(rewrite);
        }
    }
    for keyword in ONES {
        if let Some(one @ Value::Object(_)) = keywords.get_mut(keyword) {
            rewrite(one);
        }
    }
}

fn drop_if(keywords: &mut Map<String, Value>, keyword: &str, drops: impl Fn(&Value) -> bool) {
    if keywords.get(keyword).is_some_and(drops) {
        keywords.shift_remove(keyword);
    }
}

/// The parser lets any minute end in second 60 and any February in day 29. Not all do: neither is written.
fn every_year(keywords: &mut Map<String, Value>) {
    let pattern = match keywords.get("format").and_then(Value::as_str) {
        Some("time") => "^.{6}[0-5]",
        Some("date") => "^.{5}(0[13-9]|1|02-([01]|2[0-8]))",
        Some("date-time") => "^.{5}(0[13-9]-..|1.-..|02-([01].|2[0-8])).{7}[0-5]",
        _ => return,
    };
    if !keywords.contains_key("pattern") {
        keywords.insert("pattern".into(), pattern.into());
    }
}
