//! GBNF, against a recognizer that knows nothing of lexemes.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use galerne_grammar::{GrammarError, Limits, Vocabulary};
use galerne_types::Grammar;
use proptest::prelude::*;

use crate::{Words, accepts, allows, compile};

/// A grammar's body, with rules by their numbers.
#[derive(Clone, Debug)]
enum Body {
    Text(&'static str),
    /// One character of these.
    Class(&'static str),
    Other(&'static str),
    Rule(usize),
    Row(Vec<Body>),
    Either(Vec<Body>),
    /// At least, at most.
    Times(Box<Body>, usize, Option<usize>),
}

/// Rule 0 is `root`.
#[derive(Clone, Debug)]
struct Rules(Vec<Body>);

static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(|| Words::new().vocabulary());

fn gbnf(text: &str) -> Grammar {
    Grammar::Lark(text.to_owned())
}

impl Rules {
    fn text(&self) -> String {
        let name = |at| if at == 0 { "root".to_owned() } else { format!("rule-{at}") };
        let line = |(at, body): (usize, &Body)| format!("{} ::= {}\n", name(at), body.text());
        self.0.iter().enumerate().map(line).collect()
    }

    fn knows(&self, text: &str) -> bool {
        let chars: Vec<char> = text.chars().collect();
        // All that each rule meets from each place, until nothing is added any more.
        let mut known = vec![vec![BTreeSet::new(); chars.len() + 1]; self.0.len()];
        loop {
            let mut news = false;
            for (rule, body) in self.0.iter().enumerate() {
                for from in 0..=chars.len() {
                    let ends = body.ends(&chars, from, &known);
                    news |= ends.len() > known[rule][from].len();
                    known[rule][from] = ends;
                }
            }
            if !news {
                return known[0][0].contains(&chars.len());
            }
        }
    }
}

impl Body {
    fn text(&self) -> String {
        let list = |all: &[Self], between: &str| all.iter().map(Self::text).collect::<Vec<_>>().join(between);
        match self {
            Self::Text(text) => format!("\"{text}\""),
            Self::Class(chars) => format!("[{chars}]"),
            Self::Other(chars) => format!("[^{chars}]"),
            Self::Rule(0) => "root".to_owned(),
            Self::Rule(at) => format!("rule-{at}"),
            Self::Row(all) => format!("({})", list(all, " ")),
            Self::Either(all) => format!("({})", list(all, " | ")),
            Self::Times(body, 0, None) => format!("{}*", body.text()),
            Self::Times(body, 1, None) => format!("{}+", body.text()),
            Self::Times(body, 0, Some(1)) => format!("{}?", body.text()),
            Self::Times(body, least, None) => format!("{}{{{least},}}", body.text()),
            Self::Times(body, least, Some(most)) => format!("{}{{{least},{most}}}", body.text()),
        }
    }

    /// Where a text of this may end that begins at `from`.
    fn ends(&self, chars: &[char], from: usize, known: &[Vec<BTreeSet<usize>>]) -> BTreeSet<usize> {
        let one = |meets: &dyn Fn(char) -> bool| {
            chars.get(from).filter(|c| meets(**c)).map(|_| from + 1).into_iter().collect()
        };
        let behind = |places: &BTreeSet<usize>, body: &Self| {
            places.iter().flat_map(|place| body.ends(chars, *place, known)).collect::<BTreeSet<_>>()
        };
        match self {
            Self::Text(text) => {
                let length = text.chars().count();
                let meets = chars[from..].iter().copied().take(length).eq(text.chars());
                meets.then_some(from + length).into_iter().collect()
            }
            Self::Class(set) => one(&|c| set.contains(c)),
            Self::Other(set) => one(&|c| !set.contains(c)),
            Self::Rule(at) => known[*at][from].clone(),
            Self::Row(all) => all.iter().fold(BTreeSet::from([from]), |places, body| behind(&places, body)),
            Self::Either(all) => all.iter().flat_map(|body| body.ends(chars, from, known)).collect(),
            Self::Times(body, least, most) => {
                let mut places = BTreeSet::from([from]);
                let mut ends = if *least == 0 { places.clone() } else { BTreeSet::new() };
                // More turns than characters reach nothing new.
                for turn in 1..=most.unwrap_or(least + chars.len() + 1) {
                    places = behind(&places, body);
                    if turn >= *least {
                        ends.extend(&places);
                    }
                }
                ends
            }
        }
    }

    /// Some text of this; `draw` gives numbers. `None` if it would become too deep.
    fn write(&self, rules: &Rules, depth: usize, draw: &mut impl FnMut(usize) -> usize) -> Option<String> {
        let depth = depth.checked_sub(1)?;
        Some(match self {
            Self::Text(text) => (*text).to_owned(),
            Self::Class(set) => set.chars().nth(draw(set.chars().count()))?.to_string(),
            Self::Other(set) => {
                let others: Vec<char> = "abcxyz \"é".chars().filter(|c| !set.contains(*c)).collect();
                others[draw(others.len())].to_string()
            }
            Self::Rule(at) => rules.0[*at].write(rules, depth, draw)?,
            Self::Row(all) => {
                all.iter().map(|body| body.write(rules, depth, draw)).collect::<Option<String>>()?
            }
            Self::Either(all) => {
                let first = draw(all.len());
                (0..all.len()).find_map(|turn| all[(first + turn) % all.len()].write(rules, depth, draw))?
            }
            Self::Times(body, least, most) => {
                let turns = least + draw(most.map_or(3, |most| most - least + 1));
                (0..turns).map(|_| body.write(rules, depth, draw)).collect::<Option<String>>()?
            }
        })
    }
}

fn body(rules: usize) -> impl Strategy<Value = Body> {
    let leaf = prop_oneof![
        prop::sample::select(vec!["a", "b", "ab", "abc", "bc", "\u{e9}x", "", "ba"]).prop_map(Body::Text),
        prop::sample::select(vec!["a", "ab", "bc", "xyz", "\u{e9}b"]).prop_map(Body::Class),
        prop::sample::select(vec!["a", "xyz", "ab"]).prop_map(Body::Other),
        (0..rules).prop_map(Body::Rule),
        (0..rules).prop_map(Body::Rule),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let times = prop::sample::select(vec![
            (0, None),
            (1, None),
            (0, Some(1)),
            (2, Some(3)),
            (2, None),
            (1, Some(2)),
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Body::Row),
            prop::collection::vec(inner.clone(), 1..4).prop_map(Body::Either),
            (inner, times).prop_map(|(body, (least, most))| Body::Times(Box::new(body), least, most)),
        ]
    })
}

fn rules() -> impl Strategy<Value = Rules> {
    (1_usize..4).prop_flat_map(|count| prop::collection::vec(body(count), count).prop_map(Rules))
}

/// How far the compiled grammar follows a text, and whether it is whole; `None` if the grammar meets no text at all.
fn follows(grammar: &Grammar, text: &str) -> Option<bool> {
    let mut constraint = match VOCABULARY.compile(grammar, &Limits::default()) {
        Ok(constraint) => constraint,
        Err(GrammarError::Syntax(_) | GrammarError::TooLarge(_)) => return None,
        Err(error) => panic!("{error}"),
    };
    for byte in text.bytes() {
        match constraint.mask() {
            Ok(mask) if allows(&mask, byte.into()) => constraint.drawn(byte.into()).unwrap(),
            Ok(_) => return Some(false),
            Err(_) => return None, // too costly, which the limits say
        }
    }
    constraint.mask().ok().map(|mask| allows(&mask, Words::new().end()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_grammars_mean_what_they_say(
        rules in rules(),
        draws in prop::collection::vec(any::<u16>(), 64),
        other in "[abcxyé]{0,7}",
    ) {
        let grammar = gbnf(&rules.text());
        let mut draws = draws.into_iter().cycle();
        let mut draw = |most: usize| usize::from(draws.next().unwrap()) % most.max(1);
        let mut texts = vec![other];
        for _ in 0..4 {
            if let Some(text) = rules.0[0].write(&rules, 12, &mut draw).filter(|text| text.len() < 24) {
                let mut chars: Vec<char> = text.chars().collect();
                texts.push(text);
                match (draw(3), chars.is_empty()) {
                    (0, false) => _ = chars.remove(draw(chars.len())),
                    (1, false) => {
                        let at = draw(chars.len());
                        chars[at] = ['a', 'b', 'c', 'x', 'é'][draw(5)];
                    }
                    _ => chars.insert(draw(chars.len() + 1), ['a', 'b', 'c', 'x', 'é'][draw(5)]),
                }
                texts.push(chars.into_iter().collect());
            }
        }
        for text in texts {
            let expected = rules.knows(&text);
            match follows(&grammar, &text) {
                Some(found) => prop_assert_eq!(found, expected, "{:?} under {}", text, rules.text()),
                None => prop_assert!(!expected, "{:?} is a text of {}", text, rules.text()),
            }
        }
    }
}

/// As llama.cpp publishes it.
const JSON: &str = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn json_of_llama_cpp() {
    let grammar = gbnf(JSON);
    for text in ["{}", r#"{"a": [1, -2.5e3, "é\n\u00e9"], "b":{"c": null}}"#, "{\n  \"x\": true\n}"] {
        assert!(accepts(&grammar, text), "{text}");
    }
    for text in ["", "[]", "{\"a\"}", "{\"a\": 01}", "{\"a\": tru}", "{\"a\": \"\u{1}\"}", "{} x"] {
        assert!(!accepts(&grammar, text), "{text}");
    }
}

#[test]
fn rules_as_vllm_shows_them() {
    let sql = r#"
        root ::= select_statement
        select_statement ::= "SELECT " column " from " table " where " condition
        column ::= "col_1 " | "col_2 "
        table ::= "table_1 " | "table_2 "
        condition ::= column "= " number
        number ::= "1 " | "2 "
    "#;
    assert!(accepts(&gbnf(sql), "SELECT col_1  from table_2  where col_2 = 1 "));
    assert!(!accepts(&gbnf(sql), "SELECT col_3 "));
    let sum = "root ::= expr\nexpr ::= term (\"+\" term)*\nterm ::= [0-9]+ | \"(\" expr \")\"\n";
    assert!(accepts(&gbnf("root ::=\n  # one\n  \"a\" |\n  \"b\"\nempty ::=\n"), "b"), "lines as one likes");
    assert!(accepts(&gbnf(sum), "1+(23+(4))+5"));
    assert!(!accepts(&gbnf(sum), "1+(23"));
    assert!(accepts(&Grammar::Lark("start: \"a\"".to_owned()), "a"), "Lark stays Lark");
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    for (text, says) in [
        ("root ::= other", "the grammar has no rule `other`"),
        ("root ::=\n  other", "the grammar has no rule `other`"),
        ("other ::= \"a\"", "the grammar has no rule `root`"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2 of the grammar has a second rule `root`"),
        ("root ::= \"a\"\n\n  \"b\"", "line 3 of the grammar has something other than a rule"),
        ("root ::= (\"a\"\n| \"b\"", "line 1 of the grammar has a `(` without its `)`"),
        ("root ::= \"a\")", "line 1 of the grammar has a `)` that closes nothing"),
        ("# one\nroot ::= \"a", "line 2 of the grammar has a text without its closing `\"`"),
        ("root ::= [a", "line 1 of the grammar has a class of characters without its closing `]`"),
        ("root ::= [z-a]", "line 1 of the grammar has a range of characters whose end comes before"),
        ("root ::= [^\\U00000000-\\U0010ffff]", "line 1 of the grammar has a class without characters"),
        ("root ::= \"\\xZZ\"", "line 1 of the grammar has an escape"),
        ("root ::= \"a\"{3,2}", "line 1 of the grammar has a repetition other than"),
        ("root ::= \"a\"{1,9999}", "line 1 of the grammar has more than the 2000 repetitions"),
        ("root ::= !", "line 1 of the grammar has an unexpected `!`"),
    ] {
        let error = compile(&gbnf(text)).unwrap_err().to_string();
        assert!(error.starts_with(says), "{text:?}: {error}");
    }
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(100), ")".repeat(100));
    assert!(matches!(compile(&gbnf(&deep)), Err(GrammarError::TooLarge(_))));
    let many = format!("root ::= \"{}\" root?", "a".repeat(5000));
    assert!(matches!(compile(&gbnf(&many)), Err(GrammarError::TooLarge(_))));
    assert!(compile(&gbnf("root ::= root")).is_err(), "nothing meets it");
}
