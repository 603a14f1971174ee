//! What stands where in a GPU's memory, and how it is packed.

use std::ops::Range;

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight, dequantize};
use galerne_types::Shards;
use half::bf16;

use super::device::Address;
use super::kernels::{PAIR, TILE_ROWS};
use super::layout::{LEAVES_MAX, Packing, padded_dim};
use crate::cut::{Cut, Portion};
use crate::error::ModelError;
use crate::packed::PANEL;

/// Widest head that the kernels take.
const HEAD_DIM_MAX: usize = 128;
/// Query heads of a KV head: rows of a tile of attention.
const GROUP_MAX: usize = 16;
/// What is put side by side in memory begins at multiples of this.
const ALIGNMENT: usize = 256;

/// Where a layer's weights are.
#[derive(Clone, Copy)]
pub(super) struct Layer {
    pub(super) attn_norm: Address,
    pub(super) qkv: Address,
    pub(super) o: Address,
    pub(super) mlp_norm: Address,
    pub(super) gate_up: Address,
    pub(super) down: Address,
}

/// Sizes as the kernels see them, all of the rank's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) shards: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) group: usize,
    /// Of a head, padded.
    pub(super) dim: usize,
    pub(super) hidden: usize,
    /// MLP columns of a shard, padded to the widest of all shards: where sums are cut must not depend on N.
    pub(super) mlp: usize,
    pub(super) vocab: usize,
    /// Of the rank that has the largest part, rounded up to what is moved at once.
    pub(super) widest_vocab: usize,
}

impl Shape {
    /// Pairs of k-tiles come in twos, as all of these.
    pub(super) fn hidden_pairs(&self) -> usize {
        self.hidden.div_ceil(PAIR).next_multiple_of(2)
    }
    pub(super) fn attended_pairs(&self) -> usize {
        (self.group * self.dim / PAIR).next_multiple_of(2)
    }
    pub(super) fn mlp_pairs(&self) -> usize {
        self.mlp / PAIR
    }
    pub(super) fn qkv_tiles(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim / TILE_ROWS
    }
    pub(super) fn gate_up_tiles(&self) -> usize {
        self.shards * self.mlp * 2 / TILE_ROWS
    }
    pub(super) fn hidden_tiles(&self) -> usize {
        self.hidden.div_ceil(TILE_ROWS)
    }
    pub(super) fn vocab_tiles(&self) -> usize {
        self.vocab.div_ceil(TILE_ROWS)
    }

    pub(super) fn of(config: &Config, cut: &Cut, shards: Shards, rank: usize) -> Result<Self, ModelError> {
        if config.head_dim > HEAD_DIM_MAX {
            return Err(ModelError::HeadDim { head_dim: config.head_dim, max: HEAD_DIM_MAX });
        }
        let (group, all) = (config.group(), shards.virtual_shards());
        if group > GROUP_MAX || all > LEAVES_MAX {
            return Err(ModelError::GpuShape {
                group,
                group_max: GROUP_MAX,
                shards: all,
                shards_max: LEAVES_MAX,
            });
        }
        let own = shards.of_rank(rank);
        let widest = (0..all).map(|shard| cut.mlp(shard..shard + 1).len()).max().unwrap_or(0);
        let parts = (0..shards.world_size()).map(|rank| cut.vocab(shards.of_rank(rank)).len());
        let widest_vocab = parts.max().unwrap_or(0);
        Ok(Self {
            shards: own.len(),
            heads: cut.heads(own.clone()).len(),
            kv_heads: cut.kv_heads(own.clone()).len(),
            group,
            dim: padded_dim(config.head_dim),
            hidden: config.hidden,
            mlp: widest.next_multiple_of(2 * PAIR),
            vocab: cut.vocab(own).len(),
            widest_vocab: widest_vocab.next_multiple_of(PANEL),
        })
    }
}

/// A matrix as it is packed: tiles of 16 rows over pairs of k-tiles, for one shard after another.
pub(super) struct Matrix {
    rows: Rows,
    packing: Packing,
    pub(super) shards: usize,
    pub(super) tiles: usize,
    pairs: usize,
    pub(super) offset: usize,
}

/// Which row of which weight stands where.
pub(super) enum Rows {
    /// Heads of queries and keys with the halves of their pairs 8 rows apart, then of values.
    Qkv(usize),
    /// Gates, each with its up 8 rows below.
    GateUp(usize),
    /// Rows in order; the columns of a shard after those of another.
    O(usize),
    Down(usize),
    Head(Weight),
}

impl Matrix {
    pub(super) fn tile_bytes(&self) -> usize {
        self.packing.tile_bytes(self.pairs)
    }
    pub(super) fn bytes(&self) -> usize {
        self.shards * self.tiles * self.tile_bytes()
    }
}

/// What a rank loads, and where it goes.
pub(super) struct Plan<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) portion: &'a Portion,
    pub(super) shape: Shape,
    /// How the layers' matrices are packed; the head feels rounding most and stays in bf16, as the embedding does.
    packing: Packing,
    pub(super) matrices: Vec<Matrix>,
    pub(super) bytes: usize,
}

/// Where everything is, from the beginning of the memory.
pub(super) struct Offsets {
    pub(super) layers: Vec<Layer>,
    pub(super) norms: Vec<(Weight, usize)>,
    pub(super) final_norm: usize,
    pub(super) head: usize,
    /// `[own rows][hidden]`, as it is.
    pub(super) embedding: usize,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        portion: &'a Portion,
        shape: Shape,
        packing: Packing,
    ) -> Self {
        Self { checkpoint, portion, shape, packing, matrices: Vec::new(), bytes: 0 }
    }

    /// Gives everything its place.
    pub(super) fn everything(&mut self) -> Offsets {
        let (shape, config) = (self.shape, &self.portion.config);
        let norm_bytes = config.hidden * size_of::<f32>();
        let mut norms = Vec::new();
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let [attn_norm, mlp_norm] = [Weight::AttnNorm(layer), Weight::MlpNorm(layer)].map(|norm| {
                let offset = self.room(norm_bytes);
                norms.push((norm, offset));
                offset as Address
            });
            let qkv = self.matrix(Rows::Qkv(layer), 1, shape.qkv_tiles(), shape.hidden_pairs());
            let o = self.matrix(Rows::O(layer), shape.shards, shape.hidden_tiles(), shape.attended_pairs());
            let gate_up = self.matrix(Rows::GateUp(layer), 1, shape.gate_up_tiles(), shape.hidden_pairs());
            let down = self.matrix(Rows::Down(layer), shape.shards, shape.hidden_tiles(), shape.mlp_pairs());
            let [qkv, o, gate_up, down] = [qkv, o, gate_up, down].map(|offset| offset as Address);
            layers.push(Layer { attn_norm, qkv, o, mlp_norm, gate_up, down });
        }
        let final_norm = self.room(norm_bytes);
        norms.push((Weight::FinalNorm, final_norm));
        let head = if config.tied { Weight::Embedding } else { Weight::Head };
        let head = self.matrix(Rows::Head(head), 1, shape.vocab_tiles(), shape.hidden_pairs());
        let embedding = self.room(shape.vocab * shape.hidden * size_of::<bf16>());
        Offsets { layers, norms, final_norm, head, embedding }
    }

    fn room(&mut self, bytes: usize) -> usize {
        let offset = self.bytes;
        self.bytes = (offset + bytes).next_multiple_of(ALIGNMENT);
        offset
    }

    fn matrix(&mut self, rows: Rows, shards: usize, tiles: usize, pairs: usize) -> usize {
        let packing = if matches!(rows, Rows::Head(_)) { Packing::Bf16 } else { self.packing };
        let matrix = Matrix { rows, packing, shards, tiles, pairs, offset: 0 };
        let offset = self.room(matrix.bytes());
        self.matrices.push(Matrix { offset, ..matrix });
        offset
    }

    /// The weight's row that stands in row `r` of a tile; `None` for padding.
    fn source(&self, rows: &Rows, tile: usize, r: usize) -> Option<(Weight, usize)> {
        let (config, own) = (&self.portion.config, self.portion.own_shards());
        let (half, eight) = (r / 8, r % 8);
        match *rows {
            Rows::Qkv(layer) => {
                let Shape { heads, kv_heads, dim, .. } = self.shape;
                let (head, tile) = (tile / (dim / TILE_ROWS), tile % (dim / TILE_ROWS));
                let turned = Some(8 * tile + eight).filter(|pair| *pair < config.head_dim / 2);
                let turned = turned.map(|pair| pair + half * config.head_dim / 2);
                let plain = Some(TILE_ROWS * tile + r).filter(|at| *at < config.head_dim);
                let first = self.portion.cut.kv_heads(own.clone()).start;
                let (weight, head, at) = if head < heads {
                    (Weight::Q(layer), self.portion.cut.heads(own).start + head, turned)
                } else if head < heads + kv_heads {
                    (Weight::K(layer), first + head - heads, turned)
                } else {
                    (Weight::V(layer), first + head - heads - kv_heads, plain)
                };
                at.map(|at| (weight, head * config.head_dim + at))
            }
            Rows::GateUp(layer) => {
                let (shard, column) =
                    (own.start + tile * 8 / self.shape.mlp, tile * 8 % self.shape.mlp + eight);
                let columns = self.portion.cut.mlp(shard..shard + 1);
                let weight = if half == 0 { Weight::Gate(layer) } else { Weight::Up(layer) };
                (column < columns.len()).then(|| (weight, columns.start + column))
            }
            Rows::O(layer) => self.within(Weight::O(layer), tile * TILE_ROWS + r, 0..config.hidden),
            Rows::Down(layer) => self.within(Weight::Down(layer), tile * TILE_ROWS + r, 0..config.hidden),
            Rows::Head(weight) => self.within(weight, tile * TILE_ROWS + r, self.portion.cut.vocab(own)),
        }
    }

    fn within(&self, weight: Weight, row: usize, rows: Range<usize>) -> Option<(Weight, usize)> {
        (row < rows.len()).then_some((weight, rows.start + row))
    }

    /// The columns of the weight that a shard's rows hold, and where each run of them begins.
    fn columns(&self, rows: &Rows, shard: usize) -> Vec<(Range<usize>, usize)> {
        let (config, shard) = (&self.portion.config, self.portion.own_shards().start + shard);
        match rows {
            Rows::O(_) => {
                let heads = self.portion.cut.heads(shard..shard + 1);
                let run =
                    |(i, head)| (head * config.head_dim..(head + 1) * config.head_dim, i * self.shape.dim);
                heads.enumerate().map(run).collect()
            }
            Rows::Down(_) => vec![(self.portion.cut.mlp(shard..shard + 1), 0)],
            Rows::Qkv(_) | Rows::GateUp(_) | Rows::Head(_) => vec![(0..config.hidden, 0)],
        }
    }

    /// Reads and packs some tiles of a shard into as many bytes.
    pub(super) fn pack(
        &self,
        matrix: &Matrix,
        shard: usize,
        tiles: Range<usize>,
        packed: &mut [u8],
    ) -> Result<(), ModelError> {
        packed.fill(0);
        let columns = self.columns(&matrix.rows, shard);
        // A shard may have no heads or no MLP columns.
        let all = columns.first().zip(columns.last()).map(|(first, last)| first.0.start..last.0.end);
        let Some(all) = all.filter(|all| !all.is_empty()) else { return Ok(()) };
        let mut reader = RowReader::new(self.checkpoint, all.clone());
        for (tile, out) in tiles.zip(packed.chunks_exact_mut(matrix.tile_bytes())) {
            let sources: Vec<_> = (0..TILE_ROWS).map(|r| self.source(&matrix.rows, tile, r)).collect();
            let mut r = 0;
            while r < TILE_ROWS {
                let Some((weight, row)) = sources[r] else {
                    r += 1;
                    continue;
                };
                let follow = (0..).zip(&sources[r..]);
                let run = follow.take_while(|(i, source)| **source == Some((weight, row + i))).count();
                for (i, values) in reader.read(weight, row..row + run)?.enumerate() {
                    let runs = columns
                        .iter()
                        .map(|(from, at)| (*at, &values[from.start - all.start..from.end - all.start]));
                    matrix.packing.put_row(out, r + i, &runs);
                }
                r += run;
            }
        }
        Ok(())
    }
}

/// Reads rows as bf16.
pub(super) struct RowReader<'a> {
    checkpoint: &'a Checkpoint,
    columns: Range<usize>,
    bytes: Vec<u8>,
    values: Vec<bf16>,
}

impl<'a> RowReader<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, columns: Range<usize>) -> Self {
        Self { checkpoint, columns, bytes: Vec::new(), values: Vec::new() }
    }

    pub(super) fn read(
        &mut self,
        weight: Weight,
        rows: Range<usize>,
    ) -> Result<impl Iterator<Item = &[bf16]>, ModelError> {
        let dtype = self.checkpoint.tensor(weight).dtype;
        let (block, cols) = (dtype.block_elems(), self.checkpoint.tensor(weight).cols);
        if !cols.is_multiple_of(block) {
            return Err(ModelError::RaggedBlocks { weight, cols, block });
        }
        let whole = self.columns.start / block * block..self.columns.end.next_multiple_of(block);
        self.checkpoint.read_rows(weight, rows.clone(), whole.clone(), &mut self.bytes)?;
        self.values.clear();
        if dtype == Dtype::Bf16 {
            let (pairs, _) = self.bytes.as_chunks();
            self.values.extend(pairs.iter().map(|pair| bf16::from_le_bytes(*pair)));
        } else {
            let mut wide = vec![0.0; rows.len() * whole.len()];
            dequantize(dtype, &self.bytes, &mut wide);
            self.values.extend(wide.into_iter().map(bf16::from_f32));
        }
        let own = self.columns.start - whole.start..self.columns.end - whole.start;
        Ok(self.values.chunks_exact(whole.len()).map(move |row| &row[own.clone()]))
    }
}
