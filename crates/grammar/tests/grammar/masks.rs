use galerne_grammar::{GrammarError, Limits, Vocabulary};
use galerne_types::Grammar;

use crate::{Words, accepts, allows, compile, schema};

/// Some next number of a fixed sequence.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Walks through `grammar` and holds, at every step, each bit of the mask against the definition: a token may come
/// if the text with its bytes is the beginning of a text that `begins` knows, the end if `whole` knows the text.
fn agree(grammar: &Grammar, begins: &dyn Fn(&[u8]) -> bool, whole: &dyn Fn(&[u8]) -> bool) {
    let words = Words::new();
    let vocabulary = words.vocabulary();
    let mut state = 7;
    for _ in 0..30 {
        let mut constraint = vocabulary.compile(grammar, &Limits::default()).unwrap();
        let mut text = Vec::new();
        loop {
            let mask = constraint.mask().unwrap();
            let mut allowed = Vec::new();
            for token in 0..words.size() {
                let expected = if token == words.end() {
                    whole(&text)
                } else {
                    token != words.tool() && begins(&[&text, words.bytes(token)].concat())
                };
                let shown = String::from_utf8_lossy(&text);
                assert_eq!(allows(&mask, token), expected, "token {token} after {shown:?} of {grammar:?}");
                if expected {
                    allowed.push(token);
                }
            }
            assert_eq!(constraint.is_whole(), whole(&text));
            let token = allowed[next(&mut state) as usize % allowed.len()];
            constraint.drawn(token).unwrap();
            if token == words.end() {
                break;
            }
            text.extend_from_slice(words.bytes(token));
        }
        let mask = constraint.mask().unwrap();
        let end_alone = (0..words.size()).all(|token| allows(&mask, token) == (token == words.end()));
        assert!(end_alone, "after the end");
        constraint.drawn(0).unwrap(); // what a step that was under way drew changes nothing
    }
}

/// [`agree`] for a grammar of a few texts.
fn agree_with_texts(grammar: &Grammar, texts: &[&str]) {
    let begins = |text: &[u8]| texts.iter().any(|whole| whole.as_bytes().starts_with(text));
    agree(grammar, &begins, &|text| texts.iter().any(|whole| whole.as_bytes() == text));
}

#[test]
fn choices() {
    let texts = ["ab", "abc", "a\"\\\n\té\u{7f}{}", "", "truer", "/x/"];
    agree_with_texts(&Grammar::Choice(texts.map(String::from).to_vec()), &texts);
}

#[test]
fn regular_expressions() {
    let grammar = |regex: &str| Grammar::Regex(regex.to_owned());
    agree_with_texts(&grammar("(ab|a)(c|cd){0,1}"), &["ab", "a", "abc", "ac", "abcd", "acd"]);
    agree_with_texts(&grammar("é|tr(ue)?|1?0/x"), &["é", "tr", "true", "10/x", "0/x"]);
    let numbers = |text: &[u8]| text.iter().all(u8::is_ascii_digit);
    agree(&grammar("[0-9]{2,6}"), &|text| text.len() <= 6 && numbers(text), &|text| {
        (2..=6).contains(&text.len()) && numbers(text)
    });
}

#[test]
fn rules() {
    let grammar = Grammar::Lark("start: \"a\" start \"b\" | \"c\" # nested\n".to_owned());
    // aⁿ c bⁿ
    let parts = |text: &[u8]| {
        let ahead = text.iter().take_while(|&&byte| byte == b'a').count();
        let behind = text[ahead..].strip_prefix(b"c");
        (ahead, behind.map(<[u8]>::len), text[ahead..].is_empty())
    };
    let begins = |text: &[u8]| match parts(text) {
        (ahead, Some(behind), _) => behind <= ahead && text[ahead + 1..].iter().all(|&byte| byte == b'b'),
        (_, None, only_a) => only_a,
    };
    let whole =
        |text: &[u8]| begins(text) && matches!(parts(text), (ahead, Some(behind), _) if ahead == behind);
    agree(&grammar, &begins, &whole);
}

/// A piece of JSON, or the place between two of them.
#[derive(Clone, Copy)]
enum Part<'a> {
    Text(&'a str),
    Gap,
}

/// Whether `text` is the beginning of `parts`, or all of it.
fn reads(text: &[u8], parts: &[Part<'_>], whole: bool) -> bool {
    let Some((part, rest)) = parts.split_first() else { return text.is_empty() };
    if text.is_empty() {
        return !whole || parts.iter().all(|part| matches!(part, Part::Gap));
    }
    match part {
        Part::Text(piece) => match text.strip_prefix(piece.as_bytes()) {
            Some(text) => reads(text, rest, whole),
            None => !whole && piece.as_bytes().starts_with(text),
        },
        Part::Gap => {
            let line = text.strip_prefix(b"\r").unwrap_or(text);
            let breaks = line.strip_prefix(b"\n").map(|line| {
                let blanks = line.iter().take_while(|byte| b" \t".contains(byte)).count();
                blanks <= 16 && reads(&line[blanks..], rest, whole)
            });
            reads(text, rest, whole)
                || text.strip_prefix(b" ").is_some_and(|text| reads(text, rest, whole))
                || breaks.unwrap_or(false)
                || !whole && text == b"\r"
        }
    }
}

#[test]
fn objects() {
    let grammar = schema(
        r#"{"type": "object", "properties": {"ab": {"type": "boolean"}, "c": {"enum": [10, null]}},
            "required": ["ab"], "additionalProperties": false}"#,
    );
    let mut texts = Vec::new();
    for ab in ["true", "false"] {
        let head = ["{", "\"ab\"", ":", ab];
        texts.push([&head[..], &["}"]].concat());
        for c in ["10", "null"] {
            texts.push([&head[..], &[",", "\"c\"", ":", c, "}"]].concat());
        }
    }
    let texts: Vec<Vec<Part<'_>>> = texts
        .into_iter()
        .map(|text| {
            let mut parts: Vec<Part<'_>> =
                text.into_iter().flat_map(|text| [Part::Text(text), Part::Gap]).collect();
            parts.pop();
            parts
        })
        .collect();
    agree(&grammar, &|text| texts.iter().any(|parts| reads(text, parts, false)), &|text| {
        texts.iter().any(|parts| reads(text, parts, true))
    });
}

#[test]
fn a_replay_comes_to_the_same_place() {
    let words = Words::new();
    let vocabulary = words.vocabulary();
    let grammar = Grammar::JsonObject;
    let mut constraint = vocabulary.compile(&grammar, &Limits::default()).unwrap();
    let (mut drawn, mut state) = (Vec::new(), 3);
    for _ in 0..40 {
        let mask = constraint.mask().unwrap();
        let mut replayed = vocabulary.compile(&grammar, &Limits::default()).unwrap();
        replayed.advance(&drawn).unwrap();
        assert_eq!(replayed.mask().unwrap(), mask, "after {drawn:?}");
        let allowed: Vec<u32> = (0..words.size()).filter(|&token| allows(&mask, token)).collect();
        let token = allowed[next(&mut state) as usize % allowed.len()];
        constraint.drawn(token).unwrap();
        drawn.push(token);
    }
}

#[test]
fn forks_go_their_own_ways() {
    let first = compile(&Grammar::Regex("(ab|cd)+".into())).unwrap();
    assert!(first.bytes() > 0);
    let (mut one, mut other) = (first.fork(), first.fork());
    one.advance(&[b'a'.into(), b'b'.into()]).unwrap();
    other.drawn(b'c'.into()).unwrap();
    assert!(one.is_whole() && !other.is_whole());
    assert!(allows(&other.mask().unwrap(), b'd'.into()) && !allows(&other.mask().unwrap(), b'b'.into()));
    assert!(allows(&first.fork().mask().unwrap(), b'c'.into()), "the first one stays where it is");
}

#[test]
fn what_the_mask_forbids_is_noticed() {
    let mut constraint = compile(&Grammar::Choice(vec!["ab".into()])).unwrap();
    assert_eq!(constraint.drawn(b'b'.into()), Err(GrammarError::Forbidden(b'b'.into())));
    let mut constraint = compile(&Grammar::Choice(vec!["ab".into()])).unwrap();
    constraint.advance(&[b'a'.into(), b'b'.into()]).unwrap();
    assert_eq!(constraint.drawn(b'c'.into()), Err(GrammarError::Forbidden(b'c'.into())));
}

#[test]
fn a_list_of_calls_as_the_router_asks_for_it() {
    let rules = r#"start: "[" call (", " call){0,7} "]"
call: call_0 | call_1
call_0: "{\"name\": \"add\", \"arguments\": " call_0_arguments "}"
call_0_arguments: %json {"type":"object","properties":{"a":{"type":"integer"}},"required":["a"],"additionalProperties":false}
call_1: "{\"name\": \"now\", \"arguments\": " call_1_arguments "}"
call_1_arguments: %json {"type":"object","properties":{},"additionalProperties":false}
"#;
    let grammar = Grammar::Lark(rules.to_owned());
    for (text, whole) in [
        (r#"[{"name": "now", "arguments": {}}]"#, true),
        (r#"[{"name": "add", "arguments": {"a": 12}}, {"name": "now", "arguments": {}}]"#, true),
        (r#"[{"name": "add", "arguments": {}}]"#, false),
        (r#"[{"name": "sub", "arguments": {}}]"#, false),
        ("[]", false),
    ] {
        assert_eq!(accepts(&grammar, text), whole, "{text}");
    }
}

#[test]
fn a_token_that_marks_structure_is_asked_for_by_its_id() {
    let words = Words::new();
    let mut constraint = compile(&Grammar::Lark(format!("start: <[{}]> \"ab\"", words.tool()))).unwrap();
    let mask = constraint.mask().unwrap();
    assert!((0..words.size()).all(|token| allows(&mask, token) == (token == words.tool())));
    constraint.drawn(words.tool()).unwrap();
    assert!(allows(&constraint.mask().unwrap(), b'a'.into()));
}

#[test]
fn a_model_that_cannot_end_cannot_keep_to_a_grammar() {
    let error = Vocabulary::new(4, &[], |_| (b"a", false)).err().unwrap();
    assert!(error.to_string().contains("no end token"), "{error}");
    assert!(Vocabulary::new(4, &[4], |_| (b"a", false)).is_err(), "beyond the model's head");
}

#[test]
fn json_neither_loops_on_blanks_nor_spells_a_name_twice() {
    assert!(accepts(&Grammar::JsonObject, "{\"a\": 1, \"b\": [1, 2]}"));
    assert!(accepts(&Grammar::JsonObject, "{\n  \"a\": 1,\n  \"b\": {}\n}"));
    assert!(accepts(&Grammar::JsonObject, "{\"é\":\"\\n\\\"\"}"));
    assert!(!accepts(&Grammar::JsonObject, "{  \"a\": 1}"));
    assert!(!accepts(&Grammar::JsonObject, "{\n\n\"a\": 1}"));
    assert!(!accepts(&Grammar::JsonObject, "{} "), "nor behind the end");
    assert!(!accepts(&Grammar::JsonObject, "{\"\\u0061\":1}"));
    assert!(!accepts(&Grammar::JsonObject, "[]"));
}
