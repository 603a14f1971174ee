//! Whether the compute thread gets on with its step, and how much of the time it computes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use galerne_collective::{AbortHandle, Collective, CollectiveError};
use galerne_failpoint::{self as failpoint, Point};
use tokio::time::{MissedTickBehavior, interval};

/// How often the thread is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How long the thread may compute without meeting the other ranks: half a layer's work, apart from its tokens.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// How much longer for each token of the step, at first: a slow machine with a large model takes some ten milliseconds.
const STUCK_AFTER_TOKEN_MAX: Duration = Duration::from_millis(100);

/// Later it is so many times the most that a token has taken until then.
const SLOWER_MAX: u64 = 10;

/// What the compute thread is doing, written by it and read by others.
#[derive(Clone, Debug)]
pub(crate) struct Pulse(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    doing: AtomicU8,
    /// How often it has begun to do something else.
    moves: AtomicU64,
    /// Tokens of its step.
    tokens: AtomicU32,
    began: Instant,
    /// Since when it computes, in nanoseconds from `began`.
    since_ns: AtomicU64,
    /// What it has computed since it was last [taken](Pulse::take_busy).
    busy_ns: AtomicU64,
    /// The most that it has computed for a token without meeting the other ranks.
    token_ns_max: AtomicU64,
}

/// It has no step, or waits for others.
const WAITS: u8 = 0;
const COMPUTES: u8 = 1;

impl Pulse {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            doing: AtomicU8::new(WAITS),
            moves: AtomicU64::new(0),
            tokens: AtomicU32::new(0),
            began: Instant::now(),
            since_ns: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            token_ns_max: AtomicU64::new(0),
        }))
    }

    /// A step of so many tokens begins.
    pub(crate) fn begins(&self, tokens: usize) {
        self.0.tokens.store(u32::try_from(tokens).unwrap_or(u32::MAX), Ordering::Relaxed);
        self.computes();
    }

    /// The thread computes from now on.
    pub(crate) fn computes(&self) {
        self.0.since_ns.store(self.now_ns(), Ordering::Relaxed);
        self.0.moves.fetch_add(1, Ordering::Relaxed);
        self.0.doing.store(COMPUTES, Ordering::Release);
    }

    /// The thread waits from now on. What it has computed since it last waited counts as its share of the work.
    pub(crate) fn waits(&self) {
        let computed = self.now_ns() - self.0.since_ns.load(Ordering::Relaxed);
        self.0.busy_ns.fetch_add(computed, Ordering::Relaxed);
        let tokens = u64::from(self.0.tokens.load(Ordering::Relaxed)).max(1);
        self.0.token_ns_max.fetch_max(computed / tokens, Ordering::Relaxed);
        self.waits_uncounted();
    }

    /// The same, after something that rank 0 alone has to do.
    pub(crate) fn waits_uncounted(&self) {
        self.0.moves.fetch_add(1, Ordering::Relaxed);
        self.0.doing.store(WAITS, Ordering::Release);
    }

    /// How long it has computed its share since this was last asked.
    pub(crate) fn take_busy(&self) -> Duration {
        Duration::from_nanos(self.0.busy_ns.swap(0, Ordering::Relaxed))
    }

    /// Waits until the thread has computed for too long without meeting anyone; says for how long. Time in which this
    /// process did not run at all does not count.
    pub(crate) async fn stuck(&self) -> Duration {
        let mut ticks = interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut seen, mut for_ticks) = (0, 0);
        loop {
            ticks.tick().await;
            let moves = self.0.moves.load(Ordering::Relaxed);
            if moves != seen || self.0.doing.load(Ordering::Acquire) == WAITS {
                (seen, for_ticks) = (moves, 0);
                continue;
            }
            for_ticks += 1;
            if LOOK_INTERVAL * for_ticks > self.may_take() {
                return LOOK_INTERVAL * for_ticks;
            }
        }
    }

    /// How long the thread may compute now, until it is taken to be stuck.
    fn may_take(&self) -> Duration {
        let token = match self.0.token_ns_max.load(Ordering::Relaxed) {
            0 => STUCK_AFTER_TOKEN_MAX,
            most => STUCK_AFTER_TOKEN_MAX.min(Duration::from_nanos(most.saturating_mul(SLOWER_MAX))),
        };
        STUCK_AFTER + token * self.0.tokens.load(Ordering::Relaxed)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A collective whose calls are waits.
pub(crate) struct Watched {
    pub(crate) inner: Box<dyn Collective>,
    pub(crate) pulse: Pulse,
}

impl Watched {
    fn call<T>(&mut self, call: impl FnOnce(&mut dyn Collective) -> T) -> T {
        self.pulse.waits();
        let result = call(self.inner.as_mut());
        self.pulse.computes();
        result
    }
}

impl Collective for Watched {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&mut self, partials: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        failpoint::meet(Point::AllReduce(self.inner.rank()));
        self.call(|inner| inner.all_reduce(partials, out))
    }

    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(|inner| inner.all_gather(mine, counts, out))
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.call(|inner| inner.gather(root, mine, counts, out))
    }

    /// What was done before it is the root's alone: it draws the tokens that it now tells.
    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.pulse.waits_uncounted();
        let result = self.inner.broadcast(root, data);
        self.pulse.computes();
        result
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.call(|inner| inner.barrier())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_thread_that_computes_for_too_long_is_stuck() {
        let pulse = Pulse::new();
        let a_while = Duration::from_secs(20);
        assert!(timeout(a_while, pulse.stuck()).await.is_err(), "it has nothing to do");
        pulse.begins(100);
        assert_eq!(pulse.stuck().await, STUCK_AFTER + 100 * STUCK_AFTER_TOKEN_MAX + LOOK_INTERVAL);
        pulse.waits();
        assert!(timeout(a_while, pulse.stuck()).await.is_err(), "it waits for others");
        pulse.begins(100);
        let took = pulse.stuck().await;
        assert!(took < STUCK_AFTER + 10 * STUCK_AFTER_TOKEN_MAX, "a token takes microseconds here: {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_thread_that_moves_is_not_stuck() {
        let pulse = Pulse::new();
        let moves = async {
            for _ in 0..100 {
                pulse.computes();
                tokio::time::sleep(STUCK_AFTER / 2).await;
            }
        };
        tokio::select! {
            stuck = pulse.stuck() => panic!("{stuck:?}"),
            () = moves => {}
        }
    }

    #[test]
    fn what_every_rank_does_is_counted() {
        let pulse = Pulse::new();
        pulse.begins(1);
        std::thread::yield_now();
        pulse.waits();
        assert!(pulse.take_busy() > Duration::ZERO);
        pulse.computes();
        pulse.waits_uncounted();
        assert_eq!(pulse.take_busy(), Duration::ZERO);
    }
}
