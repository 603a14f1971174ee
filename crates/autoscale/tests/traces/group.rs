//! A group in virtual time: what the scheduler and the ranks of one do, reduced to counts. One tenant, no prefixes, answers
//! whose length is known; `likeness.rs` holds it against the real scheduler.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use galerne_autoscale::{GroupWindow, Room, StepCost, Steps};

/// Requests that wait at a group before it refuses more, as unless a flag says otherwise.
const WAITING_MAX: usize = 1024;

/// A request: when it came, in seconds, and how long prompt and answer are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ask {
    pub(crate) due_s: f64,
    pub(crate) prompt: u32,
    pub(crate) answer: u32,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) ask: Ask,
    pub(crate) first_s: f64,
    pub(crate) end_s: f64,
}

impl Outcome {
    pub(crate) fn ttft_s(&self) -> f64 {
        self.first_s - self.ask.due_s
    }

    /// `None` for an answer of one token.
    pub(crate) fn tpot_s(&self) -> Option<f64> {
        (self.ask.answer > 1).then(|| (self.end_s - self.first_s) / f64::from(self.ask.answer - 1))
    }
}

/// A step that is planned, or runs.
#[derive(Clone, Debug, Default)]
struct Step {
    number: u64,
    tokens: u64,
    keys: u64,
    /// Requests whose prompt it completes.
    firsts: Vec<Ask>,
}

#[derive(Clone, Debug)]
pub(crate) struct Group {
    cost: StepCost,
    room: Room,
    /// Makes steps up to 5% longer or shorter than the law says, by lot.
    dice: u64,
    waiting: VecDeque<Ask>,
    /// Admitted prompts, and how much of each has been planned.
    prompts: VecDeque<(Ask, u32)>,
    /// Slots in use.
    held: u32,
    /// Answers that get a token in the next step to be planned, and the positions of all of them.
    answering: u64,
    positions: u64,
    /// By the number of the last step of answers: how many there are, and their positions at the end.
    stops: BTreeMap<u64, (u64, u64)>,
    /// And what is to be told of them then: the request, and when its first token came.
    ends: BTreeMap<u64, Vec<(Ask, f64)>>,
    planned: u64,
    /// The step that runs and when it ends; the one that was planned as it began.
    runs: Option<(Step, f64)>,
    next: Option<Step>,
    steps: Steps,
}

impl Group {
    pub(crate) fn new(cost: StepCost, room: Room, seed: u64) -> Self {
        Self {
            cost,
            room,
            dice: seed,
            waiting: VecDeque::new(),
            prompts: VecDeque::new(),
            held: 0,
            answering: 0,
            positions: 0,
            stops: BTreeMap::new(),
            ends: BTreeMap::new(),
            planned: 0,
            runs: None,
            next: None,
            steps: Steps::default(),
        }
    }

    /// Requests that it has: what a router goes by.
    pub(crate) fn in_flight(&self) -> usize {
        self.held as usize + self.waiting.len()
    }

    /// Takes a request, unless too many wait.
    pub(crate) fn submit(&mut self, ask: Ask, now_s: f64) -> bool {
        if self.waiting.len() >= WAITING_MAX {
            return false;
        }
        self.waiting.push_back(ask);
        if self.runs.is_none() {
            self.next = self.plan();
            self.begin(now_s);
        } else if self.next.is_none() {
            self.next = self.plan();
        }
        true
    }

    /// Runs all steps that end by then.
    pub(crate) fn advance(&mut self, until_s: f64, outcomes: &mut Vec<Outcome>) {
        while self.runs.as_ref().is_some_and(|(_, end_s)| *end_s <= until_s) {
            let Some((step, end_s)) = self.runs.take() else { return };
            for ask in step.firsts {
                self.ends.entry(step.number + u64::from(ask.answer) - 1).or_default().push((ask, end_s));
            }
            let ended = self.ends.remove(&step.number).unwrap_or_default();
            self.held -= ended.len() as u32;
            outcomes.extend(ended.into_iter().map(|(ask, first_s)| Outcome { ask, first_s, end_s }));
            if self.next.is_none() {
                self.next = self.plan();
            }
            self.begin(end_s);
        }
    }

    /// When the step that runs ends.
    pub(crate) fn step_end_s(&self) -> Option<f64> {
        self.runs.as_ref().map(|(_, end_s)| *end_s)
    }

    /// What an autoscaler is told, since the last time.
    pub(crate) fn window(&mut self) -> GroupWindow {
        GroupWindow {
            running: self.held,
            waiting: self.waiting.len() as u32,
            kv_blocks: 0,
            kv_blocks_free: 0,
            steps: std::mem::take(&mut self.steps),
        }
    }

    /// The planned step runs, and the one behind it is planned.
    fn begin(&mut self, now_s: f64) {
        let Some(step) = self.next.take() else { return };
        let StepCost { step_s, token_s, key_s } = self.cost;
        let law_s = step_s + step.tokens as f64 * token_s + step.keys as f64 * key_s;
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let took_s = law_s * (0.95 + 0.1 * (self.dice >> 11) as f64 / (1_u64 << 53) as f64);
        self.steps.count += 1;
        self.steps.tokens += step.tokens;
        self.steps.keys += step.keys;
        self.steps.busy += Duration::from_secs_f64(took_s);
        self.runs = Some((step, now_s + took_s));
        self.next = self.plan();
    }

    fn plan(&mut self) -> Option<Step> {
        let number = self.planned + 1;
        while let Some(entry) = self.stops.first_entry().filter(|entry| *entry.key() < number) {
            let (answers, positions) = entry.remove();
            self.answering -= answers;
            self.positions -= positions;
        }
        while self.held < self.room.sequences_max {
            let Some(ask) = self.waiting.pop_front() else { break };
            self.prompts.push_back((ask, 0));
            self.held += 1;
        }
        self.positions += self.answering;
        let mut step = Step { number, tokens: self.answering, keys: self.positions, firsts: Vec::new() };
        let mut room = self.room.step_tokens_max - self.answering as u32;
        while let Some((ask, done)) = self.prompts.front_mut().filter(|_| room > 0) {
            let chunk = room.min(ask.prompt - *done);
            let (start, tokens) = (u64::from(*done), u64::from(chunk));
            step.tokens += tokens;
            step.keys += start * tokens + tokens * (tokens + 1) / 2;
            *done += chunk;
            room -= chunk;
            if *done == ask.prompt {
                step.firsts.push(*ask);
                self.prompts.pop_front();
            }
        }
        if step.tokens == 0 {
            return None;
        }
        self.planned = number;
        for ask in &step.firsts {
            let (prompt, answer) = (u64::from(ask.prompt), u64::from(ask.answer));
            let (answers, positions) = self.stops.entry(number + answer - 1).or_default();
            *answers += 1;
            *positions += prompt + answer - 1;
            self.answering += 1;
            self.positions += prompt;
        }
        Some(step)
    }
}
