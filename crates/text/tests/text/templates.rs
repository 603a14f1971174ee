use std::path::Path;

use galerne_checkpoint::{TextAssets, TokenizerAsset};
use galerne_text::{Chat, ChatFormat, ChatTemplate, TextError, Tokenizer};
use serde_json::{Value, json};

use crate::models::{assets, bard_path, demo, golden};

fn template(source: &str) -> Result<ChatTemplate, TextError> {
    let assets = TextAssets {
        chat_template: Some(source.into()),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..assets(TokenizerAsset::None)
    };
    Ok(ChatTemplate::load(&assets)?.expect("a template"))
}

pub(crate) fn render(source: &str) -> Result<String, TextError> {
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

/// The prompt that a template makes of a conversation, as text.
fn prompt(source: &str, change: impl FnOnce(&mut Chat)) -> Result<String, TextError> {
    let assets =
        TextAssets { chat_template: Some(source.into()), ..assets(TokenizerAsset::Json(bard_path())) };
    let tokenizer = Tokenizer::load(&assets)?;
    let format = ChatFormat::load(&assets, &tokenizer, None)?.expect("a format");
    let messages = vec![json!({"role": "user", "content": "Count"})];
    let mut chat = Chat { messages, add_generation_prompt: true, ..Chat::default() };
    change(&mut chat);
    Ok(tokenizer.decode(&format.encode(&tokenizer, &chat)?, false))
}

#[test]
fn the_final_message_is_continued_where_it_ends() {
    let plain = "{% for m in messages %}({{ m.role }}: {{ m.content }})\n{% endfor %}{% if add_generation_prompt %}!{% endif %}";
    let trimming = &plain.replace("m.content", "m.content | trim");
    let parts = &plain.replace("m.content", "(m.content if m.content is string else m.content[-1].text)");
    let continued = |source: &str, content: Value| {
        prompt(source, |chat| {
            chat.continue_final = true;
            chat.messages.push(json!({"role": "assistant", "content": content}));
        })
    };
    for (source, content, expected) in [
        (plain, json!("one, "), "(user: Count)\n(assistant: one, "),
        (plain, json!(""), "(user: Count)\n(assistant: "),
        (trimming, json!(" one, "), "(user: Count)\n(assistant: one,"),
        (parts, json!([{"type": "text", "text": "one"}]), "(user: Count)\n(assistant: one"),
    ] {
        assert_eq!(continued(source, content).expect(source), expected, "{source}");
    }
    let refused = |result: Result<String, TextError>| match result {
        Err(TextError::Conversation(problem)) => problem,
        other => panic!("{other:?}"),
    };
    assert!(refused(continued(plain, Value::Null)).contains("must be text"));
    assert!(refused(continued("{{ messages[0].content }}", json!("x"))).contains("cannot be continued"));
    assert!(refused(prompt(plain, |chat| chat.continue_final = true)).contains("must be the assistant's"));
}

#[test]
fn a_client_sets_variables_but_not_the_conversation() {
    let source = "{{ 'thinking' if enable_thinking }}{{ messages[0].content }}";
    let with = |name: &str| prompt(source, |chat| _ = chat.extra.insert(name.to_owned(), true.into()));
    assert_eq!(with("enable_thinking").expect("rendered"), "thinkingCount");
    assert_eq!(with("unknown").expect("rendered"), "Count");
    for name in ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"] {
        let problem = with(name).expect_err(name).to_string();
        assert!(problem.contains(&format!("cannot set {name}")), "{problem}");
    }
}

#[test]
fn a_developer_is_the_system_where_a_template_knows_none() {
    let ask = |source| prompt(source, |chat| chat.messages[0]["role"] = "developer".into());
    assert_eq!(ask("{{ messages[0].role }}").expect("rendered"), "system");
    assert_eq!(ask("{# developer #}{{ messages[0].role }}").expect("rendered"), "developer");
}

#[test]
fn parts_are_one_text_where_a_template_looks_at_none() {
    let ask = |source: &str| {
        prompt(source, |chat| {
            chat.messages[0]["content"] =
                json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
        })
        .expect(source)
    };
    for plain in [
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{% for message in messages %}{{ message['content'] }}{% for x in message.content.split('x') %}{% endfor %}{% endfor %}",
    ] {
        assert_eq!(ask(plain), "one\ntwo");
    }
    for content in ["message.content", "message['content']", "message[\"content\"] | list", "content if true"]
    {
        let parts = format!(
            "{{% for message in messages %}}{{%- set content = message.content %}}{{%- for part in {content} %}}<{{{{ part.text }}}}>{{% endfor %}}{{% endfor %}}"
        );
        assert_eq!(ask(&parts), "<one><two>", "{parts}");
    }
}

#[test]
fn templates_see_arguments_as_objects() {
    let ask = |arguments: Value| {
        prompt("{{ messages[1].tool_calls[0].function.arguments | tojson }}", |chat| {
            let call = json!({"type": "function", "function": {"name": "f", "arguments": arguments}});
            chat.messages.push(json!({"role": "assistant", "content": "", "tool_calls": [call]}));
        })
    };
    for (arguments, expected) in [
        (json!("{\"b\": 1, \"a\": [2.50]}"), "{\"b\": 1, \"a\": [2.5]}"),
        (json!(" "), "{}"),
        (json!({"a": 1}), "{\"a\": 1}"),
    ] {
        assert_eq!(ask(arguments).expect("rendered"), expected);
    }
    for arguments in ["[1]", "{\"a\"", "7"] {
        let error = ask(json!(arguments)).expect_err("no object");
        assert!(matches!(&error, TextError::Conversation(says) if says.contains("message 1")), "{error}");
    }
}

#[test]
fn marks_for_training_are_nothing() {
    let source =
        "a\n{% generation %}\n b {%- generation -%} c {%- endgeneration %} d\n  {% endgeneration %}\ne";
    assert_eq!(render(source).expect("rendered"), "a\n bc d\ne");
}

#[test]
fn operators_are_those_of_python() {
    for (expression, expected) in [
        ("1 + 2", "3"),
        ("messages | length + 2", "3"),
        ("loose + 2.5", "3.5"),
        ("'a' + messages[0].role", "auser"),
        ("(messages + messages) | length", "2"),
        ("(['a'] + ['b', 'c'])[1]", "b"),
        ("(loose - 8) % 5", "3"),
        ("loose % -5", "-4"),
        ("(loose + 0.5) % 1", "0.5"),
        ("'%s has %d%%' % (messages[0].role, loose)", "user has 1%"),
        ("'<%s>' % messages[0].role", "<user>"),
    ] {
        let source = format!(
            "{{% set loose = messages | length %}}{{% macro m() %}}{{{{ {expression} }}}}{{% endmacro %}}{{{{ {expression} }}}}|{{{{ m() }}}}"
        );
        assert_eq!(render(&source).expect(expression), format!("{expected}|{expected}"), "{expression}");
    }
    for expression in
        ["missing + 'a'", "'a' + 1", "messages + 1", "messages % 2", "1 % (messages | length - 1)"]
    {
        assert!(render(&format!("{{{{ {expression} }}}}")).is_err(), "{expression}");
    }
}

#[test]
fn a_template_knows_the_date() {
    let year = render("{{ strftime_now('%Y') }}").expect("a year").parse::<u32>().expect("a number");
    assert!(year >= 2024, "{year}");
}
