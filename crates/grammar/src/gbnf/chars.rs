//! Sets of characters.

/// Ranges of code points, sorted, apart from each other, without surrogates at their ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Chars(Vec<(u32, u32)>);

const LAST: u32 = char::MAX as u32;

impl Chars {
    pub(super) fn one(c: char) -> Self {
        Self(vec![(c.into(), c.into())])
    }

    pub(super) fn any() -> Self {
        Self(vec![(0, LAST)])
    }

    pub(super) fn none() -> Self {
        Self(Vec::new())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, first: char, last: char) {
        self.0.push((first.into(), last.into()));
        self.merge();
    }

    pub(super) fn unite(&mut self, other: &Self) {
        if *self != *other {
            self.0.extend(&other.0);
            self.merge();
        }
    }

    fn merge(&mut self) {
        self.0.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::with_capacity(self.0.len());
        for &(first, last) in &self.0 {
            match merged.last_mut() {
                Some((_, before)) if first <= before.saturating_add(1) => *before = last.max(*before),
                _ => merged.push((first, last)),
            }
        }
        self.0 = merged;
    }

    /// All other characters.
    pub(super) fn others(&self) -> Self {
        let mut others = Vec::new();
        let mut from = 0;
        for &(first, last) in &self.0 {
            if from < first {
                others.push((from, first - 1));
            }
            from = last + 1;
        }
        if from <= LAST {
            others.push((from, LAST));
        }
        let whole = others.into_iter().filter_map(|(first, last)| {
            let first = if (0xD800..0xE000).contains(&first) { 0xE000 } else { first };
            let last = if (0xD800..0xE000).contains(&last) { 0xD7FF } else { last };
            (first <= last).then_some((first, last))
        });
        Self(whole.collect())
    }

    pub(super) fn meets(&self, other: &Self) -> bool {
        self.0.iter().any(|(first, last)| other.0.iter().any(|(from, to)| first <= to && from <= last))
    }

    /// As a regular expression.
    pub(super) fn regex(&self) -> String {
        let range = |(first, last): &(u32, u32)| match first == last {
            true => format!("\\x{{{first:x}}}"),
            false => format!("\\x{{{first:x}}}-\\x{{{last:x}}}"),
        };
        format!("[{}]", self.0.iter().map(range).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets() {
        let mut letters = Chars::one('b');
        letters.add('d', 'f');
        letters.add('c', 'c');
        assert_eq!(letters.regex(), r"[\x{62}-\x{66}]");
        assert_eq!(letters.others().others(), letters);
        assert!(letters.meets(&Chars::one('e')) && !letters.others().meets(&letters));
        let mut low = Chars::one('\0');
        low.add('\0', '\u{d7ff}');
        assert_eq!(low.others().regex(), r"[\x{e000}-\x{10ffff}]");
        assert!(Chars::any().others().is_empty());
    }
}
