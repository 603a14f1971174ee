//! What is counted, without a lock: a token costs a few additions to atomics.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn inc(&self) {
        self.inc_by(1);
    }

    pub(crate) fn inc_by(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Parts of one: the sum of a histogram is kept in these, so that it can be added to atomically.
const PARTS: f64 = 1e6;

/// How often values fell between bounds.
#[derive(Debug)]
pub(crate) struct Histogram {
    /// Upper bounds, inclusive, ascending; a last bucket without bound follows.
    bounds: Vec<f64>,
    counts: Vec<AtomicU64>,
    sum_parts: AtomicU64,
}

impl Histogram {
    pub(crate) fn new(bounds: &[f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds: bounds.to_vec(), counts, sum_parts: AtomicU64::new(0) }
    }

    /// Bounds 1, 2, 5, 10, 20, 50 … up to `most`.
    pub(crate) fn of_tokens(most: usize) -> Self {
        let decades = (0..).map(|exponent| 10f64.powi(exponent));
        let bounds = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * decade));
        Self::new(&bounds.take_while(|bound| *bound <= most as f64).collect::<Vec<_>>())
    }

    pub(crate) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_parts.fetch_add((value * PARTS) as u64, Ordering::Relaxed);
    }

    /// Upper bounds, the counts between them and one beyond the last, and the sum of all values.
    pub(crate) fn read(&self) -> (&[f64], Vec<u64>, f64) {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        (&self.bounds, counts, self.sum_parts.load(Ordering::Relaxed) as f64 / PARTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 2.0, 7.25] {
            histogram.observe(value);
        }
        assert_eq!(histogram.read(), (&[1.0, 2.0][..], vec![2, 2, 1], 12.25));
    }

    #[test]
    fn bounds_of_tokens_end_at_the_context() {
        assert_eq!(Histogram::of_tokens(100).bounds, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    }
}
