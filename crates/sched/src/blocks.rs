//! Which blocks of the ranks' KV memory are free.

use galerne_types::BlockId;

/// The KV blocks of a group. Every rank holds its share of every block, so one pool on the leader stands for all.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// A stack: the block given back last is taken first, while it is still in the ranks' caches.
    free: Vec<BlockId>,
    taken: Vec<bool>,
}

impl BlockPool {
    pub(crate) fn new(blocks: u32) -> Self {
        Self { free: (0..blocks).rev().collect(), taken: vec![false; blocks as usize] }
    }

    pub(crate) fn total(&self) -> u32 {
        self.taken.len() as u32
    }

    pub(crate) fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// `count` blocks, or `None` and nothing taken when there are fewer.
    pub(crate) fn take(&mut self, count: u32) -> Option<Vec<BlockId>> {
        let kept = self.free.len().checked_sub(count as usize)?;
        let mut blocks = self.free.split_off(kept);
        blocks.reverse();
        for &block in &blocks {
            self.taken[block as usize] = true;
        }
        Some(blocks)
    }

    /// # Panics
    /// If a block is free already: two sequences would share it by accident.
    pub(crate) fn give_back(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let taken = std::mem::replace(&mut self.taken[block as usize], false);
            assert!(taken, "KV block {block} was given back twice");
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_all_or_nothing_and_reuses_the_last_given_back() {
        let mut pool = BlockPool::new(5);
        let first = pool.take(3).unwrap();
        assert_eq!(first, [0, 1, 2]);
        assert_eq!(pool.take(3), None);
        assert_eq!((pool.free(), pool.total()), (2, 5));
        pool.give_back(&first);
        assert_eq!(pool.take(5).unwrap(), [0, 1, 2, 3, 4]);
    }

    #[test]
    #[should_panic(expected = "KV block 1 was given back twice")]
    fn a_block_given_back_twice_is_caught() {
        let mut pool = BlockPool::new(2);
        let blocks = pool.take(2).unwrap();
        pool.give_back(&blocks);
        pool.give_back(&blocks);
    }
}
