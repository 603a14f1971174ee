//! The memory of a GPU that a rank works in, besides its weights.

use galerne_checkpoint::Config;
use galerne_types::Shards;
use half::bf16;

use super::device::{Buffer, DeviceError};
use super::fast::{self, Fast};
use super::inputs::{Inputs, bytes_of};
use super::kernels::{CHUNK, FEW_TOKENS_MAX, TILE_TOKENS};
use super::layout::KvPacking;
use super::link::Ranks;
use super::peers::Peers;
use super::plan::Shape;
use super::post::Post;
use super::sampler::Sampler;
use super::weights::GpuWeights;
use crate::head::ROUND_MAX;
use crate::math::RopeTable;

/// Most tokens in a tile: enough for products to be bound by multiplication, few enough for the workspace to stay small
/// beside the weights.
pub(crate) const TILE_TOKENS_MAX: usize = 2048;
/// Bytes for what chunks of attention found, before they are merged. With more, a warp runs through its chunks.
const CHUNK_BYTES_MAX: usize = 256 << 20;
/// Bytes of a tile of packed activations for each pair of k-tiles.
pub(super) const PACKED_BYTES: usize = 512;

/// Sizes that the options decide.
#[derive(Clone, Copy)]
pub(crate) struct Room {
    pub(crate) kv_blocks: usize,
    pub(crate) sequences: usize,
    /// Positions of one sequence.
    pub(crate) positions: usize,
    /// Tokens of a step.
    pub(crate) step_tokens: usize,
    /// Sliding window in tokens.
    pub(crate) window: Option<usize>,
    pub(crate) kv_packing: KvPacking,
    /// Whether a library makes products of many tokens.
    pub(crate) fast: bool,
}

impl Room {
    pub(super) fn tokens(&self) -> usize {
        self.step_tokens.min(TILE_TOKENS_MAX)
    }

    /// Tiles of packed activations: kernels for few tokens come for 1, 2, 4 and 8 of them, and work on all of theirs.
    pub(super) fn token_tiles(&self) -> usize {
        let tiles = self.tokens().div_ceil(TILE_TOKENS);
        if self.tokens() > FEW_TOKENS_MAX as usize { tiles } else { tiles.next_power_of_two() }
    }
}

/// Memory of the device.
pub(super) struct Workspace {
    pub(super) kv: Buffer,
    pub(super) kv_packing: KvPacking,
    pub(super) turns: Buffer,
    /// By which inputs come, and what is wanted.
    pub(super) post: Post,
    pub(super) inputs: Buffer,
    /// Rows of a round, and the slots that they are drawn for.
    pub(super) wanted: Buffer,
    pub(super) residual: Buffer,
    pub(super) normed: Buffer,
    pub(super) queries: Buffer,
    pub(super) attended: Buffer,
    pub(super) mlp: Buffer,
    /// `[shard][token][hidden]`, and the sum over all ranks: what is summed next.
    pub(super) leaves: Buffer,
    /// This rank's pieces of a sum, and those of all ranks, or all ranks' parts of a round's logits; next to nothing if there is one.
    pub(super) pieces: Buffer,
    pub(super) gathered: Buffer,
    pub(super) chunks: Buffer,
    pub(super) plain: Buffer,
    pub(super) picked: Buffer,
    /// Of this rank's part of the vocabulary, a row as wide as any rank's; and of all of it, at rank 0 of several.
    pub(super) logits: Buffer,
    pub(super) joined: Buffer,
    /// At rank 0.
    pub(super) sampler: Sampler,
    pub(super) fast: Option<Fast>,
    pub(super) token_tiles: usize,
}

/// Bytes of everything but the KV memory and what drawing takes, in the order of [`Workspace`]'s fields.
fn sizes(config: &Config, shape: &Shape, ranks: &Ranks, room: Room) -> [usize; 16] {
    let (tokens, floats, halves) = (room.tokens(), size_of::<f32>(), size_of::<bf16>());
    let tiles = room.token_tiles();
    let rows = tokens * shape.hidden * floats;
    let few = tokens.min(FEW_TOKENS_MAX as usize);
    let chunks = (room.positions.div_ceil(CHUNK) + 1).next_power_of_two();
    let brought = ranks.world_size() * ROUND_MAX * shape.widest_vocab * floats;
    let (pieces, slots) = if ranks.alone() { (0, 0) } else { (ranks.pieces_max(), ranks.slots()) };
    [
        room.positions * config.head_dim * floats,
        Inputs::words_max(tokens, room.sequences, room.positions) * size_of::<u32>(),
        2 * ROUND_MAX * size_of::<u32>(),
        rows,
        tiles * shape.hidden_pairs() * PACKED_BYTES,
        tokens * shape.heads * shape.dim * halves,
        shape.shards * tiles * shape.attended_pairs() * PACKED_BYTES,
        shape.shards * tiles * shape.mlp_pairs() * PACKED_BYTES,
        shape.shards * rows,
        pieces * rows,
        if ranks.alone() { 0 } else { (slots * rows).max(brought) },
        (few * chunks * shape.heads * (shape.dim + 2) * floats).min(CHUNK_BYTES_MAX),
        rows,
        ROUND_MAX.div_ceil(TILE_TOKENS) * shape.hidden_pairs() * PACKED_BYTES,
        ROUND_MAX * shape.widest_vocab * floats,
        if ranks.alone() { 0 } else { drawn_rows(ranks) * config.vocab * floats },
    ]
}

/// Rows that this rank draws from at once.
fn drawn_rows(ranks: &Ranks) -> usize {
    if ranks.rank() == 0 { ROUND_MAX } else { 0 }
}

/// Bytes of everything but weights and KV memory.
pub(super) fn workspace_bytes(
    architecture: u16,
    config: &Config,
    shape: &Shape,
    (shards, rank): (Shards, usize),
    room: Room,
) -> usize {
    let ranks = Ranks::new(shards, rank);
    let buffers: usize = sizes(config, shape, &ranks, room).into_iter().sum();
    let fast = if room.fast { fast::sizes(architecture, shape, room).into_iter().sum() } else { 0 };
    buffers
        + Sampler::bytes(drawn_rows(&ranks), room.sequences, config.vocab)
        + Peers::bytes(&ranks, Peers::LEN_MAX)
        + fast
}

impl Workspace {
    pub(super) fn new(weights: &GpuWeights, ranks: &Ranks, room: Room) -> Result<Self, DeviceError> {
        let (shape, config) = (&weights.shape, &weights.portion.config);
        let sizes = sizes(config, shape, ranks, room);
        let posted = sizes[1].max(sizes[2]);
        let mut sizes = sizes.into_iter();
        let buffer = |bytes: usize| Buffer::zeroed(&weights.device, bytes.max(1));
        let mut next = || buffer(sizes.next().expect("a size for each buffer"));
        let turns = next()?;
        turns
            .upload(0, bytes_of(&RopeTable::new(room.positions, config.head_dim, config.rope_theta).turns))?;
        Ok(Self {
            kv: buffer(
                room.kv_blocks * config.layers * shape.kv_heads * room.kv_packing.head_bytes(shape.dim),
            )?,
            kv_packing: room.kv_packing,
            turns,
            post: Post::new(&weights.device, posted)?,
            inputs: next()?,
            wanted: next()?,
            residual: next()?,
            normed: next()?,
            queries: next()?,
            attended: next()?,
            mlp: next()?,
            leaves: next()?,
            pieces: next()?,
            gathered: next()?,
            chunks: next()?,
            plain: next()?,
            picked: next()?,
            logits: next()?,
            joined: next()?,
            sampler: Sampler::new(&weights.device, drawn_rows(ranks), room.sequences, config.vocab)?,
            fast: if room.fast { Some(Fast::new(&weights.device, shape, room)?) } else { None },
            token_tiles: room.token_tiles(),
        })
    }
}
