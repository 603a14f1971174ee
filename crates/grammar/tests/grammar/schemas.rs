use galerne_types::Grammar;

use crate::{accepts, compile, schema};

/// What is said of a schema, and where.
fn refusal(text: &str) -> String {
    compile(&schema(text)).err().unwrap_or_else(|| panic!("{text} compiles")).to_string()
}

#[test]
fn a_schema_that_cannot_be_met_is_refused_with_the_place() {
    let cases = [
        (
            r#"{"type":"object","properties":{"age":{"type":"integer","minimum":3,"maximum":2}}}"#,
            "$.properties.age: no value can meet it: `minimum` is 3 and `maximum` is 2",
        ),
        (r#"{"items":{"type":"string","minLength":3,"maxLength":2}}"#, "$.items: no value can meet it"),
        (r#"{"type":"number","exclusiveMinimum":1,"maximum":1}"#, "$: no value can meet it"),
        (
            r#"{"properties":{"a b":{"enum":[]}}}"#,
            "$.properties[\"a b\"].enum: no value can meet an empty list",
        ),
        (r#"{"anyOf":[]}"#, "$.anyOf: no value can meet an empty list"),
        ("false", "$: no value can meet it: schema is false"),
        (r#"{"type":"object","properties":{"a":false},"required":["a"]}"#, "$: no value can meet it"),
        (
            r#"{"type":"object","properties":{"a":{"allOf":[{"type":"string"},{"type":"null"}]}},"required":["a"]}"#,
            "$.properties.a: no value can meet it: incompatible types",
        ),
        (
            r#"{"type":"object","properties":{"a":{"type":"string","const":1}},"required":["a"]}"#,
            "$.properties.a: no value can meet it",
        ),
        (r##"{"$ref":"#"}"##, "$: no value can meet it: it needs itself without end"),
        (
            r##"{"type":"object","properties":{"next":{"$ref":"#"}},"required":["next"]}"##,
            "$.properties.next: no value can meet it: it needs itself without end",
        ),
        (
            r##"{"$ref":"#/$defs/a","$defs":{"a":{"type":"array","minItems":1,"items":{"$ref":"#/$defs/a"}}}}"##,
            "needs itself without end",
        ),
        (r#"{"type":"object","required":["a"],"additionalProperties":false}"#, "$: no value can meet it"),
        (r#"{"type":"string","pattern":"^a$","minLength":2}"#, "$: no value can meet it"),
    ];
    for (text, expected) in cases {
        let says = refusal(text);
        assert!(
            says.starts_with(expected) || says.contains(expected) && !expected.starts_with('$'),
            "{text}: {says}"
        );
    }
}

#[test]
fn what_cannot_be_held_is_refused_by_its_name() {
    let cases = [
        (r#"{"properties":{"a":{"not":{}}}}"#, "$.properties.a.not: `not` is not supported"),
        (r#"{"type":"array","uniqueItems":true}"#, "$.uniqueItems: `uniqueItems` is not supported"),
        (r#"{"anyOf":[{"type":"null"},{"if":{},"then":{}}]}"#, "$.anyOf[1].if: `if` is not supported"),
        (r##"{"$defs":{"x":{"contains":1}},"items":{"$ref":"#/$defs/x"}}"##, "$.$defs.x.contains"),
        (r#"{"$ref":"https://example.com/s"}"#, "$.$ref: a reference leads to a place in the schema itself"),
        (r##"{"$ref":"#/$defs/nowhere"}"##, "$.$ref: this reference leads nowhere"),
        (r#"{"properties":{"a":{"type":"strin"}}}"#, "$.properties.a: Invalid type: strin"),
        (r#"{"properties":{"a":{"pattern":"("}}}"#, "$.properties.a: "),
        (r#"{"properties":{"a":{"pattern":"(?=x)"}}}"#, "$.properties.a: "),
        (r#"{"properties":{"a":7}}"#, "$.properties.a: a schema is an object, or true or false"),
        (r#"{"properties":[]}"#, "$: "),
        ("{", "the schema is no JSON"),
        (r#"{"oneOf":[{"type":"object"},{"type":"object"}]}"#, "$: oneOf"),
    ];
    for (text, expected) in cases {
        let says = refusal(text);
        assert!(says.starts_with(expected), "{text}: {says}");
    }
}

#[test]
fn what_changes_nothing_is_ignored() {
    let grammar = schema(
        r#"{"title":"T","description":"d","nullable":true,"x-guidance":{"lenient":true},"type":"object",
            "properties":{"a":{"type":"string","format":"password"},"b":{"type":"array","uniqueItems":false}},
            "discriminator":{"propertyName":"a"},"$defs":{"unused":{"not":{}}}}"#,
    );
    assert!(accepts(&grammar, r#"{"a":"x","b":[1,1],"c":null}"#));
    assert!(!accepts(&grammar, r#"{"a":1}"#));
}

#[test]
fn times_are_times() {
    for (format, good, bad) in [
        ("time", "\"23:59:59Z\"", "\"07:12:60Z\""),
        ("date-time", "\"2024-02-28T00:00:00.5+01:00\"", "\"2024-01-01T00:00:60Z\""),
        ("date-time", "\"2024-10-31T00:00:00z\"", "\"2023-02-29T00:00:00Z\""),
        ("date", "\"2024-12-31\"", "\"2024-13-31\""),
        ("date", "\"2024-02-28\"", "\"2023-02-29\""),
    ] {
        let grammar = schema(&format!("{{\"type\":\"string\",\"format\":\"{format}\"}}"));
        assert!(accepts(&grammar, good) && !accepts(&grammar, bad), "{format}");
    }
}

#[test]
fn recursion_with_an_end_and_tagged_unions() {
    let list = schema(
        r##"{"$ref":"#/$defs/node","$defs":{"node":{"type":"object","required":["next"],"additionalProperties":false,
            "properties":{"next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}}}}}"##,
    );
    assert!(accepts(&list, r#"{"next":{"next":null}}"#));
    assert!(!accepts(&list, r#"{"next":{"next":1}}"#));
    let union = schema(
        r##"{"oneOf":[{"$ref":"#/$defs/cat"},{"$ref":"#/$defs/dog"}],"$defs":{
            "cat":{"type":"object","properties":{"kind":{"const":"cat"},"lives":{"type":"integer"}},"required":["kind"]},
            "dog":{"type":"object","properties":{"kind":{"const":"dog"}},"required":["kind"],"additionalProperties":false}}}"##,
    );
    assert!(accepts(&union, r#"{"kind":"cat","lives":9}"#));
    assert!(accepts(&union, r#"{"kind":"dog"}"#));
    assert!(!accepts(&union, r#"{"kind":"dog","lives":9}"#));
    assert!(accepts(&schema(r##"{"anyOf":[{"$ref":"#"},{"type":"null"}]}"##), "null"));
}

#[test]
fn schemas_within_rules_are_checked_too() {
    let says = |rules: &str| compile(&Grammar::Lark(rules.to_owned())).err().map(|error| error.to_string());
    assert_eq!(says("start: \"x\" %json {\"type\": \"boolean\"}"), None);
    assert!(says("start: %json {\"not\": {}}").unwrap().starts_with("$.not: "));
    assert!(says("start: %json nothing").is_some());
    assert!(says("start: undefined").is_some());
    assert!(says("").is_some());
    assert!(accepts(&Grammar::Lark("start: \"%json\" | /%json/ // %json".to_owned()), "%json"));
}
