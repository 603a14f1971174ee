use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight, dequantize};
use galerne_types::Shards;

use crate::cut::{Cut, UNIT};
use crate::error::ModelError;
use crate::math::SUM_LANES;
use crate::packed::{PANEL, Packed};

/// What one loading thread reads at a time; at least one panel. With packing's scratch, 16 threads stay under 64 MiB.
const CHUNK_BYTES: usize = 1 << 20;
/// More threads than this gain nothing from any disk and would only hold more chunks.
const LOADING_THREADS_MAX: usize = 16;

/// One rank's share of a model: its virtual shards, packed for the kernels.
pub struct Weights {
    pub(crate) config: Config,
    pub(crate) shards: Shards,
    pub(crate) rank: usize,
    pub(crate) cut: Cut,
    pub(crate) layers: Vec<Layer>,
    pub(crate) embedding: Packed,
    /// `None` where the embedding serves as the head.
    pub(crate) head: Option<Packed>,
    /// Padded, as all norms are.
    pub(crate) final_norm: Vec<f32>,
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
    /// Reads and packs the shards of `rank`, and nothing else, with `threads` threads. `progress` is told, from any
    /// of them, how many of how many bytes are read. Peak memory is the share itself and less than 64 MiB.
    ///
    /// # Errors
    /// As [`Cut::new`]; [`ModelError::RaggedBlocks`] for a quantized matrix of an odd width; whatever reading the
    /// files says.
    ///
    /// # Panics
    /// If `rank` is not below N.
    pub fn load(
        checkpoint: &Checkpoint,
        shards: Shards,
        rank: usize,
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let cut = Cut::new(&config, shards)?;
        let share = Share { checkpoint, cut: &cut, shards: shards.of_rank(rank) };
        let parts = share.parts()?;
        let mut loaded = load_parts(checkpoint, &parts, threads, progress)?.into_iter();
        let mut all = || loaded.next().expect("as many as there are parts");
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
        let embedding = only(all());
        let head = (!config.tied).then(|| only(all()));
        let final_norm = norm(checkpoint, Weight::FinalNorm)?;
        Ok(Self { config, shards, rank, cut, layers, embedding, head, final_norm })
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The cut that these weights were loaded for.
    pub fn shards(&self) -> Shards {
        self.shards
    }

    /// The rank whose shards these are.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes that the matrices take.
    pub fn bytes(&self) -> usize {
        let of_layer = |layer: &Layer| {
            let whole = [&layer.q, &layer.k, &layer.v, &layer.gate, &layer.up];
            whole.into_iter().chain(&layer.o).chain(&layer.down).map(Packed::bytes).sum::<usize>()
        };
        self.layers.iter().map(of_layer).sum::<usize>()
            + self.embedding.bytes()
            + self.head.as_ref().map_or(0, Packed::bytes)
    }

    /// The virtual shards of this rank.
    pub(crate) fn own_shards(&self) -> Range<usize> {
        self.shards.of_rank(self.rank)
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
    stored: Dtype,
    packed: Dtype,
    rows: Range<usize>,
    slices: Vec<Range<usize>>,
}

impl Share<'_> {
    /// In the order in which [`Weights::load`] takes them.
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
        let mut parts = Vec::new();
        for layer in 0..config.layers {
            parts.push(self.rows_of(Weight::Q(layer), of_heads(q.clone()))?);
            parts.push(self.rows_of(Weight::K(layer), of_heads(kv.clone()))?);
            parts.push(self.rows_of(Weight::V(layer), of_heads(kv.clone()))?);
            parts.push(self.part(Weight::O(layer), 0..config.hidden, o_slices.clone())?);
            parts.push(self.rows_of(Weight::Gate(layer), mlp.clone())?);
            parts.push(self.rows_of(Weight::Up(layer), mlp.clone())?);
            parts.push(self.part(Weight::Down(layer), 0..config.hidden, down_slices.clone())?);
        }
        let vocab = self.cut.vocab(self.shards.clone());
        parts.push(self.rows_of(Weight::Embedding, vocab.clone())?);
        if !config.tied {
            parts.push(self.rows_of(Weight::Head, vocab)?);
        }
        Ok(parts)
    }

    fn rows_of(&self, weight: Weight, rows: Range<usize>) -> Result<Part, ModelError> {
        let cols = self.checkpoint.tensor(weight).cols;
        self.part(weight, rows, vec![0..cols])
    }

    fn part(&self, weight: Weight, rows: Range<usize>, slices: Vec<Range<usize>>) -> Result<Part, ModelError> {
        let info = self.checkpoint.tensor(weight);
        let (cols, stored) = (info.cols, info.dtype);
        if !cols.is_multiple_of(stored.block_elems()) {
            return Err(ModelError::RaggedBlocks { weight, cols, block: stored.block_elems() });
        }
        // The whole model's cuts decide, not this rank's, so that N does not show in the numerics.
        let whole = stored.block_elems() == 1 || slices.len() == 1 && slices[0] == (0..cols) || self.cuts_at_blocks(weight);
        Ok(Part { weight, stored, packed: if whole { stored } else { Dtype::F32 }, rows, slices })
    }

    /// Whether every shard's columns of `o` or `down` begin and end between quantized blocks.
    fn cuts_at_blocks(&self, weight: Weight) -> bool {
        let config = self.checkpoint.config();
        match weight {
            Weight::O(_) => (config.heads / config.kv_heads * config.head_dim).is_multiple_of(UNIT),
            _ => true,
        }
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

    /// Reads and packs; `read` is told of every chunk's bytes.
    fn load(&self, checkpoint: &Checkpoint, read: &dyn Fn(u64)) -> Result<Vec<Packed>, ModelError> {
        let rows = self.rows.len();
        let mut packed: Vec<Packed> =
            self.slices.iter().map(|slice| Packed::zeroed(self.packed, rows, slice.len())).collect();
        let (columns, row_bytes) = (self.columns(), self.row_bytes());
        if row_bytes == 0 {
            return Ok(packed);
        }
        let chunk_rows = (CHUNK_BYTES / row_bytes / PANEL * PANEL).max(PANEL);
        let (mut bytes, mut values, mut widened) = (Vec::new(), vec![0.0; columns.len()], Vec::new());
        for first in (0..rows).step_by(chunk_rows) {
            let chunk = first..rows.min(first + chunk_rows);
            let in_file = self.rows.start + chunk.start..self.rows.start + chunk.end;
            checkpoint.read_rows(self.weight, in_file, columns.clone(), &mut bytes)?;
            for (row, encoded) in chunk.zip(bytes.chunks_exact(row_bytes)) {
                let encoded = if self.packed == self.stored {
                    encoded
                } else {
                    dequantize(self.stored, encoded, &mut values);
                    widened.clear();
                    widened.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                    &widened
                };
                for (slice, matrix) in self.slices.iter().zip(&mut packed) {
                    let start = self.packed.row_bytes(slice.start - columns.start);
                    matrix.set_row(row, &encoded[start..][..self.packed.row_bytes(slice.len())]);
                }
            }
            read(bytes.len() as u64);
        }
        Ok(packed)
    }
}

/// Loads all parts; the threads take them from the first to the last. The first error ends the loading.
fn load_parts(
    checkpoint: &Checkpoint,
    parts: &[Part],
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<Vec<Packed>>, ModelError> {
    let total = parts.iter().map(Part::bytes).sum();
    let (next, done, failed) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let loaded: Vec<Mutex<Option<Result<Vec<Packed>, ModelError>>>> =
        parts.iter().map(|_| Mutex::new(None)).collect();
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(part) = parts.get(index) else { return };
            let result = part.load(checkpoint, &|bytes| {
                progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
            });
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            *loaded[index].lock().expect("nobody panics with it") = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.clamp(1, LOADING_THREADS_MAX) {
            scope.spawn(work);
        }
        work();
    });
    let results = loaded.into_iter().filter_map(|slot| slot.into_inner().expect("nobody panics with it"));
    results.collect()
}
