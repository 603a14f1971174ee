//! Ranks on one GPU, a thread each, and what they draw.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, available_parallelism};
use std::time::Duration;

use galerne_checkpoint::Checkpoint;
use galerne_collective::nccl::{self, Communicator, LIBRARY_FILE, Library, UniqueId};
use galerne_collective::{Collective, Config, Peer};
use galerne_model::gpu::{Device, GpuWeights, Link, Peers};
use galerne_model::{Options, Rank, Trace};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{KvDtype, Shards, Slice, Step, TokenId};

use crate::Outcome;
use crate::device::Gpus;
use crate::local::Local;

/// Ids and logits of what was drawn, by slot and index.
pub(crate) type Drawn = BTreeMap<(u32, u32), (TokenId, Vec<f32>)>;

/// Threads that load, and draw.
pub(crate) fn threads() -> usize {
    available_parallelism().map_or(1, usize::from).min(16)
}

/// What a rank of a check or a measurement gets.
pub(crate) fn options(kv_blocks: usize, sequences_max: usize, step_tokens_max: usize) -> Options {
    let threads = threads().min(4);
    Options {
        threads,
        kv_blocks,
        sequences_max,
        step_tokens_max,
        kv_dtype: KvDtype::Bf16,
        ..Options::default()
    }
}

/// Loads one rank's shards.
pub(crate) fn load(
    gpus: &Gpus,
    checkpoint: &Checkpoint,
    shards: Shards,
    rank: usize,
    device: &Arc<dyn Device>,
) -> Outcome<Arc<GpuWeights>> {
    let quantize = gpus.quantize;
    Ok(Arc::new(GpuWeights::load(checkpoint, shards, rank, quantize, device, threads(), &|_, _| {})?))
}

/// The weights of all ranks of a group, which share the GPU.
pub(crate) fn load_group(
    gpus: &Gpus,
    checkpoint: &Checkpoint,
    world_size: usize,
) -> Outcome<Vec<Arc<GpuWeights>>> {
    let shards = Shards::new(virtual_shards(checkpoint), world_size)?;
    (0..world_size).map(|rank| load(gpus, checkpoint, shards, rank, &gpus.open()?)).collect()
}

/// S such that groups of 1, 2 and 4 can be made.
pub(crate) fn virtual_shards(checkpoint: &Checkpoint) -> usize {
    checkpoint.config().kv_heads.next_multiple_of(4)
}

/// Opens a model, which is a folder or a GGUF file.
pub(crate) fn open(path: &Path) -> Outcome<Checkpoint> {
    Ok(Checkpoint::open(path)?)
}

/// By what partial sums travel between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the host's memory.
    Host,
    /// From GPU to GPU, here from the one to itself.
    Nccl,
    /// By memory that all of them have mapped.
    Memory,
}

impl Way {
    /// Meets the others; every rank has the library for itself, as every process would.
    pub(crate) fn link(self, weights: &GpuWeights, end: &mut Local, timeout: Duration) -> Outcome<Link> {
        match self {
            Self::Host => Ok(Link::host()),
            Self::Nccl => Ok(Link::nccl(Self::communicator(weights, end, timeout)?)),
            Self::Memory => {
                let peers = Self::peers(weights, end, timeout)?
                    .ok_or("a rank does not reach the memory of another")?;
                Ok(Link::host().beside(Some(peers)))
            }
        }
    }

    /// The memory of all ranks; nothing if it cannot be had.
    pub(crate) fn peers(
        weights: &GpuWeights,
        end: &mut dyn Collective,
        timeout: Duration,
    ) -> Outcome<Option<Peers>> {
        let of = (weights.shards(), weights.rank(), Peers::LEN_MAX);
        Ok(Peers::meet(weights.device(), of, end, timeout, &|error| eprintln!("{error}"))?)
    }

    pub(crate) fn communicator(
        weights: &GpuWeights,
        end: &mut Local,
        timeout: Duration,
    ) -> Outcome<Communicator> {
        let shards = weights.shards();
        let peer = |rank| Peer {
            host: "here".into(),
            address: ([127, 0, 0, 1], 1).into(),
            leaves: shards.of_rank(rank),
        };
        let config = Config {
            rank: weights.rank(),
            leaves: shards.virtual_shards(),
            peers: (0..shards.world_size()).map(peer).collect(),
            secret: [0; 32].into(),
            epoch: 1,
            threads: 1,
            meet_timeout: TIMEOUT,
            timeout,
        };
        let library = Arc::new(Library::open(LIBRARY_FILE)?);
        let id = UniqueId::share(&library, config.epoch, end)?;
        let device = Arc::clone(weights.device());
        Ok(nccl::connect(&config, &library, id, &end.abort_handle(), move || device.bind())?)
    }
}

/// How long ranks wait for each other.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs steps at all ranks; what rank 0 drew, with logits if they are asked for.
pub(crate) fn run(
    weights: &[Arc<GpuWeights>],
    options: &Options,
    steps: &[Step],
    logits: bool,
) -> Outcome<Drawn> {
    run_by(Way::Host, weights, options, steps, logits)
}

/// The same, by a way of one's choice.
pub(crate) fn run_by(
    way: Way,
    weights: &[Arc<GpuWeights>],
    options: &Options,
    steps: &[Step],
    logits: bool,
) -> Outcome<Drawn> {
    let ends = Local::group(weights[0].shards().virtual_shards(), weights.len());
    let at_each = |(mut end, weights): (Local, &Arc<GpuWeights>)| -> Outcome<Drawn> {
        let link = way.link(weights, &mut end, TIMEOUT)?;
        let mut rank = Rank::on_gpu(Arc::clone(weights), options, Box::new(end), link)?;
        let drawn = run_on(&mut rank, steps, logits)?;
        rank.close()?;
        Ok(drawn)
    };
    thread::scope(|scope| {
        // A rank that fails leaves the others waiting for it: then the time limit of the whole ends them.
        let ranks = ends.into_iter().zip(weights).map(|rank| scope.spawn(move || at_each(rank)));
        let ranks: Vec<_> = ranks.collect();
        let mut drawn = ranks.into_iter().map(|rank| rank.join().map_err(|_| "a rank has panicked")?);
        let first = drawn.next().ok_or("a group has a rank")??;
        for (rank, other) in (1..).zip(drawn) {
            if !ids(&other?).eq(ids(&first)) {
                return Err(format!("rank {rank} knows other tokens than rank 0").into());
            }
        }
        Ok(first)
    })
}

fn ids(drawn: &Drawn) -> impl Iterator<Item = ((u32, u32), TokenId)> {
    drawn.iter().map(|(key, (id, _))| (*key, *id))
}

/// Runs steps at one rank.
pub(crate) fn run_on(rank: &mut Rank, steps: &[Step], with_logits: bool) -> Outcome<Drawn> {
    let mut drawn = Drawn::new();
    for (index, step) in steps.iter().enumerate() {
        if !with_logits
            && rank.begin(step)?
            && let Some(next) = steps.get(index + 1)
        {
            rank.begin(next)?;
        }
        let mut rows = BTreeMap::<usize, VecDeque<Vec<f32>>>::new();
        let sampled = match with_logits {
            false => rank.step(step, &mut |_| None)?,
            true => rank.step_traced(step, &mut |_| None, &mut |trace| {
                if let Trace::Logits { slice, row } = trace {
                    rows.entry(slice).or_default().push_back(row.to_vec());
                }
            })?,
        };
        let mut further = sampled.further.into_iter();
        for (index, (slice, token)) in step.slices.iter().zip(sampled.tokens).enumerate() {
            let (Some(draw), Some(token)) = (&slice.draw, token) else { continue };
            let more = if draw.draft.is_empty() { None } else { further.next() };
            for (at, token) in (draw.index..).zip([token].into_iter().chain(more.into_iter().flatten())) {
                let row = rows.get_mut(&index).and_then(VecDeque::pop_front).unwrap_or_default();
                drawn.insert((slice.slot, at), (token.id, row));
            }
        }
    }
    Ok(drawn)
}

/// Blocks that a script of these steps needs.
pub(crate) fn blocks_of(steps: &[Step]) -> usize {
    let last = |slice: &Slice| slice.blocks.iter().copied().max().unwrap_or(0) as usize;
    steps.iter().flat_map(|step| &step.slices).map(last).max().unwrap_or(0) + 1
}

/// KV blocks of so many positions.
pub(crate) fn blocks(positions: usize) -> usize {
    positions.div_ceil(KV_BLOCK_TOKENS)
}
