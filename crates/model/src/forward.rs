//! The layers, over a tile of tokens at a time.
//!
//! A tile is just a run of a step's tokens: since every token's numbers are the same whatever runs beside it,
//! cutting a step into tiles only bounds the workspace.

use std::ops::Range;

use galerne_collective::{Collective, tree};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Compute, Slice};

use crate::attention::{Attend, TOKENS_TOGETHER};
use crate::check::Place;
use crate::error::ModelError;
use crate::kv::{Kept, KvMemory, Tile};
use crate::linear::Strided;
use crate::math::{AddNorm, RopeTable};
use crate::products::Engine;
use crate::rank::{Trace, Tracer};
use crate::rows::Rows;
use crate::weights::{Layer, Weights};

/// Most tokens in a tile: enough to spread the cost of widening weights, few enough for the workspace to stay small.
pub(crate) const TILE_TOKENS_MAX: usize = 256;
/// Tokens of cheap work that are not worth waking a thread for.
const CHEAP_TOKENS: usize = 8;

/// What the layers work with besides the weights.
pub(crate) struct Forward {
    engine: Engine,
    kv: KvMemory,
    rope: RopeTable,
    window: Option<usize>,
    /// The rank's pieces of the summation tree, as ranges of its own shards.
    pieces: Vec<Range<usize>>,
    /// Of the tile: tokens that attend together.
    runs: Vec<Range<usize>>,
    work: Workspace,
}

/// Sizes that the options decide.
#[derive(Clone, Copy)]
pub(crate) struct Room {
    pub(crate) kv_blocks: usize,
    /// Positions of one sequence.
    pub(crate) positions: usize,
    /// Tokens of a tile.
    pub(crate) tokens: usize,
    /// Sliding window in tokens.
    pub(crate) window: Option<usize>,
    pub(crate) compute: Compute,
    pub(crate) kept: Kept,
}

/// Activations of a tile.
struct Workspace {
    /// The residual stream.
    hidden: Rows,
    /// What the last reduction gave: to be added to it.
    delta: Rows,
    normed: Rows,
    q: Rows,
    k: Rows,
    v: Rows,
    attended: Rows,
    gate: Rows,
    up: Rows,
    /// `[shard of the rank][token]`; then, from the front, `[piece][token]`.
    partials: Rows,
}

impl Workspace {
    fn new(weights: &Weights, tokens: usize, compute: Compute) -> Self {
        let (config, own) = (&weights.portion.config, weights.portion.own_shards());
        let rows = |width: usize| Rows::zeroed(tokens, width);
        let inputs = |width: usize| Rows::for_products(tokens, width, compute);
        let q = weights.portion.cut.heads(own.clone()).len() * config.head_dim;
        let kv = weights.portion.cut.kv_heads(own.clone()).len() * config.head_dim;
        let mlp = weights.portion.cut.mlp(own.clone()).len();
        Self {
            hidden: rows(config.hidden),
            delta: rows(config.hidden),
            normed: inputs(config.hidden),
            q: rows(q),
            k: rows(kv),
            v: rows(kv),
            attended: inputs(q),
            gate: inputs(mlp),
            up: rows(mlp),
            partials: Rows::zeroed(own.len() * tokens, config.hidden),
        }
    }

    /// Sums the pieces over all ranks: `delta` = the sum over all virtual shards.
    fn reduce(
        &mut self,
        pieces: usize,
        tokens: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let len = tokens * self.delta.width;
        collective.all_reduce(&self.partials.data[..pieces * len], &mut self.delta.data[..len])?;
        Ok(())
    }
}

impl Forward {
    pub(crate) fn new(weights: &Weights, engine: Engine, room: Room) -> Self {
        let (config, own) = (&weights.portion.config, weights.portion.own_shards());
        let kv_heads = weights.portion.cut.kv_heads(own.clone()).len();
        let tile = Tile::new(config.head_dim, room.kept);
        let pieces = tree::pieces(weights.portion.shards.virtual_shards(), own.clone());
        Self {
            engine,
            kv: KvMemory::new(config.layers, kv_heads, room.kv_blocks, tile),
            rope: RopeTable::new(room.positions, config.head_dim, config.rope_theta),
            window: room.window,
            pieces: pieces.into_iter().map(|piece| piece.start - own.start..piece.end - own.start).collect(),
            runs: Vec::with_capacity(room.tokens),
            work: Workspace::new(weights, room.tokens, room.compute),
        }
    }

    /// Runs a tile of tokens through all layers; their keys and values are stored, and the rows after the final norm
    /// stand ready for the head.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost.
    pub(crate) fn tile(
        &mut self,
        weights: &Weights,
        slices: &[Slice],
        places: &[Place],
        collective: &mut dyn Collective,
        trace: &mut Tracer<'_>,
    ) -> Result<(), ModelError> {
        let (tokens, config) = (places.len(), &weights.portion.config);
        let mut tell = |layer: usize, rows: &Rows| {
            if let Some(trace) = trace {
                let rows = rows.data.chunks_exact(rows.width).take(tokens);
                let rows: Vec<f32> = rows.flat_map(|row| &row[..config.hidden]).copied().collect();
                trace(Trace::Hidden { layer, rows: &rows });
            }
        };
        self.find_runs(places);
        self.embed(weights, places);
        self.work.reduce(self.pieces.len(), tokens, collective)?;
        self.work.hidden.data[..tokens * self.work.hidden.width].fill(0.0);
        for (index, layer) in weights.layers.iter().enumerate() {
            self.add_norm(weights, &layer.attn_norm, tokens);
            tell(index, &self.work.hidden);
            self.attention(weights, index, slices, places);
            self.work.reduce(self.pieces.len(), tokens, collective)?;
            self.add_norm(weights, &layer.mlp_norm, tokens);
            self.mlp(layer, tokens);
            self.work.reduce(self.pieces.len(), tokens, collective)?;
        }
        self.add_norm(weights, &weights.final_norm, tokens);
        tell(config.layers, &self.work.normed);
        Ok(())
    }

    /// What the head needs after a tile: the threads, and the rows after the final norm.
    pub(crate) fn engine_and_normed(&mut self) -> (&mut Engine, &Rows) {
        (&mut self.engine, &self.work.normed)
    }

    /// Cuts the tile's tokens into runs of one slice each, in which positions follow each other.
    fn find_runs(&mut self, places: &[Place]) {
        self.runs.clear();
        for (token, place) in places.iter().enumerate() {
            match self.runs.last_mut() {
                Some(run) if places[run.start].slice == place.slice && run.len() < TOKENS_TOGETHER => {
                    run.end = token + 1;
                }
                _ => self.runs.push(token..token + 1),
            }
        }
    }

    /// The rank that owns a token's row brings it; what it does not own is zero.
    fn embed(&mut self, weights: &Weights, places: &[Place]) {
        let own = weights.portion.cut.vocab(weights.portion.own_shards());
        let Rows { width, data, .. } = &mut self.work.partials;
        let partials = &mut data[..self.pieces.len() * places.len() * *width];
        partials.fill(0.0);
        for (row, place) in partials.chunks_exact_mut(*width).zip(places) {
            let token = place.token as usize;
            if own.contains(&token) {
                weights.embedding.gather_row(token - own.start, row);
            }
        }
    }

    /// Adds what the last reduction gave to the residual stream, and norms it.
    fn add_norm(&mut self, weights: &Weights, norm: &[f32], tokens: usize) {
        let (isa, width, eps) =
            (self.engine.isa, weights.portion.config.hidden, weights.portion.config.norm_eps);
        let Workspace { hidden, delta, normed, .. } = &mut self.work;
        let (hidden, normed) = (hidden.shared(), normed.shared());
        self.engine.team.each(tokens, CHEAP_TOKENS, &|_, range| {
            for token in range {
                let columns = 0..norm.len();
                let delta = &delta.data[token * norm.len()..][..norm.len()];
                // SAFETY: a token's rows belong to the one range that it is in.
                unsafe {
                    let (row, to) = (hidden.row(token, columns.clone()), normed.row(token, columns.clone()));
                    AddNorm { row, delta, weight: norm, width, eps, normed: to }.run_on(isa);
                    normed.round(isa, token, columns);
                }
            }
        });
    }

    /// Attention of one layer, into the partials.
    fn attention(&mut self, weights: &Weights, index: usize, slices: &[Slice], places: &[Place]) {
        let layer = &weights.layers[index];
        let Workspace { normed, q, k, v, .. } = &mut self.work;
        let projections = [(&layer.q, q.shared()), (&layer.k, k.shared()), (&layer.v, v.shared())];
        self.engine.products(places.len(), normed, projections);
        self.turn_and_store(weights, index, slices, places);
        self.attend(weights, index, slices, places);
        let Workspace { attended, partials, .. } = &mut self.work;
        self.engine.partial_products(places.len(), attended, &layer.o, &self.pieces, partials.shared());
    }

    /// RoPE on queries and keys; keys and values go to the KV memory.
    fn turn_and_store(&mut self, weights: &Weights, index: usize, slices: &[Slice], places: &[Place]) {
        let dim = weights.portion.config.head_dim;
        let scale = 1.0 / (dim as f32).sqrt();
        let own = weights.portion.own_shards();
        let (heads, kv_heads) =
            (weights.portion.cut.heads(own.clone()).len(), weights.portion.cut.kv_heads(own).len());
        let Workspace { q, k, v, .. } = &mut self.work;
        let (q, k, v, rope, kv) = (q.shared(), k.shared(), v.shared(), &self.rope, self.kv.layer(index));
        self.engine.team.each(places.len(), CHEAP_TOKENS, &|_, range| {
            for token in range {
                let Place { position, slice, .. } = places[token];
                // SAFETY: a token's rows, and its place in its block, belong to the one range that it is in: blocks
                // in which a sequence still writes are its own.
                unsafe {
                    for head in q.row(token, 0..heads * dim).chunks_exact_mut(dim) {
                        rope.turn(position, scale, head);
                    }
                    let values = v.row(token, 0..kv_heads * dim).chunks_exact(dim);
                    for (head, (key, value)) in
                        k.row(token, 0..kv_heads * dim).chunks_exact_mut(dim).zip(values).enumerate()
                    {
                        rope.turn(position, 1.0, key);
                        let Slice { first_block, blocks, .. } = &slices[slice];
                        let position = position - *first_block as usize * KV_BLOCK_TOKENS;
                        kv.store(head, blocks, position, key, value);
                    }
                }
            }
        });
    }

    /// Every token attends to what its window shows, itself included.
    fn attend(&mut self, weights: &Weights, index: usize, slices: &[Slice], places: &[Place]) {
        let (isa, window, dim) = (self.engine.isa, self.window, weights.portion.config.head_dim);
        let (kv_heads, group) = (
            weights.portion.cut.kv_heads(weights.portion.own_shards()).len(),
            weights.portion.config.group(),
        );
        let Workspace { q, attended, .. } = &mut self.work;
        let (q, attended, kv) = (q.shared(), attended.shared(), self.kv.layer(index));
        let runs = &self.runs;
        self.engine.team.each(runs.len() * kv_heads, 1, &|_, range| {
            for task in range {
                let (run, kv_head) = (runs[task / kv_heads].clone(), task % kv_heads);
                let Place { position, slice, .. } = places[run.start];
                let columns = kv_head * group * dim..(kv_head + 1) * group * dim;
                let Slice { first_block, blocks, .. } = &slices[slice];
                // Pieces are cut by absolute position; without those before the first block the rest is cut alike.
                let behind = *first_block as usize * KV_BLOCK_TOKENS;
                let start = run.start * q.width + columns.start;
                // SAFETY: a task's queries and outputs are its own; `check` has seen to it that the blocks exist, begin
                // no later than what is seen and reach to the last position, and every position of them up to it has
                // been stored, here or in an earlier step.
                unsafe {
                    Attend {
                        queries: Strided {
                            start: q.strided().start.add(start).cast_const(),
                            stride: q.width,
                        },
                        tokens: run.len(),
                        heads: group,
                        tiles: kv.head(kv_head),
                        stride: kv.stride,
                        tile: kv.tile,
                        blocks,
                        position: position - behind,
                        window,
                        out: Strided { start: attended.strided().start.add(start), stride: attended.width },
                    }
                    .run_on(isa);
                    for token in run {
                        attended.round(isa, token, columns.clone());
                    }
                }
            }
        });
    }

    /// The MLP of one layer, into the partials.
    fn mlp(&mut self, layer: &Layer, tokens: usize) {
        let Workspace { normed, gate, up, partials, .. } = &mut self.work;
        self.engine.gate_up(tokens, normed, (&layer.gate, gate.shared()), (&layer.up, up.shared()));
        self.engine.partial_products(tokens, gate, &layer.down, &self.pieces, partials.shared());
    }
}
