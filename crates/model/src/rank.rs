use std::collections::VecDeque;
use std::iter;
use std::sync::Arc;
use std::thread::available_parallelism;

use galerne_collective::{AbortHandle, Collective};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Compute, Draw, KvDtype, RequestId, Sampled, Slice, Step, TokenId, TokenOut};

use crate::backend::Backend;
use crate::check::{Bounds, DRAWN, Place, Places, place};
use crate::cores::Cores;
use crate::cut::Portion;
use crate::error::ModelError;
use crate::gpu::{EDITS_MAX, GpuWeights, Link};
use crate::head::{Head, How, Read, Want, Wanted};
use crate::products::Engine;
use crate::sampler::{Mask, Past};
use crate::simd::Isa;
use crate::team::{THREADS_MAX, Team};
use crate::weights::Weights;

/// What a rank is given to work with. Equal on all ranks of a group but for threads, cores and instruction set.
#[derive(Clone, Debug)]
pub struct Options {
    /// Compute threads, the caller of [`Rank::step`] included.
    pub threads: usize,
    /// Where they run, the caller's included, which stays bound; `None`: wherever the system has them run.
    pub cores: Option<Cores>,
    /// Blocks of KV memory; see [`kv_bytes_per_block`](crate::kv_bytes_per_block).
    pub kv_blocks: usize,
    /// Slots for running sequences.
    pub sequences_max: usize,
    /// Tokens of one step.
    pub step_tokens_max: usize,
    /// What a query sees.
    pub window: WindowChoice,
    /// How products are computed.
    pub compute: Compute,
    /// How keys and values are kept.
    pub kv_dtype: KvDtype,
    /// Instruction set of the kernels: it changes the speed, not a bit.
    pub isa: Isa,
}

impl Options {
    /// Whether a GPU has a library multiply many tokens.
    pub(crate) fn is_fast(&self) -> bool {
        matches!(self.compute, Compute::Fast(_))
    }
}

impl Default for Options {
    fn default() -> Self {
        let threads = available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        Self {
            threads,
            cores: None,
            kv_blocks: 256,
            sequences_max: 16,
            step_tokens_max: 512,
            window: WindowChoice::AsModel,
            compute: Compute::default(),
            kv_dtype: KvDtype::default(),
            isa: Isa::best(),
        }
    }
}

/// The sliding window of attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WindowChoice {
    /// As the checkpoint's configuration says.
    #[default]
    AsModel,
    /// None: a query sees everything before it.
    Full,
    /// A query sees itself and the tokens before it, as many as this in all.
    Tokens(usize),
}

/// What [`Rank::step_traced`] shows.
#[derive(Clone, Copy, Debug)]
pub enum Trace<'a> {
    /// Hidden states of consecutive tokens of the step, `[tokens][hidden]`, on every rank: the input of layer
    /// `layer`; for `layer` = number of layers, what the head sees (after the final norm).
    Hidden {
        /// Which layer.
        layer: usize,
        /// A row for each token.
        rows: &'a [f32],
    },
    /// Logits that a token was drawn from, on rank 0.
    Logits {
        /// Index of the slice in the step.
        slice: usize,
        /// One for each token of the vocabulary.
        row: &'a [f32],
    },
}

/// Whoever wants to be shown, if anybody.
pub(crate) type Tracer<'a> = Option<&'a mut dyn FnMut(Trace<'_>)>;

/// Who knows which tokens a request's grammar allows next; it may take its time.
pub type Masks<'a> = dyn FnMut(RequestId) -> Option<Mask> + 'a;

/// One rank of a group: its weights, its KV memory and its way to the others. Runs the leader's steps and decides
/// nothing.
pub struct Rank {
    backend: Backend,
    collective: Box<dyn Collective>,
    bounds: Bounds,
    /// The last drawn token of each slot, or where it will be.
    last: Vec<Option<TokenId>>,
    /// Numbers of the steps that were begun, each with the slots that it draws for.
    begun: VecDeque<(u64, Vec<u32>)>,
    /// At rank 0, the tokens before the next draw of each slot, where penalties look back on them.
    pasts: Vec<Option<Past>>,
    head: Head,
    places: Places,
    wanted: Vec<Wanted>,
    /// Those of a round that are read by threads.
    left: Vec<Wanted>,
    /// Where they stand in it.
    left_at: Vec<usize>,
    drawn: Vec<TokenOut>,
    /// The drawn ids, as they go to the other ranks.
    ids: Vec<u8>,
}

impl Rank {
    /// Allocates KV memory (taken from the system as it is first used) and starts the threads. All ranks of the
    /// group give equal options but for threads, cores and instruction set.
    ///
    /// # Errors
    /// [`ModelError::Option`] for an option out of range, [`ModelError::Place`] if `weights` are another rank's,
    /// [`ModelError::KvDtype`] for what GPUs alone have, [`ModelError::Thread`] if the system gives no thread.
    pub fn new(
        weights: Arc<Weights>,
        options: &Options,
        collective: Box<dyn Collective>,
    ) -> Result<Self, ModelError> {
        let bounds = bounds(&weights.portion, options, &*collective)?;
        let engine = engine(options, &*collective)?;
        let head = Head::new(&weights.portion, bounds.round_max(), options.compute);
        let backend = Backend::cpu(weights, options, &bounds, engine)?;
        Ok(Self::with(backend, bounds, head, collective))
    }

    /// The same on a GPU: all memory is taken now, and the threads draw what the GPU does not. Partial sums travel by `link`, everything
    /// else by `collective`.
    ///
    /// # Errors
    /// As [`Rank::new`], but for [`ModelError::KvDtype`]: a GPU has others; [`ModelError::Device`], above all if there is too little memory.
    pub fn on_gpu(
        weights: Arc<GpuWeights>,
        options: &Options,
        collective: Box<dyn Collective>,
        link: Link,
    ) -> Result<Self, ModelError> {
        let bounds = bounds(&weights.portion, options, &*collective)?;
        let engine = engine(options, &*collective)?;
        let head = Head::new(&weights.portion, bounds.round_max(), Compute::F32);
        let backend = Backend::gpu(weights, options, &bounds, engine, link)?;
        Ok(Self::with(backend, bounds, head, collective))
    }

    fn with(backend: Backend, bounds: Bounds, head: Head, collective: Box<dyn Collective>) -> Self {
        Self {
            backend,
            collective,
            bounds,
            last: vec![None; bounds.sequences_max],
            begun: VecDeque::new(),
            pasts: vec![None; bounds.sequences_max],
            head,
            places: Places::default(),
            wanted: Vec::new(),
            left: Vec::new(),
            left_at: Vec::new(),
            drawn: Vec::new(),
            ids: Vec::new(),
        }
    }

    /// Runs one step. Every rank returns the same token ids; log probabilities and scores are rank 0's alone.
    ///
    /// Rank 0 asks `masks` for the mask of each draw that a grammar binds, once, when the logits are there: it may wait
    /// for whoever works it out meanwhile. For a request that was given up any mask will do.
    ///
    /// # Errors
    /// [`ModelError::Step`] if the step does not fit this rank's room: nothing was computed, and the rank is as it
    /// was. [`ModelError::Collective`] if other ranks were lost or the epoch was aborted, and [`ModelError::Mask`] if
    /// `masks` gives `None`: the rank is of no further use.
    pub fn step(&mut self, step: &Step, masks: &mut Masks<'_>) -> Result<Sampled, ModelError> {
        self.run(step, masks, &mut None)
    }

    /// Gives a GPU a step's work ahead of [`Rank::step`], behind that of the step before, which need not be over: where that one draws a
    /// token that this one goes on from, it is on the device. Whether it did, or had: not for a step that needs the host while it runs
    /// (a grammar, a draft, a score, penalties on tokens that are still to be drawn), nor for one that cannot be run, which `step` tells.
    /// What was begun is run next, in order. All ranks of a group begin the same steps, here or in `step`: its devices tell each other
    /// what is drawn.
    ///
    /// # Errors
    /// As [`Rank::step`], but for [`ModelError::Step`].
    pub fn begin(&mut self, step: &Step) -> Result<bool, ModelError> {
        if self.begun.iter().any(|(number, _)| *number == step.number) {
            return Ok(true);
        }
        if !self.backend.begins() {
            return Ok(false);
        }
        // What is said of a step of several ranks must not depend on what only some of them know.
        let past_is_known = self.collective.world_size() == 1 && self.begun.is_empty();
        let draws = || step.slices.iter().filter_map(|slice| Some((slice.slot, slice.draw.as_ref()?)));
        let needs_host = |draw: &Draw| {
            let looks_back = draw.sampling.looks_back() && !past_is_known;
            draw.grammar.is_some() || !draw.draft.is_empty() || looks_back
        };
        let edits: usize = draws().map(|(_, draw)| draw.sampling.logit_bias.len() + draw.banned.len()).sum();
        let scores = step.slices.iter().any(|slice| slice.score.is_some());
        if draws().next().is_none()
            || scores
            || edits > EDITS_MAX
            || draws().any(|(_, draw)| needs_host(draw))
        {
            return Ok(false);
        }
        let placed = place(step, &self.bounds, &self.last, &mut self.places);
        let is_tile = self.places.all.len() <= self.backend.tile_tokens_max();
        if placed.is_err() || !is_tile || self.look_back(step).is_err() {
            return Ok(false);
        }
        let places = &self.places.all[..];
        find_wanted(&step.slices, places, &mut self.wanted);
        let (work, collective) = ((&step.slices[..], places), &mut *self.collective);
        if !self.backend.begin(work, &self.wanted, &self.pasts, collective)? {
            return Ok(false);
        }
        let slots: Vec<u32> = draws().map(|(slot, _)| slot).collect();
        self.will_draw(&slots);
        self.begun.push_back((step.number, slots));
        Ok(true)
    }

    /// Whether the oldest step that was begun is still under way.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub fn is_busy(&self) -> Result<bool, ModelError> {
        self.backend.is_busy()
    }

    /// The last tokens of these slots are on the device, or will be.
    fn will_draw(&mut self, slots: &[u32]) {
        slots.iter().for_each(|&slot| self.last[slot as usize] = Some(DRAWN + slot));
    }

    /// Takes in what a step has drawn that was begun.
    fn finish(&mut self, step: &Step) -> Result<Sampled, ModelError> {
        self.begun.pop_front();
        self.drawn.clear();
        self.drawn.extend(self.backend.finish()?);
        let sampled = self.sampled(step, Vec::new());
        // Those that were begun since draw for some of the same slots.
        let later: Vec<u32> = self.begun.iter().flat_map(|(_, slots)| slots).copied().collect();
        self.will_draw(&later);
        Ok(sampled)
    }

    /// As [`Rank::step`], showing hidden states and logits on the way; for tests and for finding out. All ranks are shown them, or none:
    /// logits that are shown come together on the host.
    ///
    /// # Errors
    /// As [`Rank::step`].
    pub fn step_traced(
        &mut self,
        step: &Step,
        masks: &mut Masks<'_>,
        trace: &mut dyn FnMut(Trace<'_>),
    ) -> Result<Sampled, ModelError> {
        self.run(step, masks, &mut Some(trace))
    }

    /// Meets the other ranks, and does nothing else.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if other ranks were lost or the epoch was aborted: the rank is of no further use.
    pub fn meet(&mut self) -> Result<(), ModelError> {
        Ok(self.collective.barrier()?)
    }

    /// Leaves the other ranks, when the epoch is over.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if a GPU is not let go: then the process must end.
    pub fn close(self) -> Result<(), ModelError> {
        self.backend.close()
    }

    /// Ends a step that waits for other ranks, from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.collective.abort_handle()
    }

    fn run(
        &mut self,
        step: &Step,
        masks: &mut Masks<'_>,
        trace: &mut Tracer<'_>,
    ) -> Result<Sampled, ModelError> {
        match self.begun.front() {
            Some((number, _)) if *number == step.number => return self.finish(step),
            Some((number, _)) => {
                let what = format!("step {number} was begun, and is to be run before");
                return Err(ModelError::Step { number: step.number, what });
            }
            None => {}
        }
        if trace.is_none() && self.begin(step)? {
            return self.finish(step);
        }
        place(step, &self.bounds, &self.last, &mut self.places)?;
        self.look_back(step)?;
        let (slices, collective) = (&step.slices, &mut *self.collective);
        let draws = self.places.all.iter().filter(|place| place.draw.is_some()).count();
        let mut scored = Vec::new();
        self.drawn.clear();
        for tile in self.places.all.chunks(self.bounds.step_tokens_max.min(self.backend.tile_tokens_max())) {
            self.backend.tile(slices, tile, collective, trace)?;
            find_wanted(slices, tile, &mut self.wanted);
            for round in self.wanted.chunks(self.bounds.round_max()) {
                let read = match trace {
                    None => self.backend.read(slices, round, &self.pasts, collective)?,
                    Some(_) => Read::Nothing,
                };
                let mut found = match read {
                    Read::Elsewhere => continue,
                    Read::Nothing => Vec::new(),
                    Read::Here(found) => found,
                };
                let left = (0..round.len()).filter(|at| !matches!(found.get(*at), Some(Some(_))));
                self.left_at.clear();
                self.left_at.extend(left);
                self.left.clear();
                self.left.extend(self.left_at.iter().map(|at| round[*at]));
                let left = &self.left;
                if found.is_empty() {
                    self.backend.project(&mut self.head, left)?;
                    self.head.gather(left.len(), collective)?;
                } else {
                    self.backend.fetch(&mut self.head, &self.left_at)?;
                }
                if collective.rank() > 0 {
                    continue;
                }
                let masks = masks_of(left, slices, masks)?;
                let how = How { pasts: &self.pasts, masks: &masks };
                let mut drawn = self.head.read(self.backend.engine(), slices, left, &how, trace);
                for (at, Wanted { want, .. }) in round.iter().enumerate() {
                    let token = found.get_mut(at).and_then(Option::take).or_else(|| drawn.next());
                    if let Want::Score(_) = want { scored.extend(token) } else { self.drawn.extend(token) }
                }
            }
        }
        self.share(draws)?;
        Ok(self.sampled(step, scored))
    }

    /// Takes in what the draws are told of the tokens before them; rank 0 alone draws.
    ///
    /// # Errors
    /// [`ModelError::Step`] for a draw that looks back and was never told on what; nothing was changed.
    fn look_back(&mut self, step: &Step) -> Result<(), ModelError> {
        if self.collective.rank() > 0 {
            return Ok(());
        }
        let draws = || step.slices.iter().filter_map(|slice| Some((slice.slot, slice.draw.as_ref()?)));
        let untold = |(slot, draw): &(u32, &Draw)| {
            draw.sampling.looks_back() && draw.history.is_none() && self.pasts[*slot as usize].is_none()
        };
        if let Some((slot, _)) = draws().find(untold) {
            let what = format!("slot {slot} draws with penalties, but the tokens before were never told");
            return Err(ModelError::Step { number: step.number, what });
        }
        for (slot, draw) in draws() {
            let past = &mut self.pasts[slot as usize];
            match &draw.history {
                _ if !draw.sampling.looks_back() => *past = None,
                Some(history) => *past = Some(Past::new(history)),
                None => {}
            }
        }
        Ok(())
    }

    /// Tells every rank the ids that rank 0 has drawn.
    fn share(&mut self, draws: usize) -> Result<(), ModelError> {
        let Self { ids, drawn, collective, .. } = self;
        if draws == 0 {
            return Ok(());
        }
        ids.clear();
        ids.extend(drawn.iter().flat_map(|token| token.id.to_le_bytes()));
        ids.resize(draws * size_of::<TokenId>(), 0);
        collective.broadcast(0, ids)?;
        if collective.rank() > 0 {
            let (ids, _) = ids.as_chunks();
            drawn.extend(ids.iter().map(|id| TokenOut::unreported(TokenId::from_le_bytes(*id))));
        }
        Ok(())
    }

    /// Gives the tokens to their slices, and remembers the drawn ones by slot.
    fn sampled(&mut self, step: &Step, scored: Vec<TokenOut>) -> Sampled {
        let (mut drawn, mut scored, mut further) = (self.drawn.drain(..), scored.into_iter(), Vec::new());
        let mut of_slice = |slice: &Slice| {
            let Draw { draft, .. } = slice.draw.as_ref()?;
            let token = drawn.next()?;
            let mut last = token.id;
            if let Some(past) = &mut self.pasts[slice.slot as usize] {
                past.push(token.id);
            }
            if !draft.is_empty() {
                let mut ahead: Vec<TokenOut> = drawn.by_ref().take(draft.len()).collect();
                let so_far = iter::once(token.id).chain(ahead.iter().map(|token| token.id));
                // What was drawn behind a token that did not come true was drawn from what will not be.
                let came_true = draft.iter().zip(so_far).take_while(|(believed, token)| *believed == token);
                ahead.truncate(came_true.count());
                last = ahead.last().map_or(last, |token| token.id);
                further.push(ahead);
            }
            self.last[slice.slot as usize] = Some(last);
            Some(token)
        };
        let tokens = step.slices.iter().map(&mut of_slice).collect();
        let scores = step.slices.iter().filter_map(|slice| slice.score.as_ref());
        let scores = scores.map(|score| scored.by_ref().take(score.targets.len()).collect()).collect();
        Sampled { tokens, further, scores: if self.collective.rank() == 0 { scores } else { Vec::new() } }
    }
}

/// The rows of a tile whose logits are wanted, in order.
fn find_wanted(slices: &[Slice], tile: &[Place], wanted: &mut Vec<Wanted>) {
    wanted.clear();
    for (row, &Place { position, slice, draw, .. }) in tile.iter().enumerate() {
        let Slice { start, score, .. } = &slices[slice];
        let target = score.as_ref().and_then(|score| score.targets.get(position - *start as usize));
        wanted.extend(target.map(|&target| Wanted { row, slice, want: Want::Score(target) }));
        wanted.extend(draw.map(|by| Wanted { row, slice, want: Want::Draw(by) }));
    }
}

/// The masks of a round's draws, where a grammar binds them; empty if none does.
fn masks_of(
    round: &[Wanted],
    slices: &[Slice],
    masks: &mut Masks<'_>,
) -> Result<Vec<Option<Mask>>, ModelError> {
    let mask = |&Wanted { slice, want, .. }: &Wanted| {
        let draw = slices[slice].draw.as_ref().filter(|_| want == Want::Draw(0));
        let request = draw.and_then(|draw| draw.grammar);
        request.map(|request| masks(request).ok_or(ModelError::Mask { request })).transpose()
    };
    let bound = |&Wanted { slice, .. }: &Wanted| {
        slices[slice].draw.as_ref().is_some_and(|draw| draw.grammar.is_some())
    };
    if round.iter().any(bound) { round.iter().map(mask).collect() } else { Ok(Vec::new()) }
}

/// The threads.
fn engine(options: &Options, collective: &dyn Collective) -> Result<Engine, ModelError> {
    let crowded = match &options.cores {
        Some(cores) => cores.are_crowded_by(options.threads),
        // Where the other ranks run is not known here; if they share this host's cores, spinning would hurt.
        None => options.threads * collective.world_size() > available_parallelism().map_or(1, usize::from),
    };
    let homes = options.cores.as_ref().map_or_else(Vec::new, |cores| cores.homes(options.threads));
    let team = Team::new(options.threads, crowded, homes)?;
    Ok(Engine::new(options.isa, team))
}

/// What the rank will have room for, if its options can be met and its weights are those of its place.
fn bounds(portion: &Portion, options: &Options, collective: &dyn Collective) -> Result<Bounds, ModelError> {
    let window = check_options(portion, options)?;
    let (rank, world_size) = (collective.rank(), collective.world_size());
    if (rank, world_size) != (portion.rank, portion.shards.world_size()) {
        return Err(ModelError::Place {
            rank: portion.rank,
            world_size: portion.shards.world_size(),
            collective_rank: rank,
            collective_world_size: world_size,
        });
    }
    let &Options { kv_blocks, sequences_max, step_tokens_max, .. } = options;
    let context = portion.config.context_tokens_max;
    let positions_max = match window {
        Some(_) => context, // blocks that have left the window are used again
        None => context.min(kv_blocks.saturating_mul(KV_BLOCK_TOKENS)),
    };
    Ok(Bounds {
        vocab: portion.config.vocab,
        kv_blocks,
        sequences_max,
        step_tokens_max,
        positions_max,
        window,
    })
}

/// The window in tokens, and whether the options can be met.
fn check_options(portion: &Portion, options: &Options) -> Result<Option<usize>, ModelError> {
    let refuse = |option, value, expected| Err(ModelError::Option { option, value, expected });
    let sizes = [
        ("kv_blocks", options.kv_blocks),
        ("sequences_max", options.sequences_max),
        ("step_tokens_max", options.step_tokens_max),
    ];
    if !(1..=THREADS_MAX).contains(&options.threads) {
        return refuse("threads", options.threads, "1 to 256 are possible");
    }
    for (option, value) in sizes {
        if value == 0 {
            return refuse(option, value, "at least 1 is needed");
        }
    }
    match options.window {
        WindowChoice::AsModel => Ok(portion.config.window),
        WindowChoice::Full => Ok(None),
        WindowChoice::Tokens(0) => refuse("window", 0, "a query sees at least itself"),
        WindowChoice::Tokens(tokens) => Ok(Some(tokens)),
    }
}
