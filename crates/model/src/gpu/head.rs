//! The head on a GPU: from rows of a tile to logits, and to tokens at all ranks.

use std::ops::Range;

use galerne_collective::Collective;
use galerne_types::Slice;

use super::device::{Address, Buffer, DeviceError};
use super::forward::Core;
use super::inputs::bytes_of;
use super::kernels::{
    Activations, Join, PLAIN, Pick, Plain, Product, RANKS_MAX, TILE_TOKENS, each_row, multiply, order,
};
use super::layout::Packing;
use super::link::Link;
use super::peers::Turn;
use super::sampler::{Ask, Asked};
use super::workspace::Workspace;
use crate::error::ModelError;
use crate::head::{ROUND_MAX, Want, Wanted};
use crate::sampler::Past;

/// What a round asks a device for.
pub(super) fn asks<'a>(
    slices: &'a [Slice],
    round: &[Wanted],
    pasts: &'a [Option<Past>],
) -> Vec<Option<Ask<'a>>> {
    let ask = |&Wanted { slice, want, .. }: &Wanted| {
        let Slice { slot, draw, score, .. } = &slices[slice];
        match want {
            Want::Draw(ahead) => {
                draw.as_ref().map(|draw| Ask::Draw(draw, ahead, pasts[*slot as usize].as_ref()))
            }
            Want::Score(target) => score.as_ref().map(|score| Ask::Score(target, score.top)),
        }
    };
    round.iter().map(ask).collect()
}

impl Core {
    /// Whether rank 0's device draws for all.
    pub(super) fn draws(&self) -> bool {
        self.ranks.world_size() <= RANKS_MAX
    }

    /// Numbers from a row of logits to the next.
    pub(super) fn width(&self) -> usize {
        let shape = &self.weights.shape;
        if self.ranks.alone() { shape.vocab } else { shape.widest_vocab }
    }

    /// Where logits of the whole vocabulary are.
    pub(super) fn whole(&self) -> &Buffer {
        if self.ranks.alone() { &self.work.logits } else { &self.work.joined }
    }

    /// Brings the logits of so many positions to rank 0, side by side.
    pub(super) fn join(
        &self,
        link: &mut Link,
        positions: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let (portion, width, ranks) = (&self.weights.portion, self.width(), self.ranks.world_size());
        let mut starts = [0; RANKS_MAX + 1];
        for (rank, start) in starts.iter_mut().skip(1).enumerate().take(ranks) {
            *start = portion.cut.vocab(portion.shards.of_rank(rank)).end as u32;
        }
        let each = link.rows_max(width).min(positions);
        for (number, first) in (0..positions).step_by(each).enumerate() {
            let rows = each.min(positions - first);
            let turn = Turn::rows(number, positions.div_ceil(each));
            let part = (&self.work.logits, first * width..(first + rows) * width);
            let parts = self.bring(link, part, turn, collective)?;
            if self.ranks.rank() > 0 {
                continue;
            }
            let vocab = starts[ranks] as usize;
            let out = self.work.joined.address() + (first * vocab * size_of::<f32>()) as Address;
            let (rows, width) = (rows as u32, width as u32);
            let join = Join { parts, out, starts, rows, width, ranks: ranks as u32 };
            // SAFETY: so many rows of each part, and room for a round's.
            unsafe { each_row(self.device(), c"join", rows, &join)? };
        }
        Ok(())
    }

    /// As [`Link::bring`].
    pub(super) fn bring(
        &self,
        link: &mut Link,
        part: (&Buffer, Range<usize>),
        turn: Turn,
        collective: &mut dyn Collective,
    ) -> Result<Address, ModelError> {
        link.bring(self.width(), part, turn, &self.work.gathered, (self.device(), collective))
    }

    /// Tells the device of a round's rows, and of the slots that they are drawn for.
    pub(super) fn want(&mut self, round: &[Wanted], slots: &[u32]) -> Result<(), DeviceError> {
        let mut words = [0; 2 * ROUND_MAX];
        words.iter_mut().zip(round).for_each(|(word, wanted)| *word = wanted.row as u32);
        words[ROUND_MAX..][..slots.len()].copy_from_slice(slots);
        self.work.post.put(&self.work.wanted, bytes_of(&words))
    }

    /// Logits of so many rows of a round, `[position][width]`.
    pub(super) fn logits(&self, rows: usize, width: usize) -> Result<(), DeviceError> {
        let shape = &self.weights.shape;
        let to = Activations {
            numbers: self.work.picked.address(),
            token_tiles: ROUND_MAX.div_ceil(TILE_TOKENS) as u32,
            ..self.normed(order(self.device(), rows))
        };
        let pick = Pick { from: self.normed(self.order()), to, wanted: self.work.wanted.address() };
        let tokens = rows as u32;
        let product = Product { tokens, ..self.product(self.weights.head, to, shape.vocab_tiles()) };
        let head = Plain { product, out: self.work.logits.address(), width: width as u32 };
        // SAFETY: rows of the tile, and room for a round.
        unsafe {
            each_row(self.device(), c"pick", tokens, &pick)?;
            multiply(self.device(), &PLAIN, (Packing::Bf16, &product), 1, &head)
        }
    }

    /// Tells the device what a round's rows are asked for.
    pub(super) fn ask(&mut self, round: &[Wanted], slots: &[u32], asked: &Asked) -> Result<(), DeviceError> {
        self.want(round, slots)?;
        if self.ranks.rank() == 0 { self.work.sampler.tell(asked) } else { Ok(()) }
    }

    /// Draws from so many rows that were [asked for](Self::ask), and brings the tokens to all ranks' devices.
    pub(super) fn draw(
        &self,
        rows: usize,
        link: &mut Link,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let Workspace { sampler, logits, joined, wanted, .. } = &self.work;
        self.logits(rows, self.width())?;
        if self.ranks.alone() {
            return Ok(sampler.draw(logits, rows)?);
        }
        self.join(link, rows, collective)?;
        if self.ranks.rank() == 0 {
            sampler.draw(joined, rows)?;
        }
        let ids = (sampler.ids(), 0..rows.next_multiple_of(4));
        let from = self.bring(link, ids, Turn::drawn(), collective)?;
        if self.ranks.rank() > 0 {
            let slots = wanted.address() + (ROUND_MAX * size_of::<u32>()) as Address;
            sampler.keep(from, slots, rows)?;
        }
        Ok(())
    }
}
