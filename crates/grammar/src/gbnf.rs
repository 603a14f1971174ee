//! GBNF, the notation of llama.cpp's grammars and of what vLLM calls EBNF, turned into llguidance's dialect of Lark.
//!
//! GBNF works on characters, Lark on lexemes, of which the longest wins. A grammar whose rules never come back to
//! themselves therefore becomes one lexeme. In any other every character is a lexeme of its own, so that none is
//! longer than another; only a run of characters of one class is one lexeme where nothing that may follow it could be
//! a part of it, because parsing a long string character by character costs too much.

mod chars;
mod lexemes;
mod read;
mod write;

use std::collections::BTreeMap;

use self::chars::Chars;
use crate::error::GrammarError;
use crate::limits::Limits;

/// Where a grammar begins.
const ROOT: &str = "root";

/// What a rule says.
#[derive(Clone, Debug)]
enum Node {
    /// One of these.
    Either(Vec<Node>),
    /// One after the other; none is the empty text.
    Row(Vec<Node>),
    /// One character.
    One(Chars),
    /// So many characters of a class, at least one, as one lexeme; the number tells it from others.
    Run {
        chars: Chars,
        times: Times,
        number: usize,
    },
    Rule(String),
    Repeat(Box<Node>, Times),
}

/// How often something comes; without an upper bound if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    least: u32,
    most: Option<u32>,
}

type Rules = BTreeMap<String, Node>;

/// Whether `text` begins with a rule as GBNF writes it.
pub(crate) fn is_gbnf(text: &str) -> bool {
    let rule = text.lines().map(str::trim_start).find(|line| !line.is_empty() && !line.starts_with('#'));
    rule.is_some_and(|line| {
        let rest = line.trim_start_matches(is_of_name);
        rest.len() < line.len() && rest.trim_start().starts_with("::=")
    })
}

/// The same grammar in Lark.
pub(crate) fn to_lark(text: &str, limits: &Limits) -> Result<String, GrammarError> {
    let rules = reached(read::rules(text, limits)?)?;
    if !comes_back(&rules) {
        return Ok(write::as_lexeme(&rules));
    }
    let characters: usize = rules.values().map(Node::characters).sum();
    let max = limits.gbnf_characters_max;
    if characters > max {
        let says =
            format!("has {characters} characters in rules that come back, and at most {max} are taken");
        return Err(GrammarError::TooLarge(says));
    }
    Ok(write::as_rules(&lexemes::with_runs(&rules)))
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

/// The rules that an answer can need.
fn reached(mut rules: Rules) -> Result<Rules, GrammarError> {
    let mut reached = Rules::new();
    let mut next = vec![ROOT.to_owned()];
    while let Some(name) = next.pop() {
        if reached.contains_key(&name) {
            continue;
        }
        let Some(node) = rules.remove(&name) else {
            return Err(GrammarError::Syntax(format!("the grammar has no rule `{name}`")));
        };
        node.visit(&mut |node| {
            if let Node::Rule(name) = node {
                next.push(name.clone());
            }
        });
        reached.insert(name, node);
    }
    Ok(reached)
}

/// Whether any rule needs itself.
fn comes_back(rules: &Rules) -> bool {
    // A rule that needs only rules that end, ends.
    let mut left: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, node) in rules {
        let mut needs = Vec::new();
        node.visit(&mut |node| {
            if let Node::Rule(name) = node {
                needs.push(name.as_str());
            }
        });
        left.insert(name, needs);
    }
    loop {
        let ends: Vec<&str> = left
            .iter()
            .filter(|(_, needs)| needs.iter().all(|need| !left.contains_key(need)))
            .map(|(name, _)| *name)
            .collect();
        if ends.is_empty() {
            return !left.is_empty();
        }
        ends.iter().for_each(|name| _ = left.remove(name));
    }
}

impl Node {
    /// Shows this node and all below it.
    fn visit<'a>(&'a self, see: &mut impl FnMut(&'a Self)) {
        see(self);
        match self {
            Self::Either(nodes) | Self::Row(nodes) => nodes.iter().for_each(|node| node.visit(see)),
            Self::Repeat(node, _) => node.visit(see),
            Self::One(_) | Self::Run { .. } | Self::Rule(_) => {}
        }
    }

    fn characters(&self) -> usize {
        let mut count = 0;
        self.visit(&mut |node| count += usize::from(matches!(node, Self::One(_) | Self::Run { .. })));
        count
    }

    fn perhaps(self) -> Self {
        Self::Repeat(Box::new(self), Times { least: 0, most: Some(1) })
    }
}
