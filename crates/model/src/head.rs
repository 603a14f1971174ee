//! From hidden states to drawn tokens, a round of a few sequences at a time.

use galerne_collective::Collective;
use galerne_types::{Slice, TokenOut};

use crate::error::ModelError;
use crate::memory::SharedMut;
use crate::products::{Engine, Rows};
use crate::rank::{Trace, Tracer};
use crate::sampler::{self, Mask, Past};
use crate::weights::Weights;

/// Sequences whose logits are computed, gathered and drawn from at once.
pub(crate) const DRAWS_PER_ROUND: usize = 32;

/// Buffers of a round.
pub(crate) struct Head {
    /// What the head sees, `[draw][hidden]`.
    hidden: Rows,
    /// This rank's part of the vocabulary, `[draw][its rows, padded]`.
    part: Rows,
    /// At rank 0: `[rank][draw][its rows, padded]`.
    gathered: Vec<f32>,
    /// At rank 0: `[draw][vocab]`.
    logits: Vec<f32>,
    /// Rows of each rank, and the same padded.
    widths: Vec<(usize, usize)>,
    counts: Vec<usize>,
}

/// What draws depend on besides the logits.
pub(crate) struct How<'a> {
    /// By slot, where penalties look back.
    pub(crate) pasts: &'a [Option<Past>],
    /// One for each row of the round, where a grammar constrains it.
    pub(crate) masks: &'a [Option<Mask>],
}

impl Head {
    pub(crate) fn new(weights: &Weights, sequences_max: usize) -> Self {
        let draws = sequences_max.min(DRAWS_PER_ROUND);
        let shards = weights.shards;
        let rows_of = |rank| weights.cut.vocab(shards.of_rank(rank)).len();
        let part = Rows::zeroed(draws, rows_of(weights.rank));
        let padded = |rows: usize| (rows, rows.next_multiple_of(crate::packed::PANEL));
        let widths: Vec<_> = (0..shards.world_size()).map(|rank| padded(rows_of(rank))).collect();
        let at_root = if weights.rank == 0 { draws } else { 0 };
        Self {
            hidden: Rows::zeroed(draws, weights.config.hidden),
            part,
            gathered: vec![0.0; at_root * widths.iter().map(|(_, padded)| padded).sum::<usize>()],
            logits: vec![0.0; at_root * weights.config.vocab],
            counts: Vec::with_capacity(widths.len()),
            widths,
        }
    }

    /// Computes the logits of the rows `round` (row of `normed`, slice) and gathers them at rank 0.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost.
    pub(crate) fn project(
        &mut self,
        weights: &Weights,
        engine: &mut Engine,
        normed: &Rows,
        round: &[(usize, usize)],
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let draws = round.len();
        let width = self.hidden.width;
        for (to, (row, _)) in self.hidden.data.chunks_exact_mut(width).zip(round) {
            to.copy_from_slice(&normed.data[row * width..][..width]);
        }
        let matrix = weights.head.as_ref().unwrap_or(&weights.embedding);
        engine.products(draws, &self.hidden, [(matrix, self.part.shared())]);
        self.counts.clear();
        self.counts.extend(self.widths.iter().map(|(_, padded)| draws * padded));
        let all = if collective.rank() == 0 { self.counts.iter().sum() } else { 0 };
        let mine = &self.part.data[..draws * self.part.width];
        collective.gather(0, mine, &self.counts, &mut self.gathered[..all])?;
        Ok(())
    }

    /// At rank 0: draws a token for each of the rows just gathered.
    pub(crate) fn draw(
        &mut self,
        weights: &Weights,
        engine: &mut Engine,
        slices: &[Slice],
        round: &[(usize, usize)],
        how: &How<'_>,
        trace: &mut Tracer<'_>,
    ) -> Vec<TokenOut> {
        let vocab = weights.config.vocab;
        let mut drawn = vec![None; round.len()];
        let (results, logits) = (SharedMut::new(&mut drawn), SharedMut::new(&mut self.logits));
        let (gathered, widths) = (&self.gathered[..], &self.widths[..]);
        engine.team.each(round.len(), 1, &|_, range| {
            for draw in range {
                // SAFETY: a draw's row and result belong to the one range that it is in.
                let (row, result) = unsafe {
                    (logits.slice(draw * vocab..(draw + 1) * vocab), results.slice(draw..draw + 1))
                };
                let (mut to, mut from) = (0, 0);
                for (rows, padded) in widths {
                    row[to..to + rows].copy_from_slice(&gathered[from + draw * padded..][..*rows]);
                    to += rows;
                    from += round.len() * padded;
                }
                let slice = &slices[round[draw].1];
                let past = how.pasts[slice.slot as usize].as_ref();
                let mask = how.masks[draw].as_deref();
                result[0] = slice.draw.as_ref().map(|draw| sampler::draw(row, draw, past, mask));
            }
        });
        if let Some(trace) = trace {
            for ((_, slice), row) in round.iter().zip(self.logits.chunks_exact(vocab)) {
                trace(Trace::Logits { slice: *slice, row });
            }
        }
        drawn.into_iter().flatten().collect()
    }
}
