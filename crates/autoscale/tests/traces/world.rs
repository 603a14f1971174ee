//! A fleet in virtual time: a router, groups that start cold and are drained, and what their hours and requests come to.

use std::collections::VecDeque;
use std::time::Duration;

use galerne_autoscale::{Groups, Window};

use crate::group::{Ask, Group, Outcome};
use crate::trace::{COST, ROOM, SLA};

/// From when a group is wanted until it serves.
pub(crate) const COLD_START_S: f64 = 60.0;

/// A request that waits longer at the router for want of any group is refused.
const HELD_S_MAX: f64 = 120.0;

#[derive(Clone, Debug)]
enum State {
    /// Since when.
    Starting(f64),
    Ready,
    Draining,
}

#[derive(Clone, Debug)]
struct Member {
    group: Group,
    state: State,
    /// When it was chosen last, as a number of requests.
    chosen: u64,
}

/// What came of requests that were due from a certain time on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    pub(crate) requests: u64,
    /// Those that kept what is promised.
    pub(crate) good: u64,
}

impl Tally {
    /// In percent.
    pub(crate) fn attained(&self) -> f64 {
        100.0 * self.good as f64 / self.requests.max(1) as f64
    }
}

#[derive(Clone, Debug)]
pub(crate) struct World {
    cold_start_s: f64,
    pub(crate) now_s: f64,
    members: Vec<Member>,
    held: VecDeque<Ask>,
    numbers: u64,
    outcomes: Vec<Outcome>,
    /// What is paid for, in seconds: groups that start, serve and are drained.
    pub(crate) group_s: f64,
    /// By the minute in which they were due.
    minutes: Vec<Tally>,
    window: Window,
    window_since_s: f64,
    starts: Vec<Duration>,
}

impl World {
    /// With so many groups that serve.
    pub(crate) fn new(groups: u32, cold_start_s: f64) -> Self {
        let mut world = Self {
            cold_start_s,
            now_s: 0.0,
            members: Vec::new(),
            held: VecDeque::new(),
            numbers: 0,
            outcomes: Vec::new(),
            group_s: 0.0,
            minutes: Vec::new(),
            window: Window::default(),
            window_since_s: 0.0,
            starts: Vec::new(),
        };
        (0..groups).for_each(|_| world.start(State::Ready));
        world
    }

    fn start(&mut self, state: State) {
        self.numbers += 1;
        let group = Group::new(COST, ROOM, self.numbers);
        self.members.push(Member { group, state, chosen: self.numbers });
    }

    /// A request comes.
    pub(crate) fn ask(&mut self, ask: Ask) {
        self.advance(ask.due_s);
        self.window.arrivals += 1;
        self.window.prompts.add(ask.prompt);
        let minute = (ask.due_s / 60.0) as usize;
        self.minutes.resize(self.minutes.len().max(minute + 1), Tally::default());
        self.minutes[minute].requests += 1;
        self.place(ask);
    }

    /// To the group with the fewest requests; of these the one that was chosen longest ago.
    fn place(&mut self, ask: Ask) {
        let ready = self.members.iter_mut().filter(|member| matches!(member.state, State::Ready));
        let Some(member) = ready.min_by_key(|member| (member.group.in_flight(), member.chosen)) else {
            self.held.push_back(ask);
            return;
        };
        self.numbers += 1;
        member.chosen = self.numbers;
        member.group.submit(ask, self.now_s); // whom it refuses has not got what was promised
    }

    /// Time goes on until then.
    pub(crate) fn advance(&mut self, until_s: f64) {
        while let Some(ready_s) = self.next_ready_s().filter(|ready_s| *ready_s <= until_s) {
            self.pass(ready_s);
            for member in &mut self.members {
                if matches!(member.state, State::Starting(since_s) if since_s + self.cold_start_s <= ready_s)
                {
                    member.state = State::Ready;
                    self.starts.push(Duration::from_secs_f64(self.cold_start_s));
                }
            }
            for ask in std::mem::take(&mut self.held) {
                if ask.due_s + HELD_S_MAX >= ready_s {
                    self.place(ask);
                }
            }
        }
        self.pass(until_s);
    }

    fn next_ready_s(&self) -> Option<f64> {
        let starting = self.members.iter().filter_map(|member| match member.state {
            State::Starting(since_s) => Some(since_s + self.cold_start_s),
            _ => None,
        });
        starting.min_by(f64::total_cmp)
    }

    fn pass(&mut self, until_s: f64) {
        for member in &mut self.members {
            member.group.advance(until_s, &mut self.outcomes);
        }
        for outcome in self.outcomes.drain(..) {
            let [ttft, tpot] = [SLA.ttft, SLA.tpot].map(|target| target.unwrap().within.as_secs_f64());
            let good = outcome.ttft_s() <= ttft && outcome.tpot_s().is_none_or(|took_s| took_s <= tpot);
            self.minutes[(outcome.ask.due_s / 60.0) as usize].good += u64::from(good);
            self.window.answers.add(outcome.ask.answer);
        }
        self.group_s += self.members.len() as f64 * (until_s - self.now_s);
        self.now_s = until_s;
        self.members
            .retain(|member| !matches!(member.state, State::Draining) || member.group.in_flight() > 0);
    }

    pub(crate) fn groups(&self) -> Groups {
        let count =
            |is: fn(&State) -> bool| self.members.iter().filter(|member| is(&member.state)).count() as u32;
        let first_s = self.next_ready_s().map_or(self.now_s, |ready_s| ready_s - self.cold_start_s);
        Groups {
            ready: count(|state| matches!(state, State::Ready)),
            starting: count(|state| matches!(state, State::Starting(_))),
            starting_for: Duration::from_secs_f64(self.now_s - first_s),
            draining: count(|state| matches!(state, State::Draining)),
        }
    }

    /// Requests that are under way or wait.
    pub(crate) fn in_flight(&self) -> usize {
        self.members.iter().map(|member| member.group.in_flight()).sum::<usize>() + self.held.len()
    }

    /// So many groups are to serve or start: others are started, or those drained that have the least to do, those first
    /// that do not serve yet.
    pub(crate) fn scale(&mut self, groups: u32) {
        let Groups { ready, starting, .. } = self.groups();
        (ready + starting..groups).for_each(|_| self.start(State::Starting(self.now_s)));
        if self.cold_start_s == 0.0 {
            self.advance(self.now_s);
        }
        for _ in groups..ready + starting {
            let stands = self.members.iter_mut().filter(|member| !matches!(member.state, State::Draining));
            let serves = |member: &Member| matches!(member.state, State::Ready);
            let least = stands.min_by_key(|member| (serves(member), member.group.in_flight()));
            if let Some(member) = least {
                member.state = State::Draining;
            }
        }
        let idle = |member: &Member| matches!(member.state, State::Draining) && member.group.in_flight() == 0;
        self.members.retain(|member| !idle(member));
    }

    /// What happened since the last time, and how long those took to start that have begun to serve since.
    pub(crate) fn window(&mut self) -> (Window, Vec<Duration>) {
        let mut window = std::mem::take(&mut self.window);
        window.length = Duration::from_secs_f64(self.now_s - self.window_since_s);
        window.held = self.held.len() as u32;
        window.groups = self.members.iter_mut().map(|member| member.group.window()).collect();
        self.window_since_s = self.now_s;
        (window, std::mem::take(&mut self.starts))
    }

    /// Whatever is under way comes to its end.
    pub(crate) fn finish(&mut self) {
        while let Some(end_s) =
            self.members.iter().filter_map(|member| member.group.step_end_s()).max_by(f64::total_cmp)
        {
            self.advance(end_s.max(self.now_s));
        }
    }

    /// Of the requests that were due in these minutes.
    pub(crate) fn tally(&self, minutes: std::ops::Range<usize>) -> Tally {
        let minutes =
            self.minutes.get(minutes.start..minutes.end.min(self.minutes.len())).unwrap_or_default();
        minutes.iter().fold(Tally::default(), |sum, minute| Tally {
            requests: sum.requests + minute.requests,
            good: sum.good + minute.good,
        })
    }
}
