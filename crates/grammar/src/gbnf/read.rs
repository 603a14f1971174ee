//! From text to rules. Every refusal names its line.

use super::chars::Chars;
use super::{Node, Rules, Times, is_of_name};
use crate::error::GrammarError;
use crate::limits::Limits;

/// The rules in `text`.
pub(super) fn rules(text: &str, limits: &Limits) -> Result<Rules, GrammarError> {
    let mut reader = Reader { text, at: 0, depth_left: limits.depth_max, limits };
    let mut rules = Rules::new();
    reader.skip(true);
    while reader.peek().is_some() {
        let name = reader.name();
        reader.skip(false);
        if name.is_empty() || !reader.take("::=") {
            return reader.wrong("something other than a rule, `name ::= …`");
        }
        let body = reader.either(false)?;
        if !matches!(reader.peek(), None | Some('\n')) {
            return reader.wrong("a `)` that closes nothing");
        }
        if rules.insert(name.to_owned(), body).is_some() {
            return reader.wrong(&format!("a second rule `{name}`"));
        }
        reader.skip(true);
    }
    Ok(rules)
}

#[derive(Clone)]
struct Reader<'a> {
    text: &'a str,
    /// Bytes read.
    at: usize,
    depth_left: usize,
    limits: &'a Limits,
}

impl<'a> Reader<'a> {
    /// Refuses what the line has where the reader stands.
    fn wrong<T>(&self, has: &str) -> Result<T, GrammarError> {
        let line = self.text[..self.at].matches('\n').count() + 1;
        Err(GrammarError::Syntax(format!("line {line} of the grammar has {has}")))
    }

    /// Alternatives, up to the end of a rule or of a group.
    fn either(&mut self, in_group: bool) -> Result<Node, GrammarError> {
        let mut rows = vec![self.row(in_group)?];
        loop {
            // An alternative may stand on a line of its own.
            let mut ahead = self.clone();
            ahead.skip(true);
            if ahead.peek() == Some('|') {
                self.at = ahead.at;
            }
            if !self.take("|") {
                break;
            }
            rows.push(self.row(in_group)?);
        }
        Ok(if rows.len() == 1 { rows.remove(0) } else { Node::Either(rows) })
    }

    fn row(&mut self, in_group: bool) -> Result<Node, GrammarError> {
        let mut nodes = Vec::new();
        self.skip(in_group);
        if self.peek() == Some('\n') && !self.at_next_rule() {
            self.skip(true); // a rule may begin on the line behind its name
        }
        loop {
            self.skip(in_group);
            let node = match self.peek() {
                None | Some('\n' | '|' | ')') => break,
                Some('"') => self.literal()?,
                Some('[') => Node::One(self.class()?),
                Some('.') => {
                    self.at += 1;
                    Node::One(Chars::any())
                }
                Some('(') => self.group()?,
                Some(c) if is_of_name(c) => Node::Rule(self.name().to_owned()),
                Some(other) => return self.wrong(&format!("an unexpected `{other}`")),
            };
            nodes.push(self.repeated(node)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Row(nodes) })
    }

    /// Whether the next line that says something begins a rule, or there is none.
    fn at_next_rule(&self) -> bool {
        let mut ahead = self.clone();
        ahead.skip(true);
        if ahead.peek().is_none() {
            return true;
        }
        let name = ahead.name();
        ahead.skip(false);
        !name.is_empty() && ahead.take("::=")
    }

    fn group(&mut self) -> Result<Node, GrammarError> {
        let begin = self.clone();
        self.at += 1;
        let Some(left) = self.depth_left.checked_sub(1) else {
            let max = self.limits.depth_max;
            return Err(GrammarError::TooLarge(format!("nests deeper than the {max} levels that are taken")));
        };
        self.depth_left = left;
        let node = self.either(true)?;
        self.depth_left += 1;
        self.skip(true);
        if self.take(")") { Ok(node) } else { begin.wrong("a `(` without its `)`") }
    }

    fn repeated(&mut self, mut node: Node) -> Result<Node, GrammarError> {
        loop {
            let times = match self.peek() {
                Some('*') => Times { least: 0, most: None },
                Some('+') => Times { least: 1, most: None },
                Some('?') => Times { least: 0, most: Some(1) },
                Some('{') => self.times()?,
                _ => return Ok(node),
            };
            self.at += 1;
            node = Node::Repeat(Box::new(node), times);
        }
    }

    /// `{m}`, `{m,}`, `{,n}` or `{m,n}` up to its closing brace.
    fn times(&mut self) -> Result<Times, GrammarError> {
        self.at += 1;
        self.skip(false);
        let least = self.number();
        self.skip(false);
        let most = if self.take(",") {
            self.skip(false);
            self.number()
        } else {
            least
        };
        self.skip(false);
        let (says, max) = (least.or(most), self.limits.repetitions_max);
        let least = least.unwrap_or(0);
        if self.peek() != Some('}') || says.is_none() || most.is_some_and(|most| most < least) {
            return self.wrong("a repetition other than `{m}`, `{m,}` or `{m,n}`");
        }
        if least.max(most.unwrap_or(0)) > max {
            return self.wrong(&format!("more than the {max} repetitions that are taken"));
        }
        Ok(Times { least, most })
    }

    fn literal(&mut self) -> Result<Node, GrammarError> {
        let begin = self.clone();
        self.at += 1;
        let mut nodes = Vec::new();
        while !self.take("\"") {
            if matches!(self.peek(), None | Some('\n')) {
                return begin.wrong("a text without its closing `\"`");
            }
            nodes.push(Node::One(Chars::one(self.character()?)));
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Row(nodes) })
    }

    fn class(&mut self) -> Result<Chars, GrammarError> {
        let begin = self.clone();
        self.at += 1;
        let others = self.take("^");
        let mut chars = Chars::none();
        while !self.take("]") {
            if matches!(self.peek(), None | Some('\n')) {
                return begin.wrong("a class of characters without its closing `]`");
            }
            let first = self.character()?;
            let range = self.peek() == Some('-') && !self.text[self.at..].starts_with("-]");
            let last = if range {
                self.at += 1;
                self.character()?
            } else {
                first
            };
            if last < first {
                return self.wrong("a range of characters whose end comes before its beginning");
            }
            chars.add(first, last);
        }
        let chars = if others { chars.others() } else { chars };
        if chars.is_empty() { begin.wrong("a class without characters") } else { Ok(chars) }
    }

    /// One character, which may be escaped.
    fn character(&mut self) -> Result<char, GrammarError> {
        const ESCAPE: &str = "an escape that is not finished, or no character";
        let Some(first) = self.next() else { return self.wrong(ESCAPE) };
        if first != '\\' {
            return Ok(first);
        }
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(plain) if plain.is_ascii_punctuation() => return Ok(plain),
            _ => return self.wrong(ESCAPE),
        };
        let code = self.text.get(self.at..self.at + digits);
        let code = code.filter(|code| code.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let code = code.and_then(|code| u32::from_str_radix(code, 16).ok()).and_then(char::from_u32);
        self.at += if code.is_some() { digits } else { 0 };
        code.map_or_else(|| self.wrong(ESCAPE), Ok)
    }

    fn number(&mut self) -> Option<u32> {
        let digits = self.while_is(|c| c.is_ascii_digit());
        if digits.is_empty() { None } else { Some(digits.parse().unwrap_or(u32::MAX)) }
    }

    fn name(&mut self) -> &'a str {
        self.while_is(is_of_name)
    }

    fn while_is(&mut self, is: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !is(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn take(&mut self, expected: &str) -> bool {
        let there = self.text[self.at..].starts_with(expected);
        self.at += if there { expected.len() } else { 0 };
        there
    }

    /// Passes over blanks and comments, and over line breaks if `lines`.
    fn skip(&mut self, lines: bool) {
        loop {
            self.while_is(|c| matches!(c, ' ' | '\t' | '\r') || lines && c == '\n');
            if self.peek() != Some('#') {
                return;
            }
            self.while_is(|c| c != '\n');
        }
    }
}
