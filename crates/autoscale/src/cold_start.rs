//! How long a group takes from the decision for it until it serves.

use std::time::Duration;

/// What is believed before any was measured, in seconds.
pub const COLD_START_S_FIRST: u64 = 60;

/// A start that takes longer than was believed counts by this part, one that takes less by the other: a horizon that is too
/// short is paid for by requests.
const LONGER_PART: u32 = 2;
const SHORTER_PART: u32 = 8;

#[derive(Clone, Copy, Debug)]
pub(crate) struct ColdStart(Duration);

impl Default for ColdStart {
    fn default() -> Self {
        Self(Duration::from_secs(COLD_START_S_FIRST))
    }
}

impl ColdStart {
    pub(crate) fn learn(&mut self, took: Duration) {
        if took > self.0 {
            self.0 += (took - self.0) / LONGER_PART;
        } else {
            self.0 -= (self.0 - took) / SHORTER_PART;
        }
    }

    pub(crate) fn believed(self) -> Duration {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_starts_are_believed_sooner_than_shorter_ones() {
        let mut cold = ColdStart::default();
        cold.learn(Duration::from_secs(120));
        assert_eq!(cold.believed(), Duration::from_secs(90));
        cold.learn(Duration::from_secs(10));
        assert_eq!(cold.believed(), Duration::from_secs(80));
    }
}
