//! The KV memory of a rank: blocks of 32 positions for each of its layers and KV heads, in f32.

use galerne_checkpoint::Config;
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Shards};

use crate::cut::Cut;
use crate::error::ModelError;
use crate::memory::{Buffer, SharedMut};

/// Value rows are padded to this, so that attention needs no narrower vectors.
const VALUE_LANES: usize = 32;

/// Bytes that one KV block takes at `rank`: keys and values of
/// [`KV_BLOCK_TOKENS`] positions for all layers and the rank's KV heads.
///
/// # Errors
/// As [`Cut::of`].
///
/// # Panics
/// If `rank` is not below N.
pub fn kv_bytes_per_block(config: &Config, shards: Shards, rank: usize) -> Result<usize, ModelError> {
    let kv_heads = Cut::new(config, shards)?.kv_heads(shards.of_rank(rank)).len();
    Ok(config.layers * kv_heads * Tile::of(config.head_dim).floats() * size_of::<f32>())
}

/// What one block holds for one layer and KV head: keys `[head_dim][32 positions]`, so that positions lie across
/// lanes, then values `[32 positions][head_dim, padded]`, so that dimensions do.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) head_dim: usize,
    pub(crate) padded_dim: usize,
}

impl Tile {
    pub(crate) fn of(head_dim: usize) -> Self {
        Self { head_dim, padded_dim: head_dim.next_multiple_of(VALUE_LANES) }
    }

    /// Numbers before the values.
    pub(crate) fn keys(self) -> usize {
        self.head_dim * KV_BLOCK_TOKENS
    }

    pub(crate) fn floats(self) -> usize {
        self.keys() + self.padded_dim * KV_BLOCK_TOKENS
    }
}

/// `[block][layer][KV head]` tiles: a block's memory lies together, so that huge pages are taken only as blocks are
/// first written.
pub(crate) struct KvMemory {
    tile: Tile,
    layers: usize,
    heads: usize,
    data: Buffer<f32>,
}

impl KvMemory {
    pub(crate) fn new(layers: usize, heads: usize, blocks: usize, head_dim: usize) -> Self {
        let tile = Tile::of(head_dim);
        Self { tile, layers, heads, data: Buffer::zeroed(layers * heads * blocks * tile.floats()) }
    }

    /// All blocks of one layer.
    pub(crate) fn layer(&mut self, layer: usize) -> KvLayer<'_> {
        let stride = self.layers * self.heads * self.tile.floats();
        let first = layer * self.heads * self.tile.floats();
        KvLayer { tile: self.tile, stride, first, tiles: SharedMut::new(&mut self.data) }
    }
}

/// The blocks of one layer.
#[derive(Clone, Copy)]
pub(crate) struct KvLayer<'a> {
    pub(crate) tile: Tile,
    /// Numbers from one block to the next.
    pub(crate) stride: usize,
    /// Where the layer begins in a block.
    first: usize,
    tiles: SharedMut<'a, f32>,
}

impl KvLayer<'_> {
    /// One KV head's tile in block 0; that of the next block follows after `stride` numbers.
    pub(crate) fn head(&self, head: usize) -> *const f32 {
        self.tiles.as_ptr().wrapping_add(self.first + head * self.tile.floats())
    }

    /// Stores the key and value of one position of a sequence with these blocks, `head_dim` elements each.
    ///
    /// # Safety
    /// Nobody else reads or writes this position of the block.
    pub(crate) unsafe fn store(
        &self,
        head: usize,
        blocks: &[BlockId],
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let Tile { head_dim, padded_dim } = self.tile;
        let (block, column) = (blocks[position / KV_BLOCK_TOKENS], position % KV_BLOCK_TOKENS);
        let start = block as usize * self.stride + self.first + head * self.tile.floats();
        let keys = start + column;
        for (dim, key) in key[..head_dim].iter().enumerate() {
            let at = keys + dim * KV_BLOCK_TOKENS;
            // SAFETY: exclusive by the caller's promise, position by position.
            unsafe { self.tiles.slice(at..at + 1)[0] = *key };
        }
        let values = start + self.tile.keys() + column * padded_dim;
        // SAFETY: as above.
        unsafe { self.tiles.slice(values..values + head_dim) }.copy_from_slice(&value[..head_dim]);
    }
}
