//! A rank's GPU: opened once, kept from epoch to epoch.

use std::sync::Arc;

use galerne_checkpoint::Checkpoint;
use galerne_collective::nccl::{self, LIBRARY_FILE, Library, UniqueId};
use galerne_collective::{AbortHandle, Collective, CollectiveError, Config};
use galerne_model::gpu::{Cuda, Device, DeviceError, DeviceMemory, GpuWeights, Link, Peers};
use galerne_model::{ModelError, Options};
use galerne_types::{Compute, Quantize, Shards};

use crate::error::WorkerError;
use crate::options::{self, RankOptions};

/// A GPU, and NCCL where the group has others.
pub(crate) struct Gpu {
    pub(crate) device: Arc<dyn Device>,
    index: u16,
    /// Whether a library multiplies many tokens.
    fast: bool,
    /// What weights become at load.
    pub(crate) quantize: Option<Quantize>,
    nccl: Option<Arc<Library>>,
}

impl Gpu {
    /// Opens the GPU that the options name, if they name one.
    ///
    /// # Errors
    /// [`WorkerError::Model`] if there is no such GPU, no driver, or no kernels in this binary; [`WorkerError::Options`] for
    /// what a GPU does not do, and without NCCL in a group of several.
    pub(crate) fn open(options: &RankOptions) -> Result<Option<Self>, WorkerError> {
        let options::Device::Cuda(index) = options.device else { return Ok(None) };
        if options.rehearse.is_some() {
            return Ok(None);
        }
        let refuse = |says: &str| Err(WorkerError::Options(says.to_owned()));
        if options.compute.is_some() {
            return refuse("--compute is a choice between ways of a CPU: leave it out with --device cuda");
        }
        if options.quantize.is_some_and(|quantize| quantize != Quantize::Fp8) {
            return refuse(
                "--quantize q8_0 and q4_0 are for CPUs: a GPU takes fp8, or holds weights in bf16 without it",
            );
        }
        let utilization = options.gpu_memory_utilization;
        if !(utilization > 0.0 && utilization <= 1.0) {
            return refuse(
                "--gpu-memory-utilization is a share of the GPU's memory: more than 0, and 1 at most",
            );
        }
        let nccl = match options.world_size {
            1 => None,
            _ => Some(Library::open(LIBRARY_FILE).map_err(|error| WorkerError::Options(error.to_string()))?),
        };
        let device = Cuda::open(index.into()).map_err(ModelError::from).map_err(WorkerError::Model)?;
        let fast = options.fast;
        if fast {
            device.open_library().map_err(ModelError::from).map_err(WorkerError::Model)?;
        }
        tracing::info!(index, name = device.name(), nccl = ?nccl, fast, "GPU opened");
        let (quantize, nccl) = (options.quantize, nccl.map(Arc::new));
        Ok(Some(Self { device: Arc::new(device), index, fast, quantize, nccl }))
    }

    /// How it computes.
    pub(crate) fn compute(&self) -> Compute {
        let architecture = self.device.architecture();
        if self.fast { Compute::Fast(architecture) } else { Compute::Tensor(architecture) }
    }

    /// Its name in the fleet.
    pub(crate) fn name(&self) -> String {
        format!("cuda:{} {}", self.index, self.device.name())
    }

    /// Bytes for keys and values: what is left of the GPU's memory, as far as it may be used. Equal on all ranks of a group
    /// if their GPUs are.
    ///
    /// # Errors
    /// [`WorkerError::Options`] with the arithmetic if nothing is left.
    pub(crate) fn kv_bytes(
        &self,
        checkpoint: &Checkpoint,
        shards: Shards,
        model: &Options,
        utilization: f64,
    ) -> Result<u64, WorkerError> {
        let DeviceMemory { total, .. } =
            self.device.memory().map_err(ModelError::from).map_err(WorkerError::Model)?;
        let [mut weights, mut workspace] = [0, 0];
        for rank in 0..shards.world_size() {
            let (of_rank, architecture) = ((shards, rank), self.device.architecture());
            let of = GpuWeights::bytes_needed(checkpoint, of_rank, self.quantize, architecture, model)
                .map_err(WorkerError::Model)?;
            [weights, workspace] = [weights.max(of[0] as u64), workspace.max(of[1] as u64)];
        }
        left_of(total, utilization, weights, workspace)
    }

    /// How partial sums travel in an epoch that `config` tells of: by NCCL, and short ones by the GPUs' memory if all are on one
    /// host and reach each other's.
    ///
    /// # Errors
    /// As [`UniqueId::share`], [`nccl::connect`] and [`Peers::meet`].
    pub(crate) fn link(
        &self,
        config: Option<&Config>,
        abort: &AbortHandle,
        collective: &mut dyn Collective,
    ) -> Result<Link, CollectiveError> {
        let (Some(config), Some(library)) = (config, &self.nccl) else { return Ok(Link::host()) };
        let id = UniqueId::share(library, config.epoch, collective)?;
        let device = Arc::clone(&self.device);
        let link = Link::nccl(nccl::connect(config, library, id, abort, move || device.bind())?);
        let one_host = config.peers.iter().all(|peer| peer.host == config.peers[0].host);
        let Ok(shards) = Shards::new(config.leaves, config.peers.len()) else { return Ok(link) };
        if !one_host {
            return Ok(link);
        }
        let of = (shards, config.rank, Peers::LEN_MAX);
        let refused =
            |error: &DeviceError| tracing::warn!(%error, "this GPU does not reach the others' memory");
        let peers = Peers::meet(&self.device, of, collective, config.timeout, &refused)?;
        tracing::info!(by_memory = peers.is_some(), "the GPUs of this host have met");
        Ok(link.beside(peers))
    }
}

/// What weights and workspace leave of the memory that may be used.
fn left_of(total: u64, utilization: f64, weights: u64, workspace: u64) -> Result<u64, WorkerError> {
    const MIB: u64 = 1 << 20;
    let usable = (total as f64 * utilization) as u64;
    usable.checked_sub(weights + workspace).ok_or_else(|| {
        WorkerError::Options(format!(
            "{utilization} of the GPU's {} MiB are {} MiB, but the rank's share of the weights takes {} MiB and its workspace {} MiB: \
             raise --gpu-memory-utilization, take fewer --step-tokens-max, or cut the model into more ranks (--tp)",
            total / MIB,
            usable / MIB,
            weights.div_ceil(MIB),
            workspace.div_ceil(MIB)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::options;

    #[test]
    fn keys_and_values_get_what_is_left() {
        assert_eq!(left_of(1000, 0.5, 100, 30).unwrap(), 370);
        let error = left_of(80 << 30, 0.1, 14 << 30, 1 << 30).unwrap_err().to_string();
        assert!(error.contains(
            "0.1 of the GPU's 81920 MiB are 8192 MiB, but the rank's share of the weights takes 14336 MiB"
        ));
    }

    #[test]
    fn what_a_gpu_does_not_do_is_refused_before_it_is_looked_for() {
        let refusal = |change: &dyn Fn(&mut RankOptions)| {
            let mut options = options().first;
            options.device = options::Device::Cuda(0);
            change(&mut options);
            Gpu::open(&options).err().unwrap().to_string()
        };
        assert!(refusal(&|options| options.compute = Some(Compute::F32)).starts_with("--compute is"));
        assert!(refusal(&|options| options.gpu_memory_utilization = 1.5).contains("1 at most"));
        assert!(refusal(&|options| options.quantize = Some(Quantize::Q8_0)).contains("takes fp8"));
        // Without a driver, or without kernels, it is said which is missing.
        for quantize in [None, Some(Quantize::Fp8)] {
            let none = refusal(&|options| (options.world_size, options.quantize) = (1, quantize));
            assert!(none.contains("libcuda.so.1 was not found") || none.contains("CUDA_HOME"), "{none}");
        }
    }
}
