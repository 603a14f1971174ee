//! A circuit breaker: whoever fails again and again is left alone for a while.

use std::time::Duration;

/// Failures in a row after which a group gets no new requests for a while.
pub const BREAKER_FAILURES: u32 = 5;

/// The first such while.
pub const BREAKER_MS_MIN: Duration = Duration::from_millis(500);

/// The longest: each is twice the one before, until a request succeeds. What a leader had waits for it, too.
pub const BREAKER_MS_MAX: Duration = Duration::from_secs(8);

/// How a group's breaker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Requests pass.
    Closed,
    /// None does.
    Open,
    /// The while is over: one request may try, and what becomes of it decides.
    Probing,
}

/// Time is the router's, from any beginning.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    /// Failures in a row.
    failures: u32,
    /// It has opened so often since the last success.
    opened: u32,
    /// When the while is over; `None` if it is closed.
    open_until: Option<Duration>,
    /// A request tries.
    probed: bool,
}

impl Breaker {
    pub(crate) fn state(&self, now: Duration) -> BreakerState {
        match self.open_until {
            None => BreakerState::Closed,
            Some(until) if now < until => BreakerState::Open,
            Some(_) => BreakerState::Probing,
        }
    }

    pub(crate) fn admits(&self, now: Duration) -> bool {
        match self.state(now) {
            BreakerState::Closed => true,
            BreakerState::Open => false,
            BreakerState::Probing => !self.probed,
        }
    }

    /// A request passes; true if what becomes of it decides.
    pub(crate) fn passes(&mut self, now: Duration) -> bool {
        let probes = self.state(now) == BreakerState::Probing && !self.probed;
        self.probed |= probes;
        probes
    }

    /// The request that tried has ended, and nobody knows whether well.
    pub(crate) fn gave_up(&mut self) {
        self.probed = false;
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Counts a failure; for how long it is open from now on, if it has opened. `draw` is any number: between half and
    /// all of the while is chosen by it.
    pub(crate) fn failed(&mut self, now: Duration, draw: u64) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        let opens = match self.state(now) {
            BreakerState::Closed => self.failures >= BREAKER_FAILURES,
            BreakerState::Open => false, // sent before it opened
            BreakerState::Probing => true,
        };
        if !opens {
            return None;
        }
        let most = BREAKER_MS_MIN.saturating_mul(1 << self.opened.min(16)).min(BREAKER_MS_MAX);
        let pause = most / 2 + full_jitter(most / 2, draw);
        self.opened += 1;
        (self.open_until, self.probed) = (Some(now + pause), false);
        Some(pause)
    }
}

/// A time from none to `most`, chosen by any number.
pub fn full_jitter(most: Duration, draw: u64) -> Duration {
    most.mul_f64(draw as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn fail(breaker: &mut Breaker, now: Duration, times: u32) -> Option<Duration> {
        (0..times).fold(None, |last, _| last.or(breaker.failed(now, u64::MAX)))
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_request_try() {
        let mut breaker = Breaker::default();
        assert_eq!(fail(&mut breaker, MS, BREAKER_FAILURES - 1), None);
        breaker.succeeded();
        assert_eq!(fail(&mut breaker, MS, BREAKER_FAILURES - 1), None);
        assert!(breaker.admits(MS));
        assert_eq!(fail(&mut breaker, MS, 1), Some(BREAKER_MS_MIN));
        assert_eq!(fail(&mut breaker, MS, 9), None, "what was under way does not make it longer");
        let over = MS + BREAKER_MS_MIN;
        assert!(!breaker.admits(over - MS) && breaker.admits(over));
        assert!(breaker.passes(over) && !breaker.admits(over), "one tries");
        breaker.gave_up();
        assert!(breaker.admits(over), "its client left, and another tries");
        assert!(breaker.passes(over));
        breaker.succeeded();
        assert_eq!(breaker.state(over), BreakerState::Closed);
    }

    #[test]
    fn each_while_is_twice_the_last_and_jittered() {
        let (mut breaker, mut now) = (Breaker::default(), Duration::ZERO);
        fail(&mut breaker, now, BREAKER_FAILURES - 1);
        let mut most = BREAKER_MS_MIN;
        for draw in [0, u64::MAX / 2, u64::MAX].into_iter().cycle().take(12) {
            let pause = breaker.failed(now, draw).unwrap();
            assert!(most / 2 <= pause && pause <= most, "{pause:?} of {most:?}");
            now += pause;
            most = (most * 2).min(BREAKER_MS_MAX);
        }
        assert_eq!(most, BREAKER_MS_MAX);
    }
}
