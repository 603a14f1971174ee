//! Where a run of characters may be one lexeme.
//!
//! The longest lexeme wins, so a run swallows every character that it can. That changes the language only where a
//! character could have been meant for what follows: where a lexeme that stands in the same place as the run ends,
//! and a character may come next that the run would take, too.

use std::collections::{BTreeMap, BTreeSet};

use super::chars::Chars;
use super::{Node, ROOT, Rules, Times};

/// Steps of the search for places where runs are not safe; a grammar that needs more has no runs.
const STEPS_MAX: usize = 2_000_000;

/// Rules that are looked through for the classes of characters in what they repeat.
const THROUGH_MAX: usize = 8;

const ANY: Times = Times { least: 0, most: None };
const SOME: Times = Times { least: 1, most: None };

/// The same rules, with runs where they are safe.
pub(super) fn with_runs(rules: &Rules) -> Rules {
    let mut refused = BTreeSet::new();
    loop {
        let mut runs = Runs { rules, empty: can_be_empty(rules), refused: &refused, seen: 0 };
        let tried: Rules = rules.iter().map(|(name, node)| (name.clone(), runs.of(node))).collect();
        let seen = runs.seen;
        match Places::of(&tried).and_then(|mut places| places.unsafe_runs()) {
            Some(found) if found.is_empty() => return tried,
            Some(found) => refused.extend(found),
            None => refused.extend(0..seen),
        }
        if refused.len() == seen {
            return rules.clone();
        }
    }
}

/// The rules that the empty text meets.
fn can_be_empty(rules: &Rules) -> BTreeSet<String> {
    let mut empty = BTreeSet::new();
    loop {
        let more: Vec<String> = rules
            .iter()
            .filter(|(name, node)| !empty.contains(*name) && is_empty(node, &empty))
            .map(|(name, _)| name.clone())
            .collect();
        if more.is_empty() {
            return empty;
        }
        empty.extend(more);
    }
}

fn is_empty(node: &Node, empty: &BTreeSet<String>) -> bool {
    match node {
        Node::Either(nodes) => nodes.iter().any(|node| is_empty(node, empty)),
        Node::Row(nodes) => nodes.iter().all(|node| is_empty(node, empty)),
        Node::One(_) | Node::Run { .. } => false,
        Node::Rule(name) => empty.contains(name),
        Node::Repeat(node, times) => times.least == 0 || is_empty(node, empty),
    }
}

/// Rewrites repetitions so that neighbours of one class become runs. Runs are numbered as they are met, whether they
/// are refused or not.
struct Runs<'a> {
    rules: &'a Rules,
    empty: BTreeSet<String>,
    refused: &'a BTreeSet<usize>,
    seen: usize,
}

impl Runs<'_> {
    fn of(&mut self, node: &Node) -> Node {
        match node {
            Node::Either(nodes) => Node::Either(nodes.iter().map(|node| self.of(node)).collect()),
            Node::Row(nodes) => Node::Row(nodes.iter().map(|node| self.of(node)).collect()),
            Node::One(_) | Node::Run { .. } | Node::Rule(_) => node.clone(),
            Node::Repeat(inner, times) => self.repeat(inner, *times),
        }
    }

    fn repeat(&mut self, inner: &Node, times: Times) -> Node {
        let (mut class, mut others) = (Chars::none(), Vec::new());
        self.sort(inner, true, THROUGH_MAX, &mut class, &mut others);
        let single = times.most.is_some_and(|most| most <= 1);
        let others_are_empty = others.iter().any(|node| is_empty(node, &self.empty));
        if class.is_empty() || single || others_are_empty {
            return Node::Repeat(Box::new(self.of(inner)), times);
        }
        match (others.is_empty(), times) {
            (true, Times { least: 0, most }) => self.run(&class, Times { least: 1, most }).perhaps(),
            (true, times) => self.run(&class, times),
            // A run is never followed by another one of the same class, so there is one way to read it.
            (false, ANY) => {
                let first = self.run(&class, SOME).perhaps();
                let turn = Node::Row(vec![Node::Either(others), self.run(&class, SOME).perhaps()]);
                Node::Row(vec![first, Node::Repeat(Box::new(turn), ANY)])
            }
            (false, SOME) => {
                let first = self.run(&class, SOME);
                let turn = Node::Row(vec![Node::Either(others), self.run(&class, SOME).perhaps()]);
                let begun = Node::Row(vec![first, Node::Repeat(Box::new(turn.clone()), ANY)]);
                Node::Either(vec![begun, Node::Repeat(Box::new(turn), SOME)])
            }
            (false, times) => Node::Repeat(Box::new(self.of(inner)), times),
        }
    }

    /// Sorts the alternatives in `node` into a class of single characters and others. What comes from another rule
    /// is taken as it stands, so that a grammar of many rules within each other does not grow without end.
    fn sort(&mut self, node: &Node, here: bool, through: usize, class: &mut Chars, others: &mut Vec<Node>) {
        match node {
            Node::One(chars) => class.unite(chars),
            Node::Either(nodes) => {
                nodes.iter().for_each(|node| self.sort(node, here, through, class, others));
            }
            Node::Row(nodes) if nodes.len() == 1 => self.sort(&nodes[0], here, through, class, others),
            Node::Rule(name) if through > 0 => match self.rules.get(name) {
                Some(rule @ (Node::One(_) | Node::Either(_))) => {
                    self.sort(rule, false, through - 1, class, others);
                }
                _ => others.push(node.clone()),
            },
            node if here => {
                let node = self.of(node);
                others.push(node);
            }
            node => others.push(node.clone()),
        }
    }

    fn run(&mut self, class: &Chars, times: Times) -> Node {
        let number = self.seen;
        self.seen += 1;
        if self.refused.contains(&number) {
            return Node::Repeat(Box::new(Node::One(class.clone())), times);
        }
        Node::Run { chars: class.clone(), times, number }
    }
}

/// A set of lexemes, by their places in the grammar.
type Set = BTreeSet<usize>;

/// The lexemes of a grammar, and which may follow which.
struct Places {
    /// The characters of each, and the number of one that is a run.
    all: Vec<(Chars, Option<usize>)>,
    next: Vec<Set>,
    /// Those with which an answer may begin.
    first: Set,
    steps_left: usize,
}

/// A rule's body, with its lexemes by their places.
enum Part {
    Either(Vec<Part>),
    Row(Vec<Part>),
    Place(usize),
    Rule(usize),
    Repeat { inner: Box<Part>, optional: bool, again: bool },
}

/// What is known of each rule.
#[derive(Default)]
struct Known {
    empty: bool,
    first: Set,
    follow: Set,
}

impl Places {
    /// `None` beyond the limit of steps.
    fn of(rules: &Rules) -> Option<Self> {
        let names: BTreeMap<&str, usize> = rules.keys().map(String::as_str).zip(0..).collect();
        let mut places = Self { all: Vec::new(), next: Vec::new(), first: Set::new(), steps_left: STEPS_MAX };
        let parts: Vec<Part> = rules.values().map(|node| places.part(node, &names)).collect();
        places.next = vec![Set::new(); places.all.len()];
        let mut known: Vec<Known> = parts.iter().map(|_| Known::default()).collect();
        loop {
            let mut news = false;
            for (at, part) in parts.iter().enumerate() {
                let (empty, first) = begin(part, &known);
                places.pay(first.len() + part.size())?;
                news |= empty != known[at].empty || first.len() != known[at].first.len();
                (known[at].empty, known[at].first) = (empty, first);
            }
            if !news {
                break;
            }
        }
        loop {
            let before: usize = known.iter().map(|rule| rule.follow.len()).sum();
            for (at, part) in parts.iter().enumerate() {
                let follow = known[at].follow.clone();
                places.flow(part, &follow, &mut known)?;
            }
            if known.iter().map(|rule| rule.follow.len()).sum::<usize>() == before {
                break;
            }
        }
        places.first = known[names[ROOT]].first.clone();
        Some(places)
    }

    fn part(&mut self, node: &Node, names: &BTreeMap<&str, usize>) -> Part {
        match node {
            Node::Either(nodes) => Part::Either(nodes.iter().map(|node| self.part(node, names)).collect()),
            Node::Row(nodes) => Part::Row(nodes.iter().map(|node| self.part(node, names)).collect()),
            Node::One(chars) => self.place(chars, None),
            Node::Run { chars, times: _, number } => self.place(chars, Some(*number)),
            Node::Rule(name) => Part::Rule(names[name.as_str()]),
            Node::Repeat(inner, Times { least, most }) => Part::Repeat {
                inner: Box::new(self.part(inner, names)),
                optional: *least == 0,
                again: *most != Some(1),
            },
        }
    }

    fn place(&mut self, chars: &Chars, run: Option<usize>) -> Part {
        self.all.push((chars.clone(), run));
        Part::Place(self.all.len() - 1)
    }

    fn pay(&mut self, steps: usize) -> Option<()> {
        self.steps_left = self.steps_left.checked_sub(steps + 1)?;
        Some(())
    }

    /// Takes note of what may follow each lexeme and rule in `part`, behind which `after` may come. What comes back
    /// is what `part` may begin with, and whether it can be empty.
    fn flow(&mut self, part: &Part, after: &Set, known: &mut [Known]) -> Option<(bool, Set)> {
        self.pay(after.len())?;
        match part {
            Part::Place(place) => self.next[*place].extend(after),
            Part::Rule(rule) => known[*rule].follow.extend(after),
            Part::Either(parts) => {
                for part in parts {
                    self.flow(part, after, known)?;
                }
            }
            Part::Row(parts) => {
                let mut after = after.clone();
                for part in parts.iter().rev() {
                    let (empty, first) = self.flow(part, &after, known)?;
                    self.pay(first.len())?;
                    after = if empty { &after | &first } else { first };
                }
            }
            Part::Repeat { inner, optional: _, again } => {
                let (_, first) = begin(inner, known);
                self.pay(inner.size() + first.len())?;
                let after = if *again { after | &first } else { after.clone() };
                self.flow(inner, &after, known)?;
            }
        }
        Some(begin(part, known))
    }

    /// The numbers of the runs that could take what is meant for something else.
    fn unsafe_runs(&mut self) -> Option<BTreeSet<usize>> {
        let mut behind = Vec::with_capacity(self.all.len());
        for place in 0..self.all.len() {
            self.pay(self.next[place].len())?;
            let mut chars = Chars::none();
            self.next[place].iter().for_each(|next| chars.unite(&self.all[*next].0));
            behind.push(chars);
        }
        let mut found = BTreeSet::new();
        // Lexemes that may begin in one place: at the beginning, or behind two that did and ended in one place.
        let mut pairs = BTreeSet::new();
        let mut open = Vec::new();
        self.pair(&self.first.clone(), &self.first.clone(), &mut pairs, &mut open)?;
        while let Some((one, other)) = open.pop() {
            if !self.all[one].0.meets(&self.all[other].0) {
                continue;
            }
            for (ends, goes_on) in [(one, other), (other, one)] {
                if let (chars, Some(number)) = &self.all[goes_on]
                    && behind[ends].meets(chars)
                {
                    found.insert(*number);
                }
            }
            let (ones, others) = (self.next[one].clone(), self.next[other].clone());
            self.pair(&ones, &others, &mut pairs, &mut open)?;
        }
        Some(found)
    }

    fn pair(
        &mut self,
        ones: &Set,
        others: &Set,
        pairs: &mut BTreeSet<(usize, usize)>,
        open: &mut Vec<(usize, usize)>,
    ) -> Option<()> {
        self.pay(ones.len().checked_mul(others.len())?)?;
        for &one in ones {
            for &other in others {
                let pair = (one.min(other), one.max(other));
                if pairs.insert(pair) {
                    open.push(pair);
                }
            }
        }
        Some(())
    }
}

impl Part {
    fn size(&self) -> usize {
        match self {
            Self::Either(parts) | Self::Row(parts) => 1 + parts.iter().map(Self::size).sum::<usize>(),
            Self::Place(_) | Self::Rule(_) => 1,
            Self::Repeat { inner, .. } => 1 + inner.size(),
        }
    }
}

/// Whether a part can be empty, and what it may begin with.
fn begin(part: &Part, known: &[Known]) -> (bool, Set) {
    match part {
        Part::Place(place) => (false, Set::from([*place])),
        Part::Rule(rule) => (known[*rule].empty, known[*rule].first.clone()),
        Part::Either(parts) => parts.iter().fold((false, Set::new()), |(empty, mut all), part| {
            let (also, first) = begin(part, known);
            all.extend(first);
            (empty | also, all)
        }),
        Part::Row(parts) => {
            let mut all = Set::new();
            for part in parts {
                let (empty, first) = begin(part, known);
                all.extend(first);
                if !empty {
                    return (false, all);
                }
            }
            (true, all)
        }
        Part::Repeat { inner, optional, again: _ } => {
            let (empty, first) = begin(inner, known);
            (empty | optional, first)
        }
    }
}
