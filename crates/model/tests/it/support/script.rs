//! Steps for sequences whose tokens are all known, or drawn greedily.

use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Draw, Epoch, Input, Sampling, Slice, Step, TokenId};

/// KV blocks that a script may use.
pub(crate) const KV_BLOCKS: usize = 64;
const BLOCKS_PER_SLOT: usize = 16;

pub(crate) fn greedy(index: usize) -> Option<Draw> {
    Some(Draw::new(Sampling::greedy(), index as u32))
}

/// Blocks for positions `0..end` of a slot's sequence, scattered over the memory.
fn blocks(slot: u32, end: usize) -> Vec<BlockId> {
    (0..end.div_ceil(KV_BLOCK_TOKENS))
        .map(|index| ((slot as usize * BLOCKS_PER_SLOT + index) * 37 % KV_BLOCKS) as BlockId)
        .collect()
}

/// Known tokens from position `start` on, in one slice.
pub(crate) fn known(slot: u32, start: usize, tokens: &[TokenId], draw: Option<Draw>) -> Slice {
    let blocks = blocks(slot, start + tokens.len());
    let input = Input::Tokens(tokens.to_vec());
    Slice { slot, start: start as u32, input, first_block: 0, blocks, draw, score: None }
}

/// A prompt in chunks of `chunk` tokens, then greedy tokens: `drawn` in all.
pub(crate) fn sequence(slot: u32, prompt: &[TokenId], chunk: usize, drawn: usize) -> Vec<Slice> {
    let mut slices = Vec::new();
    for start in (0..prompt.len()).step_by(chunk) {
        let end = prompt.len().min(start + chunk);
        let draw = if end == prompt.len() { greedy(0) } else { None };
        slices.push(known(slot, start, &prompt[start..end], draw));
    }
    for index in 1..drawn {
        let start = prompt.len() + index - 1;
        let blocks = blocks(slot, start + 1);
        slices.push(Slice {
            slot,
            start: start as u32,
            input: Input::Last,
            first_block: 0,
            blocks,
            draw: greedy(index),
            score: None,
        });
    }
    slices
}

/// The same with an answer whose tokens are known, run ahead by drafts of these lengths in turn; of every second one the
/// token in the middle is wrong.
pub(crate) fn drafted(slot: u32, prompt: &[TokenId], answer: &[TokenId], drafts: &[usize]) -> Vec<Slice> {
    let mut slices = sequence(slot, prompt, prompt.len(), 1);
    let (mut index, mut lengths) = (1, drafts.iter().copied().cycle());
    while index < answer.len() {
        let tokens = lengths.next().unwrap().min(answer.len() - index - 1);
        let mut draft = answer[index..index + tokens].to_vec();
        let wrong = if slices.len().is_multiple_of(2) { tokens / 2 } else { tokens };
        draft.iter_mut().skip(wrong).take(1).for_each(|token| *token ^= 1);
        let start = prompt.len() + index - 1;
        let draw = greedy(index).map(|draw| Draw { draft, ..draw });
        let blocks = blocks(slot, start + 1 + tokens);
        slices.push(Slice { draw, blocks, input: Input::Last, ..known(slot, start, &[], None) });
        index += 1 + wrong;
    }
    slices
}

/// The same, drawn otherwise.
pub(crate) fn sampled(sampling: &Sampling, mut slices: Vec<Slice>) -> Vec<Slice> {
    let draws = slices.iter_mut().filter_map(|slice| slice.draw.as_mut());
    draws.for_each(|draw| draw.sampling = sampling.clone());
    slices
}

/// The slices of a slot behind its first `prefix` positions, whose blocks are those of the slot `of`.
pub(crate) fn sharing(slot: u32, of: u32, prefix: usize, mut slices: Vec<Slice>) -> Vec<Slice> {
    slices.retain(|slice| slice.start as usize >= prefix);
    for slice in &mut slices {
        assert_eq!(slice.slot, slot);
        slice.blocks[..prefix / KV_BLOCK_TOKENS].copy_from_slice(&blocks(of, prefix));
    }
    slices
}

/// Blocks that a window and a chunk behind it touch at most.
pub(crate) fn ring(window: usize, chunk: usize) -> usize {
    (window - 1 + chunk + KV_BLOCK_TOKENS - 2) / KV_BLOCK_TOKENS + 1
}

/// The same slices with no more blocks than a window and a chunk touch: those that have left the window are used again.
pub(crate) fn sliding(window: usize, chunk: usize, mut slices: Vec<Slice>) -> Vec<Slice> {
    let count = ring(window, chunk);
    for slice in &mut slices {
        let first = (slice.start as usize + 1).saturating_sub(window) / KV_BLOCK_TOKENS;
        slice.first_block = first as u32;
        slice.blocks = (first..slice.blocks.len())
            .map(|index| (slice.slot as usize * count + index % count) as BlockId)
            .collect();
        assert!(slice.blocks.len() <= count);
    }
    slices
}

/// Runs sequences beside each other: step i holds the i-th slice of each.
pub(crate) fn steps(sequences: Vec<Vec<Slice>>) -> Vec<Step> {
    let count = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let mut sequences: Vec<_> = sequences.into_iter().map(Vec::into_iter).collect();
    (0..count)
        .map(|step| Step {
            epoch: Epoch(1),
            number: step as u64 + 1,
            slices: sequences.iter_mut().filter_map(Iterator::next).collect(),
            traces: Vec::new(),
        })
        .collect()
}
