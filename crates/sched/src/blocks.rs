//! Which blocks of the ranks' KV memory are free, and which of those are worth keeping.

use std::collections::BTreeMap;

use galerne_types::BlockId;

use crate::chain::Key;

/// The KV blocks of a group. Every rank holds its share of every block, so one pool on the leader stands for all.
///
/// A full block may have a key: then it is found again, held by several sequences at once and written by none. When the last
/// of them has given it back it is free, but keeps its content until nothing else is left to take; the least recently used
/// goes first, and of those that one sequence gave back its last, which is of no use without those before it.
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Without a key. A stack: the block given back last is taken first, while it is still in the ranks' caches.
    blank: Vec<BlockId>,
    /// With a key, and held by nobody; by when they were given back.
    kept: BTreeMap<u64, BlockId>,
    found_by: BTreeMap<Key, BlockId>,
    /// Blocks that were given back so far.
    given_back: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: u32,
    key: Option<Key>,
    /// Its place in `kept`, if it is there.
    kept: u64,
}

impl BlockPool {
    pub(crate) fn new(blocks: u32) -> Self {
        Self {
            blocks: vec![Block::default(); blocks as usize],
            blank: (0..blocks).rev().collect(),
            kept: BTreeMap::new(),
            found_by: BTreeMap::new(),
            given_back: 0,
        }
    }

    pub(crate) fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks that nobody holds.
    pub(crate) fn free(&self) -> u32 {
        (self.blank.len() + self.kept.len()) as u32
    }

    /// Sequences that hold a block.
    pub(crate) fn holders(&self, block: BlockId) -> u32 {
        self.blocks[block as usize].holders
    }

    /// `count` blocks to write, or `None` and nothing taken when there are fewer.
    pub(crate) fn take(&mut self, count: u32) -> Option<Vec<BlockId>> {
        if self.free() < count {
            return None;
        }
        let blocks = (0..count).map(|_| {
            let block = self.blank.pop().or_else(|| self.forget_oldest()).expect("so many are free");
            self.blocks[block as usize].holders = 1;
            block
        });
        Some(blocks.collect())
    }

    fn forget_oldest(&mut self) -> Option<BlockId> {
        let (_, block) = self.kept.pop_first()?;
        let key = self.blocks[block as usize].key.take().expect("what is kept has a key");
        self.found_by.remove(&key);
        Some(block)
    }

    /// The block with that key.
    pub(crate) fn find(&self, key: &Key) -> Option<BlockId> {
        self.found_by.get(key).copied()
    }

    /// One sequence more holds a block that was found.
    pub(crate) fn hold(&mut self, block: BlockId) {
        let Block { holders, key: _, kept } = &mut self.blocks[block as usize];
        *holders += 1;
        if *holders == 1 {
            self.kept.remove(kept);
        }
    }

    /// A held block is full: from now on it can be found by `key`, unless another one is, which came first.
    pub(crate) fn name(&mut self, block: BlockId, key: Key) {
        let named = &mut self.blocks[block as usize].key;
        if named.is_none() && !self.found_by.contains_key(&key) {
            *named = Some(key);
            self.found_by.insert(key, block);
        }
    }

    /// # Panics
    /// If nobody holds a block: two sequences would share it by accident.
    pub(crate) fn give_back(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let Block { holders, key, kept } = &mut self.blocks[block as usize];
            *holders =
                holders.checked_sub(1).unwrap_or_else(|| panic!("KV block {block} was given back twice"));
            match (*holders, key) {
                (0, None) => self.blank.push(block),
                (0, Some(_)) => {
                    self.given_back += 1;
                    *kept = self.given_back;
                    self.kept.insert(self.given_back, block);
                }
                _ => {}
            }
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

    #[test]
    fn what_has_a_key_is_kept_until_nothing_else_is_left() {
        let (mut pool, keys) = (BlockPool::new(5), [[1; 32], [2; 32], [3; 32]]);
        let blocks = pool.take(3).unwrap();
        for (&block, key) in blocks.iter().zip(keys) {
            pool.name(block, key);
        }
        pool.hold(blocks[0]);
        pool.give_back(&blocks);
        assert_eq!((pool.free(), pool.holders(blocks[0])), (4, 1));
        assert_eq!(pool.take(3).unwrap(), [3, 4, 2], "of what is kept the last of its sequence");
        assert_eq!(keys.map(|key| pool.find(&key)), [Some(0), Some(1), None]);
        pool.hold(1);
        assert_eq!((pool.free(), pool.take(1)), (0, None));
        pool.give_back(&[0, 1]);
        pool.hold(0);
        pool.give_back(&[0]);
        assert_eq!(pool.take(1).unwrap(), [1], "the least recently used");
    }

    #[test]
    fn of_two_blocks_with_one_content_the_first_is_found() {
        let mut pool = BlockPool::new(2);
        let blocks = pool.take(2).unwrap();
        blocks.iter().for_each(|&block| pool.name(block, [1; 32]));
        assert_eq!(pool.find(&[1; 32]), Some(0));
        pool.give_back(&blocks);
        assert_eq!(pool.take(1).unwrap(), [1], "the other one is blank");
    }
}
