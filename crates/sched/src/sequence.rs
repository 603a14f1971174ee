//! One request while it holds a slot.

use std::ops::Range;

use galerne_types::limits::{DRAFT_TOKENS_MAX, KV_BLOCK_TOKENS, STEPS_IN_FLIGHT_MAX};
use galerne_types::{BlockId, Draw, FinishReason, History, Input, Request, Score, Slice, TokenId};

use crate::blocks::BlockPool;
use crate::chain::{Chain, Key};
use crate::draft::{Offer, Proposal, Worth};
use crate::scheduler::{Limits, Prefix};
use crate::tenants::Arrived;

/// An accepted request and how far it has come. Planning runs ahead of what is committed, so both are counted.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: Request,
    /// KV blocks for every position that the sequence can reach, or with a window those that it sees next. The first ones
    /// it may share with others.
    pub(crate) blocks: Vec<BlockId>,
    /// Blocks that have left the window.
    first_block: u32,
    /// Blocks that it may hold at once.
    pub(crate) needed: u32,
    /// Those of them that were free when it came: what its tenant holds for it.
    pub(crate) charge: u32,
    chain: Chain,
    /// Its first blocks that others can find.
    named: u32,
    /// Uncommitted steps that hold a slice of it: until they are committed, its slot and blocks stay its own.
    pub(crate) steps_in_flight: u32,
    /// Nothing more is planned for it or told of it.
    pub(crate) ended: bool,
    /// Nothing more is planned for it: it goes back to the queue when the steps that hold it are committed.
    pub(crate) yields: bool,
    /// It has gone back once, and runs to its end now.
    pub(crate) resumed: bool,
    /// Tokens that it has drawn here.
    answer: Vec<TokenId>,
    /// Position of the next slice: all before it are planned.
    positions_planned: u32,
    /// Index of the next token whose draw will be planned.
    index_planned: u32,
    /// Index of the next token that will be committed.
    index_committed: u32,
    /// One past the last index that it may draw.
    index_end: u32,
    /// How the answer may go on, from the token at that index.
    proposal: Option<(u32, Proposal)>,
}

/// One past the last index that `request` may draw: `max_tokens`, or where the context is full if that is sooner.
/// A replay's prompt holds its first `first_index` tokens, so the end is the same however often it is replayed.
fn index_end(request: &Request, limits: &Limits) -> u32 {
    let room = limits.context_tokens_max - request.prompt.len() as u32;
    request.max_tokens.min(request.first_index.saturating_add(room))
}

/// KV blocks that `request` can need at once: its last token is drawn, but never run, so it needs no position.
pub(crate) fn blocks_needed(request: &Request, limits: &Limits) -> u32 {
    let tokens = index_end(request, limits) - request.first_index;
    limits.kv_blocks_held(request.prompt.len() as u32 + tokens - 1)
}

/// Tokens that are looked up: a draft, and what is under way before it.
const PROPOSED_TOKENS_MAX: u32 = (DRAFT_TOKENS_MAX + STEPS_IN_FLIGHT_MAX) as u32;

fn blocks_of(positions: u32) -> u32 {
    positions.div_ceil(KV_BLOCK_TOKENS as u32)
}

impl Sequence {
    /// A request that was checked, with blocks of which the first hold `cached_tokens` of its prompt already.
    pub(crate) fn new(
        arrived: Arrived,
        held: Prefix,
        cached_tokens: u32,
        charge: u32,
        limits: &Limits,
    ) -> Self {
        let Arrived { request, chain, resumes: resumed, kv_blocks: needed, .. } = arrived;
        let Prefix { first_block, blocks } = held;
        Self {
            blocks,
            first_block,
            needed,
            charge,
            chain,
            named: cached_tokens / KV_BLOCK_TOKENS as u32,
            steps_in_flight: 0,
            ended: false,
            yields: false,
            resumed,
            answer: Vec::new(),
            positions_planned: cached_tokens,
            index_planned: request.first_index,
            index_committed: request.first_index,
            index_end: index_end(&request, limits),
            proposal: None,
            request,
        }
    }

    /// Prompt tokens that no step holds yet.
    pub(crate) fn prompt_left(&self) -> u32 {
        (self.request.prompt.len() as u32).saturating_sub(self.positions_planned)
    }

    /// Whether a decode slice can be planned: the prompt is planned to its end, and an index is left to draw.
    pub(crate) fn decodes(&self) -> bool {
        self.goes_on() && self.prompt_left() == 0 && self.index_planned < self.index_end
    }

    /// Whether a chunk of the prompt can be planned.
    pub(crate) fn prefills(&self) -> bool {
        self.goes_on() && self.prompt_left() > 0
    }

    fn goes_on(&self) -> bool {
        !self.ended && !self.yields
    }

    /// Whether its slot and blocks are free as soon as the steps that hold it are committed.
    pub(crate) fn leaves(&self) -> bool {
        !self.prefills() && !self.decodes()
    }

    /// Whether it may be sent back to the queue: once, and not while its prompt is being scored, which is not done twice.
    pub(crate) fn may_yield(&self) -> bool {
        !self.resumed && !self.leaves() && (self.request.prompt_logprobs.is_none() || self.prompt_left() == 0)
    }

    /// The request that goes on where this sequence stopped: a replay.
    pub(crate) fn into_rest(self) -> (Request, Chain) {
        let Self { mut request, answer, chain, .. } = self;
        request.first_index += answer.len() as u32;
        request.prompt.extend(answer);
        request.prompt_logprobs = None;
        (request, chain)
    }

    /// Lets others find the blocks that have become full: all of their tokens are known, and all of their positions
    /// planned, so that any step which is planned from now on finds them stored.
    pub(crate) fn name_blocks(&mut self, pool: &mut BlockPool) {
        let known = (self.request.prompt.len() + self.answer.len()) as u32;
        let full = self.positions_planned.min(known) / KV_BLOCK_TOKENS as u32;
        if full <= self.named {
            return;
        }
        let keys = self.chain.keys(&self.request, &self.answer, full);
        let held = (self.first_block..full).zip(&self.blocks).filter(|&(index, _)| index >= self.named);
        for (index, &block) in held {
            if let Some(&key) = keys.get(index as usize) {
                pool.name(block, key);
            }
        }
        self.named = full;
    }

    /// Whether it will run the block of its prompt that has this key.
    pub(crate) fn will_compute(&mut self, block: u32, key: &Key) -> bool {
        let end = (block + 1) * KV_BLOCK_TOKENS as u32;
        self.prefills()
            && self.positions_planned < end
            && end as usize <= self.request.prompt.len()
            && self.chain.keys(&self.request, &[], block + 1).get(block as usize) == Some(key)
    }

    /// Gives back the blocks that no position sees from the next one on, and takes those that the next `tokens` need. Without
    /// a window there are none of either. Ranks run steps in order: whoever takes such a block writes it after the steps
    /// under way have read it.
    pub(crate) fn slide(&mut self, tokens: u32, limits: &Limits, pool: &mut BlockPool) {
        let gone = limits.first_seen(self.positions_planned) - self.first_block;
        let gone: Vec<BlockId> = self.blocks.drain(..gone as usize).collect();
        pool.give_back(&gone);
        self.first_block += gone.len() as u32;
        let held = self.first_block + self.blocks.len() as u32;
        let more = blocks_of(self.positions_planned + tokens).saturating_sub(held);
        self.blocks.extend(pool.take(more).expect("no more are held than were kept free for it"));
    }

    /// The next chunk of the prompt, `tokens` long; the one that completes it draws.
    pub(crate) fn plan_prefill(&mut self, slot: u32, tokens: u32) -> Slice {
        let chunk = self.positions_planned as usize..(self.positions_planned + tokens) as usize;
        let input = Input::Tokens(self.request.prompt[chunk.clone()].to_vec());
        let draw = (tokens == self.prompt_left()).then(|| self.plan_draw(Vec::new()));
        let score = self.score(chunk);
        Slice { score, ..self.plan(slot, input, draw) }
    }

    /// The prompt's tokens that follow those of `chunk`, if they are to be scored.
    fn score(&self, chunk: Range<usize>) -> Option<Score> {
        let Request { prompt, prompt_logprobs, .. } = &self.request;
        let targets = &prompt[chunk.start + 1..prompt.len().min(chunk.end + 1)];
        let score = prompt_logprobs.map(|top| Score { top, targets: targets.to_vec() });
        score.filter(|score| !score.targets.is_empty())
    }

    /// The next token of the answer, and behind it a draft of so many tokens of what was last offered. Ranks keep what a
    /// slot drew last, so it need not be known here yet.
    pub(crate) fn plan_decode(&mut self, slot: u32, draft_tokens: usize) -> Slice {
        let draft = self.offer().map_or(Vec::new(), |Offer { proposal, under_way }| {
            proposal.tokens()[under_way..][..draft_tokens].to_vec()
        });
        let draw = self.plan_draw(draft);
        self.plan(slot, Input::Last, Some(draw))
    }

    /// Looks up how the answer may go on, if the next draw may have a draft and there is more than it left to draw.
    pub(crate) fn propose(&mut self) {
        let Request { prompt, sampling, stop_tokens, min_tokens, grammar, .. } = &self.request;
        let banned = self.index_planned < *min_tokens && !stop_tokens.is_empty();
        let alone = !sampling.looks_back() && !banned && grammar.is_none();
        // The last index is left for the draw behind the draft.
        let tokens = (self.index_end - self.index_committed).saturating_sub(1).min(PROPOSED_TOKENS_MAX);
        let proposal = Proposal::look_up(prompt, &self.answer, tokens as usize).filter(|_| alone);
        self.proposal = proposal.map(|proposal| (self.index_committed, proposal));
    }

    /// What was last looked up, if that was after the last token was committed.
    pub(crate) fn offer(&self) -> Option<Offer<'_>> {
        let (index, proposal) = self.proposal.as_ref().filter(|(index, _)| *index == self.index_committed)?;
        Some(Offer { proposal, under_way: (self.index_planned - index) as usize })
    }

    /// So many tokens of its last draft did not come true: they are planned again.
    pub(crate) fn take_back(&mut self, tokens: u32) {
        self.positions_planned -= tokens;
        self.index_planned -= tokens;
    }

    fn plan(&mut self, slot: u32, input: Input, draw: Option<Draw>) -> Slice {
        let (start, first_block) = (self.positions_planned, self.first_block);
        let mut slice = Slice { slot, start, input, first_block, blocks: Vec::new(), draw, score: None };
        self.positions_planned += slice.tokens() as u32;
        self.steps_in_flight += 1;
        slice.blocks = self.blocks[..(blocks_of(self.positions_planned) - first_block) as usize].to_vec();
        slice
    }

    /// The next draw, and those behind it as if its draft came true.
    fn plan_draw(&mut self, draft: Vec<TokenId>) -> Draw {
        let index = self.index_planned;
        self.index_planned += 1 + draft.len() as u32;
        let Request { id, sampling, stop_tokens, min_tokens, grammar, .. } = &self.request;
        let banned = if index < *min_tokens { stop_tokens.clone() } else { Vec::new() };
        let first = index == self.request.first_index;
        let history = (first && sampling.looks_back()).then(|| self.history());
        let grammar = grammar.is_some().then_some(*id);
        Draw { sampling: sampling.clone(), index, banned, history, grammar, draft }
    }

    /// The prompt as the client sent it, and behind it what was generated before a replay.
    fn history(&self) -> History {
        let sent = self.request.prompt.len() - self.request.first_index as usize;
        let (prompt, answer) = self.request.prompt.split_at(sent);
        History { prompt: prompt.to_vec(), answer: answer.to_vec() }
    }

    /// Counts a drawn token; says whether it is the last, and why.
    ///
    /// # Panics
    /// If `index` is not the one that is due.
    pub(crate) fn commit_draw(
        &mut self,
        index: u32,
        token: TokenId,
        worth: &mut Worth,
    ) -> Option<FinishReason> {
        assert_eq!(index, self.index_committed, "tokens of a request are committed in order");
        if let Some((first, proposal)) = &self.proposal {
            let at = (index - first) as usize;
            let right = proposal.tokens().get(at).map(|&proposed| proposed == token);
            if let Some(right) = right {
                worth.learn(proposal, at, right);
            }
            self.proposal.take_if(|_| right != Some(true));
        }
        self.index_committed += 1;
        self.answer.push(token);
        if self.request.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.index_committed == self.index_end {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
