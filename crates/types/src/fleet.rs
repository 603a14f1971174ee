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

impl ModelCard {
    /// All that an answer's tokens depend on, in a word: an answer that was begun under a card goes on with the very same
    /// tokens under one of equal numerics. N is no part of that, nor is how long an answer may become.
    pub fn numerics(&self) -> String {
        let Self { name: _, digest, context_tokens_max: _, vocab, shards, quantize, compute, kv } = self;
        let quantize = quantize.map_or("as-stored".to_owned(), |quantize| quantize.to_string());
        format!("{digest}.{vocab}.s{}.{quantize}.{compute}.kv-{kv}", shards.virtual_shards())
    }

    /// Whether two cards are of equal [`numerics`](Self::numerics).
    pub fn same_numerics(&self, other: &Self) -> bool {
        self.numerics() == other.numerics()
    }
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
    /// `cpu xT ISA` with T threads and the kernels' instruction set.
    pub device: String,
    /// Version of the binary.
    pub build: String,
    /// What it serves.
    pub model: ModelCard,
    /// What it is doing.
    pub state: RankState,
    /// Its resident memory, in bytes.
    pub memory_bytes: u64,
    /// The fewest ranks of a group that it can be one of: with fewer, its share would not fit its memory.
    #[serde(default)]
    pub ranks_min: u16,
    /// The last epoch that it has given up, or that was there before it: it is in none up to this one.
    #[serde(default)]
    pub left: Epoch,
    /// Why it has given that one up.
    #[serde(default)]
    pub loss: Option<Loss>,
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
    /// Its process has ended, and was not there to say so: its supervisor did.
    Dead,
}

/// Why an epoch ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// In a word.
    pub kind: LossKind,
    /// Whose fault it was, as far as that is known.
    #[serde(default)]
    pub rank: Option<RankId>,
}

/// Kinds of [`Loss`], the most telling first: of what several ranks say of one epoch's end, the first counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// A rank computed something else than the others.
    Diverged,
    /// A rank took ten times as long as the others.
    Slow,
    /// A rank lives and does not answer.
    Hung,
    /// A rank's process ended.
    Died,
    /// A rank's lease ended, and nobody knows why.
    Vanished,
    /// The ranks did not meet, or one of them failed at something.
    Failed,
    /// The group is drained.
    Drained,
    /// More ranks stand than it had.
    Grown,
}

impl LossKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Diverged,
        Self::Slow,
        Self::Hung,
        Self::Died,
        Self::Vanished,
        Self::Failed,
        Self::Drained,
        Self::Grown,
    ];

    /// As records and metrics say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diverged => "diverged",
            Self::Slow => "slow",
            Self::Hung => "hung",
            Self::Died => "died",
            Self::Vanished => "vanished",
            Self::Failed => "failed",
            Self::Drained => "drained",
            Self::Grown => "grown",
        }
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.rank {
            Some(rank) => write!(f, "{} ({rank})", self.kind.name()),
            None => f.write_str(self.kind.name()),
        }
    }
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
    /// When it was written, in milliseconds of Unix time by its writer's clock.
    #[serde(default)]
    pub began_ms: u64,
    /// The epochs before it, the oldest first: the last [`PAST_EPOCHS_MAX`](crate::limits::PAST_EPOCHS_MAX) of them.
    #[serde(default)]
    pub past: Vec<Past>,
    /// How often the group has been formed anew, and why.
    #[serde(default)]
    pub reformations: BTreeMap<LossKind, u64>,
}

/// An epoch that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Past {
    /// Which.
    pub epoch: Epoch,
    /// N.
    pub ranks: u16,
    /// When it began, in milliseconds of Unix time.
    pub began_ms: u64,
    /// When the next one was written.
    pub ended_ms: u64,
    /// Why it ended.
    pub loss: Loss,
}

impl EpochRecord {
    /// The record of a group's first epoch, or of one that knows of none before it.
    pub fn new(group: GroupId, shards: Shards, members: Vec<Member>, secret: String) -> Self {
        let (past, reformations) = (Vec::new(), BTreeMap::new());
        Self { group, shards, members, secret, began_ms: 0, past, reformations }
    }
}

/// Without the secret: logs show records.
impl std::fmt::Debug for EpochRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { group, shards, members, secret: _, began_ms: _, past: _, reformations: _ } = self;
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
    /// Tokens of one step, at most; 0 from a leader that does not tell.
    #[serde(default)]
    pub step_tokens_max: u32,
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
    /// Present while somebody wants it to end.
    pub drain: Option<Drain>,
    /// Present while it shall get no requests, though it may serve: it is on trial.
    pub hold: Option<Hold>,
}

/// Somebody wants a group to take nothing new, to finish or pass on what it has, and to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// When it was said; ranks that came later are not meant.
    #[serde(skip)]
    pub revision: u64,
    /// How long running answers may take to finish, in milliseconds, before other groups take them over.
    pub grace_ms: u64,
}

/// Somebody wants routers to give a group no requests: whoever wrote it asks the group by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Why, in a few words.
    pub why: String,
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

/// Why a member does not stand for its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// It is not registered. It may live all the same: a lease can be lost without its holder.
    Gone,
    /// Its process has ended, or another one has its place.
    Dead,
    /// Its process has given the epoch up.
    Left,
}

impl Group {
    /// The leader's word, if it is of the last incarnation and that is not over: a word that is older, or that a dead
    /// rank makes untrue, is not to be believed.
    pub fn serving(&self) -> Option<&Health> {
        let (epoch, _) = self.epoch.as_ref()?;
        self.health.as_ref().filter(|health| health.epoch == *epoch && self.stands())
    }

    /// True while the last epoch can go on: none of its members is dead or has left it.
    pub fn stands(&self) -> bool {
        let mut absences = self.absences();
        self.epoch.is_some() && absences.all(|(_, absence)| absence == Absence::Gone)
    }

    /// True while all members of the last epoch are registered and stand for it.
    pub fn is_whole(&self) -> bool {
        self.epoch.is_some() && self.absences().next().is_none()
    }

    /// The members of the last epoch that do not stand for it.
    pub fn absences(&self) -> impl Iterator<Item = (&Member, Absence)> {
        let members = self
            .epoch
            .iter()
            .flat_map(|(epoch, record)| record.members.iter().map(|member| (*epoch, member)));
        members.filter_map(|(epoch, member)| Some((member, self.absence(epoch, member)?)))
    }

    /// Why `member` does not stand for `epoch`; `None` when it does.
    pub fn absence(&self, epoch: Epoch, member: &Member) -> Option<Absence> {
        let Some(rank) = self.ranks.get(&member.id) else { return Some(Absence::Gone) };
        if !member.is(rank) || rank.state == RankState::Dead {
            return Some(Absence::Dead);
        }
        (rank.left >= epoch).then_some(Absence::Left)
    }
}

/// All groups of a cluster as seen now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fleet {
    /// By name.
    pub groups: BTreeMap<GroupId, Group>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> ModelCard {
        ModelCard {
            name: "m".into(),
            digest: "d".into(),
            context_tokens_max: 64,
            vocab: 512,
            shards: Shards::new(4, 2).unwrap(),
            quantize: None,
            compute: Compute::F32,
            kv: KvDtype::F32,
        }
    }

    fn rank() -> RankRecord {
        RankRecord {
            id: RankId("a/0".into()),
            group: GroupId("g".into()),
            host: "a".into(),
            index: 0,
            address: "10.0.0.1:7000".into(),
            collective: "10.0.0.1:8000".into(),
            pid: 100,
            device: "cpu x1".into(),
            build: "0.1.0".into(),
            model: card(),
            state: RankState::Ready,
            memory_bytes: 0,
            ranks_min: 1,
            left: Epoch(8),
            loss: None,
        }
    }

    /// The rank alone in epoch 9, which it has declared healthy.
    fn serving() -> Group {
        let RankRecord { id, host, address, collective, pid, .. } = rank();
        let member = Member { id: id.clone(), host, address: address.clone(), collective, pid, shards: 0..4 };
        let group = GroupId("g".into());
        let record = EpochRecord::new(group.clone(), card().shards, vec![member], "00".into());
        let health = Health {
            group,
            epoch: Epoch(9),
            leader: address,
            model: card(),
            kv_blocks: 1,
            sequences_max: 1,
            step_tokens_max: 1,
            draining: false,
        };
        Group {
            ranks: BTreeMap::from([(id, rank())]),
            epoch: Some((Epoch(9), record)),
            health: Some(health),
            ..Group::default()
        }
    }

    fn absence(change: fn(&mut RankRecord)) -> Option<Absence> {
        let mut group = serving();
        group.ranks.values_mut().for_each(change);
        let (epoch, record) = group.epoch.as_ref().unwrap();
        let absence = group.absence(*epoch, &record.members[0]);
        assert_eq!((group.stands(), group.is_whole()), (absence.is_none(), absence.is_none()));
        assert_eq!(group.serving().is_some(), absence.is_none());
        absence
    }

    #[test]
    fn a_member_is_one_process_until_it_ends_or_leaves() {
        assert_eq!(absence(|_| {}), None);
        assert_eq!(absence(|rank| rank.pid += 1), Some(Absence::Dead), "another process");
        assert_eq!(absence(|rank| rank.address.push('1')), Some(Absence::Dead));
        assert_eq!(absence(|rank| rank.collective.push('1')), Some(Absence::Dead));
        assert_eq!(absence(|rank| rank.state = RankState::Dead), Some(Absence::Dead));
        assert_eq!(absence(|rank| rank.left = Epoch(9)), Some(Absence::Left));
        let member = &serving().epoch.unwrap().1.members[0];
        assert!(!member.is(&RankRecord { id: RankId("a/1".into()), ..rank() }));
    }

    #[test]
    fn a_group_without_an_epoch_neither_stands_nor_serves() {
        let group = Group { epoch: None, ..serving() };
        assert!(!group.stands() && !group.is_whole() && group.serving().is_none());
    }

    #[test]
    fn a_silent_member_ends_nothing_and_an_older_word_is_not_believed() {
        let mut group = serving();
        group.ranks.clear();
        assert!(group.stands() && !group.is_whole() && group.serving().is_some());
        for other in [Epoch(8), Epoch(10)] {
            group.health.as_mut().unwrap().epoch = other;
            assert_eq!(group.serving(), None);
        }
    }

    #[test]
    fn answers_go_on_under_cards_that_compute_the_same() {
        let same: [fn(&mut ModelCard); 3] = [
            |card| card.name.push('2'),
            |card| card.context_tokens_max = 1,
            |card| card.shards = Shards::new(4, 4).unwrap(),
        ];
        let others: [fn(&mut ModelCard); 6] = [
            |card| card.digest.push('2'),
            |card| card.vocab += 1,
            |card| card.shards = Shards::new(8, 2).unwrap(),
            |card| card.quantize = Some(Quantize::Q8_0),
            |card| card.compute = Compute::Int8,
            |card| card.kv = KvDtype::Int8,
        ];
        for (changes, goes_on) in [(&same[..], true), (&others[..], false)] {
            for change in changes {
                let mut other = card();
                change(&mut other);
                assert_eq!(card().same_numerics(&other), goes_on, "{other:?}");
            }
        }
    }
}
