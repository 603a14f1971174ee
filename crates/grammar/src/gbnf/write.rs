//! From rules to Lark.

use super::{Node, ROOT, Rules, Times};

/// Rules of which none comes back, as one lexeme.
pub(super) fn as_lexeme(rules: &Rules) -> String {
    write(rules, "T")
}

/// Any rules; every [`Node::One`] and [`Node::Run`] is a lexeme.
pub(super) fn as_rules(rules: &Rules) -> String {
    write(rules, "r")
}

/// Lark tells rules from lexemes by the case of their names.
fn write(rules: &Rules, prefix: &str) -> String {
    let names: Vec<&str> = rules.keys().map(String::as_str).collect();
    let writer = Writer { names, prefix };
    let mut lark = format!("start: {}\n", writer.name(ROOT));
    for (name, node) in rules {
        lark.push_str(&format!("{}: {}\n", writer.name(name), writer.body(node)));
    }
    lark
}

struct Writer<'a> {
    names: Vec<&'a str>,
    prefix: &'a str,
}

impl Writer<'_> {
    fn name(&self, name: &str) -> String {
        format!("{}{}", self.prefix, self.names.binary_search(&name).unwrap_or_default())
    }

    fn body(&self, node: &Node) -> String {
        let all = |nodes: &[Node], between| {
            nodes.iter().map(|node| self.body(node)).collect::<Vec<_>>().join(between)
        };
        match node {
            Node::Either(nodes) => format!("({})", all(nodes, " | ")),
            Node::Row(nodes) if nodes.is_empty() => "\"\"".to_owned(),
            Node::Row(nodes) => format!("({})", all(nodes, " ")),
            Node::One(chars) => format!("/{}/", chars.regex()),
            Node::Run { chars, times, number: _ } => format!("/{}{}/", chars.regex(), brackets(*times)),
            Node::Rule(name) => self.name(name),
            Node::Repeat(_, Times { least: 0, most: Some(0) }) => "\"\"".to_owned(),
            Node::Repeat(node, times) => format!("({}){}", self.body(node), brackets(*times)),
        }
    }
}

fn brackets(Times { least, most }: Times) -> String {
    match (least, most) {
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (0, Some(1)) => "?".to_owned(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}
