//! Chat templates as files bring them, and conversations as clients bring them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use galerne_checkpoint::TextAssets;
use galerne_text::{Chat, ChatFormat, ChatFormatKind, ChatTemplate, TextError, Tokenizer};
use serde_json::{Map, Value, json};

use super::checkpoint::sentencepiece_model;
use super::text::{bard_assets, load, sentencepiece_assets};
use crate::engine::{Outcome, Target, alone, fuzz, mutate};

/// Stands in every conversation and in no error.
const SECRET: &str = "zebrafink";

/// What templates are made of.
#[rustfmt::skip]
const WORDS: &[&str] = &[
    "{{ ", " }}", "{% for a in b %}", "{% endfor %}", "{% set ns.x = ", "namespace(", "[", "]",
    "(", ")", "{", "}", "|", ".", "~", "*",
    "**", "+", " and ", " not ", " is ", " in ", "{% if x %}", "{% elif y %}",
    "{% endif %}", "{% macro m() %}", "{% endmacro %}", "{% include 'x' %}", "loop", "loop(", "messages", "range(99999)",
    "|tojson", "|list", "|unique", "|sort", "|batch(2)", "|zip(x)", "|map('upper')", "|groupby(0)",
    "|indent(9999999)", "|center(99999)", "'x'*99999", "%", "'%99999d'", "[0:]", "[::-1]", "\\u",
    "{#", "#}", "|replace('', 'xx')", ".join(", ".split('')", "==", "<", "9999999999",
    "recursive", "|round(99)", "|format(", "|wordwrap(1)", "{% do ",
];

fn golden() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/text/tests/golden/templates");
    let mut paths: Vec<_> =
        fs::read_dir(folder).expect("templates").flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read_to_string(path).expect("a template")).collect()
}

fn conversation() -> Value {
    let call =
        json!({"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    json!({
        "messages": [
            {"role": "system", "content": SECRET},
            {"role": "user", "content": [{"type": "text", "text": SECRET}]},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "123456789", "name": "f"},
            {"role": "assistant", "content": SECRET},
            {"role": "user", "content": SECRET},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": SECRET,
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}],
        "extra": {"enable_thinking": true},
        "continue_final": false,
    })
}

/// What a refusal says; what the template itself says is its own.
fn said(error: &TextError) -> Outcome {
    if matches!(error, TextError::Refused(_)) { Ok(()) } else { Err(error.to_string()) }
}

#[test]
fn templates() {
    let alone = alone();
    let mut seeds = golden();
    seeds.extend(
        [
            "{% macro m(x, y=[1]) %}{{ x }}{% for a in y recursive %}{{ loop(a) }}{% endfor %}{% endmacro %}{{ m(messages) }}",
            "{% set ns = namespace(x=[], y={}) %}{% for m in messages %}{% set ns.x = ns.x + [m] %}{% endfor %}{{ ns.x | tojson(indent=2) }}",
            "{{ 'x' * 1000 ~ messages[1:] | map(attribute='role') | join(', ') }}{{ strftime_now('%Y') }}{{ range(10) | batch(3) | list }}",
            "{% call(x) m() %}{{ x }}{% endcall %}{% filter upper %}{{ '%s %d' % ('a', 1) }}{% endfilter %}{{ messages | groupby('role') }}",
            "{% set x %}{{ messages | selectattr('role', 'in', ['user']) | list | length }}{% endset %}{{ x if x is defined else raise_exception('no') }}",
            "{% for k, v in messages[0].items() if k != 'role' %}{{ loop.index0 }}{{ v.split('a')[-1].strip() }}{% else %}{% break %}{% endfor %}",
        ]
        .map(str::to_owned),
    );
    let target = Target {
        name: "templates",
        seeds: seeds.into_iter().map(String::into_bytes).collect(),
        words: WORDS,
        change: mutate::bytes,
        runs: 4_000,
        memory_bytes: (256 << 20, 2_000),
        cpu: (Duration::from_secs(8), Duration::from_micros(100)),
        secret: Some(SECRET),
    };
    let conversation = conversation();
    let [messages, tools] =
        ["messages", "tools"].map(|name| conversation[name].as_array().cloned().unwrap_or_default());
    fuzz(&alone, &target, |input| {
        let source = String::from_utf8_lossy(input).into_owned();
        let assets =
            TextAssets { chat_template: Some(source), bos_token: Some("<s>".to_owned()), ..bard_assets() };
        let template = ChatTemplate::load(&assets).map_err(|error| error.to_string())?.expect("a template");
        match template.render(&messages, Some(&tools), true) {
            Ok(prompt) => assert!(prompt.len() <= 65 << 20, "a prompt of {} bytes", prompt.len()),
            Err(error) => said(&error)?,
        }
        Ok(())
    });
}

#[test]
fn conversations() {
    let alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.model.v3");
    fs::write(&path, sentencepiece_model()).expect("a file");
    let mut formats: Vec<(Tokenizer, ChatFormat)> = Vec::new();
    for version in [ChatFormatKind::MistralV1, ChatFormatKind::MistralV2, ChatFormatKind::MistralV3] {
        let assets = sentencepiece_assets(path.clone());
        let tokenizer = load(&assets).expect("a tokenizer");
        // The small vocabulary lacks what the later versions need.
        formats.extend(
            ChatFormat::load(&assets, &tokenizer, Some(version))
                .ok()
                .flatten()
                .map(|format| (tokenizer, format)),
        );
    }
    for source in golden() {
        let assets = TextAssets { chat_template: Some(source), ..bard_assets() };
        let tokenizer = load(&assets).expect("a tokenizer");
        let format = ChatFormat::load(&assets, &tokenizer, Some(ChatFormatKind::Jinja)).expect("a format");
        formats.push((tokenizer, format.expect("a template")));
    }
    let continued = json!({"messages": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}], "continue_final": true});
    let target = Target {
        name: "conversations",
        seeds: [conversation(), continued].iter().map(|seed| seed.to_string().into_bytes()).collect(),
        words: &[
            "role",
            "content",
            "system",
            "user",
            "assistant",
            "tool",
            "developer",
            "tool_calls",
            "tool_call_id",
            "arguments",
            "function",
            "name",
            "type",
            "text",
            "messages",
            "parameters",
            "\u{f8ff}\u{e000}continue\u{e000}\u{f8ff} ",
            "[INST]",
            "</s>",
            "{}",
            "[]",
            "1e400",
        ],
        change: mutate::json,
        runs: 2_000,
        memory_bytes: (32 << 20, 4_000),
        cpu: (Duration::from_secs(3), Duration::from_micros(200)),
        secret: Some(SECRET),
    };
    fuzz(&alone, &target, |input| {
        let Ok(value) = serde_json::from_slice::<Value>(input) else { return Ok(()) };
        let list = |name: &str| value[name].as_array().cloned().unwrap_or_default();
        let extra: Map<String, Value> = value["extra"].as_object().cloned().unwrap_or_default();
        let continue_final = value["continue_final"] == true;
        let (messages, tools) = (list("messages"), list("tools"));
        let chat = Chat { messages, tools, extra, continue_final, add_generation_prompt: !continue_final };
        let outcomes = formats.iter().map(|(tokenizer, format)| {
            format.encode(tokenizer, &chat).map_or_else(|error| said(&error), |_| Ok(()))
        });
        outcomes.collect::<Vec<_>>().into_iter().collect()
    });
}
