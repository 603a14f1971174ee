//! Grammars: JSON schemas, regular expressions, rules, choices.

use std::time::Duration;

use galerne_grammar::{Limits, Vocabulary};
use galerne_types::Grammar;
use serde_json::{Value, json};

use crate::engine::{Outcome, Target, alone, fuzz, mutate};

const END: u32 = 256;

fn vocabulary() -> Vocabulary {
    let words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).chain([b"<end>".to_vec()]).collect();
    Vocabulary::new(END + 1, &[END], |id| (&words[id as usize], id == END)).expect("a vocabulary")
}

/// Compiles a grammar and draws from it: it ends, and every token that a mask allows is taken.
fn draws(vocabulary: &Vocabulary, grammar: &Grammar) -> Outcome {
    let mut constraint =
        vocabulary.compile(grammar, &Limits::default()).map_err(|error| error.to_string())?;
    for turn in 0..12_u32 {
        // Beyond the limits of a step there is an error, which ends the answer.
        let Ok(mask) = constraint.mask() else { return Ok(()) };
        let allowed = |token: &u32| mask[*token as usize / 32] >> (token % 32) & 1 == 1;
        let token = (0..=END).cycle().skip((turn * 37) as usize).take(END as usize + 1).find(allowed);
        let token = token.expect("a mask is never empty");
        if constraint.drawn(token).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

const TARGET: Target = Target {
    name: "",
    seeds: Vec::new(),
    words: &[],
    change: mutate::bytes,
    runs: 400,
    memory_bytes: (512 << 20, 20_000),
    cpu: (Duration::from_secs(20), Duration::from_micros(100)),
    secret: None,
};

#[test]
fn schemas() {
    let alone = alone();
    let vocabulary = vocabulary();
    let seeds = [
        json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "b": {"type": "integer", "minimum": 3}},
            "required": ["a"], "additionalProperties": false}),
        json!({"type": "array", "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/x"}]}, "minItems": 1, "maxItems": 4,
            "$defs": {"x": {"type": "number", "multipleOf": 0.5}}}),
        json!({"enum": ["a", 1, null, {"a": [true]}], "description": "one"}),
        json!({"allOf": [{"type": "string", "format": "date-time"}, {"minLength": 1, "maxLength": 40}]}),
        json!({"oneOf": [{"const": "a"}, {"type": "boolean"}], "patternProperties": {"^a": {}}, "prefixItems": [{}, {"type": "string"}]}),
    ];
    let target = Target {
        name: "schemas",
        seeds: seeds.iter().map(|seed| seed.to_string().into_bytes()).collect(),
        words: &[
            "type",
            "object",
            "array",
            "string",
            "integer",
            "properties",
            "items",
            "required",
            "$ref",
            "#",
            "#/$defs/x",
            "#/",
            "$defs",
            "anyOf",
            "oneOf",
            "allOf",
            "not",
            "enum",
            "const",
            "pattern",
            "format",
            "minimum",
            "maximum",
            "multipleOf",
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
            "additionalProperties",
            "patternProperties",
            "minProperties",
            "^(a|b)*$",
            "(?=a)",
            "x-guidance",
            "a",
            "if",
        ],
        change: mutate::json,
        ..TARGET
    };
    fuzz(&alone, &target, |input| {
        draws(&vocabulary, &Grammar::JsonSchema(String::from_utf8_lossy(input).into_owned()))
    });
}

#[test]
fn expressions() {
    let alone = alone();
    let vocabulary = vocabulary();
    let target = Target {
        name: "expressions",
        seeds: ["[a-z]+(\\d{1,3}|x)*", "(?i:yes|no)", "\\p{L}+[^\\n]{0,9}\\x41", "(a|b|ab)*c?"]
            .map(|text| text.as_bytes().to_vec())
            .to_vec(),
        words: &[
            "(",
            ")",
            "[^",
            "]",
            "{1,1000}",
            "{9999999}",
            "*",
            "+?",
            "|",
            "\\p{Greek}",
            "(?=",
            "\\1",
            "\\b",
            "^",
            "$",
            ".",
            "(?s:.)",
            "&",
            "~",
        ],
        ..TARGET
    };
    fuzz(&alone, &target, |input| {
        draws(&vocabulary, &Grammar::Regex(String::from_utf8_lossy(input).into_owned()))
    });
}

#[test]
fn rules() {
    let alone = alone();
    let vocabulary = vocabulary();
    let rules = "start: item (\",\" item)*\nitem: WORD | \"[\" start \"]\" | NUMBER\nWORD: /[a-z]+/\nNUMBER: /[0-9]{1,3}/\n%ignore /[ \\t]+/\n";
    let json = "start: \"x\" %json {\"type\": \"object\", \"properties\": {\"a\": {}}} tail?\ntail[lazy]: /.*/ \"end\"\n";
    let choices = json!(["a", "ab", "\u{e9}", "", "a\"\\\n"]);
    let target = Target {
        name: "rules",
        seeds: vec![rules.as_bytes().to_vec(), json.as_bytes().to_vec(), choices.to_string().into_bytes()],
        words: &[
            "start: ",
            "\n",
            "|",
            "(",
            ")",
            "*",
            "+",
            "?",
            "{2,5}",
            "{1,99999999}",
            "/[a-z]+/",
            "\"a\"",
            "%json {}",
            "%json ",
            "%import common.INT",
            "%ignore / /",
            "%lark {",
            "%regex {",
            "<[5]>",
            "<|a|>",
            "&",
            "~",
            "[capture]",
            "[max_tokens=5]",
            "-> a",
            "//",
            "#",
            "%llguidance {",
        ],
        ..TARGET
    };
    fuzz(&alone, &target, |input| {
        let text = String::from_utf8_lossy(input).into_owned();
        let choices =
            serde_json::from_str::<Value>(&text).ok().and_then(|value| serde_json::from_value(value).ok());
        draws(&vocabulary, &choices.map_or(Grammar::Lark(text), Grammar::Choice))
    });
}
