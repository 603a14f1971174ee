//! What is promised, and within what it is to be kept.

use std::time::Duration;

/// What is promised of requests; what is `None` is not promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sla {
    /// Of the time from a request's arrival at a router to its first token.
    pub ttft: Option<Target>,
    /// Of the time between two tokens of an answer, in its mean.
    pub tpot: Option<Target>,
}

/// So many percent of requests are to take no longer than so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// No longer than this.
    pub within: Duration,
    /// Of which share of requests: 95 is the 95th percentile. From 50 to 99.
    pub percent: u8,
}

/// How many groups there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// No fewer; 0 allows for none while nobody asks for anything.
    pub groups_min: u32,
    /// No more.
    pub groups_max: u32,
    /// Nobody has asked for anything for so long before there are none at all.
    pub idle: Duration,
}

/// What a group can take up at once: the limits of its scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Sequences that run at once (`--sequences-max`).
    pub sequences_max: u32,
    /// Tokens of one step (`--step-tokens-max`).
    pub step_tokens_max: u32,
}

impl Bounds {
    pub(crate) fn clamp(self, groups: u32) -> u32 {
        groups.min(self.groups_max).max(self.groups_min)
    }
}
