//! One cluster's autoscaler: fed with what routers tell and with the groups that there are, asked once a window.

use std::collections::BTreeMap;
use std::time::Duration;

use galerne_autoscale::{Autoscaler, Bounds, Decision, Groups, Room, Sla, Target};
use galerne_types::RouterRecord;

use super::Books;
use crate::api::parts::Target as Asked;
use crate::api::{AutoscaleStatus, ClusterStatus, GalerneClusterSpec, GroupPhase};
use crate::plan::{Judged, Seen};

/// A new number is told at once; what is new but for that once in so long, because figures never stand still.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

/// What is promised, and within what it is to be kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Order {
    sla: Sla,
    bounds: Bounds,
}

impl Order {
    /// `None` where nothing is promised.
    pub fn of(spec: &GalerneClusterSpec) -> Option<Self> {
        let target = |target: &Option<Asked>| {
            let Asked { percentile, ms } = target.as_ref()?;
            Some(Target { within: Duration::from_millis((*ms).into()), percent: *percentile })
        };
        let promised = spec.sla.as_ref()?;
        let groups = &spec.groups;
        Some(Self {
            sla: Sla { ttft: target(&promised.ttft), tpot: target(&promised.tpot) },
            bounds: Bounds {
                groups_min: groups.min.into(),
                groups_max: groups.max.into(),
                idle: Duration::from_secs(groups.idle_seconds.into()),
            },
        })
    }
}

/// The groups of a cluster as the planner has seen them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    ready: u32,
    starting: u32,
    draining: u32,
    /// When the first of those that start was made, in Unix seconds.
    starting_since: Option<i64>,
    /// What each of them takes up at once, if one has told.
    room: Option<Room>,
}

impl Counted {
    /// Counts the groups of `seen`; `rooms` are those of the groups that serve.
    pub fn of(seen: &Seen, rooms: impl Iterator<Item = Room>) -> Self {
        let starting = || seen.groups.values().filter(|group| group.stays() && !group.available());
        let ready = seen.groups.values().filter(|group| group.available()).count();
        let draining = seen.groups.values().filter(|group| group.retired.is_some());
        let least = |one: Room, other: Room| Room {
            sequences_max: one.sequences_max.min(other.sequences_max),
            step_tokens_max: one.step_tokens_max.min(other.step_tokens_max),
        };
        Self {
            ready: ready as u32,
            starting: starting().count() as u32,
            draining: draining.count() as u32,
            starting_since: starting().map(|group| group.created).min(),
            room: rooms.reduce(least),
        }
    }

    fn at(self, unix_s: i64) -> Groups {
        let Self { ready, starting, draining, starting_since, room: _ } = self;
        let starting_s = starting_since.map_or(0, |since| (unix_s - since).max(0));
        let starting_for = Duration::from_secs(starting_s.unsigned_abs());
        Groups { ready, starting, starting_for, draining }
    }
}

/// How long those groups took to start that serve now for the first time, by what the status said of them last. More than
/// `most_s` was no start.
pub fn started(
    seen: &Seen,
    judged: &BTreeMap<u32, Judged>,
    last: &ClusterStatus,
    most_s: i64,
) -> Vec<Duration> {
    let was_starting = |number: u32| {
        let before = last.groups.iter().find(|group| group.name == crate::names::group(number));
        let phase = before.map(|before| before.phase);
        matches!(phase, None | Some(GroupPhase::Pending | GroupPhase::Starting | GroupPhase::Trial))
    };
    let serves = |judged: &Judged| matches!(judged.phase, GroupPhase::Ready | GroupPhase::Degraded);
    let begun = judged.iter().filter(|(number, judged)| serves(judged) && was_starting(**number));
    begun
        .filter_map(|(number, _)| {
            let took_s = seen.now - seen.groups.get(number)?.created;
            (took_s <= most_s).then(|| Duration::from_secs(took_s.max(1).unsigned_abs()))
        })
        .collect()
}

/// One cluster's autoscaler.
#[derive(Debug)]
pub struct Scaler {
    autoscaler: Autoscaler,
    books: Books,
    order: Order,
    counted: Counted,
    told: Option<(Duration, AutoscaleStatus)>,
    decision: Option<Decision>,
}

impl Scaler {
    /// One that goes on where the status says that another one was.
    pub fn new(order: Order, last: Option<&AutoscaleStatus>) -> Self {
        let mut autoscaler = Autoscaler::new(order.sla, order.bounds, ROOM_FIRST);
        if let Some(last) = last {
            let took = last.cold_start_seconds.map(|seconds| Duration::from_secs(seconds.into()));
            autoscaler.resume(last.groups, took);
        }
        let (books, counted) = Default::default();
        Self { autoscaler, books, order, counted, told: None, decision: None }
    }

    /// The planner has seen these groups, of which some have begun to serve after so long.
    pub fn saw(&mut self, order: Order, counted: Counted, started: Vec<Duration>) {
        self.order = order;
        self.counted = Counted { room: counted.room.or(self.counted.room), ..counted };
        started.into_iter().for_each(|took| self.autoscaler.started(took));
    }

    /// A window ends `now`, at `unix_s` by the clock. Tells whether there is something new to say.
    pub fn look(&mut self, now: Duration, unix_s: i64, records: &BTreeMap<String, RouterRecord>) -> bool {
        let Order { sla, bounds } = self.order;
        self.autoscaler.change(sla, bounds, self.counted.room.unwrap_or(ROOM_FIRST));
        let window = self.books.close(now, records);
        self.autoscaler.observe(now, &window);
        let decision = self.autoscaler.decide(now, self.counted.at(unix_s));
        let said = self.said(&decision);
        self.decision = Some(decision);
        let news = self.told.as_ref().is_none_or(|(when, told)| {
            let at_once = |status: &AutoscaleStatus| (status.groups, status.cold_start_seconds);
            at_once(told) != at_once(&said) || (*told != said && *when + TOLD_AGAIN <= now)
        });
        if news {
            self.told = Some((now, said));
        }
        news
    }

    fn said(&self, decision: &Decision) -> AutoscaleStatus {
        let cold_start_s = self.autoscaler.cold_start().map(|took| took.as_secs_f64().ceil() as u32);
        AutoscaleStatus {
            groups: decision.groups,
            reason: decision.why.name().to_owned(),
            message: decision.to_string(),
            holds: decision.chosen.as_ref().map(galerne_autoscale::Prediction::holds),
            cold_start_seconds: cold_start_s,
        }
    }

    /// What was decided, as it is told.
    pub fn told(&self) -> Option<&AutoscaleStatus> {
        self.told.as_ref().map(|(_, told)| told)
    }

    /// What was decided last, with all figures.
    pub fn decision(&self) -> Option<&Decision> {
        self.decision.as_ref()
    }
}

/// What is believed of a group's room before one has told; nothing is decided by it, because nothing has been served then.
const ROOM_FIRST: Room = Room { sequences_max: 1, step_tokens_max: 1 };

#[cfg(test)]
mod tests {
    use galerne_types::{Epoch, GroupId, GroupLoad, Moments};
    use serde_json::json;

    use super::*;
    use crate::plan::GroupSeen;

    const WINDOW_S: u64 = 5;
    const NOW: i64 = 1_764_000_000;

    /// A cluster that has what was decided at once, with a router that tells of it.
    struct Play {
        scaler: Scaler,
        order: Order,
        record: RouterRecord,
        now_s: u64,
        ready: u32,
    }

    fn order(min: u32, max: u32) -> Order {
        let spec = json!({
            "model": { "name": "m", "path": "m" }, "router": { "noAuth": true }, "etcd": { "managed": {} },
            "storage": { "hostPath": "/m" }, "groups": { "min": min, "max": max, "idleSeconds": 60 },
            "sla": { "ttft": { "percentile": 95, "ms": 1000 }, "tpot": { "percentile": 95, "ms": 80 } },
        });
        Order::of(&serde_json::from_value(spec).expect("a spec")).expect("something is promised")
    }

    impl Play {
        fn new(min: u32, ready: u32, last: Option<&AutoscaleStatus>) -> Self {
            let order = order(min, 20);
            let (scaler, record) = (Scaler::new(order, last), RouterRecord::default());
            Self { scaler, order, record, now_s: 0, ready }
        }

        /// The same cluster, whose operator begins anew.
        fn restart(&mut self) {
            self.scaler = Scaler::new(self.order, self.scaler.told());
        }

        /// A window of requests of 400 tokens that are answered with 150; tells what is decided, if that is told.
        fn window(&mut self, arrivals: u64, held: u32) -> Option<AutoscaleStatus> {
            self.now_s += WINDOW_S;
            self.record.uptime_ms += WINDOW_S * 1000;
            self.record.arrivals += arrivals;
            self.record.held = held;
            let served = if self.ready > 0 { arrivals } else { 0 };
            let add = |moments: &mut Moments, tokens| (0..served).for_each(|_| moments.add(tokens));
            add(&mut self.record.prompts, 400);
            add(&mut self.record.answers, 150);
            // What steps cost: 25 ms, and 150 us a token.
            let (steps, tokens) = (150 + self.now_s % 7, served * 550 / u64::from(self.ready.max(1)));
            for number in 0..self.ready {
                let group = self.record.groups.entry(GroupId(crate::names::group(number))).or_default();
                let GroupLoad { steps: before_steps, tokens: before_tokens, busy_us, .. } = *group;
                *group = GroupLoad {
                    epoch: Epoch(3),
                    steps: before_steps + steps,
                    tokens: before_tokens + tokens,
                    busy_us: busy_us + 25_000 * steps + 150 * tokens,
                    ..GroupLoad::default()
                };
            }
            let room = Some(Room { sequences_max: 128, step_tokens_max: 1024 });
            let counted = Counted { ready: self.ready, room, ..Counted::default() };
            self.scaler.saw(self.order, counted, Vec::new());
            let records = [("r".to_owned(), self.record.clone())].into();
            let news = self.scaler.look(Duration::from_secs(self.now_s), NOW, &records);
            let told = self.scaler.told().cloned().expect("something was decided");
            self.ready = told.groups;
            news.then_some(told)
        }

        fn windows(&mut self, count: u32, arrivals: u64) -> Vec<AutoscaleStatus> {
            (0..count).filter_map(|_| self.window(arrivals, 0)).collect()
        }
    }

    #[test]
    fn what_is_decided_is_told_at_once_and_its_figures_now_and_then() {
        let mut play = Play::new(1, 2, None);
        play.windows(60, 200);
        let groups = play.ready;
        assert!(groups > 4, "{:?}", play.scaler.told());
        let told = play.windows(60, 200);
        assert!(told.len() <= 60 / 12 + 1 && told.iter().all(|told| told.groups == groups), "{told:?}");
        let AutoscaleStatus { reason, message, holds, .. } = play.scaler.told().expect("a decision");
        assert!(reason == "Fewest" && *holds == Some(true) && message.contains("TTFT p95"), "{message}");
        assert!(play.window(900, 0).is_some_and(|told| told.groups > groups));
    }

    #[test]
    fn an_operator_that_begins_anew_forgets_nothing_that_matters() {
        let mut play = Play::new(1, 2, None);
        play.windows(60, 200);
        let groups = play.ready;
        for _ in 0..20 {
            play.restart();
            for _ in 0..4 {
                play.window(200, 0);
                assert!((groups..=groups + 1).contains(&play.ready), "{:?}", play.scaler.told());
            }
        }
        let before = play.ready;
        play.restart();
        play.window(200, 0);
        assert_eq!(play.ready, before, "how many come is not known yet");
        play.window(200, 0);
        let decision = play.scaler.decision().expect("a decision");
        assert!(
            decision.chosen.is_some(),
            "what steps cost and how long answers are was counted before: {decision}"
        );
    }

    #[test]
    fn a_cluster_falls_asleep_and_wakes_for_a_request_that_waits() {
        let mut play = Play::new(0, 1, None);
        play.windows(20, 20);
        assert_eq!(play.ready, 1);
        play.windows(40, 0);
        assert_eq!((play.ready, &*play.scaler.told().expect("a decision").reason), (0, "Idle"));
        assert!(play.windows(40, 0).is_empty(), "it sleeps, and says nothing");
        let told = play.window(0, 1).expect("a decision");
        assert_eq!((told.groups, &*told.reason), (1, "Waking"));
        let mut fresh = Play::new(0, 0, None);
        assert_eq!(fresh.window(0, 0).expect("a decision").groups, 0);
        assert_eq!(fresh.window(0, 1).expect("a decision").groups, 1);
    }

    #[test]
    fn groups_are_counted_and_starts_are_measured() {
        let group = |serving, created| GroupSeen {
            revision: Some("r".into()),
            serving,
            created,
            ..GroupSeen::default()
        };
        let mut seen = Seen { now: NOW, ..Seen::default() };
        seen.groups =
            [(0, group(true, NOW - 90)), (1, group(false, NOW - 40)), (2, group(false, NOW - 30))].into();
        let counted = Counted::of(&seen, std::iter::empty()).at(NOW);
        assert_eq!((counted.ready, counted.starting, counted.draining), (1, 2, 0));
        assert_eq!(counted.starting_for, Duration::from_secs(40));
        let judged = |phase| Judged { phase, since: NOW, served: true, message: String::new() };
        let now = [(0, judged(GroupPhase::Ready)), (1, judged(GroupPhase::Starting))].into();
        let was = |phase| {
            let group = crate::api::GroupStatus { name: "g0".into(), phase, ..Default::default() };
            ClusterStatus { groups: vec![group], ..ClusterStatus::default() }
        };
        assert_eq!(started(&seen, &now, &was(GroupPhase::Starting), 600), vec![Duration::from_secs(90)]);
        assert!(started(&seen, &now, &was(GroupPhase::Starting), 60).is_empty(), "nobody waits so long");
        assert!(started(&seen, &now, &was(GroupPhase::Ready), 600).is_empty());
        assert!(started(&seen, &now, &was(GroupPhase::Reforming), 600).is_empty(), "that was no start");
    }
}
