//! A model that a test can follow: its next token is a function of what it sees, of the seed and of the index. It sees
//! through its KV blocks, as a real one does: a block that was shared, given away or filled wrongly changes its tokens.

use std::collections::BTreeMap;

use galerne_model::Masks;
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Input, Sampled, Slice, Step, TokenId, TokenOut};

use super::machine::mix;
use crate::rank::error::EpochError;
use crate::rank::execute::Execute;

/// Its window, in tokens; the checkpoint that its groups are made for has it, too.
pub(super) const WINDOW_TOKENS: usize = 64;

/// Ids from here on are drawn, so many of them: none that means something.
const DRAWN: (u32, u32) = (16, 1000);

/// The token behind `seen`, of which the last [`WINDOW_TOKENS`] count.
pub(super) fn next(seen: &[TokenId], seed: u64, index: u32) -> TokenId {
    let from = seen.len().saturating_sub(WINDOW_TOKENS);
    let start = mix(seed ^ u64::from(index) << 32);
    let digest = seen[from..].iter().fold(start, |digest, token| mix(digest ^ u64::from(*token)));
    DRAWN.0 + (digest % u64::from(DRAWN.1)) as u32
}

/// One rank's part of it. All ranks compute all of it, so they agree.
pub(super) struct Toy {
    /// Tokens of every block.
    memory: BTreeMap<u32, [TokenId; KV_BLOCK_TOKENS]>,
    /// What was drawn last in each slot.
    last: BTreeMap<u32, TokenId>,
}

impl Toy {
    pub(super) fn new() -> Self {
        Self { memory: BTreeMap::new(), last: BTreeMap::new() }
    }

    fn write(&mut self, slice: &Slice) -> usize {
        let tokens = match &slice.input {
            Input::Tokens(tokens) => tokens.clone(),
            Input::Last => vec![self.last.get(&slice.slot).copied().unwrap_or(TokenId::MAX)],
        };
        let start = slice.start as usize;
        for (position, token) in (start..).zip(&tokens) {
            let block = slice.blocks[position / KV_BLOCK_TOKENS - slice.first_block as usize];
            let block = self.memory.entry(block).or_insert([TokenId::MAX; KV_BLOCK_TOKENS]);
            block[position % KV_BLOCK_TOKENS] = *token;
        }
        start + tokens.len()
    }

    /// What the position before `end` sees.
    fn seen(&self, slice: &Slice, end: usize) -> Vec<TokenId> {
        let read = |position: usize| {
            let block = slice.blocks[position / KV_BLOCK_TOKENS - slice.first_block as usize];
            self.memory.get(&block).map_or(TokenId::MAX, |block| block[position % KV_BLOCK_TOKENS])
        };
        (end.saturating_sub(WINDOW_TOKENS)..end).map(read).collect()
    }
}

impl Execute for Toy {
    fn run(&mut self, step: &Step, _: &mut Masks<'_>) -> Result<Sampled, EpochError> {
        let mut tokens = Vec::new();
        for slice in &step.slices {
            let end = self.write(slice);
            tokens.push(slice.draw.as_ref().map(|draw| {
                let token = next(&self.seen(slice, end), draw.sampling.seed, draw.index);
                self.last.insert(slice.slot, token);
                TokenOut::unreported(token)
            }));
        }
        Ok(Sampled { tokens, ..Sampled::default() })
    }

    fn meet(&mut self) -> Result<(), EpochError> {
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<(), EpochError> {
        Ok(())
    }
}
