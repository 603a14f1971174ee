//! From hidden states to tokens drawn and scored, a round of a few positions at a time.

use galerne_collective::Collective;
use galerne_types::{Compute, Slice, TokenId, TokenOut};

use crate::cut::Portion;
use crate::error::ModelError;
use crate::memory::SharedMut;
use crate::products::Engine;
use crate::rank::{Trace, Tracer};
use crate::rows::Rows;
use crate::sampler::{self, Mask, Past};
use crate::weights::Weights;

/// Positions whose logits are computed, gathered and read at once: it bounds the memory for them.
pub(crate) const ROUND_MAX: usize = 32;

/// A position of a tile whose logits are wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Its row in the tile.
    pub(crate) row: usize,
    /// Index of its slice in the step.
    pub(crate) slice: usize,
    /// What for.
    pub(crate) want: Want,
}

/// What is wanted of a position's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Draw from them the token that stands so many behind the slice's first draw.
    Draw(u32),
    /// Tell this token's log probability.
    Score(TokenId),
}

/// What is known of a round where its logits are.
pub(crate) enum Read {
    /// Nothing: parts of the vocabulary come together at rank 0's host.
    Nothing,
    /// Rank 0's GPU has it.
    Elsewhere,
    /// For each row what was found, but for those that are left to the host.
    Here(Vec<Option<TokenOut>>),
}

/// Buffers of a round.
pub(crate) struct Head {
    /// What the head sees, `[position][hidden]`.
    hidden: Rows,
    /// This rank's part of the vocabulary, `[position][its rows, padded]`.
    part: Rows,
    /// At rank 0: `[rank][position][its rows, padded]`.
    gathered: Vec<f32>,
    /// At rank 0: `[position][vocab]`.
    logits: Vec<f32>,
    /// Whether they are still to be put together from what was gathered.
    in_parts: bool,
    vocab: usize,
    /// Rows of each rank, and the same padded.
    widths: Vec<(usize, usize)>,
    counts: Vec<usize>,
    /// What was read of each position.
    read: Vec<Option<TokenOut>>,
}

/// What draws depend on besides the logits.
pub(crate) struct How<'a> {
    /// By slot, where penalties look back.
    pub(crate) pasts: &'a [Option<Past>],
    /// One for each row of the round, where a grammar constrains it; empty if none does.
    pub(crate) masks: &'a [Option<Mask>],
}

impl Head {
    /// Room for rounds of `positions`.
    pub(crate) fn new(portion: &Portion, positions: usize, compute: Compute) -> Self {
        let shards = portion.shards;
        let rows_of = |rank| portion.cut.vocab(shards.of_rank(rank)).len();
        let part = Rows::zeroed(positions, rows_of(portion.rank));
        let padded = |rows: usize| (rows, rows.next_multiple_of(crate::packed::PANEL));
        let widths: Vec<_> = (0..shards.world_size()).map(|rank| padded(rows_of(rank))).collect();
        let at_root = if portion.rank == 0 { positions } else { 0 };
        Self {
            hidden: Rows::for_products(positions, portion.config.hidden, compute),
            part,
            gathered: vec![0.0; at_root * widths.iter().map(|(_, padded)| padded).sum::<usize>()],
            logits: vec![0.0; at_root * portion.config.vocab],
            in_parts: true,
            vocab: portion.config.vocab,
            counts: Vec::with_capacity(widths.len()),
            widths,
            read: Vec::with_capacity(at_root),
        }
    }

    /// Computes this rank's part of the logits of the rows of `normed` that `round` names.
    pub(crate) fn project(
        &mut self,
        weights: &Weights,
        engine: &mut Engine,
        normed: &Rows,
        round: &[Wanted],
    ) {
        for (to, Wanted { row, .. }) in round.iter().enumerate() {
            self.hidden.copy_row(to, normed, *row);
        }
        let matrix = weights.head.as_ref().unwrap_or(&weights.embedding);
        engine.products(round.len(), &self.hidden, [(matrix, self.part.shared())]);
    }

    /// Where this rank's part of the logits goes, a row for each position of a round.
    pub(crate) fn part(&mut self) -> &mut Rows {
        &mut self.part
    }

    /// Gathers the parts of so many positions at rank 0.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost.
    pub(crate) fn gather(
        &mut self,
        positions: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        self.in_parts = true;
        self.counts.clear();
        self.counts.extend(self.widths.iter().map(|(_, padded)| positions * padded));
        let all = if collective.rank() == 0 { self.counts.iter().sum() } else { 0 };
        let mine = &self.part.data[..positions * self.part.width];
        collective.gather(0, mine, &self.counts, &mut self.gathered[..all])?;
        Ok(())
    }

    /// At rank 0, in place of `gather`: `fetch` fills each row of the whole vocabulary.
    ///
    /// # Errors
    /// As `fetch`.
    pub(crate) fn fill(
        &mut self,
        positions: usize,
        mut fetch: impl FnMut(usize, &mut [f32]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.in_parts = false;
        let rows = self.logits.chunks_exact_mut(self.vocab).take(positions);
        rows.enumerate().try_for_each(|(position, row)| fetch(position, row))
    }

    /// At rank 0: draws or scores a token for each of the rows just gathered, or filled.
    pub(crate) fn read(
        &mut self,
        engine: &mut Engine,
        slices: &[Slice],
        round: &[Wanted],
        how: &How<'_>,
        trace: &mut Tracer<'_>,
    ) -> impl Iterator<Item = TokenOut> {
        let vocab = self.vocab;
        self.read.resize(round.len(), None);
        let (results, logits) = (SharedMut::new(&mut self.read), SharedMut::new(&mut self.logits));
        let (gathered, widths, in_parts) = (&self.gathered[..], &self.widths[..], self.in_parts);
        engine.team.each(round.len(), 1, &|_, range| {
            for index in range {
                // SAFETY: a position's row and result belong to the one range that it is in.
                let (row, result) = unsafe {
                    (logits.slice(index * vocab..(index + 1) * vocab), results.slice(index..index + 1))
                };
                let (mut to, mut from) = (0, 0);
                for (rows, padded) in widths.iter().filter(|_| in_parts) {
                    row[to..to + rows].copy_from_slice(&gathered[from + index * padded..][..*rows]);
                    to += rows;
                    from += round.len() * padded;
                }
                let Wanted { slice, want, .. } = round[index];
                let slice = &slices[slice];
                result[0] = match want {
                    Want::Draw(0) => slice.draw.as_ref().map(|draw| {
                        let past = how.pasts[slice.slot as usize].as_ref();
                        sampler::draw(row, draw, past, how.masks.get(index).and_then(Option::as_deref))
                    }),
                    Want::Draw(by) => {
                        slice.draw.as_ref().map(|draw| sampler::draw(row, &draw.ahead(by), None, None))
                    }
                    Want::Score(target) => {
                        slice.score.as_ref().map(|score| sampler::score(row, target, score.top))
                    }
                };
            }
        });
        if let Some(trace) = trace {
            for (Wanted { slice, want, .. }, row) in round.iter().zip(self.logits.chunks_exact(vocab)) {
                if matches!(want, Want::Draw(_)) {
                    trace(Trace::Logits { slice: *slice, row });
                }
            }
        }
        self.read.drain(..).flatten()
    }
}
