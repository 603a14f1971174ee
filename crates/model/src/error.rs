use galerne_checkpoint::{CheckpointError, Weight};
use galerne_collective::CollectiveError;
use galerne_types::{KvDtype, Quantize, RequestId};

use crate::gpu::DeviceError;

/// Why a model cannot be loaded, or a step cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A weight could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The other ranks were lost, or this epoch was ended. Meet again in a newer one and make a new [`Rank`](crate::Rank).
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The cut does not suit the model.
    #[error(
        "{virtual_shards} virtual shards are fewer than the model's {kv_heads} KV heads: ask for at least {kv_heads}"
    )]
    TooFewShards {
        /// S.
        virtual_shards: usize,
        /// KV heads of the model.
        kv_heads: usize,
    },
    /// The attention kernel has no room for such a head.
    #[error("heads of {head_dim} dimensions are not supported: at most {max}")]
    HeadDim {
        /// The model's.
        head_dim: usize,
        /// The kernel's.
        max: usize,
    },
    /// A quantized matrix whose rows are no whole number of blocks.
    #[error("{weight} has rows of {cols} elements: a quantized row must be a multiple of {block}")]
    RaggedBlocks {
        /// The matrix.
        weight: Weight,
        /// Its columns.
        cols: usize,
        /// Elements of a block.
        block: usize,
    },
    /// An option is out of its range.
    #[error("{option} is {value}: {expected}")]
    Option {
        /// Which option.
        option: &'static str,
        /// What was given.
        value: usize,
        /// What is expected.
        expected: &'static str,
    },
    /// The weights were cut for another place than the collective's.
    #[error(
        "the weights are rank {rank} of {world_size}, but the collective is rank {collective_rank} of \
         {collective_world_size}: load the shards of this rank"
    )]
    Place {
        /// The weights' rank.
        rank: usize,
        /// The weights' N.
        world_size: usize,
        /// The collective's rank.
        collective_rank: usize,
        /// The collective's N.
        collective_world_size: usize,
    },
    /// A step that this rank cannot run; nothing was computed.
    #[error("step {number} is refused: {what}")]
    Step {
        /// The step's number.
        number: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A draw is bound to a grammar, and nobody says which tokens the grammar allows.
    #[error("the grammar of request {} gives no mask: this epoch cannot go on", request.0)]
    Mask {
        /// The request.
        request: RequestId,
    },
    /// A GPU does not do what it was asked.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernels for GPUs have no room for such a model.
    #[error(
        "{group} query heads on one KV head, {shards} virtual shards: on a GPU at most {group_max} and {shards_max} are possible"
    )]
    GpuShape {
        /// The model's.
        group: usize,
        /// The kernels'.
        group_max: usize,
        /// S.
        shards: usize,
        /// The kernels' most.
        shards_max: usize,
    },
    /// The kernels for GPUs read no such weights.
    #[error("a GPU does not hold weights in {quantize}: take fp8, or leave --quantize out for bf16")]
    GpuQuantize {
        /// What was asked for.
        quantize: Quantize,
    },
    /// Not every device keeps keys and values in every way.
    #[error("a {device} keeps keys and values in {ways}, not in {dtype}: leave --kv-dtype out for bf16")]
    KvDtype {
        /// What computes.
        device: &'static str,
        /// What it has.
        ways: &'static str,
        /// What was asked for.
        dtype: KvDtype,
    },
    /// The system gave no thread.
    #[error("a compute thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
}
