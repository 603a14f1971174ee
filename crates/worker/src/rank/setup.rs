//! What a rank process knows before it meets anyone: its model, its limits, its memory.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use galerne_checkpoint::{Checkpoint, Weight};
use galerne_collective::Listener;
use galerne_model::{Cores, gpu, kv_bytes_per_block};
use galerne_sched::Limits;
use galerne_tls::{Client, Server};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Compute, Epoch, ModelCard, Quantize, RankRecord, RankState, Shards};

use super::gpu::Gpu;
use super::memory;
use crate::error::WorkerError;
use crate::options::{KvSize, RankOptions};

/// KV memory of a rank that is told nothing, if one full context needs no more.
const KV_BYTES_DEFAULT: u64 = 1 << 30;

/// A rank process's unchanging parts.
pub(crate) struct Setup {
    pub(crate) options: RankOptions,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) card: ModelCard,
    /// What computes, if not this machine's processor.
    pub(crate) gpu: Option<Gpu>,
    /// The cores of this host that the group's ranks share, where the system tells.
    pub(crate) cores: Option<Cores>,
    /// What each of N ranks is given, for every N that the group may have.
    shapes: BTreeMap<usize, Shape>,
    /// Where the other ranks of the group meet this one.
    pub(crate) listener: Listener,
    /// Both sides of its connections within the cluster, if they are not in the open.
    pub(crate) tls: Option<(Arc<Server>, Arc<Client>)>,
}

/// What each rank of a group of N is given.
pub(crate) struct Shape {
    pub(crate) limits: Limits,
    pub(crate) model: galerne_model::Options,
    /// Bytes that the rank with the largest share needs, about.
    needed_bytes: u64,
}

impl Setup {
    /// Opens and checks everything that the options name. Blocks on files.
    pub(crate) fn open(options: RankOptions) -> Result<Self, WorkerError> {
        check(&options)?;
        let tls = options.cluster_tls.as_ref().map(galerne_tls::cluster).transpose()?;
        let mut checkpoint = Checkpoint::open(&options.model)?;
        let gpu = Gpu::open(&options)?;
        if gpu.is_none() {
            check_without_gpu(&options)?;
        }
        if let Some(quantize) = options.quantize {
            checkpoint = checkpoint.quantized(quantize);
        }
        let config = checkpoint.config();
        let shards = Shards::for_model(config.kv_heads, options.world_size, options.virtual_shards)?;
        let isa = options.processor.isa();
        let on_cpu = || options.compute.unwrap_or_else(|| galerne_model::compute_for(&checkpoint, isa));
        let compute = gpu.as_ref().map_or_else(on_cpu, Gpu::compute);
        let card = ModelCard {
            name: options.model_name.clone().unwrap_or_else(|| checkpoint.name().to_owned()),
            digest: checkpoint.digest().to_owned(),
            context_tokens_max: narrow(config.context_tokens_max),
            vocab: narrow(config.vocab),
            shards,
            quantize: options.quantize,
            compute,
            kv: options.kv_dtype,
        };
        let shapes = shapes(&options, &checkpoint, shards, compute, gpu.as_ref())?;
        if gpu.is_none() {
            check_memory(&options, &shapes)?;
        }
        let cores = options.processor.cores()?;
        if gpu.is_none() {
            let on = cores.as_ref().map_or_else(|| "any core".to_owned(), Cores::to_string);
            tracing::info!(%isa, %compute, threads = options.threads, cores = %on, "the processor computes");
        }
        let listener = galerne_collective::listen(options.bind)
            .map_err(|source| WorkerError::Bind { address: options.bind.to_string(), source })?;
        Ok(Self { options, checkpoint, card, gpu, cores, shapes, listener, tls })
    }

    /// What each rank is given when there are `world_size`; `None` if so few have no room.
    pub(crate) fn shape(&self, world_size: usize) -> Option<&Shape> {
        self.shapes.get(&world_size)
    }

    /// The fewest ranks of a group that this one can be one of, with the memory that is left now.
    fn ranks_min(&self) -> u16 {
        let available = memory::available_bytes().unwrap_or(u64::MAX);
        let elsewhere = self.options.rehearse.is_some() || self.gpu.is_some();
        let fits = |shape: &Shape| elsewhere || shape.needed_bytes <= available;
        let least = self.shapes.iter().find(|(_, shape)| fits(shape)).map(|(ranks, _)| *ranks);
        least.unwrap_or(self.options.world_size) as u16
    }

    /// The rank's registration, with its gRPC server at `address`.
    pub(crate) fn record(&self, address: String) -> RankRecord {
        let options = &self.options;
        RankRecord {
            id: options.id(),
            group: options.group.clone(),
            host: options.host.clone(),
            index: options.index,
            address,
            collective: self.listener.address().to_string(),
            pid: std::process::id(),
            device: match (&options.rehearse, &self.gpu) {
                (Some(_), _) => "rehearsal".into(),
                (None, Some(gpu)) => gpu.name(),
                (None, None) => format!("cpu x{} {}", options.threads, options.processor.isa()),
            },
            build: env!("CARGO_PKG_VERSION").into(),
            model: self.card.clone(),
            state: RankState::Waiting,
            memory_bytes: memory::resident_bytes(),
            ranks_min: self.ranks_min(),
            left: Epoch::default(),
            loss: None,
        }
    }
}

fn check(options: &RankOptions) -> Result<(), WorkerError> {
    let RankOptions { bind, threads, sequences_max, step_tokens_max, .. } = options;
    let refuse = |says: String| Err(WorkerError::Options(says));
    let unspecified = match bind {
        IpAddr::V4(ip) => ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    if unspecified {
        return refuse(format!(
            "{bind} is no address that other hosts can reach: bind to one of this host's own"
        ));
    }
    if *threads == 0 || *sequences_max == 0 || *step_tokens_max == 0 {
        return refuse("threads, sequences and tokens in a step must each be at least 1".into());
    }
    Ok(())
}

/// What is a GPU's alone.
fn check_without_gpu(options: &RankOptions) -> Result<(), WorkerError> {
    let refuse = |says: &str| Err(WorkerError::Options(says.to_owned()));
    if options.quantize == Some(Quantize::Fp8) {
        return refuse("--quantize fp8 is for GPUs: take q8_0 or q4_0, or leave it out");
    }
    if options.fast {
        return refuse("--fast is for GPUs: leave it out, or take --device cuda");
    }
    Ok(())
}

/// How many KV blocks a group gets: the same at all of its ranks, since all are told the same.
fn kv_blocks(size: KvSize, block_bytes: u64, least: u64, useful: u64) -> Result<u32, WorkerError> {
    let blocks = match size {
        KvSize::Auto => (KV_BYTES_DEFAULT / block_bytes).min(useful).max(least),
        KvSize::Bytes(bytes) => (bytes / block_bytes).min(useful),
        KvSize::Blocks(blocks) => blocks.into(),
    };
    if blocks < least {
        return Err(WorkerError::Options(format!(
            "{blocks} KV blocks of {block_bytes} bytes cannot hold one context of this model, which needs {least}: \
             give each rank at least {} MiB of KV memory",
            mib_up(least * block_bytes)
        )));
    }
    u32::try_from(blocks).map_err(|_| WorkerError::Options(format!("{blocks} KV blocks are too many")))
}

/// What the ranks of a group are given, for each N that divides S, up to the one that was asked for.
fn shapes(
    options: &RankOptions,
    checkpoint: &Checkpoint,
    asked: Shards,
    compute: Compute,
    gpu: Option<&Gpu>,
) -> Result<BTreeMap<usize, Shape>, WorkerError> {
    let mut shapes = BTreeMap::new();
    for ranks in 1..=asked.world_size() {
        let Ok(shards) = Shards::new(asked.virtual_shards(), ranks) else { continue };
        match shape(options, checkpoint, shards, compute, gpu) {
            Ok(shape) => drop(shapes.insert(ranks, shape)),
            Err(error) if ranks == asked.world_size() => return Err(error),
            Err(_) => {} // with fewer ranks it cannot hold one context
        }
    }
    Ok(shapes)
}

fn shape(
    options: &RankOptions,
    checkpoint: &Checkpoint,
    shards: Shards,
    compute: Compute,
    gpu: Option<&Gpu>,
) -> Result<Shape, WorkerError> {
    let config = checkpoint.config();
    // The leader's scheduler alone uses the number of blocks, and every rank must have room for them: so it
    // is computed from what all ranks are told alike, and from the rank that needs most.
    let mut block_bytes = 1;
    for rank in 0..shards.world_size() {
        let of = if gpu.is_some() { gpu::kv_bytes_per_block } else { kv_bytes_per_block };
        let bytes = of(config, shards, rank, options.kv_dtype).map_err(WorkerError::Model)?;
        block_bytes = block_bytes.max(bytes as u64);
    }
    let context_tokens_max = narrow(config.context_tokens_max);
    let mut limits = Limits {
        kv_blocks: 0,
        sequences_max: options.sequences_max,
        step_tokens_max: options.step_tokens_max,
        context_tokens_max,
        window_tokens: config.window.map(narrow),
        vocab: narrow(config.vocab),
        waiting_max: options.waiting_requests_max as usize,
        prefix_cache: options.prefix_cache,
        speculation: options.speculation,
        itl_target: options.itl_target_ms.map(|ms| Duration::from_millis(ms.into())),
    };
    let least = limits.kv_blocks_held(context_tokens_max);
    // What has left a window is of use all the same: it may be found again.
    let useful =
        u64::from(context_tokens_max.div_ceil(KV_BLOCK_TOKENS as u32)) * u64::from(options.sequences_max);
    let mut model = galerne_model::Options {
        threads: options.threads,
        isa: options.processor.isa(),
        kv_blocks: 0,
        sequences_max: options.sequences_max as usize,
        step_tokens_max: options.step_tokens_max as usize,
        compute,
        kv_dtype: options.kv_dtype,
        ..galerne_model::Options::default()
    };
    let size = match (options.kv, gpu) {
        (KvSize::Auto, Some(gpu)) => {
            KvSize::Bytes(gpu.kv_bytes(checkpoint, shards, &model, options.gpu_memory_utilization)?)
        }
        (size, _) => size,
    };
    limits.kv_blocks = kv_blocks(size, block_bytes, least.into(), useful)?;
    model.kv_blocks = limits.kv_blocks as usize;
    let weights: usize = Weight::all(config).map(|weight| checkpoint.tensor(weight).bytes()).sum();
    let needed_bytes =
        weights as u64 / shards.world_size() as u64 + u64::from(limits.kv_blocks) * block_bytes;
    Ok(Shape { limits, model, needed_bytes })
}

/// A rough look ahead, so that a model that cannot fit is refused with a sentence rather than killed later.
fn check_memory(options: &RankOptions, shapes: &BTreeMap<usize, Shape>) -> Result<(), WorkerError> {
    let (Some(available), Some(shape)) = (memory::available_bytes(), shapes.get(&options.world_size)) else {
        return Ok(());
    };
    if options.rehearse.is_some() || shape.needed_bytes <= available {
        return Ok(());
    }
    let (needed_mib, available_mib) = (mib_up(shape.needed_bytes), available >> 20);
    Err(WorkerError::Memory { rank: options.id(), needed_mib, available_mib })
}

fn mib_up(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// A checkpoint's numbers are far below this; one that is not is refused by its limits.
fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::options;

    const KIB: u64 = 1 << 10;

    #[test]
    fn kv_memory_holds_a_context_and_no_more_than_can_be_used() {
        let auto = |block_bytes, least, useful| kv_blocks(KvSize::Auto, block_bytes, least, useful);
        assert_eq!(auto(1 << 20, 100, 6400).unwrap(), 1024, "1 GiB");
        assert_eq!(auto(KIB, 100, 6400).unwrap(), 6400, "all sequences at full length");
        assert_eq!(auto(1 << 20, 4096, 4096 * 64).unwrap(), 4096, "one full context");
        assert_eq!(kv_blocks(KvSize::Bytes(10 * KIB), KIB, 4, 256).unwrap(), 10);
        assert_eq!(kv_blocks(KvSize::Blocks(9), KIB, 4, 4).unwrap(), 9);
    }

    #[test]
    fn too_little_is_refused_with_what_is_needed() {
        for size in [KvSize::Bytes(1 << 20), KvSize::Blocks(1)] {
            let error = kv_blocks(size, 1 << 20, 4, 256).unwrap_err().to_string();
            assert!(error.contains("which needs 4: give each rank at least 4 MiB"), "{error}");
        }
    }

    #[test]
    fn wrong_options_are_refused() {
        let mut unreachable = options().first;
        unreachable.bind = "0.0.0.0".parse().unwrap();
        assert!(check(&unreachable).unwrap_err().to_string().starts_with("0.0.0.0 is no address"));
        let mut idle = options().first;
        idle.threads = 0;
        assert!(check(&idle).is_err());
        assert!(check(&options().first).is_ok());
    }

    #[test]
    fn what_is_a_gpus_alone_is_refused_without_one() {
        let refusal = |change: &dyn Fn(&mut RankOptions)| {
            let mut options = options().first;
            change(&mut options);
            check_without_gpu(&options).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refusal(&|options| options.quantize = Some(Quantize::Fp8)).contains("fp8 is for GPUs"));
        assert!(refusal(&|options| options.fast = true).contains("--fast is for GPUs"));
        assert_eq!(refusal(&|options| options.quantize = Some(Quantize::Q8_0)), "");
    }
}
