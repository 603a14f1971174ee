//! Pauses between attempts: exponential, with jitter so that a thousand ranks do not return at once.

use std::time::Duration;

use crate::limits::{BACKOFF_MAX, BACKOFF_MIN};

/// Doubles from [`BACKOFF_MIN`] to [`BACKOFF_MAX`]; each pause is a jittered step.
pub(crate) struct Backoff {
    step: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { step: BACKOFF_MIN }
    }

    /// The next pause.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = jitter(self.step);
        self.step = (self.step * 2).min(BACKOFF_MAX);
        pause
    }
}

/// Between half and all of `most`; without a source of randomness, all of it.
pub(crate) fn jitter(most: Duration) -> Duration {
    let share = getrandom::u32().map_or(1.0, |draw| 0.5 + f64::from(draw) / f64::from(u32::MAX) / 2.0);
    most.mul_f64(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_limit() {
        let mut backoff = Backoff::new();
        let mut step = BACKOFF_MIN;
        for _ in 0..10 {
            let pause = backoff.pause();
            assert!(pause >= step / 2 && pause <= step, "{pause:?} for a step of {step:?}");
            step = (step * 2).min(BACKOFF_MAX);
        }
        assert_eq!(step, BACKOFF_MAX);
    }
}
