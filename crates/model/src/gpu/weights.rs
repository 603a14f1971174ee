//! One rank's share of a model in a GPU's memory.

use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight, dequantize};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{KvDtype, Shards};
use half::bf16;

use super::device::{Address, Buffer, Device};
use super::inputs::bytes_of;
use super::kernels::{PAIR, TILE_PAIR_BYTES, TILE_ROWS};
use super::layout::{LEAVES_MAX, padded_dim, put_row};
use super::workspace::{Room, workspace_bytes};
use crate::cut::{Cut, Portion};
use crate::error::ModelError;
use crate::rank::Options;

/// Widest head that the kernels take.
const HEAD_DIM_MAX: usize = 128;
/// Query heads of a KV head: rows of a tile of attention.
const GROUP_MAX: usize = 16;
/// What a loading thread reads, packs and sends at a time, about.
const CHUNK_BYTES: usize = 4 << 20;
/// Threads that load at most.
const LOADING_THREADS_MAX: usize = 16;
/// What is put side by side in memory begins at multiples of this.
const ALIGNMENT: usize = 256;

/// One rank's share of a model: its virtual shards in bf16, packed for the kernels.
pub struct GpuWeights {
    pub(crate) portion: Portion,
    pub(super) device: Arc<dyn Device>,
    pub(super) shape: Shape,
    /// Holds all of it.
    memory: Buffer,
    pub(super) layers: Vec<Layer>,
    /// `[own rows][hidden]`.
    pub(super) embedding: Address,
    pub(super) head: Address,
    pub(super) final_norm: Address,
}

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
}

impl Shape {
    pub(super) fn hidden_pairs(&self) -> usize {
        self.hidden.div_ceil(PAIR)
    }
    pub(super) fn attended_pairs(&self) -> usize {
        self.group * self.dim / PAIR
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

    fn of(config: &Config, cut: &Cut, shards: Shards, rank: usize) -> Result<Self, ModelError> {
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
        Ok(Self {
            shards: own.len(),
            heads: cut.heads(own.clone()).len(),
            kv_heads: cut.kv_heads(own.clone()).len(),
            group,
            dim: padded_dim(config.head_dim),
            hidden: config.hidden,
            mlp: widest.next_multiple_of(PAIR),
            vocab: cut.vocab(own).len(),
        })
    }
}

/// Bytes that one KV block takes on `rank`'s GPU: keys and values in bf16 of [`KV_BLOCK_TOKENS`] positions for all layers and
/// the rank's KV heads.
///
/// # Errors
/// As [`Cut::of`]; [`ModelError::KvDtype`] for another dtype.
///
/// # Panics
/// If `rank` is not below N.
pub fn kv_bytes_per_block(
    config: &Config,
    shards: Shards,
    rank: usize,
    dtype: KvDtype,
) -> Result<usize, ModelError> {
    if dtype != KvDtype::Bf16 {
        return Err(ModelError::KvDtype { dtype });
    }
    let kv_heads = Cut::new(config, shards)?.kv_heads(shards.of_rank(rank)).len();
    Ok(config.layers * kv_heads * 2 * KV_BLOCK_TOKENS * padded_dim(config.head_dim) * size_of::<bf16>())
}

/// A matrix as it is packed: tiles of 16 rows over pairs of k-tiles, for one shard after another.
struct Matrix {
    rows: Rows,
    shards: usize,
    tiles: usize,
    pairs: usize,
    offset: usize,
}

/// Which row of which weight stands where.
enum Rows {
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
    fn tile_bytes(&self) -> usize {
        self.pairs * TILE_PAIR_BYTES
    }
    fn bytes(&self) -> usize {
        self.shards * self.tiles * self.tile_bytes()
    }
}

/// What a rank loads, and where it goes.
struct Plan<'a> {
    checkpoint: &'a Checkpoint,
    portion: &'a Portion,
    shape: Shape,
    matrices: Vec<Matrix>,
    bytes: usize,
}

/// Where everything is, from the beginning of the memory.
struct Offsets {
    layers: Vec<Layer>,
    norms: Vec<(Weight, usize)>,
    final_norm: usize,
    head: usize,
    /// `[own rows][hidden]`, as it is.
    embedding: usize,
}

impl<'a> Plan<'a> {
    fn new(checkpoint: &'a Checkpoint, portion: &'a Portion, shape: Shape) -> Self {
        Self { checkpoint, portion, shape, matrices: Vec::new(), bytes: 0 }
    }

    /// Gives everything its place.
    fn everything(&mut self) -> Offsets {
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
        let matrix = Matrix { rows, shards, tiles, pairs, offset: 0 };
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

    /// Reads and packs some tiles of a shard into `packed`.
    fn pack(
        &self,
        matrix: &Matrix,
        shard: usize,
        tiles: Range<usize>,
        packed: &mut Vec<u8>,
    ) -> Result<(), ModelError> {
        packed.clear();
        packed.resize(tiles.len() * matrix.tile_bytes(), 0);
        let columns = self.columns(&matrix.rows, shard);
        let Some(all) = columns.first().zip(columns.last()).map(|(first, last)| first.0.start..last.0.end)
        else {
            return Ok(());
        };
        let mut reader = RowReader {
            checkpoint: self.checkpoint,
            columns: all.clone(),
            bytes: Vec::new(),
            values: Vec::new(),
        };
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
                    for (from, at) in &columns {
                        put_row(out, r + i, *at, &values[from.start - all.start..from.end - all.start]);
                    }
                }
                r += run;
            }
        }
        Ok(())
    }
}

/// Reads rows as bf16.
struct RowReader<'a> {
    checkpoint: &'a Checkpoint,
    columns: Range<usize>,
    bytes: Vec<u8>,
    values: Vec<bf16>,
}

impl RowReader<'_> {
    fn read(
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

impl GpuWeights {
    /// Reads, packs and sends the shards of `rank` to `device`, with `threads` threads. `progress` is told, from any of
    /// them, how many of how many bytes are there.
    ///
    /// # Errors
    /// As [`Cut::of`]; [`ModelError::GpuShape`] for a shape that the kernels do not take; [`ModelError::Device`];
    /// whatever reading the files says.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn load(
        checkpoint: &Checkpoint,
        shards: Shards,
        rank: usize,
        device: &Arc<dyn Device>,
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let portion = Portion::new(checkpoint, shards, rank)?;
        let shape = Shape::of(&portion.config, &portion.cut, shards, rank)?;
        let mut plan = Plan::new(checkpoint, &portion, shape);
        let Offsets { mut layers, norms, final_norm, head, embedding } = plan.everything();
        let memory = Buffer::zeroed(device, plan.bytes)?;
        for (norm, offset) in norms {
            let mut values = Vec::new();
            checkpoint.read_rows(norm, 0..1, 0..shape.hidden, &mut values)?;
            let mut wide = vec![0.0f32; shape.hidden];
            dequantize(checkpoint.tensor(norm).dtype, &values, &mut wide);
            memory.upload(offset, bytes_of(&wide))?;
        }
        send(&plan, &memory, embedding, threads, progress)?;
        let at = |offset| memory.address() + offset;
        for Layer { attn_norm, qkv, o, mlp_norm, gate_up, down } in &mut layers {
            for offset in [attn_norm, qkv, o, mlp_norm, gate_up, down] {
                *offset = at(*offset);
            }
        }
        let [embedding, head, final_norm] = [embedding, head, final_norm].map(|offset| at(offset as Address));
        let device = Arc::clone(device);
        Ok(Self { portion, device, shape, memory, layers, embedding, head, final_norm })
    }

    /// Bytes that `rank` takes of its GPU besides KV memory, for weights and to work in; nothing is read.
    ///
    /// # Errors
    /// As [`GpuWeights::load`], but for reading.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn bytes_needed(
        checkpoint: &Checkpoint,
        shards: Shards,
        rank: usize,
        options: &Options,
    ) -> Result<[usize; 2], ModelError> {
        let portion = Portion::new(checkpoint, shards, rank)?;
        let shape = Shape::of(&portion.config, &portion.cut, shards, rank)?;
        let mut plan = Plan::new(checkpoint, &portion, shape);
        plan.everything();
        let room = Room {
            kv_blocks: 0,
            sequences: options.sequences_max,
            positions: portion.config.context_tokens_max,
            step_tokens: options.step_tokens_max,
            window: None,
        };
        Ok([plan.bytes, workspace_bytes(&portion.config, &shape, shards, rank, room)])
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The cut that they were loaded for.
    pub fn shards(&self) -> Shards {
        self.portion.shards
    }

    /// The rank whose shards these are.
    pub fn rank(&self) -> usize {
        self.portion.rank
    }

    /// The device that holds them.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

/// Packs all matrices and the embedding, and sends them; the first error ends it.
fn send(
    plan: &Plan<'_>,
    memory: &Buffer,
    embedding: usize,
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ModelError> {
    let mut jobs = Vec::new();
    for matrix in &plan.matrices {
        let each = (CHUNK_BYTES / matrix.tile_bytes().max(1)).max(1);
        for shard in 0..matrix.shards {
            for first in (0..matrix.tiles).step_by(each) {
                jobs.push((Some(matrix), shard, first..matrix.tiles.min(first + each)));
            }
        }
    }
    let row_bytes = plan.shape.hidden * size_of::<bf16>();
    let rows = (CHUNK_BYTES / row_bytes).max(1);
    jobs.extend(
        (0..plan.shape.vocab).step_by(rows).map(|first| (None, 0, first..plan.shape.vocab.min(first + rows))),
    );
    let total =
        (plan.matrices.iter().map(Matrix::bytes).sum::<usize>() + plan.shape.vocab * row_bytes) as u64;
    let (next, done, failure) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(None));
    let job = |(matrix, shard, range): &(Option<&Matrix>, usize, Range<usize>), packed: &mut Vec<u8>| {
        let offset = match matrix {
            Some(matrix) => {
                plan.pack(matrix, *shard, range.clone(), packed)?;
                matrix.offset + (shard * matrix.tiles + range.start) * matrix.tile_bytes()
            }
            None => {
                let first = plan.portion.cut.vocab(plan.portion.own_shards()).start;
                let columns = 0..plan.shape.hidden;
                let mut reader =
                    RowReader { checkpoint: plan.checkpoint, columns, bytes: Vec::new(), values: Vec::new() };
                packed.clear();
                for row in reader.read(Weight::Embedding, first + range.start..first + range.end)? {
                    packed.extend(row.iter().flat_map(|value| value.to_le_bytes()));
                }
                embedding + range.start * row_bytes
            }
        };
        memory.upload(offset, packed)?;
        let sent = packed.len() as u64;
        progress(done.fetch_add(sent, Ordering::Relaxed) + sent, total);
        Ok::<_, ModelError>(())
    };
    let work = || {
        let mut packed = Vec::new();
        while let Some(next) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = job(next, &mut packed) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
            if failure.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        iter::repeat_n((), threads.clamp(1, LOADING_THREADS_MAX) - 1).for_each(|()| drop(scope.spawn(work)));
        work();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
