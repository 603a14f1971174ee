//! Virtual shards: the model is cut once into S, and N ranks host S/N consecutive ones each.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::limits::{VIRTUAL_SHARDS_MAX, WORLD_SIZE_MAX};

/// S virtual shards over N ranks. S is part of the numerics: it is chosen when a group is made and kept for
/// the group's life; N may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shards {
    virtual_shards: u16,
    world_size: u16,
}

/// Why a cut is impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardsError {
    /// N = 0, or more ranks than a group may have.
    #[error("a group has between 1 and {WORLD_SIZE_MAX} ranks, not {0}")]
    WorldSize(usize),
    /// S is not a multiple of N, or too large.
    #[error(
        "{virtual_shards} virtual shards cannot be shared by {world_size} ranks: \
         S must be a multiple of N and at most {VIRTUAL_SHARDS_MAX}"
    )]
    Uneven {
        /// S.
        virtual_shards: usize,
        /// N.
        world_size: usize,
    },
    /// S is smaller than the model's number of KV heads.
    #[error("{virtual_shards} virtual shards are fewer than the model's {kv_heads} KV heads")]
    TooFew {
        /// S.
        virtual_shards: usize,
        /// KV heads of the model.
        kv_heads: usize,
    },
}

impl Shards {
    /// S virtual shards over N ranks; S must be a multiple of N.
    pub fn new(virtual_shards: usize, world_size: usize) -> Result<Self, ShardsError> {
        if !(1..=WORLD_SIZE_MAX).contains(&world_size) {
            return Err(ShardsError::WorldSize(world_size));
        }
        let even = virtual_shards > 0 && virtual_shards.is_multiple_of(world_size);
        if !even || virtual_shards > VIRTUAL_SHARDS_MAX {
            return Err(ShardsError::Uneven { virtual_shards, world_size });
        }
        Ok(Self { virtual_shards: virtual_shards as u16, world_size: world_size as u16 })
    }

    /// The cut for a model with `kv_heads` KV heads: S as asked, or else the smallest multiple of N that gives
    /// every KV head a shard of its own. Shards beyond the KV heads carry an all-zero head group.
    pub fn for_model(kv_heads: usize, world_size: usize, asked: Option<usize>) -> Result<Self, ShardsError> {
        if world_size == 0 {
            return Err(ShardsError::WorldSize(0));
        }
        let virtual_shards = asked.unwrap_or_else(|| kv_heads.max(1).next_multiple_of(world_size));
        if virtual_shards < kv_heads {
            return Err(ShardsError::TooFew { virtual_shards, kv_heads });
        }
        Self::new(virtual_shards, world_size)
    }

    /// S.
    pub fn virtual_shards(&self) -> usize {
        self.virtual_shards.into()
    }

    /// N.
    pub fn world_size(&self) -> usize {
        self.world_size.into()
    }

    /// The virtual shards that `rank` hosts.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn of_rank(&self, rank: usize) -> Range<usize> {
        assert!(rank < self.world_size(), "rank {rank} of {}", self.world_size);
        let per_rank = self.virtual_shards() / self.world_size();
        rank * per_rank..(rank + 1) * per_rank
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_cut_that_suits_the_ranks() {
        for (kv_heads, world_size, expected) in
            [(8, 1, 8), (8, 8, 8), (3, 1, 3), (3, 3, 3), (3, 2, 4), (3, 4, 4), (1, 2, 2), (5, 4, 8)]
        {
            let shards = Shards::for_model(kv_heads, world_size, None).unwrap();
            assert_eq!(shards.virtual_shards(), expected, "{kv_heads} KV heads over {world_size}");
        }
    }

    #[test]
    fn ranks_cover_all_shards_in_order() {
        let shards = Shards::new(12, 4).unwrap();
        let all: Vec<usize> = (0..4).flat_map(|rank| shards.of_rank(rank)).collect();
        assert_eq!(all, (0..12).collect::<Vec<_>>());
    }

    #[test]
    fn impossible_cuts_say_why() {
        assert_eq!(Shards::for_model(3, 0, None), Err(ShardsError::WorldSize(0)));
        assert_eq!(Shards::for_model(3, 99, None), Err(ShardsError::WorldSize(99)));
        assert_eq!(
            Shards::for_model(8, 1, Some(4)),
            Err(ShardsError::TooFew { virtual_shards: 4, kv_heads: 8 })
        );
        assert_eq!(
            Shards::for_model(3, 2, Some(3)),
            Err(ShardsError::Uneven { virtual_shards: 3, world_size: 2 })
        );
    }
}
