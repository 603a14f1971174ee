use std::path::Path;
use std::time::{Duration, Instant};

use galerne_checkpoint::{TextAssets, TokenizerAsset};
use galerne_text::{ChatTemplate, TextError};
use serde_json::{Value, json};

use crate::models::{assets, demo, golden};

fn template(source: &str) -> Result<ChatTemplate, TextError> {
    let assets = TextAssets {
        chat_template: Some(source.into()),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..assets(TokenizerAsset::None)
    };
    Ok(ChatTemplate::load(&assets)?.expect("a template"))
}

fn render(source: &str) -> Result<String, TextError> {
    template(source)?.render(&[json!({"role": "user", "content": "secret"})], None, true)
}

#[test]
fn templates_render_as_in_transformers() {
    for case in golden("templates.json").as_array().expect("cases") {
        let file = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/templates")
            .join(case["template"].as_str().expect("name"));
        let template = template(&std::fs::read_to_string(file).expect("a template")).expect("valid");
        let messages = case["messages"].as_array().expect("messages");
        let tools = case["tools"].as_array().map(Vec::as_slice);
        let rendered = template.render(messages, tools, case["add_generation_prompt"] == true);
        let name = format!("{} {}", case["template"], case["conversation"]);
        match (&case["rendered"], &case["refused"]) {
            (Value::String(expected), _) => assert_eq!(&rendered.expect(&name), expected, "{name}"),
            (_, Value::String(expected)) => {
                assert!(
                    matches!(&rendered, Err(TextError::Refused(message)) if message == expected),
                    "{name}: {rendered:?}"
                );
            }
            _ => assert!(matches!(&rendered, Err(TextError::Render { .. })), "{name}: {rendered:?}"),
        }
    }
}

#[test]
fn the_demo_models_template_is_chatml() {
    let template = ChatTemplate::load(&demo()).expect("valid").expect("a template");
    for case in golden("templates.json")
        .as_array()
        .expect("cases")
        .iter()
        .filter(|case| case["template"] == "chatml.jinja")
    {
        let (Some(expected), Some(messages)) = (case["rendered"].as_str(), case["messages"].as_array())
        else {
            continue;
        };
        assert_eq!(
            template.render(messages, None, case["add_generation_prompt"] == true).expect("rendered"),
            expected
        );
    }
}

#[test]
fn a_model_without_a_template_has_none() {
    assert!(ChatTemplate::load(&assets(TokenizerAsset::None)).expect("no error").is_none());
}

#[test]
fn errors_tell_the_line_and_not_the_conversation() {
    let error = render("{{ bos_token }}\n{% for x in %}").expect_err("not Jinja");
    assert!(matches!(error, TextError::Template { line: 2, .. }), "{error}");
    let error = render("ok\n\n{{ messages[0].content.no_such_method() }}").expect_err("no such method");
    assert!(matches!(error, TextError::Render { line: 3, .. }), "{error}");
    assert!(!error.to_string().contains("secret"), "{error}");
    let error =
        render("{% if true %}{{ raise_exception('only ' ~ 'tools') }}{% endif %}").expect_err("refused");
    assert_eq!(error.to_string(), "the model's chat template refuses this conversation: only tools");
}

#[test]
fn a_hostile_template_ends_soon() {
    let start = Instant::now();
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for a in range(100000) %}{{ 'x' * 1000000 }}{% endfor %}",
        "{% macro m(n) %}{% for a in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
        "{% for a in range(100000) %}{% for b in messages[0].content * 100000 %}{% endfor %}{% endfor %}",
    ] {
        let error = render(source).expect_err(source);
        assert!(matches!(error, TextError::Endless { .. } | TextError::Render { .. }), "{source}: {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(render("{% include '/etc/passwd' %}").is_err(), "no file is read");
}

#[test]
fn a_template_knows_the_date() {
    let year = render("{{ strftime_now('%Y') }}").expect("a year").parse::<u32>().expect("a number");
    assert!(year >= 2024, "{year}");
}
