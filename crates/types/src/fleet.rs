//! Ranks, groups and the fleet as etcd tells of them.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::compute::Compute;
use crate::kv::KvDtype;
use crate::quantize::Quantize;
use crate::shards::Shards;
use crate::step::Epoch;

/// A group's name, unique in a cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(pub String);

/// A rank process's place: `HOST/INDEX`, the same after a restart of the process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RankId(pub String);

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::fmt::Display for RankId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a group serves. Ranks form a group only when their cards are equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// The name that clients ask for.
    pub name: String,
    /// Hex SHA-256 over the configuration and the weight files' headers and sizes.
    pub digest: String,
    /// Positions of prompt and answer together, in tokens.
    pub context_tokens_max: u32,
    /// Size of the vocabulary, in tokens.
    pub vocab: u32,
    /// The cut that the group was asked to make; S is part of the numerics.
    pub shards: Shards,
    /// What its weights are quantized to at load; part of the numerics, too.
    #[serde(default)]
    pub quantize: Option<Quantize>,
    /// How it computes; part of the numerics, too.
    #[serde(default)]
    pub compute: Compute,
    /// How it keeps keys and values; so is this.
    #[serde(default)]
    pub kv: KvDtype,
}

/// A rank process's registration, written under its lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankRecord {
    /// The rank's place.
    pub id: RankId,
    /// The group it stands for.
    pub group: GroupId,
    /// Machine it runs on: ranks of one host share memory.
    pub host: String,
    /// Its index among the ranks of its host and group; orders the ranks.
    pub index: u16,
    /// `IP:PORT` of its gRPC server.
    pub address: String,
    /// `IP:PORT` where its collective meets ranks of other hosts.
    pub collective: String,
    /// Process id on its host.
    pub pid: u32,
    /// `cpu xT` with T threads.
    pub device: String,
    /// Version of the binary.
    pub build: String,
    /// What it serves.
    pub model: ModelCard,
    /// What it is doing.
    pub state: RankState,
    /// Its resident memory, in bytes.
    pub memory_bytes: u64,
    /// The last epoch that it has given up, or that was there before it: it is in none up to this one.
    #[serde(default)]
    pub left: Epoch,
}

/// What a rank process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankState {
    /// Registered; waits for a group to form.
    Waiting,
    /// Reads its shards.
    Loading {
        /// Share of its bytes that are read, in percent.
        percent: u8,
    },
    /// Holds its shards; meets the others in the collective.
    Joining,
    /// Runs steps.
    Ready,
}

/// One incarnation of a group; the revision of the transaction that wrote it is its [`Epoch`].
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The group.
    pub group: GroupId,
    /// S and N.
    pub shards: Shards,
    /// Ranks in order; the first is the leader.
    pub members: Vec<Member>,
    /// Hex of 32 random bytes: authenticates this epoch's collective and step connections, once.
    pub secret: String,
}

/// Without the secret: logs show records.
impl std::fmt::Debug for EpochRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { group, shards, members, secret: _ } = self;
        let mut record = f.debug_struct("EpochRecord");
        record.field("group", group).field("shards", shards).field("members", members).finish_non_exhaustive()
    }
}

/// A rank of an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Who.
    pub id: RankId,
    /// Machine it runs on.
    pub host: String,
    /// `IP:PORT` of its gRPC server.
    pub address: String,
    /// `IP:PORT` where its collective meets ranks of other hosts.
    pub collective: String,
    /// Process id: tells a restarted process from its predecessor.
    pub pid: u32,
    /// Virtual shards that it hosts.
    pub shards: Range<usize>,
}

/// A leader's word that its group serves, written under its lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// The group.
    pub group: GroupId,
    /// The incarnation that serves.
    pub epoch: Epoch,
    /// `IP:PORT` where requests go.
    pub leader: String,
    /// What it serves.
    pub model: ModelCard,
    /// KV blocks of the group.
    pub kv_blocks: u32,
    /// Sequences that run at once, at most.
    pub sequences_max: u32,
    /// True while the group finishes what it has and takes nothing new.
    pub draining: bool,
}

/// One group as seen now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// Live ranks, in order of their ids.
    pub ranks: BTreeMap<RankId, RankRecord>,
    /// The last incarnation.
    pub epoch: Option<(Epoch, EpochRecord)>,
    /// Present while the group serves.
    pub health: Option<Health>,
}

impl Member {
    /// True if `rank` is this very process: a restarted one has another pid, or other ports.
    pub fn is(&self, rank: &RankRecord) -> bool {
        self.id == rank.id
            && self.pid == rank.pid
            && self.address == rank.address
            && self.collective == rank.collective
    }
}

/// Why a member no longer stands for its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// Its process is gone.
    Gone,
    /// Its process has given the epoch up.
    Left,
}

impl Group {
    /// The leader's word, if it is of the last incarnation and all of its members stand: a word that is older, or
    /// that a dead rank makes untrue, is not to be believed.
    pub fn serving(&self) -> Option<&Health> {
        let (epoch, _) = self.epoch.as_ref()?;
        self.health.as_ref().filter(|health| health.epoch == *epoch && self.stands())
    }

    /// True while the last epoch's members all live, are the processes they were, and have not left it.
    pub fn stands(&self) -> bool {
        let Some((epoch, record)) = &self.epoch else { return false };
        record.members.iter().all(|member| self.absence(*epoch, member).is_none())
    }

    /// Why `member` does not stand for `epoch`; `None` when it does.
    pub fn absence(&self, epoch: Epoch, member: &Member) -> Option<Absence> {
        match self.ranks.get(&member.id) {
            Some(rank) if member.is(rank) && rank.left < epoch => None,
            Some(rank) if member.is(rank) => Some(Absence::Left),
            _ => Some(Absence::Gone),
        }
    }
}

/// All groups of a cluster as seen now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fleet {
    /// By name.
    pub groups: BTreeMap<GroupId, Group>,
}
