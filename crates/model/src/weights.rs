use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight, dequantize};
use galerne_types::{Compute, Shards};

use crate::cores::{Cores, nodes};
use crate::cut::{Cut, Portion};
use crate::error::ModelError;
use crate::math::SUM_LANES;
use crate::memory::Buffer;
use crate::packed::{PAIR, PANEL, Packed, Shape};
use crate::simd::Isa;

/// What one loading thread reads at a time; at least one panel. With packing's scratch, 16 threads stay under 64 MiB.
const CHUNK_BYTES: usize = 256 << 10;
/// More threads than this gain nothing from any disk and would only hold more chunks.
const LOADING_THREADS_MAX: usize = 16;

/// One rank's share of a model: its virtual shards, packed for the kernels.
pub struct Weights {
    pub(crate) portion: Portion,
    bytes: usize,
    pub(crate) layers: Vec<Layer>,
    pub(crate) embedding: Packed,
    /// `None` where the embedding serves as the head.
    pub(crate) head: Option<Packed>,
    /// Padded, as all norms are.
    pub(crate) final_norm: Vec<f32>,
}

/// Weights of a model from which on rounded activations suit it. Smaller ones feel the rounding (SmolLM2-135M with
/// eight bits forgets the capital of France, as it does in llama.cpp), and are quick enough without.
const ROUNDED_WEIGHTS_MIN: usize = 500_000_000;

/// The way to compute that `auto` takes for a checkpoint of half a billion weights and more: bytes if any of them are
/// quantized, in its files or at load; pairs if any are bf16 and `isa` multiplies pairs.
pub fn compute_for(checkpoint: &Checkpoint, isa: Isa) -> Compute {
    let tensors: Vec<_> = Weight::all(checkpoint.config()).map(|weight| checkpoint.tensor(weight)).collect();
    let weights = tensors.iter().map(|tensor| tensor.rows * tensor.cols).sum();
    let dtypes: Vec<_> = tensors.iter().map(|tensor| tensor.dtype).collect();
    compute_of(weights, &dtypes, isa.multiplies_pairs())
}

fn compute_of(weights: usize, dtypes: &[Dtype], pairs: bool) -> Compute {
    if weights < ROUNDED_WEIGHTS_MIN {
        Compute::F32
    } else if dtypes.iter().any(|dtype| dtype.is_quantized()) {
        Compute::Int8
    } else if pairs && dtypes.contains(&Dtype::Bf16) {
        Compute::Bf16
    } else {
        Compute::F32
    }
}

/// One layer's share. Matrices that all tokens' full rows go into hold the rank's outputs; `o` and `down`, whose
/// inputs are cut, stand once for each of the rank's virtual shards.
pub(crate) struct Layer {
    pub(crate) attn_norm: Vec<f32>,
    pub(crate) q: Packed,
    pub(crate) k: Packed,
    pub(crate) v: Packed,
    pub(crate) o: Vec<Packed>,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate: Packed,
    pub(crate) up: Packed,
    pub(crate) down: Vec<Packed>,
}

impl Weights {
    /// Reads and packs the shards of `rank`, and nothing else, with `threads` threads. Every matrix lies in the memory of the
    /// nodes of `cores`, each thread's part where that thread is going to compute. `progress` is told, from any of them, how many
    /// of how many bytes are read. Peak memory is the share itself and less than 64 MiB.
    ///
    /// # Errors
    /// As [`Cut::of`]; [`ModelError::RaggedBlocks`] for a quantized matrix of an odd width; whatever reading the
    /// files says.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn load(
        checkpoint: &Checkpoint,
        shards: Shards,
        rank: usize,
        threads: usize,
        cores: Option<&Cores>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let portion = Portion::new(checkpoint, shards, rank)?;
        let config = &portion.config;
        let share = Share { checkpoint, cut: &portion.cut, shards: portion.own_shards() };
        let parts = share.parts()?;
        let mut loaded = load_parts(checkpoint, &parts, threads, cores, progress)?.into_iter();
        let mut all = || loaded.next().unwrap_or_default();
        let embedding = only(all());
        let head = (!config.tied).then(|| only(all()));
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(Layer {
                attn_norm: norm(checkpoint, Weight::AttnNorm(layer))?,
                mlp_norm: norm(checkpoint, Weight::MlpNorm(layer))?,
                q: only(all()),
                k: only(all()),
                v: only(all()),
                o: all(),
                gate: only(all()),
                up: only(all()),
                down: all(),
            });
        }
        let final_norm = norm(checkpoint, Weight::FinalNorm)?;
        let bytes = parts.iter().map(Part::packed_bytes).sum();
        Ok(Self { portion, bytes, layers, embedding, head, final_norm })
    }

    /// Bytes that the matrices of `rank` will take; nothing is read.
    ///
    /// # Errors
    /// As [`Weights::load`], but for reading.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn bytes_of(checkpoint: &Checkpoint, shards: Shards, rank: usize) -> Result<usize, ModelError> {
        let cut = Cut::of(checkpoint, shards)?;
        let share = Share { checkpoint, cut: &cut, shards: shards.of_rank(rank) };
        Ok(share.parts()?.iter().map(Part::packed_bytes).sum())
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.portion.config
    }

    /// The cut that these weights were loaded for.
    pub fn shards(&self) -> Shards {
        self.portion.shards
    }

    /// The rank whose shards these are.
    pub fn rank(&self) -> usize {
        self.portion.rank
    }

    /// Bytes that the matrices take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn only(mut matrices: Vec<Packed>) -> Packed {
    matrices.pop().expect("a part that is not sliced is one matrix")
}

/// A norm's weights, padded with zeros.
fn norm(checkpoint: &Checkpoint, weight: Weight) -> Result<Vec<f32>, ModelError> {
    let info = checkpoint.tensor(weight);
    let (cols, dtype) = (info.cols, info.dtype);
    if !cols.is_multiple_of(dtype.block_elems()) {
        return Err(ModelError::RaggedBlocks { weight, cols, block: dtype.block_elems() });
    }
    let mut bytes = Vec::new();
    checkpoint.read_rows(weight, 0..1, 0..cols, &mut bytes)?;
    let mut values = vec![0.0; cols.next_multiple_of(SUM_LANES)];
    dequantize(dtype, &bytes, &mut values[..cols]);
    Ok(values)
}

/// What one rank loads.
struct Share<'a> {
    checkpoint: &'a Checkpoint,
    cut: &'a Cut,
    shards: Range<usize>,
}

/// A matrix to load: `rows` of it, and of those the column ranges `slices`, each packed by itself. The slices are
/// consecutive.
struct Part {
    weight: Weight,
    /// As the checkpoint reads it.
    stored: Dtype,
    packed: Dtype,
    rows: Range<usize>,
    slices: Vec<Range<usize>>,
}

impl Share<'_> {
    /// In the order in which [`Weights::load`] takes them: the largest first, so that no thread is left alone with one.
    fn parts(&self) -> Result<Vec<Part>, ModelError> {
        let config = self.checkpoint.config();
        let dim = config.head_dim;
        let of_heads = |heads: Range<usize>| heads.start * dim..heads.end * dim;
        let (q, kv) = (self.cut.heads(self.shards.clone()), self.cut.kv_heads(self.shards.clone()));
        let mlp = self.cut.mlp(self.shards.clone());
        let by_shard = |columns: &dyn Fn(Range<usize>) -> Range<usize>| -> Vec<Range<usize>> {
            self.shards.clone().map(|shard| columns(shard..shard + 1)).collect()
        };
        let o_slices = by_shard(&|shard| of_heads(self.cut.heads(shard)));
        let down_slices = by_shard(&|shard| self.cut.mlp(shard));
        let vocab = self.cut.vocab(self.shards.clone());
        let mut parts = vec![self.rows_of(Weight::Embedding, vocab.clone())?];
        if !config.tied {
            parts.push(self.rows_of(Weight::Head, vocab)?);
        }
        for layer in 0..config.layers {
            parts.push(self.rows_of(Weight::Q(layer), of_heads(q.clone()))?);
            parts.push(self.rows_of(Weight::K(layer), of_heads(kv.clone()))?);
            parts.push(self.rows_of(Weight::V(layer), of_heads(kv.clone()))?);
            parts.push(self.part(Weight::O(layer), 0..config.hidden, o_slices.clone())?);
            parts.push(self.rows_of(Weight::Gate(layer), mlp.clone())?);
            parts.push(self.rows_of(Weight::Up(layer), mlp.clone())?);
            parts.push(self.part(Weight::Down(layer), 0..config.hidden, down_slices.clone())?);
        }
        Ok(parts)
    }

    fn rows_of(&self, weight: Weight, rows: Range<usize>) -> Result<Part, ModelError> {
        let cols = self.checkpoint.tensor(weight).cols;
        self.part(weight, rows, iter::once(0..cols).collect())
    }

    fn part(
        &self,
        weight: Weight,
        rows: Range<usize>,
        slices: Vec<Range<usize>>,
    ) -> Result<Part, ModelError> {
        let info = self.checkpoint.tensor(weight);
        let (cols, stored) = (info.cols, info.dtype);
        if !cols.is_multiple_of(stored.block_elems()) {
            return Err(ModelError::RaggedBlocks { weight, cols, block: stored.block_elems() });
        }
        // A shard's columns that begin or end within a block cannot share its scale, or within a pair its place: they
        // are stored as f32, of the same value.
        let block = if stored == Dtype::Bf16 { PAIR } else { stored.block_elems() };
        let at_blocks =
            |slice: &Range<usize>| slice.start.is_multiple_of(block) && slice.end.is_multiple_of(block);
        let packed = if slices.iter().all(at_blocks) { stored } else { Dtype::F32 };
        Ok(Part { weight, stored, packed, rows, slices })
    }
}

impl Part {
    /// The columns to read: all slices', widened to whole blocks.
    fn columns(&self) -> Range<usize> {
        let block = self.stored.block_elems();
        let (start, end) = (self.slices[0].start, self.slices[self.slices.len() - 1].end);
        start / block * block..end.next_multiple_of(block)
    }

    fn row_bytes(&self) -> usize {
        self.stored.row_bytes(self.columns().len())
    }

    fn bytes(&self) -> u64 {
        (self.row_bytes() * self.rows.len()) as u64
    }

    /// The matrices that the part becomes, one a slice.
    fn shapes(&self) -> impl Iterator<Item = Shape> {
        self.slices.iter().map(|slice| Shape { dtype: self.packed, rows: self.rows.len(), cols: slice.len() })
    }

    fn packed_bytes(&self) -> usize {
        self.shapes().map(Shape::bytes).sum()
    }

    /// Has the system read ahead what [`load`](Part::load) is going to: of whole rows, so that a rank asks for no other's part.
    fn warm(&self, checkpoint: &Checkpoint) {
        if self.columns().len() == checkpoint.tensor(self.weight).cols {
            // Whoever cannot read ahead reads all the same.
            let _ = checkpoint.warm_rows(self.weight, self.rows.clone());
        }
    }

    /// Reads, and packs into `memory`, one matrix after another; `read` is told of every chunk's bytes.
    fn load(&self, checkpoint: &Checkpoint, memory: &mut [u8], read: &dyn Fn(u64)) -> Result<(), ModelError> {
        let (rows, columns, row_bytes) = (self.rows.len(), self.columns(), self.row_bytes());
        if row_bytes == 0 {
            return Ok(());
        }
        let chunk_rows = (CHUNK_BYTES / row_bytes / PANEL * PANEL).max(PANEL);
        let (mut bytes, mut widened) = (Vec::new(), Vec::new());
        for first in (0..rows).step_by(chunk_rows) {
            let chunk = first..rows.min(first + chunk_rows);
            let in_file = self.rows.start + chunk.start..self.rows.start + chunk.end;
            checkpoint.read_rows(self.weight, in_file, columns.clone(), &mut bytes)?;
            let encoded = if self.packed == self.stored {
                &bytes
            } else {
                widen(self.stored, &bytes, &mut widened);
                &widened
            };
            let rows: Vec<&[u8]> = encoded.chunks_exact(self.packed.row_bytes(columns.len())).collect();
            let mut memory = &mut *memory;
            for (slice, shape) in self.slices.iter().zip(self.shapes()) {
                let (matrix, rest) = memory.split_at_mut(shape.bytes());
                let (start, end) = (slice.start - columns.start, slice.end - columns.start);
                let within = self.packed.row_bytes(start)..self.packed.row_bytes(end);
                for (panel, rows) in (chunk.start / PANEL..).zip(rows.chunks(PANEL)) {
                    let rows: Vec<&[u8]> = rows.iter().map(|row| &row[within.clone()]).collect();
                    shape.set_panel(matrix, panel, &rows);
                }
                memory = rest;
            }
            read(bytes.len() as u64);
        }
        Ok(())
    }
}

/// The values that whole blocks of `dtype` stand for, as bytes of f32.
fn widen(dtype: Dtype, encoded: &[u8], out: &mut Vec<u8>) {
    let mut values = vec![0.0; encoded.len() / dtype.block_bytes() * dtype.block_elems()];
    dequantize(dtype, encoded, &mut values);
    out.clear();
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// Asks for the pages of every matrix in the nodes whose threads will read them: a job is cut into zones in the order of its
/// outputs (`team`), and queries, keys and values are one job.
fn place(memory: &Buffer<u8>, parts: &[Part], nodes: &[(usize, Range<usize>)]) {
    let threads = nodes.last().map_or(0, |(_, homes)| homes.end);
    let mut start = 0;
    for job in parts.chunk_by(|_, next| matches!(next.weight, Weight::K(_) | Weight::V(_))) {
        let lengths: Vec<usize> = match job {
            [part] => part.shapes().map(Shape::bytes).collect(),
            several => vec![several.iter().map(Part::packed_bytes).sum()],
        };
        for bytes in lengths {
            for (node, homes) in nodes {
                let at = |home: usize| start + bytes * home / threads;
                memory.prefer(at(homes.start)..at(homes.end), *node);
            }
            start += bytes;
        }
    }
}

/// Loads all parts into one memory; the threads take them from the first to the last. The first error ends the
/// loading. Returns the matrices of each part.
fn load_parts(
    checkpoint: &Checkpoint,
    parts: &[Part],
    threads: usize,
    cores: Option<&Cores>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<Vec<Packed>>, ModelError> {
    let total = parts.iter().map(Part::bytes).sum();
    let mut memory = Buffer::zeroed(parts.iter().map(Part::packed_bytes).sum());
    if let Some(cores) = cores {
        place(&memory, parts, &nodes(&cores.homes(threads)));
    }
    let mut rest = &mut memory[..];
    let mut jobs = Vec::with_capacity(parts.len());
    for part in parts {
        let (own, after) = rest.split_at_mut(part.packed_bytes());
        jobs.push((part, own));
        rest = after;
    }
    let threads = threads.clamp(1, LOADING_THREADS_MAX);
    parts.iter().take(threads).for_each(|part| part.warm(checkpoint));
    let (jobs, done) = (Mutex::new(jobs.into_iter().enumerate()), AtomicU64::new(0));
    let failure = Mutex::new(None);
    let work = || {
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((index, (part, memory))) = job else { return };
            if let Some(later) = parts.get(index + threads) {
                later.warm(checkpoint);
            }
            let result = part.load(checkpoint, memory, &|bytes| {
                progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
            });
            if let Err(error) = result {
                jobs.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    drop(jobs);
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(matrices(parts, &Arc::new(memory))),
    }
}

/// The matrices of each part, which lie in `memory` one after another.
fn matrices(parts: &[Part], memory: &Arc<Buffer<u8>>) -> Vec<Vec<Packed>> {
    let mut start = 0;
    let mut matrix = |shape: Shape| {
        let matrix = Packed::new(shape, Arc::clone(memory), start);
        start += shape.bytes();
        matrix
    };
    parts.iter().map(|part| part.shapes().map(&mut matrix).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_models_are_computed_with_rounded_activations() {
        let (large, small) = (7_248_023_552, 134_515_008);
        for (weights, dtypes, pairs, expected) in [
            (large, [Dtype::F32, Dtype::Q4_1], true, Compute::Int8),
            (large, [Dtype::Bf16, Dtype::Q8_0], true, Compute::Int8),
            (large, [Dtype::Bf16, Dtype::F32], true, Compute::Bf16),
            (large, [Dtype::Bf16, Dtype::F32], false, Compute::F32),
            (large, [Dtype::F16, Dtype::F32], true, Compute::F32),
            (small, [Dtype::Q8_0, Dtype::Q4_1], true, Compute::F32),
            (small, [Dtype::Bf16, Dtype::Bf16], true, Compute::F32),
        ] {
            assert_eq!(compute_of(weights, &dtypes, pairs), expected, "{weights} of {dtypes:?}");
        }
    }
}
