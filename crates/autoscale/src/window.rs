//! What an autoscaler is told: plain data, counted since it was told the last time.

use std::time::Duration;

/// What happened in a while: some seconds, since the window before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window {
    /// How long it was.
    pub length: Duration,
    /// Requests that came to all routers, those included that were refused for want of room.
    pub arrivals: u64,
    /// Tokens of their prompts that had to be computed: without those that were found in a prefix cache.
    pub prompts: Moments,
    /// Tokens of the answers that ended.
    pub answers: Moments,
    /// Requests that routers hold at its end because no group serves.
    pub held: u32,
    /// The groups that served, at its end.
    pub groups: Vec<GroupWindow>,
}

/// Sums over some lengths: enough for their mean and variance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moments {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
    /// The sum of their squares.
    pub squares: u64,
}

/// One group: how it stands at the end of a window, and the steps that it ran in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupWindow {
    /// Requests that hold a slot.
    pub running: u32,
    /// Requests that wait for one.
    pub waiting: u32,
    /// KV blocks of the group; 0 if that is not known.
    pub kv_blocks: u32,
    /// Those of them that no request holds.
    pub kv_blocks_free: u32,
    /// The steps that it ran.
    pub steps: Steps,
}

/// Sums over some steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// How many, those without tokens left out.
    pub count: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Keys that these tokens attended to; 0 throughout if nobody counts them.
    pub keys: u64,
    /// How long they took together.
    pub busy: Duration,
}

/// How many groups there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// Serve.
    pub ready: u32,
    /// Were started and do not serve yet.
    pub starting: u32,
    /// For how long the one of these that was started first has been starting.
    pub starting_for: Duration,
    /// Take nothing new and finish what they have.
    pub draining: u32,
}

impl Moments {
    /// Counts one more.
    pub fn add(&mut self, tokens: u32) {
        let tokens = u64::from(tokens);
        self.count += 1;
        self.sum += tokens;
        self.squares = self.squares.saturating_add(tokens * tokens);
    }
}

impl Window {
    /// Requests that wait for a slot, and those that wait for a group.
    pub(crate) fn waiting(&self) -> u64 {
        let at_groups: u64 = self.groups.iter().map(|group| u64::from(group.waiting)).sum();
        at_groups + u64::from(self.held)
    }

    pub(crate) fn running(&self) -> u64 {
        self.groups.iter().map(|group| u64::from(group.running)).sum()
    }
}
