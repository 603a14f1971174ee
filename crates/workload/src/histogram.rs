//! Percentiles of durations in bounded memory.

use std::time::Duration;

use serde::Serialize;

/// Buckets of one power of two: the relative error of a percentile is below one over this.
const BUCKETS: u64 = 1 << BUCKETS_LOG2;
const BUCKETS_LOG2: u32 = 10;

/// Counts durations in nanoseconds by buckets that are as wide as a thousandth of what they hold. A percentile is the
/// upper end of the bucket in which it lies: never below the exact one, and less than 0.1% above it (exact below 2 µs).
/// Count, mean, least and greatest are exact.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum_ns: u128,
    min_ns: u64,
    max_ns: u64,
}

/// What a person or a program wants to know of a [`Histogram`], in milliseconds; all zero if nothing was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How many.
    pub count: u64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Least.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 90% are no longer.
    pub p90: f64,
    /// 95% are no longer.
    pub p95: f64,
    /// 99% are no longer.
    pub p99: f64,
    /// Greatest.
    pub max: f64,
}

impl Histogram {
    /// Counts one more.
    pub fn add(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket(ns);
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.min_ns = if self.count == 0 { ns } else { self.min_ns.min(ns) };
        self.max_ns = self.max_ns.max(ns);
        self.count += 1;
        self.sum_ns += u128::from(ns);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The least duration that no less than `percent` percent are no longer than (nearest rank), if any was counted.
    pub fn percentile(&self, percent: u32) -> Option<Duration> {
        let rank = (u128::from(self.count) * u128::from(percent)).div_ceil(100).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += u128::from(*count);
            seen >= rank
        })?;
        Some(Duration::from_nanos(upper_end(found).min(self.max_ns)))
    }

    /// All of it, in milliseconds.
    pub fn summary(&self) -> Summary {
        let ms = |ns: u64| ns as f64 / 1e6;
        let at = |percent| self.percentile(percent).map_or(0.0, |at| ms(at.as_nanos() as u64));
        Summary {
            count: self.count,
            mean: self.sum_ns as f64 / 1e6 / self.count.max(1) as f64,
            min: ms(self.min_ns),
            p50: at(50),
            p90: at(90),
            p95: at(95),
            p99: at(99),
            max: ms(self.max_ns),
        }
    }
}

/// Below 2 · [`BUCKETS`], a bucket each; above, [`BUCKETS`] for each power of two.
fn bucket(ns: u64) -> usize {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(BUCKETS_LOG2 + 1);
    (u64::from(shift) * BUCKETS + (ns >> shift)) as usize
}

/// The greatest value of a bucket.
fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket / BUCKETS).saturating_sub(1);
    let last = (u128::from(bucket - shift * BUCKETS) + 1) << shift;
    (last - 1) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values_ns: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        values_ns.into_iter().for_each(|ns| histogram.add(Duration::from_nanos(ns)));
        histogram
    }

    #[test]
    fn percentiles_are_those_of_the_textbook() {
        // The example of nearest rank: 15, 20, 35, 40, 50 have the percentiles 15 (5th), 20 (30th, 40th), 35 (50th), 50.
        let five = of([35, 20, 15, 50, 40]);
        let at = |percent| five.percentile(percent).unwrap().as_nanos();
        assert_eq!([5, 30, 40, 50, 100].map(at), [15, 20, 20, 35, 50]);
        let hundred = of(1..=100);
        let at = |percent| hundred.percentile(percent).unwrap().as_nanos();
        assert_eq!([0, 1, 50, 90, 95, 99, 100].map(at), [1, 1, 50, 90, 95, 99, 100]);
        assert_eq!(of([]).percentile(50), None);
    }

    #[test]
    fn a_summary_is_in_milliseconds() {
        let summary = of([1_000_000, 2_000_000, 6_000_000]).summary();
        assert_eq!((summary.count, summary.mean, summary.min, summary.max), (3, 3.0, 1.0, 6.0));
        assert!((2.0..2.002).contains(&summary.p50), "{}", summary.p50);
        assert_eq!(summary.p99, 6.0, "no percentile lies above the greatest");
        assert_eq!(of([]).summary(), Summary::default());
    }

    #[test]
    fn buckets_hold_all_that_a_clock_can_tell() {
        for ns in [0, 1, 2047, 2048, 2049, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
            assert!(upper_end(bucket(ns)) >= ns && of([ns]).percentile(50) == Some(Duration::from_nanos(ns)));
        }
        assert_eq!(upper_end(bucket(u64::MAX)), u64::MAX);
    }

    proptest! {
        #[test]
        fn a_percentile_is_at_most_a_thousandth_above_the_exact_one(
            mut values in prop::collection::vec(0_u64..1 << 44, 1..200), percent in 0_u32..=100,
        ) {
            let found = of(values.clone()).percentile(percent).unwrap().as_nanos() as u64;
            values.sort_unstable();
            let exact = values[(values.len() * percent as usize).div_ceil(100).max(1) - 1];
            prop_assert!(found >= exact && found - exact <= exact / BUCKETS, "{found} for {exact}");
        }

        #[test]
        fn buckets_lie_in_order(ns in 0_u64..u64::MAX) {
            prop_assert!(bucket(ns) <= bucket(ns + 1) && bucket(ns + 1) - bucket(ns) <= 1);
        }
    }
}
