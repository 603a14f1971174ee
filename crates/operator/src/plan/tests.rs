//! The planner in a world of its own, from seeds: whatever fails, it gets where it shall, and is then silent.

use std::collections::BTreeMap;

use super::validate::wanted;
use super::{Asked, GroupSeen, Plan, PodPhase, PodSeen, PreloadSeen, Retired, Seen, Step, TrialSeen, plan};
use crate::api::parts::{CanarySpec, GroupsSpec, OnFailure, Strategy as Order, UpdateSpec};
use crate::api::{ClusterStatus, GroupStatus, PreloadPhase, Trial};
use crate::names;

/// Kubernetes, etcd and their groups, as far as the planner can tell.
struct World {
    seen: Seen,
    status: ClusterStatus,
    asked: Asked,
    /// How many groups there may be, and how many the load wants: what is wanted follows.
    groups: GroupsSpec,
    load: Option<u32>,
    /// Versions that were asked for.
    versions: Vec<String>,
    /// Versions whose groups never pass a trial.
    bad: Vec<String>,
    /// State of a SplitMix64 generator.
    random: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let seen = Seen { now: 1_000_000, fleet_known: true, ..Seen::default() };
        let (status, groups, bad) = Default::default();
        let (asked, versions) = (asked(), Vec::new());
        let mut world = Self { seen, status, asked, groups, load: None, versions, bad, random: seed };
        world.asked.hosts = 1 + world.below(2) as u16;
        world.asked.ranks = world.asked.hosts;
        world.ask();
        world
    }

    fn below(&mut self, count: u32) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 33) as u32 % count
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < percent
    }

    /// Somebody changes the spec.
    fn ask(&mut self) {
        let (min, more) = (self.below(3) as u16, 1 + self.below(4) as u16);
        let replicas = self.chance(50).then(|| min + self.below(u32::from(more) + 1) as u16);
        self.groups = GroupsSpec { min, max: min + more, replicas, ..GroupsSpec::default() };
        self.ask_for_load();
        self.asked.update.max_surge = self.below(3) as u16;
        self.asked.update.max_unavailable = self.below(3) as u16;
        if self.asked.update.max_surge == 0 && self.asked.update.max_unavailable == 0 {
            self.asked.update.max_surge = 1;
        }
        self.asked.update.paused = self.chance(15);
        self.asked.update.strategy = if self.chance(15) { Order::Recreate } else { Order::Rolling };
        if self.chance(10) && !self.versions.is_empty() {
            let before = self.below(self.versions.len() as u32) as usize;
            self.asked.revision = self.versions[before].clone();
        } else if self.chance(40) {
            self.asked.revision = format!("r{}", self.below(u32::MAX));
            self.versions.push(self.asked.revision.clone());
            if self.chance(40) {
                self.bad.push(self.asked.revision.clone());
            }
        }
        self.asked.update.canary.on_failure =
            if self.chance(50) { OnFailure::Pause } else { OnFailure::Rollback };
    }

    /// The load becomes another one, or nobody knows it.
    fn ask_for_load(&mut self) {
        self.load = self.chance(80).then(|| self.below(9));
        self.asked.wanted = wanted(&self.groups, self.load);
        let bounds = u32::from(self.groups.min)..=u32::from(self.groups.max);
        assert!(bounds.contains(&self.asked.wanted), "{:?} for {:?}", self.groups, self.load);
    }

    /// Something happens: good, or bad if `trouble`.
    fn happen(&mut self, trouble: bool) {
        self.seen.now += i64::from(self.below(20));
        let numbers: Vec<u32> = self.seen.groups.keys().copied().collect();
        for number in numbers {
            let (fate, lost) = (self.below(if trouble { 100 } else { 50 }), trouble && self.chance(5));
            let group = self.seen.groups.get_mut(&number).expect("a group");
            live(group, self.asked.hosts, fate, lost);
            if !group.occupies() && !group.remembered {
                self.seen.groups.remove(&number);
            }
        }
        for place in 0..self.seen.preloads.len() {
            let fate = self.below(if trouble { 4 } else { 2 });
            let preload = &mut self.seen.preloads[place];
            match (preload.phase, fate) {
                (PreloadPhase::Loading, 0) => preload.phase = PreloadPhase::Done,
                (PreloadPhase::Loading, 3) => preload.phase = PreloadPhase::Failed,
                _ => {}
            }
        }
        if trouble {
            self.seen.fleet_known = !self.chance(15);
            if self.chance(10) {
                self.ask();
            }
            if self.chance(20) {
                self.ask_for_load();
            }
        }
    }

    /// One pass, of which each step may fail. Tells whether it did nothing.
    fn pass(&mut self, failures: u32) -> bool {
        let planned = plan(&self.asked, &self.seen, &self.status);
        let Plan { groups, rollout, steps, again_after_s, .. } = planned;
        let silent = steps.is_empty();
        for step in steps {
            self.check(&step, rollout.trial);
            if self.chance(failures) {
                return false;
            }
            self.take(step);
        }
        if let Some(seconds) = again_after_s.filter(|_| silent) {
            self.seen.now += seconds;
        }
        let groups = groups.iter().map(|(number, judged)| GroupStatus {
            name: names::group(*number),
            phase: judged.phase,
            since: judged.since,
            served: judged.served,
            ..GroupStatus::default()
        });
        if rollout.trial == Trial::Passed {
            self.asked.passed = Some(self.asked.revision.clone());
        }
        let status =
            ClusterStatus { groups: groups.collect(), rollout: Some(rollout), ..ClusterStatus::default() };
        let same = status == self.status;
        self.status = status;
        silent && same && again_after_s.is_none()
    }

    /// Whether groups are made of the version that passed last.
    fn steps_back(&self, trial: Trial) -> bool {
        let Asked { revision, passed, update, .. } = &self.asked;
        let other = passed.as_ref().is_some_and(|passed| passed != revision);
        other && (trial == Trial::Failed || update.paused && trial == Trial::Pending)
    }

    /// What no step may ever do.
    fn check(&self, step: &Step, trial: Trial) {
        if let Step::Preload(node) = step {
            let there =
                self.seen.preloads.iter().any(|it| it.node == *node && it.revision == self.asked.revision);
            assert!(!there, "the version is on node {node}, or on its way");
        }
        let available = self.seen.groups.values().filter(|group| group.available()).count();
        let Asked { wanted, update, .. } = &self.asked;
        if let Step::Retire(number, why) = step
            && why == "its version is old"
        {
            self.check_preloaded(&self.seen.groups[number]);
            let held = self.seen.groups[number].held;
            assert!(!update.paused && trial != Trial::Failed || held, "{number} is all that may serve");
        }
        match step {
            Step::Retire(_, why) if why == "its version is old" && update.strategy == Order::Recreate => {}
            Step::Retire(number, why) if self.seen.groups[number].available() => {
                let floor = match wanted {
                    0 => 0,
                    _ => (*wanted as usize).saturating_sub(update.max_unavailable.into()).max(1),
                };
                assert!(
                    available > floor,
                    "{available} serve, {wanted} are wanted, and {number} is to end: {why}"
                );
            }
            Step::Delete(number) => {
                let group = &self.seen.groups[number];
                assert!(group.retired.is_some() && !group.available(), "{number} was not drained: {group:?}");
            }
            Step::Restart(number, _) => assert!(!self.seen.groups[number].serving, "{number} serves"),
            Step::Create(number) | Step::Remake(number) => self.check_new(*number, step, trial),
            Step::Replace(number, name) => {
                let pods = &self.seen.groups[number].pods;
                let living = pods.iter().any(|pod| pod.name == *name && pod.ranks_living > 0);
                assert!(self.seen.fleet_known && !living, "nobody knows that {name} of {number} is lost");
            }
            _ => {}
        }
    }

    /// What no group may be that comes.
    fn check_new(&self, number: u32, step: &Step, trial: Trial) {
        let Asked { wanted, update, revision, hosts, .. } = &self.asked;
        let steps_back = self.steps_back(trial);
        assert_eq!(matches!(step, Step::Remake(_)), steps_back, "{number} is of the wrong version");
        let is_new = |group: &GroupSeen| group.revision.as_ref() == Some(revision);
        let groups = self.seen.groups.values();
        // What failed is in nobody's way, also while it ends.
        let counts = |group: &GroupSeen| group.revision.is_some() && !is_new(group);
        let there = groups.clone().filter(|group| group.occupies() && (!steps_back || counts(group))).count();
        let room = *wanted as usize + usize::from(update.max_surge.max(1));
        assert!(there < room, "{there} groups are there, {wanted} are wanted, and {number} is to come");
        let taken = self.seen.groups.get(&number).is_some_and(GroupSeen::occupies);
        assert!(!taken, "{number} is there already");
        let mut alike = groups.filter(|group| group.stays() && is_new(group) != steps_back);
        assert!(*hosts == 1 || alike.all(|group| group.is_placed(1)), "pods of {number} may take places");
    }

    /// Where it makes room for the next one, that one's version is there.
    fn check_preloaded(&self, group: &GroupSeen) {
        let Asked { wanted, update, revision, .. } = &self.asked;
        let has_room = update.max_surge > 0 || *wanted <= update.max_unavailable.into();
        let in_turn = update.strategy == Order::Rolling && has_room;
        let rest = |group: &&GroupSeen| {
            group.stays() && (group.revision.as_ref() != Some(revision) || group.displaced())
        };
        let surplus = self.seen.groups.values().filter(rest).count() > *wanted as usize;
        if in_turn || surplus || !group.available() || group.displaced() {
            return;
        }
        let pods = group.pods.iter().filter(|pod| !pod.node_lost && !pod.node.is_empty());
        for pod in pods {
            let done = |it: &PreloadSeen| it.node == pod.node && it.phase == PreloadPhase::Done;
            let there = self.seen.preloads.iter().any(|it| done(it) && it.revision == *revision);
            assert!(there, "{pod:?} is to make room, and what comes is not on its node");
        }
    }

    fn take(&mut self, step: Step) {
        let (now, hosts) = (self.seen.now, self.asked.hosts);
        let pod = |place: u16| PodSeen { name: format!("p{place}"), ..PodSeen::default() };
        let groups = &mut self.seen.groups;
        match step {
            Step::Hold(number) => {
                let group = groups.entry(number).or_default();
                (group.held, group.remembered) = (true, true);
            }
            Step::Create(number) => {
                let group = groups.entry(number).or_default();
                (group.revision, group.created) = (Some(self.asked.revision.clone()), now);
                group.pods = (0..hosts).map(pod).collect();
            }
            Step::Remake(number) => {
                let group = groups.entry(number).or_default();
                (group.revision, group.created) = (self.asked.passed.clone(), now);
                group.pods = (0..hosts).map(pod).collect();
            }
            Step::Try(number) => {
                let revision = groups[&number].revision.clone().expect("a group that is tried has a version");
                let trial = if self.bad.contains(&revision) { Trial::Failed } else { Trial::Passed };
                self.seen.trial = Some(TrialSeen { revision, trial, message: "tried".into() });
            }
            Step::Preload(node) => {
                let revision = self.asked.revision.clone();
                let pod = format!("{revision}-{node}");
                self.seen.preloads.push(PreloadSeen {
                    pod,
                    node,
                    revision,
                    since: now,
                    ..PreloadSeen::default()
                });
            }
            Step::Unload(pod) => self.seen.preloads.retain(|preload| preload.pod != pod),
            Step::Release(number) => groups.get_mut(&number).expect("a group").held = false,
            Step::Retire(number, why) => {
                groups.get_mut(&number).expect("a group").retired = Some(Retired { since: now, why });
            }
            Step::Drain(number) => groups.get_mut(&number).expect("a group").draining = true,
            Step::Delete(number) => {
                let group = groups.get_mut(&number).expect("a group");
                (group.revision, group.retired) = (None, None);
                (group.serving, group.ranks_living) = (false, 0);
                group.pods.iter_mut().for_each(|pod| (pod.phase, pod.ranks_living) = (PodPhase::Ending, 0));
            }
            Step::Forget(number) => {
                groups.remove(&number);
            }
            Step::Replace(number, name) => {
                let group = groups.get_mut(&number).expect("a group");
                group.pods.retain(|pod| pod.name != name || !pod.node_lost);
                if group.revision.is_some() {
                    group.pods.push(PodSeen { name, ..PodSeen::default() });
                }
            }
            Step::Restart(number, _) => {
                let group = groups.get_mut(&number).expect("a group");
                (group.pods, group.ranks_living) = ((0..hosts).map(pod).collect(), 0);
            }
        }
    }

    fn show(&self) -> String {
        let groups = self.seen.groups.iter().map(|(number, group)| format!("{number}: {group:?}\n"));
        let groups: String = groups.collect();
        format!(
            "{:?}\n{groups}{:?}\n{:?}",
            self.asked,
            self.status,
            plan(&self.asked, &self.seen, &self.status)
        )
    }
}

/// A group's pods come and go, and so do its ranks.
fn live(group: &mut GroupSeen, hosts: u16, fate: u32, lost: bool) {
    let count = group.pods.len() as u32;
    if group.revision.is_none() && fate < 50 {
        group.pods.clear(); // its StatefulSet is gone
        return end(group);
    }
    if lost && count > 0 && group.revision.is_some() {
        let one = &mut group.pods[(fate / 8 % count) as usize];
        match fate % 8 {
            0 => one.node_leaving = true,
            1 => one.node_lost = true,
            // Who tells of it is cut off, and it is not.
            2 => return one.node_lost = true,
            3 if !one.node.is_empty() => one.phase = PodPhase::Failing,
            4 => *one = PodSeen { name: one.name.clone(), ..PodSeen::default() },
            _ => {}
        }
        return end(group);
    }
    for (place, pod) in group.pods.iter_mut().enumerate().filter(|_| fate < 50) {
        match pod.phase {
            PodPhase::Waiting if pod.node.is_empty() => {
                pod.node = format!("n{}", (fate as usize + place) % 3);
            }
            PodPhase::Waiting | PodPhase::Failing => pod.phase = PodPhase::Running,
            PodPhase::Running | PodPhase::Ending => {}
        }
    }
    group.pods.retain(|pod| pod.phase != PodPhase::Ending);
    let runs = group.pods.iter().all(|pod| !pod.node_lost || pod.ranks_living > 0) && group.runs(hosts);
    if group.draining {
        end(group);
    } else if runs && fate < 50 {
        (group.serving, group.remembered) = (true, true);
        (group.ranks_ready, group.ranks_living, group.epoch) = (hosts, hosts, Some(7));
        group.pods.iter_mut().for_each(|pod| pod.ranks_living = 1);
    }
}

/// Its ranks end.
fn end(group: &mut GroupSeen) {
    (group.serving, group.ranks_living) = (false, 0);
    group.pods.iter_mut().for_each(|pod| pod.ranks_living = 0);
}

fn asked() -> Asked {
    let canary = CanarySpec { enabled: true, answer_ms_max: 1000, on_failure: OnFailure::Pause };
    let update = UpdateSpec {
        strategy: Order::Rolling,
        max_surge: 1,
        max_unavailable: 0,
        paused: false,
        preload: true,
        canary,
    };
    Asked {
        wanted: 2,
        ranks: 1,
        hosts: 1,
        revision: "r0".into(),
        update,
        drain_s: 30,
        start_s: 600,
        digest: None,
        resource: None,
        preload: true,
        may_sleep: false,
        gangs: false,
        passed: None,
    }
}

/// Passes in which nothing goes wrong, after which all must be well.
const QUIET_PASSES: usize = 600;

fn converges(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..world.below(120) {
        world.happen(true);
        world.pass(20);
    }
    world.seen.fleet_known = true;
    let mut silent = 0;
    for _ in 0..QUIET_PASSES {
        world.happen(false);
        silent = if world.pass(0) { silent + 1 } else { 0 };
        if silent == 5 {
            break;
        }
    }
    assert!(silent == 5, "it never rests\n{}", world.show());
    let of = |revision: &str| {
        let groups =
            world.seen.groups.values().filter(move |group| group.revision.as_deref() == Some(revision));
        groups.filter(|group| group.available()).count()
    };
    let by_version: BTreeMap<&str, usize> = world
        .seen
        .groups
        .values()
        .filter_map(|group| group.revision.as_deref())
        .map(|revision| (revision, of(revision)))
        .collect();
    let trial = world.status.rollout.as_ref().expect("a rollout").trial;
    let (wanted, paused) = (world.asked.wanted as usize, world.asked.update.paused);
    let (new, all): (usize, usize) = (of(&world.asked.revision), by_version.values().sum());
    if wanted == 0 || paused && trial == Trial::Passed {
        assert_eq!(all, wanted, "{}", world.show());
    } else if world.steps_back(trial) {
        assert_eq!((new, all), (0, wanted), "{}", world.show());
    } else if trial == Trial::Passed {
        assert_eq!((new, all), (wanted, wanted), "{}", world.show());
    } else {
        assert!(paused || trial == Trial::Failed, "nobody has tried it: {}", world.show());
        assert_eq!(world.asked.passed.as_ref().filter(|passed| **passed != world.asked.revision), None);
    }
}

/// Seeds that are played; the variable GALERNE_SEEDS asks for more.
const SEEDS: u64 = 2_000;

#[test]
fn it_gets_where_it_shall_whatever_fails_and_then_is_silent() {
    let seeds = std::env::var("GALERNE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    for seed in 0..seeds {
        if std::panic::catch_unwind(|| converges(seed)).is_err() {
            panic!("seed {seed}");
        }
    }
}
