//! What is counted, without a lock: a token costs a few additions to atomics, which threads do not take from each other.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Threads that count apart from each other: one more shares with another.
const SHARES: usize = 8;

/// The calling thread's share.
fn share() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static SHARE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % SHARES);
    SHARE.with(|share| *share)
}

/// On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Share(AtomicU64);

/// A number that grows.
#[derive(Debug, Default)]
pub(crate) struct Counter([Share; SHARES]);

impl Counter {
    pub(crate) fn inc(&self) {
        self.inc_by(1);
    }

    pub(crate) fn inc_by(&self, count: u64) {
        self.0[share()].0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.iter().map(|share| share.0.load(Ordering::Relaxed)).sum()
    }
}

/// Parts of one: the sum of a histogram is kept in these, so that it can be added to atomically.
const PARTS: f64 = 1e6;

/// How often values fell between bounds.
#[derive(Debug)]
pub(crate) struct Histogram {
    /// Upper bounds, inclusive, ascending; a last bucket without bound follows.
    bounds: Vec<f64>,
    shares: [Counts; SHARES],
}

#[derive(Debug)]
#[repr(align(64))]
struct Counts {
    counts: Vec<AtomicU64>,
    sum_parts: AtomicU64,
}

impl Histogram {
    pub(crate) fn new(bounds: &[f64]) -> Self {
        let shares = std::array::from_fn(|_| Counts {
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_parts: AtomicU64::new(0),
        });
        Self { bounds: bounds.to_vec(), shares }
    }

    /// Bounds 1, 2, 5, 10, 20, 50 … up to `most`.
    pub(crate) fn of_tokens(most: usize) -> Self {
        let decades = (0..).map(|exponent| 10f64.powi(exponent));
        let bounds = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * decade));
        Self::new(&bounds.take_while(|bound| *bound <= most as f64).collect::<Vec<_>>())
    }

    pub(crate) fn observe(&self, value: f64) {
        self.observe_many(value, 1);
    }

    /// The same value, so many times.
    pub(crate) fn observe_many(&self, value: f64, times: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        let Counts { counts, sum_parts } = &self.shares[share()];
        counts[bucket].fetch_add(times, Ordering::Relaxed);
        sum_parts.fetch_add((value * PARTS) as u64 * times, Ordering::Relaxed);
    }

    /// Upper bounds, the counts between them and one beyond the last, and the sum of all values.
    pub(crate) fn read(&self) -> (&[f64], Vec<u64>, f64) {
        let (mut all, mut sum_parts) = (vec![0; self.bounds.len() + 1], 0);
        for share in &self.shares {
            all.iter_mut().zip(&share.counts).for_each(|(all, count)| *all += count.load(Ordering::Relaxed));
            sum_parts += share.sum_parts.load(Ordering::Relaxed);
        }
        (&self.bounds, all, sum_parts as f64 / PARTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        std::thread::scope(|scope| {
            for value in [0.5, 1.0, 1.5, 2.0, 7.25] {
                let histogram = &histogram;
                scope.spawn(move || histogram.observe(value));
            }
        });
        assert_eq!(histogram.read(), (&[1.0, 2.0][..], vec![2, 2, 1], 12.25));
        histogram.observe_many(1.5, 4);
        assert_eq!(histogram.read(), (&[1.0, 2.0][..], vec![2, 6, 1], 18.25));
    }

    #[test]
    fn bounds_of_tokens_end_at_the_context() {
        assert_eq!(Histogram::of_tokens(100).bounds, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    }
}
