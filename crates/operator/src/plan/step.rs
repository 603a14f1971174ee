//! The next steps towards what is asked: groups that begin, are mended, are tried, drain and end.
//!
//! A step is small, may fail, and is planned again until what is seen makes it needless. What was decided is kept where everybody
//! sees it: that a group is to end in an annotation of its StatefulSet, how a version's trial went in the status.

use std::collections::BTreeMap;

use super::rollout::{others_serve, rollout};
use super::{Asked, END_S_MAX, GroupSeen, Judged, PodSeen, REFORM_S_MAX, Seen, judge};
use crate::api::parts::{OnFailure, Strategy};
use crate::api::{ClusterStatus, GroupPhase, Rollout, Trial};

/// Something to do for a group, by its number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Tell routers to give it no requests.
    Hold(u32),
    /// Make its StatefulSet and what belongs to it, of the version that is asked for.
    Create(u32),
    /// The same of the version that passed its trial last.
    Remake(u32),
    /// Put fixed prompts to it, and to a group that has the same numerics, if there is one.
    Try(u32),
    /// Tell routers that it may have requests.
    Release(u32),
    /// Bring what the version is made of to a node, in a pod of its own.
    Preload(String),
    /// Delete such a pod, by its name.
    Unload(String),
    /// Decide that it is to end.
    Retire(u32, String),
    /// Ask it to take nothing new and to end.
    Drain(u32),
    /// Delete its StatefulSet and what belongs to it.
    Delete(u32),
    /// Forget it in etcd: its number is free again.
    Forget(u32),
    /// Delete a pod whose node is lost, without waiting for it: the epoch fences what may still run there.
    Replace(u32, String),
    /// Delete all its pods: it starts afresh as a whole.
    Restart(u32, String),
}

/// What follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What each group is doing.
    pub groups: BTreeMap<u32, Judged>,
    /// How the version comes in.
    pub rollout: Rollout,
    /// What to do now, in this order; a step that fails ends the pass.
    pub steps: Vec<Step>,
    /// Routers stay those of the old groups, which whatever comes may not understand.
    pub routers_stay: bool,
    /// Look again after so many seconds, if nothing else happens.
    pub again_after_s: Option<i64>,
}

/// Plans the next steps. `last` is the status that was written last.
pub fn plan(asked: &Asked, seen: &Seen, last: &ClusterStatus) -> Plan {
    let mut groups = judge(asked, seen, last);
    let rollout = rollout(asked, seen, last);
    let steps_back = steps_back(asked, rollout.trial);
    let mut planner = Planner { asked, seen, rollout, steps_back, steps: Vec::new(), deadlines: Vec::new() };
    planner.mend(&mut groups);
    planner.end();
    planner.retire(&groups);
    planner.create();
    planner.try_out();
    planner.unload();
    let routers_stay = planner.routers_stay();
    let Planner { rollout, steps, deadlines, .. } = planner;
    let again = deadlines.into_iter().map(|deadline| (deadline - seen.now).max(1)).min();
    Plan { groups, rollout, steps, routers_stay, again_after_s: again }
}

impl Plan {
    /// True when there is nothing to do and nothing to wait for but what others do.
    pub fn is_silent(&self) -> bool {
        self.steps.is_empty()
    }
}

/// Whether the version that is asked for must not serve, or not yet, and one is known that may: what is missing is made of that.
fn steps_back(asked: &Asked, trial: Trial) -> bool {
    let other = asked.passed.as_ref().is_some_and(|passed| *passed != asked.revision);
    other && (trial == Trial::Failed || asked.update.paused && trial == Trial::Pending)
}

pub(super) struct Planner<'a> {
    pub(super) asked: &'a Asked,
    pub(super) seen: &'a Seen,
    rollout: Rollout,
    steps_back: bool,
    pub(super) steps: Vec<Step>,
    /// When something that is waited for has taken too long, in Unix seconds.
    pub(super) deadlines: Vec<i64>,
}

impl<'a> Planner<'a> {
    pub(super) fn groups(&self) -> impl Iterator<Item = (u32, &'a GroupSeen)> + use<'a> {
        self.seen.groups.iter().map(|(number, group)| (*number, group))
    }

    /// It is what there shall be, and where it can stay.
    fn is_good(&self, group: &GroupSeen) -> bool {
        let wanted = match () {
            () if self.steps_back => !self.is_new(group) && !group.held,
            () if self.asked.update.paused => true,
            () => self.is_new(group),
        };
        wanted && !group.displaced()
    }

    pub(super) fn is_new(&self, group: &GroupSeen) -> bool {
        group.revision.as_ref() == Some(&self.asked.revision)
    }

    /// True once `since` is longer ago than `most_s`; until then it is looked at again.
    pub(super) fn overdue(&mut self, since: i64, most_s: i64) -> bool {
        let deadline = since + most_s;
        if self.seen.now < deadline {
            self.deadlines.push(deadline);
        }
        self.seen.now >= deadline
    }

    /// Pods whose nodes are lost are replaced; a group that cannot form anew starts afresh.
    fn mend(&mut self, judged: &mut BTreeMap<u32, Judged>) {
        for (number, group) in self.groups() {
            let is_lost = |pod: &&PodSeen| pod.node_lost && pod.ranks_living == 0 && self.seen.fleet_known;
            let lost = group.pods.iter().filter(is_lost);
            self.steps.extend(lost.map(|pod| Step::Replace(number, pod.name.clone())));
            let Some(judged) = judged.get_mut(&number).filter(|_| self.seen.fleet_known) else { continue };
            let most_s = match judged.phase {
                GroupPhase::Reforming => REFORM_S_MAX,
                // Its workers give up by themselves; those that had served before do not.
                GroupPhase::Starting => self.asked.start_s + REFORM_S_MAX,
                _ => continue,
            };
            if self.overdue(judged.since, most_s) {
                let why = format!("it has not formed within {most_s} s");
                // Its time begins anew, even if nobody looks while its pods are gone.
                (judged.phase, judged.since) = (GroupPhase::Pending, self.seen.now);
                judged.message.clone_from(&why);
                self.steps.push(Step::Restart(number, why));
            }
        }
    }

    /// Groups that are to end: drained first, then their pods go, then their numbers are free.
    fn end(&mut self) {
        if !self.seen.fleet_known {
            return; // nobody can be asked to drain: what runs goes on until somebody can
        }
        for (number, group) in self.groups() {
            let retired = group.retired.as_ref().filter(|_| group.revision.is_some());
            if let Some(retired) = retired {
                let too_long = self.overdue(retired.since, self.asked.drain_s + END_S_MAX);
                if group.ranks_living == 0 || too_long {
                    self.steps.push(Step::Delete(number));
                } else if !group.draining {
                    self.steps.push(Step::Drain(number));
                }
            } else if !group.occupies() && group.ranks_living == 0 && self.is_over(group) {
                self.steps.push(Step::Forget(number));
            }
        }
    }

    /// What etcd remembers of a group is of one that has been; of one that was only held, if none is to come.
    fn is_over(&self, group: &GroupSeen) -> bool {
        group.draining || group.epoch.is_some() || (group.held && self.asked.wanted == 0)
    }

    /// Groups that shall not stay are chosen to end, as far as those that are left can do without them.
    fn retire(&mut self, judged: &BTreeMap<u32, Judged>) {
        if !self.seen.fleet_known {
            return; // who serves is not known
        }
        let asked = self.asked;
        let mut available = self.groups().filter(|(_, group)| group.available()).count();
        let wanted = asked.wanted as usize;
        let floor = match wanted {
            0 => 0,
            _ => wanted.saturating_sub(asked.update.max_unavailable.into()).max(1),
        };
        let mut staying: Vec<(u32, &GroupSeen)> = self.groups().filter(|(_, group)| group.stays()).collect();
        let (mut good, mut rest) = (0, 0);
        for (_, group) in &staying {
            *(if self.is_good(group) { &mut good } else { &mut rest }) += 1;
        }
        // Who does not serve goes first, then who is of an old version or sits where it cannot stay, then the last.
        staying.sort_by_key(|(number, group)| {
            (group.available(), self.is_good(group), std::cmp::Reverse(*number))
        });
        for (number, group) in staying {
            let alike = if self.is_good(group) { &mut good } else { &mut rest };
            let too_many = *alike > wanted;
            let Some((why, at_once)) = self.reason(group, judged.get(&number), too_many) else {
                continue;
            };
            if group.available() && !at_once && available <= floor {
                continue;
            }
            available -= usize::from(group.available());
            *alike -= 1;
            if self.has_preloaded(group, too_many) {
                self.steps.push(Step::Retire(number, why));
            }
        }
    }

    /// Why a group shall end, if it shall; and whether at once, whatever is left. `too_many`: of those like it.
    fn reason(&self, group: &GroupSeen, judged: Option<&Judged>, too_many: bool) -> Option<(String, bool)> {
        let update = &self.asked.update;
        let has_served = group.available() || judged.is_some_and(|judged| judged.served);
        let recreate = update.strategy == Strategy::Recreate;
        // What has served goes on to, and what is not there for a while comes back.
        let gives_way = match () {
            () if self.is_new(group) => false,
            () if self.keeps_old() => group.held && !has_served,
            () => recreate || self.may_replace() || !has_served,
        };
        if gives_way {
            return Some(("its version is old".into(), recreate));
        }
        let failed = self.is_new(group) && self.rollout.trial == Trial::Failed && !group.available();
        if failed && update.canary.on_failure == OnFailure::Rollback {
            return Some((format!("its version failed: {}", self.rollout.message), false));
        }
        if group.displaced() {
            return Some(("its node is to be emptied".into(), false));
        }
        too_many.then(|| ("there are more groups than wanted".into(), false))
    }

    /// Whether no group of an old version makes room for the one that is asked for.
    fn keeps_old(&self) -> bool {
        self.rollout.trial == Trial::Failed || self.asked.update.paused
    }

    /// Whether groups of old versions may be replaced now: by groups of one that may serve, or, where there is no room
    /// beside them, by the first of it.
    fn may_replace(&self) -> bool {
        let first = self.surge() == 0 && !self.groups().any(|(_, group)| self.is_new(group));
        // Routers that no old group can serve any more must be able to go to the new ones.
        let passed = self.rollout.trial == Trial::Passed && !self.has_old_routers();
        passed || (first && self.rollout.trial == Trial::Pending)
    }

    fn has_old_routers(&self) -> bool {
        self.asked.may_sleep && self.seen.routers_behind
    }

    /// Where all old groups go at once, what comes may not understand them. Routers that are ready without a group would all be
    /// replaced before the version has one that may serve.
    fn routers_stay(&self) -> bool {
        let old =
            |is: fn(&GroupSeen) -> bool| self.groups().any(|(_, group)| is(group) && !self.is_new(group));
        match self.asked.update.strategy {
            _ if self.steps_back => true,
            Strategy::Recreate => old(GroupSeen::available),
            Strategy::Rolling => {
                self.asked.may_sleep && self.rollout.trial != Trial::Passed && old(GroupSeen::stays)
            }
        }
    }

    /// Groups beyond those wanted that may be there: at least one where none can be missed.
    pub(super) fn surge(&self) -> u32 {
        let update = &self.asked.update;
        let all_needed = self.asked.wanted <= update.max_unavailable.into() || update.max_unavailable == 0;
        if update.max_surge == 0 && all_needed { 1 } else { update.max_surge.into() }
    }

    /// Groups that are missing are made, as far as there is room.
    fn create(&mut self) {
        let asked = self.asked;
        let (steps_back, pending) = (self.steps_back, self.rollout.trial == Trial::Pending);
        let old = self.groups().any(|(_, group)| group.stays() && !self.is_new(group));
        let halted = self.rollout.trial == Trial::Failed || (old && asked.update.paused && pending);
        if (halted && !steps_back) || (old && !self.seen.fleet_known) {
            return;
        }
        let count =
            |is: &dyn Fn(&GroupSeen) -> bool| self.groups().filter(|(_, group)| is(group)).count() as u32;
        let missing = asked.wanted.saturating_sub(count(&|group| group.stays() && self.is_good(group)));
        let rolls = !steps_back && !asked.update.paused;
        let surge =
            if asked.update.strategy == Strategy::Recreate && old && rolls { 0 } else { self.surge() };
        // What failed and stays to be looked at is in nobody's way.
        let there = count(&|group| group.occupies() && !(steps_back && self.is_new(group)));
        let mut room = (asked.wanted + surge).saturating_sub(there);
        let trial = pending && !steps_back && (others_serve(asked, self.seen) || asked.digest.is_some());
        if trial {
            room = room.min(1u32.saturating_sub(count(&|group| self.is_new(group))));
        }
        if asked.hosts > 1 && !asked.gangs {
            room = room.min(self.placed_room());
        }
        // The number of one that was held, and then never made, is as good as a new one, if it is to be held.
        let groups = &self.seen.groups;
        let is_free = |number: &u32| {
            groups.get(number).is_none_or(|group| {
                let is_over = !group.draining && group.epoch.is_none() && !(steps_back && group.held);
                !group.occupies() && is_over
            })
        };
        let numbers: Vec<u32> = (0..).filter(is_free).take(missing.min(room) as usize).collect();
        for number in numbers {
            if trial {
                self.steps.push(Step::Hold(number));
            }
            self.steps.push(if steps_back { Step::Remake(number) } else { Step::Create(number) });
        }
    }

    /// One group after the other, where pods of several could take each other's places: the next one begins when all pods of those
    /// before have some.
    fn placed_room(&self) -> u32 {
        let alike = |group: &GroupSeen| group.stays() && self.is_new(group) != self.steps_back;
        let hosts = if self.steps_back { 1 } else { self.asked.hosts };
        let placed = self.groups().all(|(_, group)| !alike(group) || group.is_placed(hosts));
        // Pods that go now come back, and need places, too.
        let goes = |step: &Step| matches!(step, Step::Replace(..) | Step::Restart(..));
        u32::from(placed && !self.steps.iter().any(goes))
    }

    /// The first group of a version is tried; those of one that passed may have requests, and those of one that failed must not.
    fn try_out(&mut self) {
        let known = self.seen.fleet_known;
        for (number, group) in self.groups().filter(|(_, group)| group.stays() && known) {
            match self.rollout.trial {
                Trial::Pending if group.held && group.serving && self.is_new(group) => {
                    self.steps.push(Step::Try(number));
                }
                Trial::Passed if group.held => self.steps.push(Step::Release(number)),
                // It began when nobody else served.
                Trial::Failed if !group.held && self.is_new(group) && self.steps_back => {
                    self.steps.push(Step::Hold(number));
                }
                _ => {}
            }
        }
    }
}
