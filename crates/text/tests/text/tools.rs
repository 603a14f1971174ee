use std::sync::LazyLock;

use galerne_checkpoint::{TextAssets, TokenizerAsset};
use galerne_grammar::{Limits, Vocabulary};
use galerne_text::{ChatFormat, Part, TextError, Tokenizer, ToolElse, ToolForce, ToolFormat, ToolParser};
use galerne_types::Grammar;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::models::{bard_path, mistral, mistral_assets};

const HERMES: &str = "{% if tools %}<tool_call>{\"name\": ..., \"arguments\": ...}</tool_call>{% endif %}";
const LLAMA: &str =
    "{% if tools %}{\"name\": function name, \"parameters\": dictionary of values}{% endif %}";

fn mistrals() -> ToolFormat {
    format_of(&mistral_assets("v3")).expect("Mistral's tools")
}

fn of_template(template: &str) -> Option<ToolFormat> {
    let assets = TextAssets {
        tokenizer: TokenizerAsset::Json(bard_path()),
        chat_template: Some(template.to_owned()),
        sentencepiece: None,
        ..mistral_assets("v3")
    };
    format_of(&assets)
}

fn format_of(assets: &TextAssets) -> Option<ToolFormat> {
    let tokenizer = Tokenizer::load(assets).expect("a tokenizer");
    ChatFormat::load(assets, &tokenizer, None).expect("no error").expect("a format").tool_format()
}

fn formats() -> [ToolFormat; 3] {
    static FORMATS: LazyLock<[ToolFormat; 3]> = LazyLock::new(|| {
        [mistrals(), of_template(HERMES).expect("Hermes"), of_template(LLAMA).expect("Llama")]
    });
    FORMATS.clone()
}

/// Everything that comes of the pieces, neighbours of one kind as one.
fn parts<'t>(format: &ToolFormat, pieces: impl IntoIterator<Item = &'t str>) -> Vec<Part> {
    let mut calls = 0;
    let mut parser = ToolParser::new(format, move || {
        calls += 1;
        format!("id{calls}")
    });
    let mut all = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect::<Vec<_>>();
    all.extend(parser.finish());
    let mut joined = Vec::<Part>::new();
    for part in all {
        match (joined.last_mut(), part) {
            (Some(Part::Content(before)), Part::Content(text)) => before.push_str(&text),
            (Some(Part::Arguments { index: i, text: before }), Part::Arguments { index, text })
                if *i == index =>
            {
                before.push_str(&text);
            }
            (_, part) => joined.push(part),
        }
    }
    joined
}

fn content(text: &str) -> Part {
    Part::Content(text.to_owned())
}

fn call(index: usize, name: &str, arguments: &str) -> [Part; 2] {
    let (id, name) = (format!("id{}", index + 1), name.to_owned());
    [Part::Call { index, id, name }, Part::Arguments { index, text: arguments.to_owned() }]
}

#[test]
fn calls_are_parted_from_content() {
    let [mistral, hermes, llama] = formats();
    let two = [call(0, "f", r#"{"a": "}{\"]", "b": [1, {}]}"#), call(1, "g-2", "{}")].concat();
    let cases = [
        (
            &mistral,
            r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "}{\"]", "b": [1, {}]}}, {"name":"g-2","arguments":{}}]"#,
        ),
        (
            &mistral,
            r#"[TOOL_CALLS][{"arguments": {"a": "}{\"]", "b": [1, {}]}, "name": "f", "id": "abcdefghi"} ,{"id": 7, "x": [{"y": "]"}], "name":"g\u002d2"}]  "#,
        ),
        (
            &mistral,
            r#"[TOOL_CALLS] [{"name": "f", "arguments": "{\"a\": \"}{\\\"]\", \"b\": [1, {}]}"}, {"name":"g-2"}"#,
        ),
        (
            &hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}{\\\"]\", \"b\": [1, {}]}}\n</tool_call>\n<tool_call>{\"name\": \"g-2\"}</tool_call>\n",
        ),
        (
            &hermes,
            "\n <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"}{\\\"]\", \"b\": [1, {}]}}<tool_call>{\"name\": \"g-2\", \"arguments\": {}}</tool",
        ),
        (
            &llama,
            "{\"name\": \"f\", \"parameters\": {\"a\": \"}{\\\"]\", \"b\": [1, {}]}}; {\"name\": \"g-2\", \"parameters\": {}}",
        ),
        (
            &llama,
            "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": \"}{\\\"]\", \"b\": [1, {}]}}\n<|python_tag|> {\"parameters\": {}, \"name\": \"g-2\"}",
        ),
    ];
    for (format, text) in cases {
        assert_eq!(parts(format, [text]), two, "{text}");
    }
    let around = parts(&mistral, ["Let me see. [TOOL_CALLS] [{\"name\":\"f\",\"arguments\":{}}] Done. "]);
    let expected =
        [vec![content("Let me see.")], call(0, "f", "{}").to_vec(), vec![content(" Done. ")]].concat();
    assert_eq!(around, expected);
}

#[test]
fn what_is_no_call_is_content_and_nothing_is_lost() {
    let [mistral, hermes, llama] = formats();
    for (format, text) in [
        (&mistral, "An answer, [TOOL_ CALLS] [1, 2] and more.\n"),
        (&mistral, "[TOOL_CALLS] []"),
        (&mistral, "[TOOL_CALLS] [{\"name\": \"\", \"arguments\": {}}]"),
        (&mistral, "[TOOL_CALLS] [{\"name\": 7}]"),
        (&mistral, "[TOOL_CALLS] [{'name': 'f'}]"),
        (&mistral, "[TOOL_CALLS] [{\"nam"),
        (&mistral, "[TOOL_CALLS] [{\"arguments\": {\"name\": \"f\"}}]"),
        (&mistral, "[TOOL_CALLS"),
        (&hermes, "<tool_call>\nnot JSON\n</tool_call>"),
        (&hermes, "1 <tool_ <tool_cal"),
        (&llama, "{\"name\": \"Bob\", \"age\": 7}"),
        (&llama, "<|python_tag|>print({\"name\": \"f\"})"),
        (&llama, "I say {\"name\": \"f\", \"parameters\": {}}"),
        (&llama, "  \n"),
    ] {
        assert_eq!(parts(format, [text]), [content(text)], "{text}");
    }
    let text = "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}, oops]";
    let expected = [call(0, "f", "{}").to_vec(), vec![content(", oops]")]].concat();
    assert_eq!(parts(&mistral, [text]), expected);
    let text = "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let expected = [vec![content("<tool_call>")], call(0, "f", "{}").to_vec()].concat();
    assert_eq!(parts(&hermes, [text]), expected);
}

#[test]
fn a_call_is_told_as_soon_as_it_can_be() {
    let mut parser = ToolParser::new(&mistrals(), || "id".to_owned());
    let mut push = |text: &str| parser.push(text);
    assert_eq!(push("Well [TOOL_"), [content("Well")]);
    assert_eq!(push("CALLS] [{\"name\": \"get"), []);
    assert_eq!(push("_time\""), [Part::Call { index: 0, id: "id".into(), name: "get_time".into() }]);
    assert_eq!(push(", \"arguments\": {\"zo"), [Part::Arguments { index: 0, text: "{\"zo".into() }]);
    assert_eq!(push("ne\": 1}}"), [Part::Arguments { index: 0, text: "ne\": 1}".into() }]);
    assert_eq!(push("] "), []);
}

proptest! {
    #[test]
    fn any_cut_gives_the_same_parts(
        words in prop::collection::vec(prop::sample::select(vec![
            "[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_", "<tool", " ", "\n", "[", "]", "{", "}", "{}", ",", ":", ";", "\"",
            "\"name\": \"f\"", "\"arguments\": ", "\"parameters\": ", "{\"a\": \"}\\\"\"}", "\"{\\\"é\\\": 1}\"", "\"\\ud83d\\ude00\\u00e9\"", "7", "null", "text", "é",
            "[{\"name\": \"f\", \"arguments\": {\"x\": [1]}}]", "{\"name\": \"g\", \"parameters\": {}}",
        ]), 0..24),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let text = words.concat();
        let mut cuts = cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect::<Vec<_>>();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        for format in formats() {
            let whole = parts(&format, [text.as_str()]);
            prop_assert_eq!(&parts(&format, cuts.windows(2).map(|cut| &text[cut[0]..cut[1]])), &whole);
            let by_char = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
            prop_assert_eq!(&parts(&format, by_char), &whole);
            if !whole.iter().any(|part| matches!(part, Part::Call { .. })) {
                prop_assert_eq!(whole, if text.is_empty() { vec![] } else { vec![content(&text)] });
            }
        }
    }
}

#[test]
fn templates_show_how_calls_are_written() {
    assert_eq!(mistrals().markers(), [5]);
    assert_eq!(of_template(HERMES).expect("Hermes").markers(), [0; 0], "not a special token here");
    assert_eq!(of_template("{{ messages }}"), None);
    assert_eq!(
        of_template("<tool_call><function=f></function></tool_call>"),
        None,
        "a style that is not known"
    );
    assert_eq!(format_of(&mistral_assets("v1")), None);
}

fn tools() -> Vec<Value> {
    let place = json!({"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"], "$defs": {"place": {"enum": ["Paris", "Rome"]}}});
    vec![
        json!({"type": "function", "function": {"name": "weather", "parameters": place}}),
        json!({"type": "function", "function": {"name": "time"}}),
    ]
}

/// Whether the model could write `text` under the grammar, and end there.
fn allows(tokenizer: &Tokenizer, grammar: &str, text: &str) -> bool {
    let size = u32::try_from(tokenizer.vocab_size()).expect("a vocabulary");
    let vocabulary = Vocabulary::new(size, &[2], |id| (tokenizer.token_bytes(id), tokenizer.is_special(id)));
    let compiled =
        vocabulary.expect("an end token").compile(&Grammar::Lark(grammar.to_owned()), &Limits::default());
    let mut constraint = compiled.unwrap_or_else(|error| panic!("{error}:\n{grammar}"));
    let mut ids = tokenizer.encode(text, false).expect(text);
    // SentencePiece writes a blank before a text, which a grammar that has none there does not know.
    if let Some(first) = ids.first_mut()
        && let Some(bare) = tokenizer.token_bytes(*first).strip_prefix(b" ")
        && !text.starts_with(' ')
    {
        *first =
            (0..size).find(|id| tokenizer.token_bytes(*id) == bare).expect("the same token without a blank");
    }
    constraint.advance(&ids).is_ok() && constraint.is_whole()
}

fn bard() -> Tokenizer {
    let bard = Tokenizer::load(&TextAssets {
        tokenizer: TokenizerAsset::Json(bard_path()),
        sentencepiece: None,
        ..mistral_assets("v3")
    });
    bard.expect("bard-1m's tokenizer")
}

fn object(name: &str, key: &str, arguments: &str) -> String {
    format!("{{\"name\": \"{name}\", \"{key}\": {arguments}}}")
}

fn written(format: &ToolFormat, calls: &[String]) -> String {
    let [mistral, hermes, _] = formats();
    match format {
        f if *f == mistral => format!("[TOOL_CALLS][{}]", calls.join(", ")),
        f if *f == hermes => {
            let calls = calls.iter().map(|call| format!("<tool_call>\n{call}\n</tool_call>"));
            calls.collect::<Vec<_>>().join("\n")
        }
        _ => calls.join("; "),
    }
}

#[test]
fn a_call_that_may_be_made_or_not() {
    let (v3, bard) = (mistral("v3"), bard());
    let [mistral, hermes, llama] = formats();
    let mut tools = tools();
    tools[0]["function"]["strict"] = json!(true);
    for (format, tokenizer, key) in
        [(&mistral, &v3, "arguments"), (&hermes, &bard, "arguments"), (&llama, &bard, "parameters")]
    {
        let rome = object("weather", key, "{\"at\": \"Rome\"}");
        let oslo = object("weather", key, "{\"at\": \"Oslo\"}");
        let time = object("time", key, "{\"zone\": [1]}"); // not strict
        let (good, both) =
            (written(format, std::slice::from_ref(&rome)), written(format, &[rome.clone(), time]));
        let (wrong, other) = (written(format, &[oslo]), written(format, &[object("fly", key, "{}")]));
        let free = format.grammar_or_else(&tools, ToolElse::Words, true).expect("a grammar");
        for text in ["It is late.", "", "no < [TOOL or <tool_ here, \n{}", &good, &both] {
            assert!(allows(tokenizer, &free, text), "{text:?} under {free}");
        }
        for text in [&wrong, &other] {
            assert!(!allows(tokenizer, &free, text), "{text:?} under {free}");
        }
        // Llama's calls are the whole answer.
        if *format != llama {
            assert!(allows(tokenizer, &free, &format!("So be it: {good}")), "{free}");
            assert!(!allows(tokenizer, &free, &format!("So be it: {wrong}")), "{free}");
        }
        let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]});
        let shaped = format.grammar_or_else(&tools, ToolElse::Json(&schema), false).expect("a grammar");
        for (text, allowed) in [
            ("{\"n\": 2}", true),
            (good.as_str(), true),
            ("{\"n\": 3}", false),
            ("It is late.", false),
            (&wrong, false),
            (&both, false),
        ] {
            assert_eq!(allows(tokenizer, &shaped, text), allowed, "{text:?} under {shaped}");
        }
        let texts = ["yes".to_owned(), "a \"no\"".to_owned()];
        let choice = format.grammar_or_else(&tools, ToolElse::OneOf(&texts), true).expect("a grammar");
        for (text, allowed) in
            [("yes", true), ("a \"no\"", true), (&both, true), ("no", false), (&wrong, false)]
        {
            assert_eq!(allows(tokenizer, &choice, text), allowed, "{text:?} under {choice}");
        }
    }
}

#[test]
fn a_forced_call_is_one_that_the_parser_reads() {
    let (v3, bard) = (mistral("v3"), bard());
    let [mistral, hermes, llama] = formats();
    let rome = |key| object("weather", key, "{\"at\": \"Rome\"}");
    let time = |key| object("time", key, "{}");
    for (format, tokenizer, key) in
        [(&mistral, &v3, "arguments"), (&hermes, &bard, "arguments"), (&llama, &bard, "parameters")]
    {
        let any = format.grammar(&tools(), ToolForce::Any, true).expect("a grammar");
        let one = format.grammar(&tools(), ToolForce::Any, false).expect("a grammar");
        let named = format.grammar(&tools(), ToolForce::Named("time"), false).expect("a grammar");
        let (first, both) = (written(format, &[rome(key)]), written(format, &[rome(key), time(key)]));
        assert!(allows(tokenizer, &any, &both) && allows(tokenizer, &any, &first), "{any}");
        assert!(allows(tokenizer, &one, &first) && !allows(tokenizer, &one, &both), "{one}");
        let last = written(format, &[time(key)]);
        assert!(allows(tokenizer, &named, &last) && !allows(tokenizer, &named, &first), "{named}");
        let elsewhere = written(format, &[object("weather", key, "{\"at\": \"Oslo\"}")]);
        assert!(!allows(tokenizer, &any, &elsewhere), "{any}");
        assert!(!allows(tokenizer, &any, "It is late."), "{any}");
        assert_eq!(parts(format, [both.as_str()]).len(), 4);
    }
    let refusal = |tools: &[Value], force| mistral.grammar(tools, force, true).expect_err("a refusal");
    assert!(matches!(refusal(&[], ToolForce::Any), TextError::Tools(_)));
    assert!(refusal(&tools(), ToolForce::Named("fly")).to_string().contains("none of the tools"));
}
