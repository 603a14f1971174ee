//! What the leader's own work costs beside the model's.

use std::time::Duration;

use galerne_types::Epoch;

/// Buckets of a histogram of microseconds: bucket i counts values below 2^i.
const BUCKETS: usize = 24;

/// Steps of one epoch and the leader's control time for each: taking in requests, planning, handing the step to
/// all ranks, committing and sending out its tokens. Waiting is not in it, nor is the model's time.
#[derive(Debug, Default)]
pub(crate) struct StepStats {
    steps: u64,
    tokens: u64,
    control: Duration,
    control_max: Duration,
    buckets: [u64; BUCKETS],
    /// Since the last step was done.
    current: Duration,
}

impl StepStats {
    /// Control work was done.
    pub(crate) fn worked(&mut self, time: Duration) {
        self.current += time;
    }

    /// A step is done, and so is the control work for it.
    pub(crate) fn step_done(&mut self, tokens: usize) {
        let time = std::mem::take(&mut self.current);
        self.steps += 1;
        self.tokens += tokens as u64;
        self.control += time;
        self.control_max = self.control_max.max(time);
        let bucket = (u128::BITS - time.as_micros().leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)] += 1;
    }

    /// Mean control time of a step.
    pub(crate) fn control_mean(&self) -> Duration {
        self.control.checked_div(u32::try_from(self.steps).unwrap_or(u32::MAX)).unwrap_or_default()
    }

    /// An upper bound, within a factor of two, of the control time of the fastest `percent` of all steps.
    pub(crate) fn control_max_of(&self, percent: u64) -> Duration {
        let mut slower = self.steps * (100 - percent.min(100)) / 100;
        for (bucket, &count) in self.buckets.iter().enumerate().rev() {
            if count > slower {
                return Duration::from_micros(1 << bucket).min(self.control_max);
            }
            slower -= count;
        }
        Duration::ZERO
    }

    /// Tells the log.
    pub(crate) fn log(&self, epoch: Epoch) {
        tracing::info!(
            epoch = epoch.0,
            steps = self.steps,
            tokens = self.tokens,
            control_mean_us = self.control_mean().as_micros(),
            control_p50_us = self.control_max_of(50).as_micros(),
            control_p99_us = self.control_max_of(99).as_micros(),
            control_max_us = self.control_max.as_micros(),
            "steps of this epoch"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_percentiles() {
        let mut stats = StepStats::default();
        assert_eq!((stats.control_mean(), stats.control_max_of(99)), (Duration::ZERO, Duration::ZERO));
        for _ in 0..98 {
            stats.worked(Duration::from_micros(10));
            stats.worked(Duration::from_micros(20));
            stats.step_done(1);
        }
        stats.worked(Duration::from_micros(1000));
        stats.step_done(1);
        assert_eq!(stats.control_mean().as_micros(), (98 * 30 + 1000) / 99);
        assert_eq!(stats.control_max_of(99).as_micros(), 1000, "the slowest counts below 100 steps");
        stats.worked(Duration::from_micros(30));
        stats.step_done(1);
        assert_eq!(stats.control_max_of(99).as_micros(), 32);
    }
}
