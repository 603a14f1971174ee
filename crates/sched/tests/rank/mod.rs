//! A rank that computes nothing but what depends on what: the content of a position is a function of its token, its place
//! and the contents that it sees, so whoever reads a block that is not its own draws another token.

use galerne_sched::Limits;
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Draw, FinishReason, Input, Request, Sampled, Sampling, Slice, Step, TokenId, TokenOut};

pub(crate) const VOCAB: u32 = 60;

pub(crate) struct Rank {
    pub(crate) limits: Limits,
    /// Of each position of each block.
    memory: Vec<u64>,
    /// The last drawn token of each slot.
    last: Vec<TokenId>,
}

impl Rank {
    pub(crate) fn new(limits: &Limits) -> Self {
        let positions = limits.kv_blocks as usize * KV_BLOCK_TOKENS;
        Self {
            limits: limits.clone(),
            memory: vec![0; positions],
            last: vec![0; limits.sequences_max as usize],
        }
    }

    pub(crate) fn run(&mut self, step: &Step) -> Sampled {
        let mut sampled = Sampled::default();
        for slice in &step.slices {
            let mut drawn = self.run_slice(slice).into_iter().map(TokenOut::unreported);
            sampled.tokens.push(drawn.next());
            if !slice.draft().is_empty() {
                sampled.further.push(drawn.collect());
            }
            let scores =
                slice.score.as_ref().map(|score| score.targets.iter().copied().map(TokenOut::unreported));
            sampled.scores.extend(scores.map(Iterator::collect));
        }
        sampled
    }

    /// The tokens that are drawn: one, and one more for each of the draft that comes true.
    fn run_slice(&mut self, slice: &Slice) -> Vec<TokenId> {
        let tokens = match &slice.input {
            Input::Tokens(tokens) => tokens.clone(),
            Input::Last => vec![self.last[slice.slot as usize]],
        };
        let (last, mut answer) = (slice.input.len() - 1, Vec::new());
        let mut comes_true = true;
        for (offset, &token) in tokens.iter().chain(slice.draft()).enumerate() {
            let position = slice.start as usize + offset;
            let at = |position: usize| {
                let block = slice.blocks[position / KV_BLOCK_TOKENS - slice.first_block as usize];
                block as usize * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS
            };
            let seen = first_seen(position, &self.limits)..position;
            let content = computed(token, position, seen.map(|seen| self.memory[at(seen)]));
            self.memory[at(position)] = content;
            let Some(draw) = slice.draw.as_ref().filter(|_| offset >= last) else { continue };
            comes_true &= offset == last || answer.last() == Some(&token);
            if comes_true {
                answer.push(drawn(&draw.ahead((offset - last) as u32), content));
            }
        }
        self.last[slice.slot as usize] = answer.last().copied().unwrap_or_default();
        answer
    }
}

/// The answer that a request gets with the whole memory to itself, and why it ends.
pub(crate) fn alone(request: &Request, limits: &Limits) -> (Vec<TokenId>, FinishReason) {
    let (mut tokens, mut contents, mut answer) = (request.prompt.clone(), Vec::new(), Vec::new());
    for index in 0.. {
        while contents.len() < tokens.len() {
            let position = contents.len();
            let seen = contents[first_seen(position, limits)..].iter().copied();
            contents.push(computed(tokens[position], position, seen));
        }
        let token = drawn(&Draw::new(request.sampling.clone(), index), contents[tokens.len() - 1]);
        answer.push(token);
        tokens.push(token);
        if request.stop_tokens.contains(&token) {
            return (answer, FinishReason::Stop);
        }
        if index + 1 == request.max_tokens || tokens.len() == limits.context_tokens_max as usize {
            return (answer, FinishReason::Length);
        }
    }
    unreachable!("every answer ends")
}

fn first_seen(position: usize, limits: &Limits) -> usize {
    limits.window_tokens.map_or(0, |window| (position + 1).saturating_sub(window as usize))
}

fn computed(token: TokenId, position: usize, seen: impl Iterator<Item = u64>) -> u64 {
    seen.fold(mix(u64::from(token), position as u64), mix)
}

/// Of an even seed some token, of an odd one mostly the first of two: such an answer repeats itself.
fn drawn(draw: &Draw, content: u64) -> TokenId {
    let Sampling { seed, .. } = draw.sampling;
    let lot = mix(mix(content, seed), draw.index.into());
    match seed % 2 {
        0 => (lot % u64::from(VOCAB)) as TokenId,
        _ => 7 + TokenId::from(lot.is_multiple_of(8)),
    }
}

/// Two numbers stirred into one (SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(31).wrapping_add(b).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}
