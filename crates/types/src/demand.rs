//! What a router tells of the requests that come to it, and of the groups that it hears of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fleet::GroupId;
use crate::step::Epoch;

/// What a router tells in etcd, under a lease: counts since it began, so that whoever misses a record misses nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterRecord {
    /// How long the router had run when it counted, in milliseconds.
    pub uptime_ms: u64,
    /// Answers that were asked for, those included that no group had room for.
    pub arrivals: u64,
    /// Tokens of prompts that groups had to compute.
    pub prompts: Moments,
    /// Tokens of the answers that ended.
    pub answers: Moments,
    /// Requests that wait here now because no group serves.
    pub held: u32,
    /// What the leaders have reported last.
    pub groups: BTreeMap<GroupId, GroupLoad>,
}

/// Sums over some lengths in tokens: enough for their mean and variance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
    /// The sum of their squares.
    pub squares: u64,
}

/// A group's load, and what it has done since its epoch began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupLoad {
    /// Its incarnation.
    pub epoch: Epoch,
    /// Requests that hold a slot.
    pub running: u32,
    /// Requests that wait for one.
    pub waiting: u32,
    /// KV blocks of the group.
    pub kv_blocks: u32,
    /// Those of them that no request holds.
    pub kv_blocks_free: u32,
    /// Steps that were run, those without tokens left out.
    pub steps: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Keys that these tokens attended to.
    pub keys: u64,
    /// How long they took together, in microseconds.
    pub busy_us: u64,
}

impl Moments {
    /// Counts one more.
    pub fn add(&mut self, tokens: usize) {
        let tokens = tokens as u64;
        self.count += 1;
        self.sum = self.sum.saturating_add(tokens);
        self.squares = self.squares.saturating_add(tokens.saturating_mul(tokens));
    }
}
