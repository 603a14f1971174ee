//! What everybody has done, and what must hold of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_types::{EpochRecord, Fleet, GroupId, Step};

use super::machine::mix;

/// Shared by all processes of a simulation; nobody's decisions depend on it.
#[derive(Clone, Default)]
pub(super) struct Ledger(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    now: u64,
    epochs: BTreeMap<u64, Known>,
    /// The newest epoch that each process has begun.
    newest: BTreeMap<u32, u64>,
    /// Processes that have ended.
    dead: BTreeSet<u32>,
    wrongs: Vec<String>,
    story: Vec<String>,
    tells: bool,
    /// As a router saw it last.
    fleet: Fleet,
    /// Of the whole story: two runs of a seed are the same if theirs are.
    digest: u64,
}

/// What was seen of an epoch.
struct Known {
    record: EpochRecord,
    /// The processes that took part, by rank.
    ranks: BTreeMap<usize, u32>,
    /// What each step was.
    steps: BTreeMap<u64, u64>,
}

impl Ledger {
    /// `tells`: the story is kept, not only its digest.
    pub(super) fn new(tells: bool) -> Self {
        let ledger = Self::default();
        ledger.inner().tells = tells;
        ledger
    }

    pub(super) fn set_clock(&self, now: u64) {
        self.inner().now = now;
    }

    /// Something has happened.
    pub(super) fn tell(&self, what: impl FnOnce() -> String) {
        let mut inner = self.inner();
        let line = format!("{:>6} ms  {}", inner.now, what());
        inner.digest = line.bytes().fold(inner.digest, |digest, byte| mix(digest ^ u64::from(byte)));
        if inner.tells {
            inner.story.push(line);
        }
    }

    /// Something has happened that must not.
    pub(super) fn wrong(&self, what: &str) {
        self.tell(|| format!("WRONG: {what}"));
        self.inner().wrongs.push(what.to_owned());
    }

    pub(super) fn wrongs(&self) -> Vec<String> {
        self.inner().wrongs.clone()
    }

    pub(super) fn story(&self) -> Vec<String> {
        std::mem::take(&mut self.inner().story)
    }

    pub(super) fn digest(&self) -> u64 {
        self.inner().digest
    }

    /// Epochs that have been lost, but for those whose processes live and that no other has followed yet.
    pub(super) fn losses(&self) -> usize {
        let inner = self.inner();
        let newest: BTreeMap<&GroupId, u64> =
            inner.epochs.iter().map(|(epoch, known)| (&known.record.group, *epoch)).collect();
        let is_lost = |(epoch, known): &(&u64, &Known)| {
            newest[&known.record.group] > **epoch
                || known.ranks.values().any(|rank| inner.dead.contains(rank))
        };
        inner.epochs.iter().filter(is_lost).count()
    }

    /// A process has ended.
    pub(super) fn died(&self, process: u32) {
        self.inner().dead.insert(process);
    }

    /// Epochs that have begun anywhere.
    pub(super) fn epochs(&self) -> Vec<(u64, EpochRecord)> {
        self.inner().epochs.iter().map(|(epoch, known)| (*epoch, known.record.clone())).collect()
    }

    /// The newest epoch that a process has begun.
    pub(super) fn newest(&self, process: u32) -> Option<u64> {
        self.inner().newest.get(&process).copied()
    }

    /// A process begins an epoch: a newer one than ever, of which all say the same, and in a place of its own.
    pub(super) fn begins(&self, process: u32, epoch: u64, rank: usize, record: &EpochRecord) {
        self.tell(|| {
            format!("process {process} begins epoch {epoch} as rank {rank} of {}", record.members.len())
        });
        let mut inner = self.inner();
        let before = inner.newest.insert(process, epoch);
        let fresh = Known { record: record.clone(), ranks: BTreeMap::new(), steps: BTreeMap::new() };
        let known = inner.epochs.entry(epoch).or_insert(fresh);
        let same = known.record == *record;
        let holder = known.ranks.insert(rank, process);
        drop(inner);
        if before.is_some_and(|before| before >= epoch) {
            self.wrong(&format!("process {process} goes from epoch {before:?} back to {epoch}"));
        }
        if !same {
            self.wrong(&format!("two records of epoch {epoch}"));
        }
        if let Some(other) = holder.filter(|other| *other != process) {
            self.wrong(&format!("epoch {epoch} has two ranks {rank}: processes {other} and {process}"));
        }
    }

    /// A rank obeys a step: of the newest epoch that its process has begun, and the same as at the other ranks.
    pub(super) fn obeys(&self, process: u32, epoch: u64, step: &Step) {
        let digest = format!("{step:?}").bytes().fold(0, |digest, byte| mix(digest ^ u64::from(byte)));
        let mut inner = self.inner();
        let newest = inner.newest.get(&process).copied();
        let known =
            inner.epochs.get_mut(&epoch).map(|known| *known.steps.entry(step.number).or_insert(digest));
        drop(inner);
        if newest != Some(epoch) || step.epoch.0 != epoch {
            self.wrong(&format!("process {process} obeys a step of epoch {} in {newest:?}", step.epoch.0));
        }
        if known != Some(digest) {
            self.wrong(&format!("step {} of epoch {epoch} is not the same at all ranks", step.number));
        }
    }

    /// A router sees the fleet: no group goes back, and no epoch has two leaders.
    pub(super) fn sees(&self, seen: &mut BTreeMap<GroupId, u64>, fleet: &Fleet) {
        for (id, group) in &fleet.groups {
            let Some((epoch, record)) = &group.epoch else { continue };
            let before = seen.insert(id.clone(), epoch.0).unwrap_or_default();
            if before > epoch.0 {
                self.wrong(&format!("group {} goes from epoch {before} back to {}", id.0, epoch.0));
            }
            let Some(health) = group.health.as_ref().filter(|health| health.epoch == *epoch) else {
                continue;
            };
            if record.members.first().map(|leader| &leader.address) != Some(&health.leader) {
                self.wrong(&format!("{} says that it leads epoch {}, and does not", health.leader, epoch.0));
            }
        }
        self.inner().fleet = fleet.clone();
    }

    /// Whether every group serves with as many ranks as it should have.
    pub(super) fn is_whole(&self, sizes: &BTreeMap<GroupId, usize>) -> bool {
        let inner = self.inner();
        let whole = |id: &GroupId, size: usize| {
            inner.fleet.groups.get(id).is_some_and(|group| {
                let members = group.epoch.as_ref().map_or(0, |(_, record)| record.members.len());
                group.serving().is_some() && members == size
            })
        };
        sizes.iter().all(|(id, size)| whole(id, *size))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
