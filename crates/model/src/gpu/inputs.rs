//! What a tile of tokens tells the kernels: one row of words, sent at once.

use galerne_types::Slice;
use galerne_types::limits::KV_BLOCK_TOKENS;

use super::kernels::CHUNK;
use crate::check::Place;

/// Rows of queries that a warp takes.
const ROWS: usize = 16;
/// Words that describe a tile of attention: its first token's row, its tokens, their first position, and where its blocks
/// stand in the table.
const TILE_WORDS: usize = 4;

/// `[ids][positions][places in KV memory][tiles of attention][tables of KV blocks]`, and how long each is.
#[derive(Default)]
pub(super) struct Inputs {
    pub(super) words: Vec<u32>,
    pub(super) tokens: usize,
    pub(super) tiles: usize,
    /// Chunks that the tile with the most of them sees.
    pub(super) chunks: usize,
    table: Vec<u32>,
}

impl Inputs {
    /// Words that a tile of so many tokens needs at most, of as many sequences of so many positions.
    pub(super) fn words_max(tokens: usize, sequences: usize, positions: usize) -> usize {
        tokens * (3 + TILE_WORDS) + sequences.min(tokens) * (positions.div_ceil(KV_BLOCK_TOKENS) + 1)
    }

    /// Where the positions, the places, the tiles and the tables begin.
    pub(super) fn offsets(&self) -> [usize; 4] {
        let (tokens, tiles) = (self.tokens, self.tiles);
        [tokens, 2 * tokens, 3 * tokens, 3 * tokens + TILE_WORDS * tiles]
    }

    /// Lays out these tokens; `group` query heads share a KV head, and a token sees as many positions as `window` says.
    pub(super) fn set(&mut self, slices: &[Slice], places: &[Place], group: usize, window: Option<usize>) {
        let Self { words, table, .. } = self;
        words.clear();
        table.clear();
        words.extend(places.iter().map(|place| place.token));
        words.extend(places.iter().map(|place| place.position as u32));
        words.extend(places.iter().map(|&Place { position, slice, .. }| {
            let Slice { first_block, blocks, .. } = &slices[slice];
            let block = blocks[position / KV_BLOCK_TOKENS - *first_block as usize];
            block * KV_BLOCK_TOKENS as u32 + (position % KV_BLOCK_TOKENS) as u32
        }));
        (self.tokens, self.tiles, self.chunks) = (places.len(), 0, 1);
        let mut row = 0;
        while row < places.len() {
            let Place { position, slice, .. } = places[row];
            let run = places[row..].iter().take_while(|place| place.slice == slice).count();
            let Slice { first_block, blocks, .. } = &slices[slice];
            let base = (table.len() as u32).wrapping_sub(*first_block);
            table.extend_from_slice(blocks);
            let each = ROWS / group;
            for first in (0..run).step_by(each) {
                let (tokens, position) = (each.min(run - first), position + first);
                words.extend([(row + first) as u32, tokens as u32, position as u32, base]);
                let begin = window.map_or(0, |window| (position + 1).saturating_sub(window));
                let chunks = (position + tokens).div_ceil(CHUNK) - begin / CHUNK;
                self.tiles += 1;
                self.chunks = self.chunks.max(chunks);
            }
            row += run;
        }
        words.extend_from_slice(table);
    }

    /// The words as they are sent.
    pub(super) fn bytes(&self) -> &[u8] {
        bytes_of(&self.words)
    }
}

/// Numbers as they lie in memory: little-endian on every machine that a GPU is in.
pub(super) fn bytes_of<T: Copy + Into<f64>>(numbers: &[T]) -> &[u8] {
    // SAFETY: integers and floats have no padding, and every byte may be read.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// As [`bytes_of`], to be filled.
pub(super) fn bytes_of_mut<T: Copy + Into<f64>>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a number.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
