//! Steps for sequences whose tokens are known, or drawn greedily.

use galerne_types::{BlockId, Draw, Epoch, History, Input, Sampling, Slice, Step, TokenId};

use crate::ranks::blocks;

/// Where the sequences of a script keep their keys and values: so many blocks a slot, scattered over the memory.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) slots: usize,
    pub(crate) blocks_per_slot: usize,
}

/// No number of blocks here is a multiple of it.
const SCATTER: usize = 1_000_003;

impl Memory {
    pub(crate) fn blocks(&self) -> usize {
        self.slots * self.blocks_per_slot
    }

    /// A slice of `slot` that ends before position `end`.
    pub(crate) fn slice(
        &self,
        slot: usize,
        start: usize,
        end: usize,
        input: Input,
        draw: Option<Draw>,
    ) -> Slice {
        let block = |index| ((slot * self.blocks_per_slot + index) * SCATTER % self.blocks()) as BlockId;
        let blocks = (0..blocks(end)).map(block).collect();
        Slice { slot: slot as u32, start: start as u32, input, first_block: 0, blocks, draw, score: None }
    }

    pub(crate) fn known(&self, slot: usize, start: usize, tokens: &[TokenId], draw: Option<Draw>) -> Slice {
        self.slice(slot, start, start + tokens.len(), Input::Tokens(tokens.to_vec()), draw)
    }

    /// One token behind the last that was drawn.
    pub(crate) fn next(&self, slot: usize, position: usize, index: usize) -> Slice {
        self.slice(slot, position, position + 1, Input::Last, greedy(index))
    }

    /// A prompt in chunks, then greedy tokens: `drawn` in all.
    pub(crate) fn sequence(&self, slot: usize, prompt: &[TokenId], chunk: usize, drawn: usize) -> Vec<Slice> {
        let starts = (0..prompt.len()).step_by(chunk);
        let chunks = starts.map(|start| {
            let end = prompt.len().min(start + chunk);
            self.known(slot, start, &prompt[start..end], greedy(0).filter(|_| end == prompt.len()))
        });
        chunks.chain((1..drawn).map(|index| self.next(slot, prompt.len() + index - 1, index))).collect()
    }

    /// A prompt, and an answer that is known, run ahead by drafts whose middle token is wrong every second time.
    pub(crate) fn drafted(
        &self,
        slot: usize,
        prompt: &[TokenId],
        answer: &[TokenId],
        ahead: usize,
    ) -> Vec<Slice> {
        let mut slices = self.sequence(slot, prompt, prompt.len(), 1);
        let mut index = 1;
        while index < answer.len() {
            let tokens = ahead.min(answer.len() - index - 1);
            let mut draft = answer[index..index + tokens].to_vec();
            let wrong = if slices.len().is_multiple_of(2) { tokens / 2 } else { tokens };
            draft.iter_mut().skip(wrong).take(1).for_each(|token| *token ^= 1);
            let start = prompt.len() + index - 1;
            let draw = greedy(index).map(|draw| Draw { draft, ..draw });
            slices.push(self.slice(slot, start, start + 1 + tokens, Input::Last, draw));
            index += 1 + wrong;
        }
        slices
    }
}

pub(crate) fn greedy(index: usize) -> Option<Draw> {
    Some(Draw::new(Sampling::greedy(), index as u32))
}

/// The same steps with draws by chance, after penalties and within all limits.
pub(crate) fn warm(steps: &[Step]) -> Vec<Step> {
    let mut steps = steps.to_vec();
    let slices = steps.iter_mut().flat_map(|step| &mut step.slices);
    for draw in slices.filter_map(|slice| slice.draw.as_mut()) {
        draw.history = (draw.index == 0).then(History::default);
        draw.sampling = Sampling {
            temperature: 0.9,
            top_k: 200,
            top_p: 0.95,
            min_p: 0.001,
            repetition_penalty: 1.2,
            presence_penalty: 0.1,
            logit_bias: vec![(1, -1.0)],
            seed: 7,
            ..Sampling::greedy()
        };
    }
    steps
}

pub(crate) fn step(slices: Vec<Slice>) -> Step {
    Step { epoch: Epoch(1), number: 1, slices, traces: Vec::new() }
}

/// Runs sequences beside each other: step i holds the i-th slice of each.
pub(crate) fn steps(sequences: Vec<Vec<Slice>>) -> Vec<Step> {
    let count = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let mut sequences: Vec<_> = sequences.into_iter().map(Vec::into_iter).collect();
    let slices = |_| sequences.iter_mut().filter_map(Iterator::next).collect();
    (1..).zip((0..count).map(slices)).map(|(number, slices)| Step { number, ..step(slices) }).collect()
}

/// Tokens that repeat nothing for long.
pub(crate) fn prompt(tokens: usize, seed: usize, vocab: usize) -> Vec<TokenId> {
    (0..tokens).map(|at| ((at * 7919 + seed * 104_729 + 13) % vocab) as TokenId).collect()
}
