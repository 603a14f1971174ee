//! As much of the Common Expression Language as the rules of our custom resources speak ("CEL in Kubernetes"): fields, `has`,
//! comparisons, arithmetic of integers, `&&`, `||`, `!`, `?:`, `startsWith`, `endsWith`, `contains`, `matches`, `size`, `all` and
//! `exists`. A rule that says more is no rule.

use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;
use serde_json::{Value, json};

/// A rule, parsed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expr {
    Literal(Value),
    Name(String),
    Field(Box<Expr>, String),
    Has(Box<Expr>, String),
    Not(Box<Expr>),
    Binary(Box<Expr>, String, Box<Expr>),
    If(Box<[Expr; 3]>),
    /// A method of a value.
    Call(Box<Expr>, String, Vec<Expr>),
    /// `all`, or else `exists`; what an item is called, and what must hold of it.
    Each(Box<Expr>, bool, String, Box<Expr>),
}

/// Names that are bound, the last ones first.
type Scope<'a> = Vec<(&'a str, &'a Value)>;

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Number(i64),
    Text(String),
    Sign(String),
}

/// Signs between two values, those that bind least first.
const BINARY: [&[&str]; 5] =
    [&["||"], &["&&"], &["==", "!=", "<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];

impl Expr {
    /// # Errors
    /// What was not understood.
    pub(crate) fn parse(rule: &str) -> Result<Self, String> {
        let tokens = tokens(rule)?;
        let mut parser = Parser { tokens: &tokens };
        let expr = parser.choice()?;
        if parser.tokens.is_empty() {
            Ok(expr)
        } else {
            Err(format!("{:?} is not understood", parser.tokens))
        }
    }

    /// Whether the rule is about a change.
    pub(crate) fn names(&self, name: &str) -> bool {
        match self {
            Self::Literal(_) => false,
            Self::Name(known) => known == name,
            Self::Field(of, _) | Self::Has(of, _) | Self::Not(of) => of.names(name),
            Self::Binary(left, _, right) | Self::Each(left, _, _, right) => {
                left.names(name) || right.names(name)
            }
            Self::If(parts) => parts.iter().any(|part| part.names(name)),
            Self::Call(of, _, arguments) => {
                of.names(name) || arguments.iter().any(|argument| argument.names(name))
            }
        }
    }

    /// Whether the rule holds.
    ///
    /// # Errors
    /// What there is not, or is of another type.
    pub(crate) fn holds(&self, scope: &Scope<'_>) -> Result<bool, String> {
        let value = self.value(scope)?;
        value.as_bool().ok_or_else(|| format!("{value} is neither true nor false"))
    }

    fn value(&self, scope: &Scope<'_>) -> Result<Value, String> {
        match self {
            Self::Literal(value) => Ok(value.clone()),
            Self::Name(name) => {
                let bound = scope.iter().rev().find(|(known, _)| known == name);
                bound
                    .map(|(_, value)| (*value).clone())
                    .ok_or_else(|| format!("undeclared reference to {name}"))
            }
            Self::Field(of, field) => {
                of.value(scope)?.get(field).cloned().ok_or_else(|| format!("no such key: {field}"))
            }
            Self::Has(of, field) => {
                Ok(of.value(scope)?.get(field).is_some_and(|value| !value.is_null()).into())
            }
            Self::Not(of) => Ok((!of.holds(scope)?).into()),
            Self::Binary(left, sign, right) => binary(left, sign, right, scope),
            Self::If(parts) => {
                let [condition, then, other] = &**parts;
                if condition.holds(scope)? { then.value(scope) } else { other.value(scope) }
            }
            Self::Call(of, method, arguments) => {
                let arguments: Result<Vec<Value>, String> =
                    arguments.iter().map(|it| it.value(scope)).collect();
                call(&of.value(scope)?, method, &arguments?)
            }
            Self::Each(of, all, name, body) => {
                let items = of.value(scope)?;
                let items = items.as_array().ok_or_else(|| format!("{items} is no list"))?;
                for item in items {
                    let inner: Scope<'_> = scope.iter().copied().chain([(name.as_str(), item)]).collect();
                    if body.holds(&inner)? != *all {
                        return Ok((!all).into());
                    }
                }
                Ok((*all).into())
            }
        }
    }
}

fn binary(left: &Expr, sign: &str, right: &Expr, scope: &Scope<'_>) -> Result<Value, String> {
    if let "&&" | "||" = sign {
        // What decides decides, also where the other side is an error.
        let decides = sign == "||";
        return match (left.holds(scope), right.holds(scope)) {
            (Ok(value), _) | (_, Ok(value)) if value == decides => Ok(decides.into()),
            (Err(error), _) | (_, Err(error)) => Err(error),
            _ => Ok((!decides).into()),
        };
    }
    let (left, right) = (left.value(scope)?, right.value(scope)?);
    match sign {
        "==" => return Ok((left == right).into()),
        "!=" => return Ok((left != right).into()),
        _ => {}
    }
    let (Some(a), Some(b)) = (left.as_i64(), right.as_i64()) else {
        return Err(format!("no such overload: {left} {sign} {right}"));
    };
    let number =
        |number: Option<i64>| number.map(Value::from).ok_or_else(|| format!("{a} {sign} {b} is no number"));
    match sign {
        "<" => Ok((a < b).into()),
        "<=" => Ok((a <= b).into()),
        ">" => Ok((a > b).into()),
        ">=" => Ok((a >= b).into()),
        "+" => number(a.checked_add(b)),
        "-" => number(a.checked_sub(b)),
        "*" => number(a.checked_mul(b)),
        "/" => number(a.checked_div(b)),
        _ => number(a.checked_rem(b)),
    }
}

fn call(of: &Value, method: &str, arguments: &[Value]) -> Result<Value, String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match (method, of, arguments) {
        ("size", Value::String(of), []) => Ok(of.chars().count().into()),
        ("size", Value::Array(of), []) => Ok(of.len().into()),
        ("startsWith" | "endsWith" | "contains" | "matches", Value::String(of), [argument]) => {
            let argument = text(argument).ok_or_else(|| format!("{argument} is no string"))?;
            Ok(match method {
                "startsWith" => of.starts_with(&argument).into(),
                "endsWith" => of.ends_with(&argument).into(),
                "contains" => of.contains(&argument).into(),
                _ => Regex::new(&argument).map_err(|error| error.to_string())?.is_match(of).into(),
            })
        }
        _ => Err(format!("no such overload: {of}.{method}({arguments:?})")),
    }
}

struct Parser<'a> {
    tokens: &'a [Token],
}

impl Parser<'_> {
    fn next(&mut self) -> Option<Token> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first.clone())
    }

    /// Takes a sign if it is the next one.
    fn takes(&mut self, sign: &str) -> bool {
        let is = matches!(self.tokens.first(), Some(Token::Sign(next)) if next == sign);
        if is {
            self.tokens = &self.tokens[1..];
        }
        is
    }

    fn wants(&mut self, sign: &str) -> Result<(), String> {
        if self.takes(sign) { Ok(()) } else { Err(format!("{sign} is missing before {:?}", self.tokens)) }
    }

    fn choice(&mut self) -> Result<Expr, String> {
        let condition = self.binary(0)?;
        if !self.takes("?") {
            return Ok(condition);
        }
        let then = self.choice()?;
        self.wants(":")?;
        Ok(Expr::If(Box::new([condition, then, self.choice()?])))
    }

    fn binary(&mut self, level: usize) -> Result<Expr, String> {
        let Some(signs) = BINARY.get(level) else { return self.unary() };
        let mut left = self.binary(level + 1)?;
        while let Some(sign) = signs.iter().find(|sign| self.takes(sign)) {
            let right = self.binary(level + 1)?;
            left = Expr::Binary(Box::new(left), (*sign).to_owned(), Box::new(right));
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Expr, String> {
        if self.takes("!") {
            return Ok(Expr::Not(Box::new(self.unary()?)));
        }
        let mut expr = self.primary()?;
        while self.takes(".") {
            let Some(Token::Word(name)) = self.next() else { return Err("a field has no name".into()) };
            if !self.takes("(") {
                expr = Expr::Field(Box::new(expr), name);
                continue;
            }
            let mut arguments = Vec::new();
            while !self.takes(")") {
                arguments.push(self.choice()?);
                self.takes(",");
            }
            expr = match (name.as_str(), &mut arguments[..]) {
                ("all" | "exists", [Expr::Name(item), _]) => {
                    let item = std::mem::take(item);
                    let body = arguments.pop().unwrap_or(Expr::Literal(Value::Null));
                    Expr::Each(Box::new(expr), name == "all", item, Box::new(body))
                }
                _ => Expr::Call(Box::new(expr), name, arguments),
            };
        }
        Ok(expr)
    }

    fn primary(&mut self) -> Result<Expr, String> {
        match self.next() {
            Some(Token::Number(number)) => Ok(Expr::Literal(number.into())),
            Some(Token::Text(text)) => Ok(Expr::Literal(text.into())),
            Some(Token::Word(word)) => match word.as_str() {
                "true" | "false" => Ok(Expr::Literal((word == "true").into())),
                "null" => Ok(Expr::Literal(json!(null))),
                "has" if self.takes("(") => {
                    let field = self.choice()?;
                    self.wants(")")?;
                    let Expr::Field(of, name) = field else { return Err("has() is of a field".into()) };
                    Ok(Expr::Has(of, name))
                }
                _ => Ok(Expr::Name(word)),
            },
            Some(Token::Sign(sign)) if sign == "(" => {
                let inner = self.choice()?;
                self.wants(")")?;
                Ok(inner)
            }
            other => Err(format!("{other:?} is no value")),
        }
    }
}

fn tokens(rule: &str) -> Result<Vec<Token>, String> {
    let mut rest = rule.chars().peekable();
    let mut tokens = Vec::new();
    while let Some(&next) = rest.peek() {
        tokens.push(match next {
            space if space.is_whitespace() => {
                rest.next();
                continue;
            }
            letter if letter.is_alphabetic() || letter == '_' => {
                Token::Word(run(&mut rest, |c| c.is_alphanumeric() || c == '_'))
            }
            digit if digit.is_ascii_digit() => {
                let digits = run(&mut rest, |c| c.is_ascii_digit());
                Token::Number(digits.parse().map_err(|_| format!("{digits} is too large"))?)
            }
            quote @ ('\'' | '"') => {
                rest.next();
                let text = run(&mut rest, |c| c != quote && c != '\\');
                rest.next().filter(|end| *end == quote).ok_or("a string has no end, or a backslash in it")?;
                Token::Text(text)
            }
            sign => {
                rest.next();
                let two = rest.peek().map(|second| format!("{sign}{second}"));
                let two = two.filter(|two| ["||", "&&", "==", "!=", "<=", ">="].contains(&two.as_str()));
                if two.is_some() {
                    rest.next();
                }
                Token::Sign(two.unwrap_or_else(|| sign.to_string()))
            }
        });
    }
    Ok(tokens)
}

fn run(rest: &mut Peekable<Chars<'_>>, is: impl Fn(char) -> bool) -> String {
    std::iter::from_fn(|| rest.next_if(|c| is(*c))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(rule: &str, value: &Value) -> Result<bool, String> {
        Expr::parse(rule)?.holds(&vec![("self", value)])
    }

    #[test]
    fn rules_hold_as_cel_says() {
        let it = json!({ "a": 4, "b": 2, "s": "https://x", "l": ["x1", "x2"], "t": true, "n": null });
        for (rule, expected) in [
            ("self.a % self.b == 0 && self.a - 1 > self.b", true),
            ("1 + 2 * 3 == 7 && (1 + 2) * 3 == 9", true),
            ("has(self.a) != has(self.z)", true),
            ("has(self.n)", false),
            ("!has(self.z) || self.z > 1", true),
            ("self.z > 1 || self.t", true),
            ("!(self.z > 1 && false)", true),
            ("(has(self.z) ? 1 : 0) + (self.t ? 1 : 0) == 1", true),
            ("self.s.startsWith('https://') && !self.s.contains(\"..\") && self.s.matches('x$')", true),
            ("self.l.all(item, item.startsWith('x')) && self.l.exists(item, item == 'x2')", true),
            ("self.l.all(item, item == 'x1')", false),
            ("self.l.size() == 2 && self.s.size() == 9", true),
        ] {
            assert_eq!(holds(rule, &it), Ok(expected), "{rule}");
        }
        for (rule, says) in [
            ("self.z == 1", "no such key: z"),
            ("self.a", "4 is neither true nor false"),
            ("self.s < 1", "no such overload"),
            ("self.a % 0 == 0", "4 % 0 is no number"),
            ("other == 1", "undeclared reference to other"),
            ("self.a ==", "is no value"),
            ("self.a == 4)", "is not understood"),
            ("self.s == 'x", "has no end"),
        ] {
            let said = holds(rule, &it).unwrap_err();
            assert!(said.contains(says), "{rule}: {said}");
        }
    }
}
