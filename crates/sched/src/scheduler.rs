//! Continuous batching, fair between tenants.

mod preemption;
mod prefixes;
mod speculation;

use std::time::Duration;

use galerne_types::limits::{KV_BLOCK_TOKENS, STEP_TRACES_MAX, STEPS_IN_FLIGHT_MAX};
use galerne_types::{
    Epoch, Event, Input, Refusal, Request, RequestId, Sampled, Slice, Step, TenantId, TokenOut,
};

pub(crate) use self::prefixes::Prefix;
use self::prefixes::looked_up_tokens;
use crate::blocks::BlockPool;
use crate::check::check;
use crate::cost::Cost;
use crate::draft::Worth;
use crate::pace::Pace;
use crate::sequence::{Sequence, blocks_needed};
use crate::tenants::{Held, Tenants};

/// Among several tenants, the prompts of all but the one that used least of late fill at most this part of a step: a step
/// with many tokens takes long, and whoever comes waits for it.
const OTHERS_PROMPT_PART: u32 = 32;

/// What a group's ranks can hold and run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Blocks of KV memory, each of [`KV_BLOCK_TOKENS`](galerne_types::limits::KV_BLOCK_TOKENS) positions.
    pub kv_blocks: u32,
    /// Sequences that run at once: the ranks' slots.
    pub sequences_max: u32,
    /// Tokens of all slices of one step.
    pub step_tokens_max: u32,
    /// Tokens of a prompt and its answer together.
    pub context_tokens_max: u32,
    /// Positions that a token sees, its own included; all before it without a window.
    pub window_tokens: Option<u32>,
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// Requests that wait for a slot or for blocks before more are refused.
    pub waiting_max: usize,
    /// Whether KV blocks are kept for prompts to come.
    pub prefix_cache: bool,
    /// Whether answers are run ahead where they seem to repeat something.
    pub speculation: bool,
    /// How long a step with answers under way may take, as far as prompts make it longer.
    pub itl_target: Option<Duration>,
}

impl Limits {
    /// KV blocks that a sequence of so many positions holds at once, at most: all of them, or with a window those that a
    /// step's chunk and the window before it touch.
    pub fn kv_blocks_held(&self, positions: u32) -> u32 {
        let block = KV_BLOCK_TOKENS as u32;
        let seen = |window: u32| (window.saturating_sub(1)).saturating_add(self.step_tokens_max);
        // The first and the last of them may be touched in a single position.
        let touched = self.window_tokens.map_or(u32::MAX, |window| (seen(window) - 1).div_ceil(block) + 1);
        positions.div_ceil(block).min(touched)
    }

    /// The first block that a position sees.
    pub(crate) fn first_seen(&self, position: u32) -> u32 {
        let first = self.window_tokens.map_or(0, |window| (position + 1).saturating_sub(window));
        first / KV_BLOCK_TOKENS as u32
    }
}

/// A request that has got a slot for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Which one.
    pub request: RequestId,
    /// Tokens of its prompt that were looked up among what is kept: all of them, or none.
    pub looked_up_tokens: u32,
    /// Those of them that were found, and are not run again.
    pub cached_tokens: u32,
}

/// How busy a scheduler is, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests that hold a slot and go on.
    pub running: usize,
    /// Requests that wait for a slot or for blocks.
    pub waiting: usize,
    /// Tenants of all these requests.
    pub tenants: usize,
    /// KV blocks that no request holds, those included that are kept for prompts to come.
    pub kv_blocks_free: u32,
    /// KV blocks of the group.
    pub kv_blocks: u32,
    /// Blocks are kept for prompts to come.
    pub prefix_cache: bool,
}

/// Decides, step by step, which tokens of which requests the ranks of one epoch run.
///
/// **Admission**: the most urgent, and of these the oldest request of the tenant that was served least (`tenants`) is admitted once a slot and all
/// blocks that it can need (prompt and `max_tokens`, at most the context) are free, and nobody overtakes it. With one
/// tenant that is first come, first served. What was admitted never lacks a block: no deadlock, at the price of blocks
/// that stay empty when an answer ends early. With a sliding window a request needs no more at once than the window and a
/// chunk touch: it takes blocks as it goes on, and gives back those that left the window. Slots and blocks are kept free for whoever comes: among several tenants, one
/// that holds more than an equal share is passed over unless it leaves to each of the others what that one wanted lately,
/// and a quarter of all to whoever comes.
///
/// **Preemption** (`preemption`): who was alone may hold all. If then one comes whose request fits an equal share, the
/// least urgent and youngest requests of the tenant that holds the most go back to the queue, each once at most, and later on as a replay.
///
/// **A step** holds one token of every answer under way, and then chunks of prompts until `step_tokens_max`: those of the
/// least served tenant first, within a tenant in order of admission. While several tenants are present, the prompts of
/// all but the one that used least of late take at most a thirty-second of a step. A prompt is completed only with tokens that the
/// answers leave, so the answers never outgrow a step, and none waits for another.
///
/// **Pace** (`pace`): with a target for the time between two tokens, a step that holds answers takes no more tokens of
/// prompts than will keep it, by what steps have [`taken`](Self::took) so far; without one as many as a step may hold.
///
/// **Prefixes** (`prefixes`): full blocks are found again by what stands in them and before them, within a tenant. Who
/// begins as another did holds the same blocks, and runs what is left of its prompt, at least its last token. Where that other
/// one is just about to run the next block, it waits for it: several choices of one prompt run it once.
///
/// **Speculation** (`draft`): while few answers run and no prompts, an answer whose end has stood before is run ahead by what
/// followed there, as far as that is worth its time. What does not come true is planned again.
///
/// **Planning overlaps execution**: up to [`STEPS_IN_FLIGHT_MAX`] steps may be planned and not yet committed. A
/// request that turns out to have ended in one step may then stand in the next one too; that draw is ignored, and
/// its slot and blocks are free once no uncommitted step holds them. Where answers stand after a step with drafts
/// is known once it is committed, so no other is planned before.
#[derive(Debug)]
pub struct Scheduler {
    epoch: Epoch,
    limits: Limits,
    steps_planned: u64,
    steps_committed: u64,
    tenants: Tenants,
    slots: Vec<Option<Sequence>>,
    /// Slots in use, in order of admission.
    admitted: Vec<u32>,
    /// Requests admitted since they were last asked for.
    admitted_since: Vec<Admitted>,
    /// Requests preempted since they were last asked for.
    preempted_since: Vec<RequestId>,
    pool: BlockPool,
    pace: Pace,
    worth: Worth,
    /// The last step has drafts, and is not committed.
    drafting: bool,
    /// Blocks that the running sequences may hold at once, those counted several times that they share.
    reserved: u32,
}

impl Scheduler {
    /// A scheduler without requests, whose first step is number 1 of `epoch`.
    ///
    /// # Panics
    /// If one of the limits leaves no room for anything.
    pub fn new(epoch: Epoch, mut limits: Limits) -> Self {
        let Limits {
            kv_blocks, sequences_max, step_tokens_max, context_tokens_max, vocab, waiting_max, ..
        } = limits;
        let fit = [kv_blocks, sequences_max, step_tokens_max, vocab].iter().all(|&limit| limit > 0);
        assert!(fit && context_tokens_max > 1 && waiting_max > 0, "limits leave no room to run: {limits:?}");
        limits.window_tokens = limits.window_tokens.filter(|&window| window < context_tokens_max);
        Self {
            epoch,
            steps_planned: 0,
            steps_committed: 0,
            tenants: Tenants::new(step_tokens_max),
            slots: (0..sequences_max).map(|_| None).collect(),
            admitted: Vec::new(),
            admitted_since: Vec::new(),
            preempted_since: Vec::new(),
            pool: BlockPool::new(kv_blocks),
            pace: Pace::default(),
            worth: Worth::default(),
            drafting: false,
            reserved: 0,
            limits,
        }
    }

    /// Puts a request in the queue. From then on it ends exactly once: by [`Event::Finished`], or by
    /// [`cancel`](Self::cancel).
    ///
    /// # Errors
    /// A [`Refusal`] says why the request cannot run, ever (`Invalid`, `TooLong`, `NeverFits`) or now
    /// (`Overloaded`); nothing was kept of it.
    pub fn submit(&mut self, request: Request) -> Result<(), Refusal> {
        let needed = self.needed(&request)?;
        self.tenants.submit(request, needed, self.limits.waiting_max)
    }

    /// As [`submit`](Self::submit), for a request that another group had accepted and lost: it waits ahead of those that are
    /// new, and is not refused because too many wait. Whoever sends such requests limits how many there are.
    ///
    /// # Errors
    /// A [`Refusal`] says why the request cannot run, ever.
    pub fn take_over(&mut self, request: Request) -> Result<(), Refusal> {
        let needed = self.needed(&request)?;
        self.tenants.take_over(request, needed);
        Ok(())
    }

    /// The blocks that a request can need, if it can run.
    fn needed(&self, request: &Request) -> Result<u32, Refusal> {
        check(request, &self.limits)?;
        if self.holds(request.id) {
            return Err(Refusal::Invalid(format!("request {} is here already", request.id.0)));
        }
        let (needed, available) = (blocks_needed(request, &self.limits), self.pool.total());
        if needed > available {
            return Err(Refusal::NeverFits { needed: needed as usize, available: available as usize });
        }
        Ok(needed)
    }

    /// Ends a request without another word: no event of it follows. Its slot and blocks are free at once, or, if
    /// steps under way hold them, when the last of those is committed. A request that is not here is ignored:
    /// it may have ended by itself a moment ago.
    pub fn cancel(&mut self, id: RequestId) {
        self.tenants.cancel(id);
        let is_it = |sequence: &Sequence| sequence.request.id == id;
        if let Some(slot) = self.slots.iter().position(|slot| slot.as_ref().is_some_and(is_it)) {
            let slot = slot as u32;
            self.sequence(slot).ended = true;
            self.release_if_done(slot);
        }
    }

    /// The next step to run; `None` when there is nothing to run before a step is committed or a request comes.
    pub fn plan(&mut self) -> Option<Step> {
        if self.drafting || self.steps_planned - self.steps_committed == STEPS_IN_FLIGHT_MAX as u64 {
            return None;
        }
        self.tenants.begin_step(self.steps_planned + 1);
        self.admit();
        let slices = self.plan_slices();
        if slices.is_empty() {
            return None;
        }
        self.steps_planned += 1;
        let traces = self.traces(&slices);
        Some(Step { epoch: self.epoch, number: self.steps_planned, slices, traces })
    }

    /// A step without work: all ranks meet in it, and show that they can.
    pub fn beat(&mut self) -> Step {
        self.steps_planned += 1;
        Step { epoch: self.epoch, number: self.steps_planned, slices: Vec::new(), traces: Vec::new() }
    }

    /// Takes in what a step drew; says what to tell of it, in the order of the step's slices.
    ///
    /// # Panics
    /// If `step` is not the oldest uncommitted step of [`plan`](Self::plan) or [`beat`](Self::beat), or `sampled` is not an answer to it.
    pub fn commit(&mut self, step: &Step, sampled: &Sampled) -> Vec<Event> {
        assert_eq!(step.epoch, self.epoch, "a step is committed to the epoch that planned it");
        assert_eq!(step.number, self.steps_committed + 1, "steps are committed in order, each once");
        assert!(step.number <= self.steps_planned, "step {} was never planned", step.number);
        assert_eq!(step.slices.len(), sampled.tokens.len(), "one entry for each slice");
        let scored = step.slices.iter().filter(|slice| slice.score.is_some()).count();
        assert_eq!(scored, sampled.scores.len(), "one entry for each slice that asks for scores");
        let drafts = step.slices.iter().filter(|slice| !slice.draft().is_empty()).count();
        assert_eq!(drafts, sampled.further.len(), "one entry for each slice with a draft");
        self.steps_committed = step.number;
        self.drafting &= drafts == 0;
        let mut events = Vec::new();
        let (mut scores, mut further) = (sampled.scores.iter(), sampled.further.iter());
        for (slice, token) in step.slices.iter().zip(&sampled.tokens) {
            if let Some(scores) = slice.score.as_ref().and_then(|_| scores.next()) {
                self.commit_scores(slice, scores, &mut events);
            }
            match (&slice.draw, token) {
                (Some(draw), Some(token)) => {
                    let further = if draw.draft.is_empty() { None } else { further.next() };
                    let further = further.map_or(&[][..], Vec::as_slice);
                    self.commit_draws(slice.slot, draw, (token, further), &mut events);
                }
                (None, None) => {}
                _ => panic!("a token comes where one was to be drawn, and only there"),
            }
            self.sequence(slice.slot).steps_in_flight -= 1;
            self.release_if_done(slice.slot);
        }
        events
    }

    /// Tells how long the ranks were at a step: from the end of the one before it, or from its own planning if there was none.
    pub fn took(&mut self, step: &Step, time: Duration) {
        let answers = step.slices.iter().all(|slice| slice.input == Input::Last);
        if answers && self.limits.speculation {
            self.worth.took(step, time);
        }
        if step.slices.iter().all(|slice| slice.draft().is_empty()) {
            self.pace.learn(step, time);
        }
    }

    /// Keys that the tokens of a step attend to, together.
    pub fn keys(&self, step: &Step) -> u64 {
        Cost { window_tokens: self.limits.window_tokens, ..Cost::default() }.step_keys(step)
    }

    /// The requests that [`plan`](Self::plan) has admitted for the first time since this was last called, in order; for
    /// whoever holds a clock.
    pub fn take_admitted(&mut self) -> Vec<Admitted> {
        std::mem::take(&mut self.admitted_since)
    }

    /// The requests that [`plan`](Self::plan) has preempted since this was last called. They go on later.
    pub fn take_preempted(&mut self) -> Vec<RequestId> {
        std::mem::take(&mut self.preempted_since)
    }

    /// How busy it is now.
    pub fn load(&self) -> Load {
        Load {
            running: self.slots.iter().flatten().filter(|sequence| !sequence.ended).count(),
            waiting: self.tenants.waiting(),
            tenants: self.tenants.busy(),
            kv_blocks_free: self.pool.free(),
            kv_blocks: self.pool.total(),
            prefix_cache: self.limits.prefix_cache,
        }
    }

    fn admit(&mut self) {
        while self.tenants.waiting() > 0 {
            let (free, total) = (self.free(), self.total());
            if free.slots == 0 && !self.tenants.anyone_is_entitled(total) {
                break;
            }
            let Some((tenant, needed)) = self.tenants.due(free, total) else { break };
            let found = if free.slots > 0 { self.find_prefix(tenant) } else { Prefix::default() };
            if self.comes_soon(tenant, &found) {
                self.tenants.put_off(tenant);
                continue;
            }
            let shared = self.needed_no_more(&found);
            if free.slots == 0 || free.kv_blocks < needed - shared {
                match self.make_room(tenant, needed - shared) {
                    true => continue,
                    false => break,
                }
            }
            let slot = self.slots.iter().position(Option::is_none).expect("a slot is free");
            self.start(tenant, slot, found, needed);
        }
    }

    /// Gives a tenant's next request a slot, the blocks that were found for it, and `needed` in all, at once or as it goes on.
    fn start(&mut self, tenant: TenantId, slot: usize, mut found: Prefix, needed: u32) {
        let (before, cached_tokens) = (self.pool.free(), found.tokens());
        found.blocks.iter().for_each(|&block| self.pool.hold(block));
        let charge = match self.limits.window_tokens {
            Some(_) => needed,
            None => {
                let more = needed - found.blocks.len() as u32;
                found.blocks.extend(self.pool.take(more).expect("so many blocks are free"));
                before - self.pool.free()
            }
        };
        self.reserved += needed;
        let arrived = self.tenants.admit(tenant, charge, cached_tokens);
        let arrived = arrived.expect("whose turn it is has a request");
        if !arrived.resumes {
            let looked_up_tokens = looked_up_tokens(&arrived.request, &self.limits);
            let request = arrived.request.id;
            self.admitted_since.push(Admitted { request, looked_up_tokens, cached_tokens });
        }
        self.slots[slot] = Some(Sequence::new(arrived, found, cached_tokens, charge, &self.limits));
        self.admitted.push(slot as u32);
    }

    /// What nobody holds, or may take later.
    fn free(&self) -> Held {
        let slots = self.slots.iter().filter(|slot| slot.is_none()).count() as u32;
        let kv_blocks = match self.limits.window_tokens {
            Some(_) => self.pool.total() - self.reserved,
            None => self.pool.free(),
        };
        Held { slots, kv_blocks }
    }

    fn total(&self) -> Held {
        Held { slots: self.limits.sequences_max, kv_blocks: self.pool.total() }
    }

    fn plan_slices(&mut self) -> Vec<Slice> {
        let mut slices = Vec::with_capacity(self.admitted.len());
        let mut drafts = self.drafts().into_iter();
        for &slot in &self.admitted {
            let sequence = occupied(&mut self.slots, slot);
            if sequence.decodes() {
                let draft_tokens = drafts.next().unwrap_or(0);
                self.tenants.serve_answer(sequence.request.tenant);
                sequence.slide(1 + draft_tokens as u32, &self.limits, &mut self.pool);
                slices.push(sequence.plan_decode(slot, draft_tokens));
                self.drafting |= draft_tokens > 0;
            }
        }
        self.plan_prompts(&mut slices);
        slices
    }

    fn plan_prompts(&mut self, slices: &mut Vec<Slice>) {
        if !self.admitted.iter().any(|&slot| occupied(&mut self.slots, slot).prefills()) {
            return;
        }
        let mut tokens_left = self.limits.step_tokens_max - slices.len() as u32;
        if let Some(target) = self.limits.itl_target.filter(|_| !slices.is_empty()) {
            tokens_left = tokens_left.min(self.pace.prompt_tokens(target));
        }
        let least_used = self.tenants.least_used();
        let mut prefilling: Vec<(u64, bool, u32)> = Vec::new();
        for &slot in &self.admitted {
            let sequence = occupied(&mut self.slots, slot);
            if sequence.prefills() {
                let tenant = sequence.request.tenant;
                let others = self.tenants.used(tenant) > least_used;
                prefilling.push((self.tenants.service(tenant), others, slot));
            }
        }
        prefilling.sort_by_key(|&(service, ..)| service); // in order of admission where it is equal
        let mut others_left = self.limits.step_tokens_max.div_ceil(OTHERS_PROMPT_PART);
        for (_, others, slot) in prefilling {
            let sequence = occupied(&mut self.slots, slot);
            let most = if others { others_left.min(tokens_left) } else { tokens_left };
            let tokens = sequence.prompt_left().min(most);
            if tokens > 0 {
                tokens_left -= tokens;
                others_left -= if others { tokens } else { 0 };
                self.tenants.serve_prompt(sequence.request.tenant, tokens);
                sequence.slide(tokens, &self.limits, &mut self.pool);
                slices.push(sequence.plan_prefill(slot, tokens));
                if self.limits.prefix_cache {
                    sequence.name_blocks(&mut self.pool);
                }
            }
        }
    }

    /// The traces of a step's requests; for a step without traced ones that allocates nothing.
    fn traces(&self, slices: &[Slice]) -> Vec<String> {
        let sequences = slices.iter().filter_map(|slice| self.slots[slice.slot as usize].as_ref());
        let traced = sequences.filter_map(|sequence| sequence.request.trace.clone());
        traced.take(STEP_TRACES_MAX).collect()
    }

    fn commit_scores(&mut self, slice: &Slice, scores: &[TokenOut], events: &mut Vec<Event>) {
        let sequence = self.sequence(slice.slot);
        if !sequence.ended {
            let (request, position) = (sequence.request.id, slice.start + 1);
            events.push(Event::Scored { request, position, scores: scores.to_vec() });
        }
    }

    fn release_if_done(&mut self, slot: u32) {
        let sequence = self.sequence(slot);
        if !(sequence.ended || sequence.yields) || sequence.steps_in_flight > 0 {
            return;
        }
        let sequence = self.slots[slot as usize].take().expect("it was there just now");
        let needed = sequence.needed;
        self.pool.give_back(&sequence.blocks);
        self.reserved -= needed;
        self.admitted.retain(|&other| other != slot);
        if !sequence.yields {
            let unplanned = sequence.prompt_left();
            self.tenants.release(sequence.request.tenant, sequence.charge, needed, unplanned);
        } else if !sequence.ended {
            let (request, chain) = sequence.into_rest();
            self.tenants.put_back(request, chain, needed);
        }
        let all_free = self.pool.free() == self.pool.total();
        assert!(all_free || !self.admitted.is_empty(), "KV blocks are taken, but no request runs");
    }

    fn holds(&self, id: RequestId) -> bool {
        let running = self.slots.iter().flatten().any(|sequence| sequence.request.id == id);
        running || self.tenants.holds(id)
    }

    fn sequence(&mut self, slot: u32) -> &mut Sequence {
        occupied(&mut self.slots, slot)
    }
}

/// The sequence in a slot that is in use: one that was admitted, or that an uncommitted step holds.
fn occupied(slots: &mut [Option<Sequence>], slot: u32) -> &mut Sequence {
    slots[slot as usize].as_mut().expect("a slot that is in use holds its sequence")
}
