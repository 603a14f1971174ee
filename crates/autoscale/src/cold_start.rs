//! How long a group takes from the decision for it until it serves.

use std::time::Duration;

/// What is believed before any was measured, in seconds.
pub const COLD_START_S_FIRST: u64 = 60;

/// A start that takes longer than was believed counts by this part, one that takes less by the other: a horizon that is too
/// short is paid for by requests.
const LONGER_PART: u32 = 2;
const SHORTER_PART: u32 = 8;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ColdStart(Option<Duration>);

impl ColdStart {
    /// The first start that is measured is believed as it is.
    pub(crate) fn learn(&mut self, took: Duration) {
        self.0 = Some(match self.0 {
            None => took,
            Some(known) if took > known => known + (took - known) / LONGER_PART,
            Some(known) => known - (known - took) / SHORTER_PART,
        });
    }

    pub(crate) fn measured(self) -> Option<Duration> {
        self.0
    }

    pub(crate) fn believed(self) -> Duration {
        self.0.unwrap_or(Duration::from_secs(COLD_START_S_FIRST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_starts_are_believed_sooner_than_shorter_ones() {
        let mut cold = ColdStart::default();
        assert_eq!((cold.measured(), cold.believed()), (None, Duration::from_secs(COLD_START_S_FIRST)));
        cold.learn(Duration::from_secs(60));
        assert_eq!(cold.believed(), Duration::from_secs(60), "there is no better");
        cold.learn(Duration::from_secs(120));
        assert_eq!(cold.believed(), Duration::from_secs(90));
        cold.learn(Duration::from_secs(10));
        assert_eq!(cold.believed(), Duration::from_secs(80));
    }
}
