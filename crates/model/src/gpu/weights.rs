//! One rank's share of a model in a GPU's memory.

use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use galerne_checkpoint::{Checkpoint, Config, Weight, dequantize};
use galerne_types::{KvDtype, Quantize, Shards};
use half::bf16;

use super::device::{Address, Buffer, Device};
use super::inputs::bytes_of;
use super::layout::{KvPacking, Packing, padded_dim};
use super::plan::{Layer, Matrix, Offsets, Plan, RowReader, Shape};
use super::workspace::{Room, workspace_bytes};
use crate::cut::{Cut, Portion};
use crate::error::ModelError;
use crate::rank::Options;

/// What a loading thread reads, packs and sends at a time, about.
const CHUNK_BYTES: usize = 4 << 20;
/// Threads that load at most.
const LOADING_THREADS_MAX: usize = 16;
/// One rank's share of a model: its virtual shards in bf16, or its layers' matrices in FP8, packed for the kernels.
pub struct GpuWeights {
    pub(crate) portion: Portion,
    pub(super) device: Arc<dyn Device>,
    pub(super) shape: Shape,
    pub(super) packing: Packing,
    /// Holds all of it.
    memory: Buffer,
    pub(super) layers: Vec<Layer>,
    /// `[own rows][hidden]`.
    pub(super) embedding: Address,
    pub(super) head: Address,
    pub(super) final_norm: Address,
}

/// Bytes that one KV block takes on `rank`'s GPU: keys and values of 32 positions for all layers and the rank's KV heads.
///
/// # Errors
/// As [`Cut::of`]; [`ModelError::KvDtype`] for a dtype that GPUs do not have.
///
/// # Panics
/// If `rank` is not below N.
pub fn kv_bytes_per_block(
    config: &Config,
    shards: Shards,
    rank: usize,
    dtype: KvDtype,
) -> Result<usize, ModelError> {
    let packing = KvPacking::of(dtype)?;
    let kv_heads = Cut::new(config, shards)?.kv_heads(shards.of_rank(rank)).len();
    Ok(config.layers * kv_heads * packing.head_bytes(padded_dim(config.head_dim)))
}

impl GpuWeights {
    /// Reads, packs and sends the shards of `rank` to `device`, with `threads` threads. `progress` is told, from any of
    /// them, how many of how many bytes are there.
    ///
    /// # Errors
    /// As [`Cut::of`]; [`ModelError::GpuShape`] for a shape that the kernels do not take; [`ModelError::GpuQuantize`] for a
    /// format that they do not; [`ModelError::Device`];
    /// whatever reading the files says.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn load(
        checkpoint: &Checkpoint,
        shards: Shards,
        rank: usize,
        quantize: Option<Quantize>,
        device: &Arc<dyn Device>,
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let portion = Portion::new(checkpoint, shards, rank)?;
        let shape = Shape::of(&portion.config, &portion.cut, shards, rank)?;
        let packing = Packing::of(quantize)?;
        let mut plan = Plan::new(checkpoint, &portion, shape, packing);
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
        Ok(Self { portion, device, shape, packing, memory, layers, embedding, head, final_norm })
    }

    /// Bytes that `rank` takes of its GPU of this architecture besides KV memory, for weights and to work in; nothing is read.
    ///
    /// # Errors
    /// As [`GpuWeights::load`], but for reading.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn bytes_needed(
        checkpoint: &Checkpoint,
        (shards, rank): (Shards, usize),
        quantize: Option<Quantize>,
        architecture: u16,
        options: &Options,
    ) -> Result<[usize; 2], ModelError> {
        let portion = Portion::new(checkpoint, shards, rank)?;
        let shape = Shape::of(&portion.config, &portion.cut, shards, rank)?;
        let mut plan = Plan::new(checkpoint, &portion, shape, Packing::of(quantize)?);
        plan.everything();
        let room = Room {
            kv_blocks: 0,
            sequences: options.sequences_max,
            positions: portion.config.context_tokens_max,
            step_tokens: options.step_tokens_max,
            window: None,
            kv_packing: KvPacking::of(options.kv_dtype)?,
            fast: options.is_fast(),
        };
        Ok([plan.bytes, workspace_bytes(architecture, &portion.config, &shape, (shards, rank), room)])
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

/// What a thread reads, packs and sends at a time.
struct Job<'a> {
    /// Tiles of a matrix's shard; or rows of the embedding.
    of: Option<(&'a Matrix, usize)>,
    range: Range<usize>,
    /// Where it goes, and its bytes.
    offset: usize,
    bytes: usize,
}

/// Everything that is sent.
fn jobs<'a>(plan: &'a Plan<'_>, embedding: usize) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    let mut cut = |of, count: usize, offset: usize, each_bytes: usize| {
        let each = (CHUNK_BYTES / each_bytes.max(1)).max(1);
        for first in (0..count).step_by(each) {
            let range = first..count.min(first + each);
            let (offset, bytes) = (offset + first * each_bytes, range.len() * each_bytes);
            jobs.push(Job { of, range, offset, bytes });
        }
    };
    for matrix in &plan.matrices {
        for shard in 0..matrix.shards {
            let offset = matrix.offset + shard * matrix.tiles * matrix.tile_bytes();
            cut(Some((matrix, shard)), matrix.tiles, offset, matrix.tile_bytes());
        }
    }
    cut(None, plan.shape.vocab, embedding, plan.shape.hidden * size_of::<bf16>());
    jobs
}

/// Reads and packs what is sent at a time.
fn pack(plan: &Plan<'_>, Job { of, range, .. }: &Job<'_>, packed: &mut [u8]) -> Result<(), ModelError> {
    if let Some((matrix, shard)) = of {
        return plan.pack(matrix, *shard, range.clone(), packed);
    }
    let first = plan.portion.cut.vocab(plan.portion.own_shards()).start;
    let mut reader = RowReader::new(plan.checkpoint, 0..plan.shape.hidden);
    let rows = reader.read(Weight::Embedding, first + range.start..first + range.end)?;
    let values = rows.flatten().map(|value| value.to_le_bytes());
    packed.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    Ok(())
}

/// Packs all matrices and the embedding, and sends them; the first error ends it.
fn send(
    plan: &Plan<'_>,
    memory: &Buffer,
    embedding: usize,
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ModelError> {
    let jobs = jobs(plan, embedding);
    let bytes = || jobs.iter().map(|job| job.bytes);
    let (total, largest) = (bytes().sum::<usize>() as u64, bytes().max().unwrap_or(0).max(1));
    let (next, done, failure) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(None));
    let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    let all = || {
        // One is packed while the other is on its way.
        let (mut now, mut later) = (memory.stage(largest)?, memory.stage(largest)?);
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| failed().is_none()) {
            now.wait()?;
            pack(plan, job, &mut now.bytes()[..job.bytes])?;
            memory.take(job.offset, &mut *now, 0..job.bytes)?;
            let sent = job.bytes as u64;
            progress(done.fetch_add(sent, Ordering::Relaxed) + sent, total);
            std::mem::swap(&mut now, &mut later);
        }
        Ok::<_, ModelError>(())
    };
    let work = || {
        if let Err(error) = all() {
            failed().get_or_insert(error);
        }
    };
    std::thread::scope(|scope| {
        iter::repeat_n((), threads.clamp(1, LOADING_THREADS_MAX) - 1).for_each(|()| drop(scope.spawn(work)));
        work();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
