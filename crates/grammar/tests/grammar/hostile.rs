use std::fmt::Write as _;
use std::time::{Duration, Instant};

use galerne_types::Grammar;

use crate::{Words, allows, compile, schema};

/// A hostile grammar's compilation ends within this; most take a hundredth of it.
const PATIENCE: Duration = Duration::from_secs(5);

fn nested(open: &str, inner: &str, close: &str, times: usize) -> String {
    format!("{}{inner}{}", open.repeat(times), close.repeat(times))
}

fn listed(count: usize, item: impl Fn(usize) -> String) -> String {
    let items: Vec<String> = (0..count).map(item).collect();
    items.join(",")
}

/// Compiles, and draws some tokens if that succeeds: whatever it is, it ends soon, by an answer or an error.
fn survives(name: &str, grammar: &Grammar) {
    let began = Instant::now();
    let words = Words::new();
    let outcome = match compile(grammar) {
        Err(error) => error.to_string(),
        Ok(mut constraint) => (|| {
            for _ in 0..20 {
                let mask = match constraint.mask() {
                    Ok(mask) => mask,
                    Err(error) => return error.to_string(),
                };
                let token =
                    (0..words.size()).rev().find(|&token| token != words.end() && allows(&mask, token));
                constraint.drawn(token.unwrap_or(words.end())).unwrap();
            }
            "compiles".to_owned()
        })(),
    };
    let took = began.elapsed();
    println!("{took:?} {name}: {outcome}");
    assert!(took < PATIENCE, "{name} took {took:?}: {outcome}");
    assert!(!outcome.contains("bug"), "{name}: {outcome}");
    assert!(outcome.len() < 500, "{name}: {outcome}");
}

#[test]
fn hostile_schemas_end_soon() {
    let chain = listed(3000, |i| format!("\"d{i}\":{{\"$ref\":\"#/$defs/d{}\"}}", i + 1));
    let wide = listed(900, |i| format!("\"p{i}\":{{}}"));
    let wider = listed(20_000, |i| format!("\"p{i}\":{{}}"));
    let choices = listed(3000, |_| "{}".into());
    let typed = listed(60, |i| format!("{{\"properties\":{{\"a{i}\":{{\"type\":\"string\"}}}}}}"));
    let patterns = listed(64, |i| format!("\"^(a|b|ab){{1,{i}9}}c\":{{}}"));
    let pattern = listed(60, |i| format!("\"p{i}\":{{\"pattern\":\"^(.*a){{30}}[{i}]$\",\"minLength\":9}}"));
    let either = format!("{{\"anyOf\":[{typed}]}}");
    let cases = [
        ("deep", nested("{\"items\":", "{}", "}", 100)),
        ("deeper than JSON goes", nested("{\"items\":", "{}", "}", 40_000)),
        ("a chain of references", format!("{{\"$ref\":\"#/$defs/d0\",\"$defs\":{{{chain},\"d3000\":{{}}}}}}")),
        ("many properties", format!("{{\"properties\":{{{wide}}},\"additionalProperties\":false}}")),
        ("too many properties", format!("{{\"properties\":{{{wider}}}}}")),
        ("all required, or not", format!("{{\"minProperties\":5,\"properties\":{{{wide}}}}}")),
        ("alternatives beside a wide object", format!("{{\"properties\":{{{wide}}},\"anyOf\":[{choices}]}}")),
        ("alternatives multiplied", format!("{{\"allOf\":[{either},{either},{either},{either}]}}")),
        ("one of many", format!("{{\"oneOf\":[{}]}}", listed(5000, |i| format!("{{\"const\":\"{i}\"}}")))),
        ("a long enum", format!("{{\"enum\":[{}]}}", listed(20_000, |i| i.to_string()))),
        ("an enum beside an object", format!("{{\"properties\":{{{wide}}},\"enum\":[{}]}}", listed(9000, |_| "null".into()))),
        ("many patterns", format!("{{\"patternProperties\":{{{patterns}}}}}")),
        ("heavy patterns", format!("{{\"properties\":{{{pattern}}}}}")),
        ("a giant number", "{\"minimum\":1e400}".into()),
        ("large numbers", "{\"type\":\"integer\",\"minimum\":-1e300,\"maximum\":1e300}".into()),
        ("small numbers", "{\"type\":\"number\",\"minimum\":1e-300,\"maximum\":2e-300}".into()),
        ("large multiples", "{\"type\":\"integer\",\"multipleOf\":4294967291}".into()),
        ("small multiples", "{\"type\":\"number\",\"multipleOf\":1e-9}".into()),
        ("multiples of many", format!("{{\"type\":\"integer\",\"allOf\":[{}]}}", listed(20, |i| format!("{{\"multipleOf\":{}}}", 9_973 + i * 2)))),
        ("a long string", "{\"type\":\"string\",\"minLength\":1000000,\"maxLength\":2000000}".into()),
        ("a longer string", "{\"type\":\"string\",\"minLength\":99999999999}".into()),
        ("a long array", "{\"type\":\"array\",\"minItems\":4000000000,\"items\":{\"type\":\"null\"}}".into()),
        ("a long array of arrays", nested("{\"type\":\"array\",\"minItems\":1000,\"maxItems\":1001,\"items\":", "{}", "}", 20)),
        ("an exponential pattern", "{\"pattern\":\"^(a|a)*(b|b)*((a|b)*c){40}(.*x.{30})$\"}".into()),
        ("patterns at once", format!("{{\"type\":\"string\",\"allOf\":[{}]}}", listed(12, |i| format!("{{\"pattern\":\"(.*[a-{}].{{{i}}}x)\"}}", char::from(b'c' + i as u8))))),
        ("a reference beside keywords", r##"{"type":"object","properties":{"a":{"$ref":"#","minProperties":1}}}"##.into()),
        ("two trees at once", r##"{"allOf":[{"$ref":"#/$defs/a"},{"$ref":"#/$defs/b"}],"$defs":{"a":{"type":"object","properties":{"c":{"$ref":"#/$defs/a"}}},"b":{"type":"object","properties":{"c":{"$ref":"#/$defs/b"}}}}}"##.into()),
        ("left recursion", r##"{"anyOf":[{"$ref":"#"},{"$ref":"#/anyOf/0"},{"type":"null"}]}"##.into()),
        ("strange types", r#"{"type":{"a":1},"required":"a","enum":{},"properties":{"a":[]}}"#.into()),
        ("strange keywords", r#"{"required":[1],"minLength":-1,"pattern":3,"multipleOf":0,"items":[[]]}"#.into()),
        ("a zero multiple", r#"{"type":"integer","multipleOf":0}"#.into()),
        ("a name of quotes", "{\"properties\":{\"\\\"\\\\\\u0000\\ud83d\\ude00\":{}},\"required\":[\"\\\"\\\\\\u0000\\ud83d\\ude00\"]}".into()),
    ];
    for (name, text) in cases {
        survives(name, &schema(&text));
    }
}

#[test]
fn hostile_rules_end_soon() {
    let regex = |text: &str| Grammar::Regex(text.to_owned());
    let lark = |text: &str| Grammar::Lark(text.to_owned());
    let mut many = String::from("start: r0\n");
    for rule in 0..5000 {
        writeln!(many, "r{rule}: \"a\" r{} | \"b\" r{}", rule + 1, (rule * 7) % 5000).unwrap();
    }
    many.push_str("r5000: \"c\"\n");
    let doubling: String = (0..40).map(|i| format!("r{i}: r{} r{}\n", i + 1, i + 1)).collect();
    let cases = [
        ("no expression", regex("(")),
        ("look-around", regex("a(?=b)")),
        ("back-reference", regex("(a)\\1")),
        ("nested groups", regex(&nested("(", "a", ")", 10_000))),
        ("nested repeats", regex("((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}")),
        ("ambiguous", regex("(a|a|a|aa)*(a*)*b")),
        ("the last but n", regex("(.*)x(.{40})y(.{50})z")),
        ("conjunction", regex(&"(.*a.*b.*)?".repeat(200))),
        ("a long literal", regex(&"ab/é\\.".repeat(20_000))),
        ("nothing", regex("[^\\s\\S]")),
        ("empty", regex("")),
        ("nested rules", lark(&format!("start: {}", nested("(", "\"a\"", ")", 50_000)))),
        ("a rule of itself", lark("start: start")),
        ("rules of each other", lark("start: a\na: b\nb: a")),
        ("ambiguous rules", lark("start: start start | \"a\" | ")),
        ("many rules", lark(&many)),
        ("doubling rules", lark(&format!("start: r0\n{doubling}r40: \"a\" | \"b\""))),
        ("huge repeats", lark("start: (\"a\" \"b\"){1,1000000000}")),
        ("repeats of repeats", lark("start: a{1000}\na: b{1000}\nb: c{1000}\nc: \"x\"{1000}")),
        ("an import", lark("%import common.INT\nstart: INT")),
        ("no start", lark("a: \"b\"")),
        ("another language", lark("root ::= \"a\"")),
        ("a strange token", lark("start: <[4000000000]>")),
        ("no such token", lark("start: <|nothing|>")),
        ("bytes", lark("start: /[\\xff]/")),
        ("not at all", lark("\u{0}\u{1}{{{{[[[[((((%json %lark %if")),
        ("too many choices", Grammar::Choice(vec!["a".into(); 5000])),
        ("no choice", Grammar::Choice(Vec::new())),
        ("an empty choice", Grammar::Choice(vec![String::new()])),
        ("large choices", Grammar::Choice((0..200).map(|i| format!("{i}").repeat(400)).collect())),
        ("too large", Grammar::Choice(vec!["a".repeat(1 << 20)])),
    ];
    for (name, grammar) in cases {
        survives(name, &grammar);
    }
}

#[test]
fn control_characters_of_a_grammar_do_not_reach_a_terminal() {
    for grammar in
        [Grammar::Regex("(\u{1b}[2J\u{0}".to_owned()), Grammar::Lark("sta\u{1b}[2J\u{0}rt".to_owned())]
    {
        let says = compile(&grammar).expect_err("a refusal").to_string();
        assert!(!says.contains(char::is_control), "{says:?}");
    }
}
