//! What the leader's own work costs beside the model's.

use std::time::{Duration, Instant};

use galerne_sched::{Admitted, Load};
use galerne_types::{Epoch, Input, Sampled, Slice, Step};
use galerne_wire::v1;

/// Buckets of a histogram of microseconds: bucket i counts values below 2^i.
const BUCKETS: usize = 24;

/// Buckets of the steps by their tokens; the last takes all larger ones too.
const TOKEN_BUCKETS: usize = 16;

/// Durations, of which are known the number, the sum, the largest, and how many there are between two powers of 2.
#[derive(Debug, Default)]
pub(crate) struct Durations {
    count: u64,
    total: Duration,
    max: Duration,
    buckets: [u64; BUCKETS],
}

impl Durations {
    pub(crate) fn record(&mut self, time: Duration) {
        self.count += 1;
        self.total += time;
        self.max = self.max.max(time);
        let bucket = (u128::BITS - time.as_micros().leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)] += 1;
    }

    pub(crate) fn mean(&self) -> Duration {
        mean(self.total, self.count)
    }

    /// An upper bound, within a factor of two, of the shortest `percent` of all.
    pub(crate) fn max_of(&self, percent: u64) -> Duration {
        let mut longer = self.count * (100 - percent.min(100)) / 100;
        for (bucket, &count) in self.buckets.iter().enumerate().rev() {
            if count > longer {
                return Duration::from_micros(1 << bucket).min(self.max);
            }
            longer -= count;
        }
        Duration::ZERO
    }
}

fn mean(total: Duration, count: u64) -> Duration {
    total.checked_div(u32::try_from(count).unwrap_or(u32::MAX)).unwrap_or_default()
}

/// How long a rank stood still between two steps although an answer was under way: until the leader had planned and sent
/// the next one, and the thread that runs it had noticed.
#[derive(Debug, Default)]
pub(crate) struct Gaps {
    gaps: Durations,
    ended: Option<Instant>,
}

impl Gaps {
    /// A step begins.
    pub(crate) fn begin(&mut self, step: &Step) {
        let goes_on = step.slices.iter().any(|slice| slice.input == Input::Last);
        if let Some(ended) = self.ended.filter(|_| goes_on) {
            self.gaps.record(ended.elapsed());
        }
    }

    /// It has ended.
    pub(crate) fn end(&mut self) {
        self.ended = Some(Instant::now());
    }

    /// Tells the log.
    pub(crate) fn log(&self, epoch: Epoch) {
        let gaps = &self.gaps;
        tracing::info!(
            epoch = epoch.0,
            steps = gaps.count,
            mean_us = gaps.mean().as_micros(),
            p50_us = gaps.max_of(50).as_micros(),
            p99_us = gaps.max_of(99).as_micros(),
            max_us = gaps.max.as_micros(),
            "this rank stood still between steps"
        );
    }
}

/// Steps of one epoch and the leader's control time for each: taking in requests, planning, handing the step to
/// all ranks, committing and sending out its tokens. Waiting is not in it, nor is the model's time.
#[derive(Debug, Default)]
pub(crate) struct StepStats {
    tokens: u64,
    /// Keys that these tokens attended to.
    keys: u64,
    /// From the end of the step before, or from its own planning if there was none, until all ranks had answered.
    busy: Duration,
    preemptions: u64,
    /// Tokens of prompts that were looked up among what is kept, and found.
    looked_up: u64,
    cached: u64,
    drafts: u64,
    draft_tokens: u64,
    draft_tokens_accepted: u64,
    control: Durations,
    /// Processor time within `control`: the rest is waiting for a core that the model's threads hold.
    control_cpu: Duration,
    /// Entry i counts steps of more than 2^(i-1) and at most 2^i tokens.
    by_tokens: [u64; TOKEN_BUCKETS],
    /// Since the last step was done.
    current: Duration,
}

impl StepStats {
    /// Control work was done, which took `time`, and `cpu` of a processor's.
    pub(crate) fn worked(&mut self, time: Duration, cpu: Duration) {
        self.current += time;
        self.control_cpu += cpu;
    }

    /// A step is done, and so is the control work for it: the ranks `took` so long.
    pub(crate) fn step_done(&mut self, tokens: usize, keys: u64, took: Duration) {
        self.control.record(std::mem::take(&mut self.current));
        self.tokens += tokens as u64;
        self.keys = self.keys.saturating_add(keys);
        self.busy += took;
        let bucket = tokens.next_power_of_two().trailing_zeros() as usize;
        self.by_tokens[bucket.min(TOKEN_BUCKETS - 1)] += 1;
    }

    /// The drafts of a step were run, and some of their tokens came true.
    pub(crate) fn drafted(&mut self, step: &Step, sampled: &Sampled) {
        let drafts = step.slices.iter().map(Slice::draft).filter(|draft| !draft.is_empty());
        for (draft, further) in drafts.zip(&sampled.further) {
            self.drafts += 1;
            self.draft_tokens += draft.len() as u64;
            self.draft_tokens_accepted += further.len() as u64;
        }
    }

    /// So many requests were sent back to the queue.
    pub(crate) fn preempted(&mut self, requests: usize) {
        self.preemptions += requests as u64;
    }

    /// Requests got a slot for the first time.
    pub(crate) fn admitted(&mut self, requests: &[Admitted]) {
        for &Admitted { request: _, looked_up_tokens, cached_tokens } in requests {
            self.looked_up += u64::from(looked_up_tokens);
            self.cached += u64::from(cached_tokens);
        }
    }

    /// What routers are told of an epoch's steps, and of its load now.
    pub(crate) fn report(&self, load: &Load) -> v1::LoadReport {
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        v1::LoadReport {
            running: count(load.running),
            waiting: count(load.waiting),
            tenants: count(load.tenants),
            kv_blocks: load.kv_blocks,
            kv_blocks_free: load.kv_blocks_free,
            preemptions: self.preemptions,
            steps: self.control.count,
            step_tokens: self.tokens,
            steps_by_tokens: self.by_tokens.to_vec(),
            grammar_hits: 0, // whoever compiles grammars puts them in
            grammar_misses: 0,
            prefix_cache_queries: self.looked_up,
            prefix_cache_hits: self.cached,
            prefix_cache: load.prefix_cache,
            drafts: self.drafts,
            draft_tokens: self.draft_tokens,
            draft_tokens_accepted: self.draft_tokens_accepted,
            step_keys: self.keys,
            step_busy_us: u64::try_from(self.busy.as_micros()).unwrap_or(u64::MAX),
        }
    }

    /// Tells the log.
    pub(crate) fn log(&self, epoch: Epoch) {
        tracing::info!(
            epoch = epoch.0,
            steps = self.control.count,
            tokens = self.tokens,
            control_mean_us = self.control.mean().as_micros(),
            control_p50_us = self.control.max_of(50).as_micros(),
            control_p99_us = self.control.max_of(99).as_micros(),
            control_max_us = self.control.max.as_micros(),
            control_cpu_mean_us = mean(self.control_cpu, self.control.count).as_micros(),
            "steps of this epoch"
        );
    }
}

/// A stop watch for work of one thread that does not wait.
pub(crate) struct Work {
    began: Instant,
    cpu_began: Duration,
}

impl Work {
    pub(crate) fn begin() -> Self {
        Self { began: Instant::now(), cpu_began: thread_cpu_time() }
    }

    /// Time since the beginning, and the thread's processor time within it.
    pub(crate) fn end(self) -> (Duration, Duration) {
        (self.began.elapsed(), thread_cpu_time().saturating_sub(self.cpu_began))
    }
}

/// Processor time of the calling thread.
pub(crate) fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_percentiles() {
        let mut stats = StepStats::default();
        assert_eq!((stats.control.mean(), stats.control.max_of(99)), (Duration::ZERO, Duration::ZERO));
        for _ in 0..98 {
            stats.worked(Duration::from_micros(10), Duration::ZERO);
            stats.worked(Duration::from_micros(20), Duration::ZERO);
            stats.step_done(1, 1, Duration::ZERO);
        }
        stats.worked(Duration::from_micros(1000), Duration::ZERO);
        stats.step_done(1, 1, Duration::ZERO);
        assert_eq!(stats.control.mean().as_micros(), (98 * 30 + 1000) / 99);
        assert_eq!(stats.control.max_of(99).as_micros(), 1000, "the slowest counts below 100 steps");
        stats.worked(Duration::from_micros(30), Duration::ZERO);
        stats.step_done(1, 1, Duration::ZERO);
        assert_eq!(stats.control.max_of(99).as_micros(), 32);
    }

    #[test]
    fn steps_are_counted_by_their_tokens() {
        let mut stats = StepStats::default();
        for tokens in [1, 2, 3, 4, 5, 512, 513, 1 << 20] {
            stats.step_done(tokens, 10, Duration::from_micros(7));
        }
        let report = stats.report(&Load::default());
        assert_eq!(report.steps_by_tokens, [1, 1, 2, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1]);
        assert_eq!((report.steps, report.step_tokens), (8, 1040 + (1 << 20)));
        assert_eq!((report.step_keys, report.step_busy_us), (80, 56));
    }
}
