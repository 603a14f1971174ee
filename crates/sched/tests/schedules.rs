//! Random schedules against a model of the ranks: whatever is submitted, cancelled, planned and committed in
//! whatever order, nobody's KV memory is touched by another, nothing leaks, and every request ends once, also those that
//! were preempted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use galerne_sched::{Limits, Load, Scheduler};
use galerne_types::limits::{KV_BLOCK_TOKENS, STEPS_IN_FLIGHT_MAX};
use galerne_types::{
    BlockId, Epoch, Event, FinishReason, Input, Refusal, Request, RequestId, Sampled, Sampling, Slice, Step,
    TenantId, TokenId, TokenOut,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const VOCAB: u32 = 1000;
const STOP: [TokenId; 2] = [3, 5];

#[derive(Clone, Debug)]
enum Op {
    Submit {
        tenant: u64,
        prompt: usize,
        replayed: u32,
        max_tokens: u32,
        min_tokens: u32,
    },
    /// The request to cancel, among those accepted so far.
    Cancel(prop::sample::Index),
    Plan,
    /// Bit i % 64: slice i draws a stop token, if it may.
    Commit(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..3u64, 1..120usize, 0..3u32, 1..60u32, 0..12u32).prop_map(
            |(tenant, prompt, replayed, max_tokens, min_tokens)| {
                Op::Submit { tenant, prompt, replayed, max_tokens, min_tokens }
            }
        ),
        1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        8 => Just(Op::Plan),
        // Most draws go on: each bit is set once in eight.
        8 => [any::<u64>(), any::<u64>(), any::<u64>()].prop_map(|[a, b, c]| Op::Commit(a & b & c)),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    (3..24u32, 1..7u32, prop_oneof![1..7u32, 7..100u32], 33..160u32, 1..6usize).prop_map(
        |(kv_blocks, sequences_max, step_tokens_max, context_tokens_max, waiting_max)| Limits {
            kv_blocks,
            sequences_max,
            step_tokens_max,
            context_tokens_max,
            window_tokens: None,
            vocab: VOCAB,
            waiting_max,
            prefix_cache: false,
            speculation: true,
            itl_target: None,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_schedule_is_sound(limits in limits(), tenants in 1..4u64, ops in prop::collection::vec(op(), 1..250)) {
        let mut world = World::new(limits, tenants);
        for op in &ops {
            world.apply(op);
        }
        world.drain();
    }
}

/// A request as its client and the ranks see it.
#[derive(Debug)]
struct Known {
    request: Request,
    /// One past the last index that it may draw.
    index_end: u32,
    positions_planned: u32,
    draws_planned: u32,
    tokens_told: u32,
    /// What it was told since it began, or began again.
    answer: Vec<TokenId>,
    /// It was preempted and has not begun again.
    paused: bool,
    preempted: bool,
    /// Its block table in its last slice.
    blocks: Vec<BlockId>,
    ended: bool,
}

struct World {
    limits: Limits,
    scheduler: Scheduler,
    known: BTreeMap<RequestId, Known>,
    tenants: u64,
    /// Accepted requests of which no slice was planned, in order, by tenant.
    unstarted: BTreeMap<TenantId, VecDeque<RequestId>>,
    /// Who had the last slice in a slot.
    slots: BTreeMap<u32, RequestId>,
    /// Planned and not committed, with the request of each slice.
    in_flight: VecDeque<(Step, Vec<RequestId>)>,
    steps: u64,
}

impl World {
    fn new(limits: Limits, tenants: u64) -> Self {
        Self {
            scheduler: Scheduler::new(Epoch(9), limits.clone()),
            limits,
            tenants,
            known: BTreeMap::new(),
            unstarted: BTreeMap::new(),
            slots: BTreeMap::new(),
            in_flight: VecDeque::new(),
            steps: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Submit { tenant, prompt, replayed, max_tokens, min_tokens } => {
                self.submit(TenantId(tenant % self.tenants), prompt, replayed, max_tokens, min_tokens);
            }
            Op::Cancel(ref which) if !self.known.is_empty() => {
                let id = *which.get(&self.known.keys().copied().collect::<Vec<_>>());
                self.scheduler.cancel(id);
                self.end(id);
            }
            Op::Cancel(_) => self.scheduler.cancel(RequestId(0)),
            Op::Plan => {
                self.plan();
            }
            Op::Commit(stops) => self.commit(stops),
        }
        self.check_load();
    }

    fn submit(&mut self, tenant: TenantId, prompt: usize, replayed: u32, max_tokens: u32, min_tokens: u32) {
        let id = RequestId(self.known.len() as u64);
        let token = |position: usize| (id.0 as u32 * 131 + position as u32 * 7) % VOCAB;
        let request = Request {
            id,
            tenant,
            prompt: (0..prompt).map(token).collect(),
            first_index: replayed.min(prompt as u32 - 1).min(max_tokens - 1),
            sampling: Sampling { seed: id.0, temperature: 1.0, ..Sampling::greedy() },
            max_tokens,
            min_tokens,
            stop_tokens: STOP.to_vec(),
            prompt_logprobs: None,
            grammar: None,
            cache_salt: None,
            priority: 0,
            trace: None,
        };
        let Limits { context_tokens_max, kv_blocks, waiting_max, .. } = self.limits;
        let room = (context_tokens_max as usize).saturating_sub(prompt);
        let tokens = room.min((max_tokens - request.first_index) as usize);
        let needed = (prompt + tokens - 1).div_ceil(KV_BLOCK_TOKENS);
        let accepted = self.scheduler.submit(request.clone());
        let waiting = self.scheduler.load().waiting;
        match accepted {
            Ok(()) => {
                assert!(room > 0 && needed <= kv_blocks as usize && waiting <= waiting_max);
                let known = Known {
                    index_end: request.first_index + tokens as u32,
                    positions_planned: 0,
                    draws_planned: 0,
                    tokens_told: 0,
                    answer: Vec::new(),
                    paused: false,
                    preempted: false,
                    blocks: Vec::new(),
                    ended: false,
                    request,
                };
                self.known.insert(id, known);
                self.unstarted.entry(tenant).or_default().push_back(id);
            }
            Err(Refusal::TooLong { .. }) => assert_eq!(room, 0),
            Err(Refusal::NeverFits { needed: told, .. }) => {
                assert!(told == needed && needed > kv_blocks as usize);
            }
            Err(Refusal::Overloaded { waiting: mine }) => {
                let free = waiting_max.saturating_sub(waiting); // the preempted wait beside all others
                assert!(free == 0 || mine >= 3 * free, "room, and refused");
            }
            Err(refusal) => panic!("refused without reason: {refusal}"),
        }
    }

    fn end(&mut self, id: RequestId) {
        self.unstarted.values_mut().for_each(|ids| ids.retain(|&other| other != id));
        self.known.get_mut(&id).unwrap().ended = true;
    }

    /// Whether steps under way hold the request.
    fn is_in_flight(&self, id: RequestId) -> bool {
        self.in_flight.iter().any(|(_, ids)| ids.contains(&id))
    }

    /// Requests whose prompt is planned to its end and that have an index left to draw.
    fn decoding(&self) -> BTreeSet<RequestId> {
        let decodes = |known: &Known| {
            let Known { request, draws_planned, index_end, ended, paused, .. } = known;
            !ended && !paused && *draws_planned > 0 && request.first_index + draws_planned < *index_end
        };
        self.known.iter().filter(|(_, known)| decodes(known)).map(|(&id, _)| id).collect()
    }

    fn plan(&mut self) -> bool {
        let planned = self.scheduler.plan();
        for id in self.scheduler.take_preempted() {
            let known = self.known.get_mut(&id).unwrap();
            assert!(!known.ended && !known.preempted, "once, and while it runs");
            (known.paused, known.preempted) = (true, true);
        }
        let decoding = self.decoding();
        let Some(step) = planned else {
            let full = self.in_flight.len() == STEPS_IN_FLIGHT_MAX;
            assert!(full || decoding.is_empty(), "answers wait though a step could be planned");
            return false;
        };
        assert!(self.in_flight.len() < STEPS_IN_FLIGHT_MAX);
        self.steps += 1;
        assert_eq!((step.epoch, step.number), (Epoch(9), self.steps));
        assert!(!step.slices.is_empty() && step.tokens() <= self.limits.step_tokens_max as usize);
        let slots: BTreeSet<u32> = step.slices.iter().map(|slice| slice.slot).collect();
        assert_eq!(slots.len(), step.slices.len(), "one slice for a slot");
        assert!(slots.iter().all(|&slot| slot < self.limits.sequences_max));
        assert!(
            step.slices.is_sorted_by_key(|slice| slice.input != Input::Last),
            "answers come before prompts"
        );

        let ids: Vec<RequestId> = step.slices.iter().map(|slice| self.take_in(slice)).collect();
        assert!(decoding.is_subset(&ids.iter().copied().collect()), "an answer stands still");
        self.in_flight.push_back((step, ids));
        self.check_blocks();
        true
    }

    /// Checks a slice against what its slot held, as a rank would see it; says whose it is.
    fn take_in(&mut self, slice: &Slice) -> RequestId {
        if slice.start == 0 {
            let id = self.begin(slice);
            if let Some(previous) = self.slots.insert(slice.slot, id) {
                let Known { ended, paused, .. } = self.known[&previous];
                let free = (ended || paused) && !self.is_in_flight(previous);
                assert!(free, "slot {} was still in use", slice.slot);
            }
        }
        let id = self.slots[&slice.slot];
        let known = self.known.get_mut(&id).unwrap();
        assert!(!known.ended && !known.paused, "an ended request is not planned");
        assert_eq!(slice.start, known.positions_planned, "positions follow each other");
        known.positions_planned += slice.input.len() as u32;
        match &slice.input {
            Input::Tokens(tokens) => {
                let start = slice.start as usize;
                assert_eq!(tokens[..], known.request.prompt[start..start + tokens.len()], "its own prompt");
            }
            Input::Last => assert!(known.draws_planned > 0, "there is a last draw"),
        }
        let expected = (known.positions_planned as usize).div_ceil(KV_BLOCK_TOKENS);
        assert_eq!(slice.blocks.len(), expected, "blocks for each position, and no more");
        assert!(slice.blocks.starts_with(&known.blocks), "a table only grows");
        known.blocks.clone_from(&slice.blocks);

        let draws = known.positions_planned as usize >= known.request.prompt.len();
        assert_eq!(slice.draw.is_some(), draws, "drawn where the prompt is complete");
        if let Some(draw) = &slice.draw {
            assert_eq!(draw.index, known.request.first_index + known.draws_planned);
            assert!(draw.index < known.index_end, "an end by length is foreseen");
            assert_eq!(draw.sampling, known.request.sampling);
            let banned = if draw.index < known.request.min_tokens { &STOP[..] } else { &[] };
            assert_eq!(draw.banned, banned);
            known.draws_planned += 1;
        }
        id
    }

    /// Whose first slice it is, by its first token: one that was preempted, with what it was told behind its prompt; or
    /// the oldest of a tenant, and of the only one in order of arrival.
    fn begin(&mut self, slice: &Slice) -> RequestId {
        let Input::Tokens(tokens) = &slice.input else { panic!("a prompt begins with tokens") };
        let again = |known: &&mut Known| known.paused && !known.ended && known.request.prompt[0] == tokens[0];
        if let Some(known) = self.known.values_mut().find(again) {
            let answer = std::mem::take(&mut known.answer);
            known.request.first_index += answer.len() as u32;
            known.request.prompt.extend(answer);
            (known.positions_planned, known.draws_planned, known.tokens_told) = (0, 0, 0);
            known.paused = false;
            known.blocks.clear();
            let id = known.request.id;
            self.slots.retain(|_, last| *last != id);
            self.unstarted.values_mut().for_each(|ids| ids.retain(|&other| other != id)); // before its first slice
            return id;
        }
        let known = &self.known;
        let is_it = |ids: &&mut VecDeque<RequestId>| {
            ids.front().is_some_and(|id| known[id].request.prompt[0] == tokens[0])
        };
        let ids = self.unstarted.values_mut().find(is_it).expect("the oldest of a tenant begins");
        ids.pop_front().unwrap()
    }

    fn holds_blocks(&self, id: RequestId, known: &Known) -> bool {
        !(known.ended || known.paused) || self.is_in_flight(id)
    }

    /// No block belongs to two requests that go on or stand in a step under way.
    fn check_blocks(&self) {
        let mut owners = BTreeMap::new();
        let holds = |&(&id, known): &(&RequestId, &Known)| self.holds_blocks(id, known);
        for (&id, known) in self.known.iter().filter(holds) {
            for &block in &known.blocks {
                assert!(block < self.limits.kv_blocks);
                let other = owners.insert(block, id);
                assert_eq!(other, None, "block {block} of request {} has two owners", id.0);
            }
        }
    }

    fn commit(&mut self, stops: u64) {
        let Some((step, ids)) = self.in_flight.pop_front() else { return };
        let mut sampled = Sampled::default();
        let mut expected = Vec::new();
        for (i, (slice, &request)) in step.slices.iter().zip(&ids).enumerate() {
            let Some(draw) = &slice.draw else {
                sampled.tokens.push(None);
                continue;
            };
            let stop = draw.banned.is_empty() && stops >> (i % 64) & 1 == 1;
            let id = if stop { STOP[i % 2] } else { 10 + draw.index };
            let token = TokenOut { logprob: -1.0, ..TokenOut::unreported(id) };
            sampled.tokens.push(Some(token.clone()));
            let known = self.known.get_mut(&request).unwrap();
            if known.ended {
                continue;
            }
            assert_eq!(
                draw.index,
                known.request.first_index + known.tokens_told,
                "indices follow each other"
            );
            known.tokens_told += 1;
            known.answer.push(token.id);
            expected.push(Event::Token { request, index: draw.index, token });
            let length = draw.index + 1 == known.index_end;
            if stop || length {
                let reason = if stop { FinishReason::Stop } else { FinishReason::Length };
                expected.push(Event::Finished { request, reason });
                known.ended = true;
            }
        }
        assert_eq!(self.scheduler.commit(&step, &sampled), expected);
    }

    fn check_load(&self) {
        let Load { running, waiting, kv_blocks_free, kv_blocks, .. } = self.scheduler.load();
        let going_on = self.known.values().filter(|known| !known.ended).count();
        assert_eq!(running + waiting, going_on);
        let seen = |&(&id, known): &(&RequestId, &Known)| self.holds_blocks(id, known);
        let held: usize = self.known.iter().filter(seen).map(|(_, known)| known.blocks.len()).sum();
        assert!(kv_blocks_free as usize + held <= kv_blocks as usize);
    }

    /// Nothing new comes: everything ends, in a bounded number of steps, and all is free again.
    fn drain(&mut self) {
        let tokens: u32 =
            self.known.values().map(|known| known.request.prompt.len() as u32 + known.index_end).sum();
        for _ in 0..=2 * tokens {
            while self.plan() {}
            self.commit(0);
            self.check_load();
        }
        assert!(self.in_flight.is_empty() && self.known.values().all(|known| known.ended), "all end");
        let kv_blocks = self.limits.kv_blocks;
        let idle = Load {
            running: 0,
            waiting: 0,
            tenants: 0,
            kv_blocks_free: kv_blocks,
            kv_blocks,
            prefix_cache: false,
        };
        assert_eq!(self.scheduler.load(), idle, "nothing leaks");
    }
}
