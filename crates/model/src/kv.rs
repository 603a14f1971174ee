//! The KV memory of a rank: blocks of 32 positions for each of its layers and KV heads.

mod formats;

use galerne_checkpoint::Config;
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, KvDtype, Shards};

pub(crate) use self::formats::{Bf16, F32, Format, Int8};
use crate::cut::Cut;
use crate::error::ModelError;
use crate::memory::{Buffer, SharedMut};

/// Value rows are padded to this, so that attention needs no narrower vectors.
const VALUE_LANES: usize = 32;

/// Bytes that one KV block takes at `rank`: keys and values of
/// [`KV_BLOCK_TOKENS`] positions for all layers and the rank's KV heads.
///
/// # Errors
/// As [`Cut::of`]; [`ModelError::KvDtype`] for what GPUs alone have.
///
/// # Panics
/// If `rank` is not below N.
pub fn kv_bytes_per_block(
    config: &Config,
    shards: Shards,
    rank: usize,
    dtype: KvDtype,
) -> Result<usize, ModelError> {
    let kv_heads = Cut::new(config, shards)?.kv_heads(shards.of_rank(rank)).len();
    Ok(config.layers * kv_heads * Tile::new(config.head_dim, Kept::of(dtype)?).bytes())
}

/// How a CPU keeps keys and values.
#[derive(Clone, Copy)]
pub(crate) enum Kept {
    F32,
    Bf16,
    Int8,
}

impl Kept {
    /// # Errors
    /// [`ModelError::KvDtype`] for what GPUs alone have.
    pub(crate) fn of(dtype: KvDtype) -> Result<Self, ModelError> {
        match dtype {
            KvDtype::F32 => Ok(Self::F32),
            KvDtype::Bf16 => Ok(Self::Bf16),
            KvDtype::Int8 => Ok(Self::Int8),
            KvDtype::Fp8 => Err(ModelError::KvDtype { device: "CPU", ways: "f32, bf16 or int8", dtype }),
        }
    }
}

/// What one block holds for one layer and KV head: keys `[head_dim][32 positions]`, so that positions lie across
/// lanes, then values `[32 positions][head_dim, padded]`, so that dimensions do; and in a format with scales those of
/// the 32 keys and those of the 32 values, in f32.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) head_dim: usize,
    pub(crate) padded_dim: usize,
    pub(crate) kept: Kept,
}

/// Where a tile's parts are.
#[derive(Clone, Copy)]
pub(crate) struct Parts<N> {
    pub(crate) keys: *mut N,
    pub(crate) values: *mut N,
    /// Of keys; those of values follow. Nothing stands there without scales.
    pub(crate) scales: *mut f32,
}

impl Tile {
    pub(crate) fn new(head_dim: usize, kept: Kept) -> Self {
        Self { head_dim, padded_dim: head_dim.next_multiple_of(VALUE_LANES), kept }
    }

    /// The parts of the tile that begins at `start`.
    #[inline(always)]
    pub(crate) fn parts<F: Format>(self, start: *mut u8) -> Parts<F::Number> {
        let keys: *mut F::Number = start.cast();
        let values = keys.wrapping_add(self.head_dim * KV_BLOCK_TOKENS);
        Parts { keys, values, scales: values.wrapping_add(self.padded_dim * KV_BLOCK_TOKENS).cast() }
    }

    fn bytes(self) -> usize {
        match self.kept {
            Kept::F32 => self.bytes_in::<F32>(),
            Kept::Bf16 => self.bytes_in::<Bf16>(),
            Kept::Int8 => self.bytes_in::<Int8>(),
        }
    }

    fn bytes_in<F: Format>(self) -> usize {
        let scales = if F::SCALED { 2 * KV_BLOCK_TOKENS * size_of::<f32>() } else { 0 };
        (self.head_dim + self.padded_dim) * KV_BLOCK_TOKENS * size_of::<F::Number>() + scales
    }
}

/// `[block][layer][KV head]` tiles: a block's memory lies together, so that huge pages are taken only as blocks are
/// first written.
pub(crate) struct KvMemory {
    tile: Tile,
    layers: usize,
    heads: usize,
    data: Buffer<u8>,
}

impl KvMemory {
    pub(crate) fn new(layers: usize, heads: usize, blocks: usize, tile: Tile) -> Self {
        Self { tile, layers, heads, data: Buffer::zeroed(layers * heads * blocks * tile.bytes()) }
    }

    /// All blocks of one layer.
    pub(crate) fn layer(&mut self, layer: usize) -> KvLayer<'_> {
        let stride = self.layers * self.heads * self.tile.bytes();
        let first = layer * self.heads * self.tile.bytes();
        KvLayer { tile: self.tile, stride, first, tiles: SharedMut::new(&mut self.data) }
    }
}

/// The blocks of one layer.
#[derive(Clone, Copy)]
pub(crate) struct KvLayer<'a> {
    pub(crate) tile: Tile,
    /// Bytes from one block to the next.
    pub(crate) stride: usize,
    /// Where the layer begins in a block.
    first: usize,
    tiles: SharedMut<'a, u8>,
}

impl KvLayer<'_> {
    /// One KV head's tile in block 0; that of the next block follows after `stride` bytes.
    pub(crate) fn head(&self, head: usize) -> *const u8 {
        self.tiles.as_ptr().wrapping_add(self.first + head * self.tile.bytes())
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
        let (block, column) = (blocks[position / KV_BLOCK_TOKENS], position % KV_BLOCK_TOKENS);
        let start = block as usize * self.stride + self.first + head * self.tile.bytes();
        assert!(start + self.tile.bytes() <= self.tiles.len(), "block {block} is beyond the memory");
        let start = self.tiles.as_ptr().wrapping_add(start);
        let (key, value) = (&key[..self.tile.head_dim], &value[..self.tile.head_dim]);
        // SAFETY: the tile was just found to be there, the position is the caller's.
        unsafe {
            match self.tile.kept {
                Kept::F32 => self.tile.store::<F32>(start, column, key, value),
                Kept::Bf16 => self.tile.store::<Bf16>(start, column, key, value),
                Kept::Int8 => self.tile.store::<Int8>(start, column, key, value),
            }
        }
    }
}

impl Tile {
    /// # Safety
    /// A tile begins at `start`, and its position `column` is the caller's alone.
    unsafe fn store<F: Format>(self, start: *mut u8, column: usize, key: &[f32], value: &[f32]) {
        let Parts { keys, values, scales } = self.parts::<F>(start);
        let of = [F::scale(key), F::scale(value)];
        // SAFETY: within the tile; the numbers and scales of this position.
        unsafe {
            for (dim, x) in key.iter().enumerate() {
                *keys.add(dim * KV_BLOCK_TOKENS + column) = F::narrow(*x, of[0]);
            }
            for (dim, x) in value.iter().enumerate() {
                *values.add(column * self.padded_dim + dim) = F::narrow(*x, of[1]);
            }
            if F::SCALED {
                *scales.add(column) = of[0];
                *scales.add(KV_BLOCK_TOKENS + column) = of[1];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// What is read back of a key.
    fn kept<F: Format>(dtype: KvDtype, key: &[f32], widen: impl Fn(F::Number) -> f32) -> (Vec<f32>, f32) {
        let mut memory = KvMemory::new(1, 1, 1, Tile::new(key.len(), Kept::of(dtype).unwrap()));
        let layer = memory.layer(0);
        let column = 5;
        // SAFETY: nobody else knows of the memory, and the tile is whole.
        unsafe {
            layer.store(0, &[0], column, key, key);
            let Parts { keys, values, scales } = layer.tile.parts::<F>(layer.head(0).cast_mut());
            let at = |dim: usize| *keys.add(dim * KV_BLOCK_TOKENS + column);
            let key: Vec<f32> = (0..key.len()).map(|dim| widen(at(dim))).collect();
            let value = |dim: usize| *values.add(column * layer.tile.padded_dim + dim);
            let same =
                (0..key.len()).map(|dim| widen(value(dim)).to_bits()).eq(key.iter().map(|x| x.to_bits()));
            assert!(same, "{dtype}: a value is kept as a key is");
            (key, if F::SCALED { *scales.add(column) } else { 1.0 })
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_and_of_two_to_the_even_one() {
        let key = [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0 / 3.0, f32::NAN, f32::NEG_INFINITY];
        let widen = |bits| bf16::from_bits(bits).to_f32();
        let (found, _) = kept::<Bf16>(KvDtype::Bf16, &key, widen);
        assert_eq!(found[..4], [1.0, 1.0, 1.0 + 4.0 / 256.0, -0.333_984_38]);
        assert!(found[4].is_nan() && found[5] == f32::NEG_INFINITY);
        let key = [0.5, 1.5, -2.5, 3.4, -127.0, 126.6];
        assert_eq!(
            kept::<Int8>(KvDtype::Int8, &key, f32::from),
            (vec![0.0, 2.0, -2.0, 3.0, -127.0, 127.0], 1.0)
        );
        assert_eq!(kept::<F32>(KvDtype::F32, &key, |x| x).0, key);
    }

    #[test]
    fn zeros_have_no_scale_and_what_is_not_finite_shows() {
        assert_eq!(kept::<Int8>(KvDtype::Int8, &[0.0, -0.0], f32::from), (vec![0.0; 2], 0.0));
        let (_, scale) = kept::<Int8>(KvDtype::Int8, &[1e-45, -1e-40], f32::from);
        assert!(scale < 1e-40);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (bytes, scale) = kept::<Int8>(KvDtype::Int8, &[1.0, odd, 1e30, -2.0], f32::from);
            assert!(bytes.into_iter().all(|byte| !(byte * scale).is_finite()), "{odd}: times {scale}");
        }
    }

    #[test]
    fn rounded_numbers_take_half_and_little_more_than_a_quarter() {
        let bytes = [Kept::F32, Kept::Bf16, Kept::Int8].map(|kept| Tile::new(128, kept).bytes());
        assert_eq!(bytes, [32 << 10, 16 << 10, (8 << 10) + 256]);
    }
}
