//! Runs a script on N ranks, one thread each.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Collective;
use galerne_emulator::Emulator;
use galerne_model::gpu::{Device, GpuWeights, Link, Peers};
use galerne_model::{Options, Rank, Trace, Weights};
use galerne_types::{Compute, Quantize, Shards, Step, TokenId};

use super::local::Local;
use super::script::KV_BLOCKS;

/// What came out, by (slot, index of the drawn token).
pub(crate) type Drawn = BTreeMap<(u32, u32), (TokenId, Vec<f32>)>;

pub(crate) fn options() -> Options {
    Options {
        threads: 1,
        kv_blocks: KV_BLOCKS,
        sequences_max: 4,
        step_tokens_max: 300,
        compute: Compute::F32,
        ..Options::default()
    }
}

/// The only rank of a group, with as many virtual shards as KV heads.
pub(crate) fn solo(checkpoint: &Checkpoint, options: &Options) -> Rank {
    let shards = Shards::for_model(checkpoint.config().kv_heads, 1, None).unwrap();
    let weights = Arc::new(Weights::load(checkpoint, shards, 0, 2, None, &|_, _| {}).unwrap());
    let collective = Local::group(shards.virtual_shards(), 1).remove(0);
    Rank::new(weights, options, Box::new(collective)).unwrap()
}

/// Runs `steps` on one rank and returns what was drawn, with the logits at rank 0.
pub(crate) fn run(rank: &mut Rank, steps: &[Step]) -> Drawn {
    let mut drawn = Drawn::new();
    for step in steps {
        let mut logits = BTreeMap::<usize, VecDeque<Vec<f32>>>::new();
        let sampled = rank
            .step_traced(step, &mut |_| None, &mut |trace| {
                if let Trace::Logits { slice, row } = trace {
                    logits.entry(slice).or_default().push_back(row.to_vec());
                }
            })
            .unwrap();
        let mut further = sampled.further.into_iter();
        for (index, (slice, token)) in step.slices.iter().zip(sampled.tokens).enumerate() {
            let (Some(draw), Some(token)) = (&slice.draw, token) else { continue };
            let more = if draw.draft.is_empty() { None } else { further.next() };
            for (at, token) in (draw.index..).zip([token].into_iter().chain(more.into_iter().flatten())) {
                let row = logits.get_mut(&index).and_then(VecDeque::pop_front).unwrap_or_default();
                assert!(drawn.insert((slice.slot, at), (token.id, row)).is_none(), "drawn once");
            }
        }
        assert!(further.next().is_none(), "one entry a draft");
    }
    drawn
}

/// Memory of an emulated GPU.
pub(crate) const GPU_BYTES: u64 = 1 << 30;

/// A rank's weights, and so what computes with them.
pub(crate) enum Held {
    Cpu(Arc<Weights>),
    Gpu(Arc<GpuWeights>),
}

impl Held {
    fn rank(
        &self,
        options: &Options,
        mut collective: impl Collective + 'static,
        near: Option<usize>,
    ) -> Rank {
        let rank = match self {
            Self::Cpu(weights) => Rank::new(Arc::clone(weights), options, Box::new(collective)),
            Self::Gpu(weights) => {
                let peers =
                    near.map(|len_max| peers(weights, len_max, &mut collective).expect("all have it"));
                let link = Link::host().beside(peers);
                Rank::on_gpu(Arc::clone(weights), options, Box::new(collective), link)
            }
        };
        rank.unwrap()
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Cpu(weights) => weights.bytes(),
            Self::Gpu(weights) => weights.bytes(),
        }
    }

    fn shards(&self) -> Shards {
        match self {
            Self::Cpu(weights) => weights.shards(),
            Self::Gpu(weights) => weights.shards(),
        }
    }
}

/// The memory of all ranks' GPUs, for sums of up to so many numbers.
pub(crate) fn peers(weights: &GpuWeights, len_max: usize, collective: &mut dyn Collective) -> Option<Peers> {
    let of = (weights.shards(), weights.rank(), len_max);
    Peers::meet(weights.device(), of, collective, Duration::from_secs(20), &|error| println!("{error}"))
        .unwrap()
}

/// All ranks' weights of a cut, loaded once for many runs.
pub(crate) fn load(checkpoint: &Checkpoint, virtual_shards: usize, world_size: usize) -> Vec<Held> {
    let shards = Shards::new(virtual_shards, world_size).unwrap();
    (0..world_size)
        .map(|rank| {
            Held::Cpu(Arc::new(Weights::load(checkpoint, shards, rank, 2, None, &|_, _| {}).unwrap()))
        })
        .collect()
}

/// The same, each on an emulated GPU of its own.
pub(crate) fn load_on_gpus(
    checkpoint: &Checkpoint,
    quantize: Option<Quantize>,
    virtual_shards: usize,
    world_size: usize,
) -> Vec<Held> {
    let shards = Shards::new(virtual_shards, world_size).unwrap();
    (0..world_size).map(|rank| on_gpu(checkpoint, quantize, shards, rank, Emulator::new(GPU_BYTES))).collect()
}

/// The only rank of a group, on a GPU of this architecture that gives a block as much shared memory.
pub(crate) fn load_on_another_gpu(
    checkpoint: &Checkpoint,
    architecture: u16,
    shared_bytes_max: u32,
) -> Vec<Held> {
    let gpu =
        Emulator::new(GPU_BYTES).with_architecture(architecture).with_shared_bytes_max(shared_bytes_max);
    vec![on_gpu(checkpoint, None, Shards::new(1, 1).unwrap(), 0, gpu)]
}

fn on_gpu(
    checkpoint: &Checkpoint,
    quantize: Option<Quantize>,
    shards: Shards,
    rank: usize,
    gpu: Emulator,
) -> Held {
    let device: Arc<dyn Device> = Arc::new(gpu);
    Held::Gpu(Arc::new(GpuWeights::load(checkpoint, shards, rank, quantize, &device, 2, &|_, _| {}).unwrap()))
}

/// Does the same at all ranks of a group, and returns what it gives at each.
fn at_each_rank<T: Send>(
    weights: &[Held],
    options: &Options,
    near: Option<usize>,
    work: impl Fn(&mut Rank) -> T + Sync,
) -> Vec<T> {
    let ends = Local::group(weights[0].shards().virtual_shards(), weights.len());
    let (work, options) = (&work, options);
    thread::scope(|scope| {
        let ranks: Vec<_> = ends
            .into_iter()
            .zip(weights)
            .map(|(end, weights)| scope.spawn(move || work(&mut weights.rank(options, end, near))))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Does the same at all ranks of a group, and returns what it gives at rank 0.
pub(crate) fn run_ranks<T: Send>(
    weights: &[Held],
    options: &Options,
    work: impl Fn(&mut Rank) -> T + Sync,
) -> T {
    at_each_rank(weights, options, None, work).remove(0)
}

/// The same on GPUs that bring each other sums of so many numbers by their memory.
pub(crate) fn run_ranks_near<T: Send>(
    len_max: usize,
    weights: &[Held],
    options: &Options,
    work: impl Fn(&mut Rank) -> T + Sync,
) -> T {
    at_each_rank(weights, options, Some(len_max), work).remove(0)
}

/// Runs `steps` on a group and returns what rank 0 drew; every rank must know the same tokens.
pub(crate) fn run_group(weights: &[Held], options: &Options, steps: &[Step]) -> Drawn {
    run_by(None, weights, options, steps)
}

/// The same on GPUs that bring each other sums by their memory.
pub(crate) fn run_near(len_max: usize, weights: &[Held], options: &Options, steps: &[Step]) -> Drawn {
    run_by(Some(len_max), weights, options, steps)
}

fn run_by(near: Option<usize>, weights: &[Held], options: &Options, steps: &[Step]) -> Drawn {
    let mut results = at_each_rank(weights, options, near, |rank| run(rank, steps));
    let ids = |drawn: &Drawn| drawn.iter().map(|(key, (id, _))| (*key, *id)).collect::<Vec<_>>();
    for follower in &results[1..] {
        assert_eq!(ids(follower), ids(&results[0]));
    }
    results.remove(0)
}

/// Equal to the last bit, logits included.
pub(crate) fn assert_same(found: &Drawn, expected: &Drawn, what: &str) {
    let keys = |drawn: &Drawn| drawn.keys().copied().collect::<Vec<_>>();
    assert_eq!(keys(found), keys(expected), "{what}");
    for (key, (id, row)) in found {
        let (expected_id, expected_row) = &expected[key];
        let same = row.iter().map(|x| x.to_bits()).eq(expected_row.iter().map(|x| x.to_bits()));
        assert!(id == expected_id && same, "{what}: token {key:?} differs: {id}, expected {expected_id}");
    }
}
