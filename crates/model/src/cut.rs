use std::ops::Range;

use galerne_checkpoint::{Checkpoint, Config, Weight};
use galerne_types::Shards;

use crate::attention::HEAD_DIM_MAX;
use crate::error::ModelError;

/// Rows are handed out in units of this, a panel of outputs; MLP columns in units of at least this.
const UNIT: usize = 32;

/// How a model falls on S virtual shards.
///
/// Shard s owns KV head s and the query heads that read it; shards beyond the KV heads own none and add zeros.
/// MLP columns and vocabulary rows (of embedding and head alike) are dealt in units of 32, MLP columns in whole blocks of
/// the down projection's format, as evenly as possible; the last unit may be ragged and a shard may get none. All ranges
/// are in elements of the whole model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    shards: usize,
    kv_heads: usize,
    group: usize,
    intermediate: usize,
    mlp_unit: usize,
    vocab: usize,
}

impl Cut {
    /// Cuts a model for `shards`.
    ///
    /// # Errors
    /// [`ModelError::TooFewShards`] if a shard would need two KV heads; [`ModelError::HeadDim`] for heads wider than
    /// the kernels take.
    pub fn of(checkpoint: &Checkpoint, shards: Shards) -> Result<Self, ModelError> {
        let downs = (0..checkpoint.config().layers).map(|layer| checkpoint.tensor(Weight::Down(layer)));
        let mlp_unit = downs.map(|down| down.dtype.block_elems()).fold(UNIT, usize::max);
        Ok(Self { mlp_unit, ..Self::new(checkpoint.config(), shards)? })
    }

    /// The same for a model whose blocks are no longer than 32.
    pub(crate) fn new(config: &Config, shards: Shards) -> Result<Self, ModelError> {
        let &Config { heads, kv_heads, head_dim, intermediate, vocab, .. } = config;
        let shards = shards.virtual_shards();
        if shards < kv_heads {
            return Err(ModelError::TooFewShards { virtual_shards: shards, kv_heads });
        }
        if head_dim > HEAD_DIM_MAX {
            return Err(ModelError::HeadDim { head_dim, max: HEAD_DIM_MAX });
        }
        Ok(Self { shards, kv_heads, group: heads / kv_heads, intermediate, mlp_unit: UNIT, vocab })
    }

    /// KV heads of consecutive shards.
    pub fn kv_heads(&self, shards: Range<usize>) -> Range<usize> {
        shards.start.min(self.kv_heads)..shards.end.min(self.kv_heads)
    }

    /// Query heads of consecutive shards.
    pub fn heads(&self, shards: Range<usize>) -> Range<usize> {
        let kv_heads = self.kv_heads(shards);
        kv_heads.start * self.group..kv_heads.end * self.group
    }

    /// MLP columns of consecutive shards: rows of gate and up, columns of down.
    pub fn mlp(&self, shards: Range<usize>) -> Range<usize> {
        self.deal(self.intermediate, self.mlp_unit, shards)
    }

    /// Vocabulary rows of consecutive shards.
    pub fn vocab(&self, shards: Range<usize>) -> Range<usize> {
        self.deal(self.vocab, UNIT, shards)
    }

    fn deal(&self, elements: usize, unit: usize, shards: Range<usize>) -> Range<usize> {
        let units = elements.div_ceil(unit);
        let bound = |shard: usize| (shard * units / self.shards * unit).min(elements);
        bound(shards.start)..bound(shards.end)
    }
}

/// Which part of which model a rank has.
pub(crate) struct Portion {
    pub(crate) config: Config,
    pub(crate) shards: Shards,
    pub(crate) rank: usize,
    pub(crate) cut: Cut,
}

impl Portion {
    /// # Errors
    /// As [`Cut::of`].
    pub(crate) fn new(checkpoint: &Checkpoint, shards: Shards, rank: usize) -> Result<Self, ModelError> {
        Ok(Self { config: checkpoint.config().clone(), shards, rank, cut: Cut::of(checkpoint, shards)? })
    }

    /// The virtual shards of this rank.
    pub(crate) fn own_shards(&self) -> Range<usize> {
        self.shards.of_rank(self.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, kv_heads: usize, intermediate: usize, vocab: usize) -> Config {
        Config {
            layers: 1,
            hidden: 64,
            heads,
            kv_heads,
            head_dim: 8,
            intermediate,
            vocab,
            rope_theta: 1e4,
            norm_eps: 1e-5,
            window: None,
            context_tokens_max: 64,
            tied: false,
            bos: None,
            eos: vec![],
        }
    }

    #[test]
    fn shards_cover_everything_once_and_in_order_however_odd_the_widths() {
        for (intermediate, vocab, s) in
            [(100, 301, 4), (1536, 49152, 3), (1536, 49152, 4), (31, 1, 8), (33, 65, 5)]
        {
            let shards = Shards::new(s, 1).unwrap();
            let cut = Cut::new(&config(6, 3, intermediate, vocab), shards)
                .unwrap_or_else(|_| Cut::new(&config(2, 1, intermediate, vocab), shards).unwrap());
            type Deal<'a> = &'a dyn Fn(Range<usize>) -> Range<usize>;
            let deals: [(Deal<'_>, usize); 2] = [(&|r| cut.mlp(r), intermediate), (&|r| cut.vocab(r), vocab)];
            for (deal, all) in deals {
                let parts: Vec<_> = (0..s).map(|shard| deal(shard..shard + 1)).collect();
                assert_eq!((parts[0].start, parts[s - 1].end), (0, all));
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(parts.iter().all(|part| part.start.is_multiple_of(UNIT) || part.start == all));
                let units = parts.iter().map(|part| part.len().div_ceil(UNIT));
                assert!(units.clone().max().unwrap() - units.min().unwrap() <= 1, "{parts:?}");
            }
        }
    }

    #[test]
    fn a_shard_beyond_the_kv_heads_has_no_heads() {
        let cut = Cut::new(&config(9, 3, 96, 96), Shards::new(4, 4).unwrap()).unwrap();
        assert_eq!((cut.kv_heads(3..4), cut.heads(3..4)), (3..3, 9..9));
        assert_eq!(cut.heads(1..3), 3..9);
    }

    #[test]
    fn a_kv_head_is_never_cut() {
        let few = Cut::new(&config(8, 4, 96, 96), Shards::new(2, 1).unwrap());
        assert!(matches!(few, Err(ModelError::TooFewShards { virtual_shards: 2, kv_heads: 4 })));
    }
}
