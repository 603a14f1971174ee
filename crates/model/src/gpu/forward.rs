//! The layers on a GPU, over a tile of tokens at a time: what `crate::forward` is on a CPU.

use std::ops::Range;
use std::sync::Arc;

use galerne_collective::{Collective, tree};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Slice, TokenId};
use half::bf16;

use super::device::{Address, Buffer, Device, DeviceError};
use super::inputs::{Inputs, bytes_of, bytes_of_mut};
use super::kernels::{
    AddNorm, Attend, CHUNK, Embed, FEW_TOKENS_MAX, GATE_UP, GateUp, Kv, Likeliest, PLAIN, Pick, Piece, Plain,
    Product, QKV, Qkv, TILE_TOKENS, Tree, attend, each_row, multiply,
};
use super::layout;
use super::weights::{GpuWeights, Layer, Shape};
use crate::check::Place;
use crate::error::ModelError;
use crate::head::{ROUND_MAX, Wanted};
use crate::math::RopeTable;
use crate::products::Engine;
use crate::rank::{Trace, Tracer};
use crate::rows::Rows;

/// Most tokens in a tile: enough for products to be bound by multiplication, few enough for the workspace to stay small
/// beside the weights.
pub(crate) const TILE_TOKENS_MAX: usize = 2048;
/// Bytes for what chunks of attention found, before they are merged. With more, a warp runs through its chunks.
const PARTIALS_BYTES_MAX: usize = 256 << 20;

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
}

/// What the layers work with besides the weights.
pub(crate) struct Forward {
    weights: Arc<GpuWeights>,
    /// For what is left to the host: drawing.
    engine: Engine,
    window: Option<usize>,
    /// The rank's pieces of the summation tree, as ranges of its own shards.
    pieces: Vec<Range<usize>>,
    /// The sum of all shards, where this rank has all of them.
    all: Tree,
    inputs: Inputs,
    work: Workspace,
    /// What goes to other ranks and comes back.
    sent: Vec<f32>,
    summed: Vec<f32>,
}

/// Memory of the device.
struct Workspace {
    kv: Buffer,
    /// bf16 from one KV block to the next.
    kv_stride: usize,
    turns: Buffer,
    inputs: Buffer,
    wanted: Buffer,
    residual: Buffer,
    normed: Buffer,
    queries: Buffer,
    attended: Buffer,
    mlp: Buffer,
    /// `[shard][token][hidden]`: what is summed next.
    leaves: Buffer,
    pieces: Buffer,
    chunks: Buffer,
    chunk_bytes: usize,
    plain: Buffer,
    picked: Buffer,
    logits: Buffer,
    ids: Buffer,
    token_tiles: usize,
}

impl Workspace {
    fn new(weights: &GpuWeights, room: Room, pieces: usize) -> Result<Self, DeviceError> {
        let (shape, config, device) = (&weights.shape, &weights.portion.config, &weights.device);
        let tokens = room.step_tokens.min(TILE_TOKENS_MAX);
        let token_tiles = tokens.div_ceil(TILE_TOKENS);
        let buffer = |bytes: usize| Buffer::zeroed(device, bytes.max(1));
        let packed = |tiles: usize, pairs: usize| buffer(tiles * pairs * 512);
        let floats = |count: usize| buffer(count * size_of::<f32>());
        let block = shape.kv_heads * 2 * KV_BLOCK_TOKENS * shape.dim;
        let row_bytes = shape.heads * (shape.dim + 2) * size_of::<f32>();
        let few = tokens.min(FEW_TOKENS_MAX as usize);
        let chunks = room.positions.div_ceil(CHUNK) + 1;
        let chunk_bytes = (few * chunks.next_power_of_two() * row_bytes).min(PARTIALS_BYTES_MAX);
        let turns = buffer(room.positions * config.head_dim * size_of::<f32>())?;
        turns
            .upload(0, bytes_of(&RopeTable::new(room.positions, config.head_dim, config.rope_theta).turns))?;
        Ok(Self {
            kv: buffer(config.layers * room.kv_blocks * block * size_of::<bf16>())?,
            kv_stride: config.layers * block,
            turns,
            inputs: buffer(Inputs::words_max(tokens, room.sequences, room.positions) * size_of::<u32>())?,
            wanted: buffer(ROUND_MAX * size_of::<u32>())?,
            residual: floats(tokens * shape.hidden)?,
            normed: packed(token_tiles, shape.hidden_pairs())?,
            queries: buffer(tokens * shape.heads * shape.dim * size_of::<bf16>())?,
            attended: packed(shape.shards * token_tiles, shape.attended_pairs())?,
            mlp: packed(shape.shards * token_tiles, shape.mlp_pairs())?,
            leaves: floats(shape.shards * tokens * shape.hidden)?,
            pieces: floats(pieces * tokens * shape.hidden)?,
            chunks: buffer(chunk_bytes)?,
            chunk_bytes,
            plain: floats(tokens * shape.hidden)?,
            picked: packed(ROUND_MAX.div_ceil(TILE_TOKENS), shape.hidden_pairs())?,
            logits: floats(ROUND_MAX * shape.vocab.next_multiple_of(crate::packed::PANEL))?,
            ids: buffer(ROUND_MAX * size_of::<TokenId>())?,
            token_tiles,
        })
    }
}

impl Forward {
    /// # Errors
    /// [`ModelError::Device`], above all if there is too little memory.
    pub(crate) fn new(weights: Arc<GpuWeights>, engine: Engine, room: Room) -> Result<Self, ModelError> {
        let (shards, own) = (weights.portion.shards, weights.portion.own_shards());
        let pieces = tree::pieces(shards.virtual_shards(), own.clone());
        let pieces: Vec<_> =
            pieces.into_iter().map(|piece| piece.start - own.start..piece.end - own.start).collect();
        let work = Workspace::new(&weights, room, pieces.len())?;
        let all = layout::tree(&singles(0..own.len()));
        let (inputs, window) = (Inputs::default(), room.window);
        Ok(Self { weights, engine, window, pieces, all, inputs, work, sent: Vec::new(), summed: Vec::new() })
    }

    pub(crate) fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// As [`crate::forward::Forward::tile`].
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost, [`ModelError::Device`].
    pub(crate) fn tile(
        &mut self,
        slices: &[Slice],
        places: &[Place],
        collective: &mut dyn Collective,
        trace: &mut Tracer<'_>,
    ) -> Result<(), ModelError> {
        self.inputs.set(slices, places, self.weights.shape.group, self.window);
        self.work.inputs.upload(0, self.inputs.bytes())?;
        let tokens = places.len();
        if collective.world_size() == 1 && trace.is_none() && tokens <= FEW_TOKENS_MAX as usize {
            // The same kernels with the same arguments, whatever the tokens.
            let key = (tokens << 40 | self.inputs.tiles << 20 | self.chunks()) as u64;
            let device = Arc::clone(&self.weights.device);
            return Ok(device.replay(key, &mut || self.alone())?);
        }
        self.together(collective, trace)
    }

    /// All layers, on a rank that has all shards.
    fn alone(&self) -> Result<(), DeviceError> {
        self.embed()?;
        let mut tree = layout::tree(&singles(0..1));
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.add_norm(layer.attn_norm, tree, index == 0, false)?;
            tree = self.all;
            self.attention(layer, index)?;
            self.add_norm(layer.mlp_norm, tree, false, false)?;
            self.mlp(layer)?;
        }
        self.add_norm(self.weights.final_norm, tree, false, false)
    }

    /// All layers, with what the other ranks have.
    fn together(
        &mut self,
        collective: &mut dyn Collective,
        trace: &mut Tracer<'_>,
    ) -> Result<(), ModelError> {
        let (weights, layers) = (Arc::clone(&self.weights), self.weights.layers.len());
        self.embed()?;
        let mut tree = self.reduce_embedding(collective)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            self.add_norm(layer.attn_norm, tree, index == 0, false)?;
            self.tell(index, &self.work.residual, trace)?;
            self.attention(layer, index)?;
            tree = self.reduce(collective)?;
            self.add_norm(layer.mlp_norm, tree, false, false)?;
            self.mlp(layer)?;
            tree = self.reduce(collective)?;
        }
        self.add_norm(weights.final_norm, tree, false, trace.is_some())?;
        self.tell(layers, &self.work.plain, trace)
    }

    fn tell(&self, layer: usize, from: &Buffer, trace: &mut Tracer<'_>) -> Result<(), ModelError> {
        if let Some(trace) = trace {
            let mut rows = vec![0.0f32; self.inputs.tokens * self.weights.shape.hidden];
            from.download(bytes_of_mut(&mut rows))?;
            trace(Trace::Hidden { layer, rows: &rows });
        }
        Ok(())
    }

    fn device(&self) -> &dyn Device {
        &*self.weights.device
    }

    fn tokens(&self) -> u32 {
        self.inputs.tokens as u32
    }

    fn input(&self, section: usize) -> Address {
        self.work.inputs.address() + (self.inputs.offsets()[section] * size_of::<u32>()) as Address
    }

    /// Chunks of attention that warps of their own take; 0 if a warp runs through all of a tile's.
    fn chunks(&self) -> usize {
        let (shape, tokens) = (&self.weights.shape, self.inputs.tokens);
        let chunks = self.inputs.chunks.next_power_of_two();
        let bytes = chunks * tokens * shape.heads * (shape.dim + 2) * size_of::<f32>();
        let split = chunks > 1 && tokens <= FEW_TOKENS_MAX as usize && bytes <= self.work.chunk_bytes;
        if split { chunks } else { 0 }
    }

    fn product(&self, weights: Address, x: &Buffer, tiles: usize, pairs: usize) -> Product {
        Product {
            weights,
            x: x.address(),
            tiles: tiles as u32,
            tokens: self.tokens(),
            token_tiles: self.work.token_tiles as u32,
            pairs: pairs as u32,
        }
    }

    fn embed(&self) -> Result<(), DeviceError> {
        let portion = &self.weights.portion;
        let arguments = Embed {
            rows: self.weights.embedding,
            ids: self.work.inputs.address(),
            out: self.work.leaves.address(),
            first: portion.cut.vocab(portion.own_shards()).start as u32,
            own: self.weights.shape.vocab as u32,
            hidden: self.weights.shape.hidden as u32,
        };
        // SAFETY: ids of the tile, and room for a row each.
        unsafe { each_row(self.device(), c"embed", self.tokens(), &arguments) }
    }

    /// Adds the leaves to the residual stream, and norms it.
    fn add_norm(&self, weight: Address, tree: Tree, starts: bool, plain: bool) -> Result<(), DeviceError> {
        let Shape { hidden, .. } = self.weights.shape;
        let arguments = AddNorm {
            leaves: self.work.leaves.address(),
            residual: self.work.residual.address(),
            weight,
            out: self.work.normed.address(),
            plain: if plain { self.work.plain.address() } else { 0 },
            stride: (self.inputs.tokens * hidden) as u64,
            hidden: hidden as u32,
            pairs: self.weights.shape.hidden_pairs() as u32,
            starts: u32::from(starts),
            eps: self.weights.portion.config.norm_eps,
            tree,
        };
        // SAFETY: a row of each leaf, of the residual stream and of what is normed for each token.
        unsafe { each_row(self.device(), c"add_norm", self.tokens(), &arguments) }
    }

    /// Attention of one layer, into the leaves.
    fn attention(&self, layer: &Layer, index: usize) -> Result<(), DeviceError> {
        let (shape, config) = (&self.weights.shape, &self.weights.portion.config);
        let kv = self.work.kv.address()
            + (index * shape.kv_heads * 2 * KV_BLOCK_TOKENS * shape.dim * size_of::<bf16>()) as Address;
        let product = self.product(layer.qkv, &self.work.normed, shape.qkv_tiles(), shape.hidden_pairs());
        let qkv = Qkv {
            product,
            positions: self.input(0),
            places: self.input(1),
            kv: Kv { data: kv, stride: self.work.kv_stride as u64, dim: shape.dim as u32 },
            turns: self.work.turns.address(),
            queries: self.work.queries.address(),
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            rotary_pairs: (config.head_dim / 2) as u32,
        };
        let seen = Attend {
            queries: qkv.queries,
            kv,
            stride: qkv.kv.stride,
            tiles: self.input(2),
            table: self.input(3),
            out: self.work.attended.address(),
            partials: self.work.chunks.address(),
            scale: std::f32::consts::LOG2_E / (config.head_dim as f32).sqrt(),
            tile_count: self.inputs.tiles as u32,
            token_tiles: self.work.token_tiles as u32,
            tokens: self.tokens(),
            kv_heads: shape.kv_heads as u32,
            group: shape.group as u32,
            window: self.window.map_or(0, |window| window as u32),
            chunks: self.chunks() as u32,
        };
        let o = self.partial(layer.o, &self.work.attended, shape.attended_pairs());
        // SAFETY: `check` has seen to it that blocks exist and reach to the last position; buffers have room for a tile.
        unsafe {
            multiply(self.device(), &QKV, &qkv.product, 1, &qkv)?;
            attend(self.device(), shape.dim, &seen)?;
            multiply(self.device(), &PLAIN, &o.product, shape.shards as u32, &o)
        }
    }

    /// The MLP of one layer, into the leaves.
    fn mlp(&self, layer: &Layer) -> Result<(), DeviceError> {
        let shape = &self.weights.shape;
        let product =
            self.product(layer.gate_up, &self.work.normed, shape.gate_up_tiles(), shape.hidden_pairs());
        let gate_up = GateUp { product, out: self.work.mlp.address(), out_pairs: shape.mlp_pairs() as u32 };
        let down = self.partial(layer.down, &self.work.mlp, shape.mlp_pairs());
        // SAFETY: buffers have room for a tile.
        unsafe {
            multiply(self.device(), &GATE_UP, &gate_up.product, 1, &gate_up)?;
            multiply(self.device(), &PLAIN, &down.product, shape.shards as u32, &down)
        }
    }

    /// A product of each shard's columns, into a leaf of its own.
    fn partial(&self, weights: Address, x: &Buffer, pairs: usize) -> Plain {
        let shape = &self.weights.shape;
        let product = self.product(weights, x, shape.hidden_tiles(), pairs);
        Plain { product, out: self.work.leaves.address(), width: shape.hidden as u32 }
    }

    /// Sums over all ranks' shards; what the next norm adds up is the tree that comes back.
    fn reduce(&mut self, collective: &mut dyn Collective) -> Result<Tree, ModelError> {
        if collective.world_size() == 1 {
            return Ok(self.all);
        }
        let (tokens, hidden) = (self.inputs.tokens, self.weights.shape.hidden);
        let len = tokens * hidden;
        for (slot, piece) in self.pieces.iter().enumerate() {
            let at =
                |buffer: &Buffer, rows: usize| buffer.address() + (rows * len * size_of::<f32>()) as Address;
            let arguments = Piece {
                leaves: at(&self.work.leaves, piece.start),
                out: at(&self.work.pieces, slot),
                stride: len as u64,
                width: hidden as u32,
                tree: layout::tree(&singles(0..piece.len())),
            };
            // SAFETY: a row of each leaf and of each piece for each token.
            unsafe { each_row(self.device(), c"piece", self.tokens(), &arguments)? };
        }
        self.sent.resize(self.pieces.len() * len, 0.0);
        self.work.pieces.download(bytes_of_mut(&mut self.sent))?;
        self.exchange(len, collective)
    }

    /// As [`reduce`](Self::reduce), of rows that one rank has and the others do not.
    fn reduce_embedding(&mut self, collective: &mut dyn Collective) -> Result<Tree, ModelError> {
        if collective.world_size() == 1 {
            return Ok(layout::tree(&singles(0..1)));
        }
        let len = self.inputs.tokens * self.weights.shape.hidden;
        self.sent.clear();
        self.sent.resize(self.pieces.len() * len, 0.0);
        self.work.leaves.download(bytes_of_mut(&mut self.sent[..len]))?;
        self.exchange(len, collective)
    }

    /// Sums `sent` over all ranks into the first leaf.
    fn exchange(&mut self, len: usize, collective: &mut dyn Collective) -> Result<Tree, ModelError> {
        self.summed.resize(len, 0.0);
        collective.all_reduce(&self.sent, &mut self.summed)?;
        self.work.leaves.upload(0, bytes_of(&self.summed))?;
        Ok(layout::tree(&singles(0..1)))
    }

    /// The logits of this rank's rows of the vocabulary for the rows of the last tile that `round` names, into `part`.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn project(&mut self, round: &[Wanted], part: &mut Rows) -> Result<(), ModelError> {
        self.logits(round, part.width)?;
        Ok(self.work.logits.download(bytes_of_mut(&mut part.data[..round.len() * part.width]))?)
    }

    /// The likeliest token of each of these rows, of equally likely ones the first: all that a greedy draw needs, where
    /// this rank has the whole vocabulary.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn likeliest(&mut self, round: &[Wanted]) -> Result<Vec<TokenId>, ModelError> {
        let vocab = self.weights.shape.vocab;
        self.logits(round, vocab)?;
        let (logits, ids) = (self.work.logits.address(), self.work.ids.address());
        let arguments = Likeliest { logits, ids, vocab: vocab as u32, stride: vocab as u32 };
        // SAFETY: a row of logits and an id for each position of a round.
        unsafe { each_row(self.device(), c"likeliest", round.len() as u32, &arguments)? };
        let mut ids = vec![0; round.len()];
        self.work.ids.download(bytes_of_mut(&mut ids))?;
        Ok(ids)
    }

    /// Logits of a round, `[position][width]`.
    fn logits(&mut self, round: &[Wanted], width: usize) -> Result<(), DeviceError> {
        let shape = &self.weights.shape;
        let rows: Vec<u32> = round.iter().map(|wanted| wanted.row as u32).collect();
        self.work.wanted.upload(0, bytes_of(&rows))?;
        let pick = Pick {
            from: self.work.normed.address(),
            wanted: self.work.wanted.address(),
            to: self.work.picked.address(),
            pairs: shape.hidden_pairs() as u32,
        };
        let product = Product {
            tokens: rows.len() as u32,
            token_tiles: ROUND_MAX.div_ceil(TILE_TOKENS) as u32,
            ..self.product(self.weights.head, &self.work.picked, shape.vocab_tiles(), shape.hidden_pairs())
        };
        let head = Plain { product, out: self.work.logits.address(), width: width as u32 };
        // SAFETY: rows of the tile, and room for a round.
        unsafe {
            each_row(self.device(), c"pick", rows.len() as u32, &pick)?;
            multiply(self.device(), &PLAIN, &product, 1, &head)
        }
    }
}

fn singles(leaves: Range<usize>) -> Vec<Range<usize>> {
    leaves.map(|leaf| leaf..leaf + 1).collect()
}
