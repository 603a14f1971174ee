//! The forward pass on a GPU: our own kernels (`cuda/*.cu`) on a [`Device`], which is a real one ([`Cuda`]) or, in tests,
//! the same source run on the host.
//!
//! [`GpuWeights::load`] packs a rank's shards into the layout in which the kernels read them; `Forward` lays out the
//! workspace and launches. Weights, keys and values are bf16 or FP8, activations bf16, everything that is summed is f32. The order of
//! every sum follows from the model and S alone (`cuda/product.cuh`, `cuda/attention.cu`), so tokens do not depend on the batch,
//! the chunks of a prefill, or N; they are not those of the CPU, whose arithmetic is another.

mod ahead;
mod cuda;
mod device;
mod fast;
mod forward;
mod head;
mod inputs;
mod kernels;
mod layout;
mod library;
mod link;
mod peers;
mod plan;
mod post;
mod sampler;
mod weights;
mod workspace;

pub use cuda::Cuda;
pub use device::{Address, Buffer, Device, DeviceError, DeviceMemory, Gemm, Launch, Shared, Stage};
pub(crate) use forward::Forward;
pub(crate) use layout::KvPacking;
pub use link::Link;
pub use peers::{Peers, Turn};
pub(crate) use sampler::EDITS_MAX;
pub use sampler::{Ask, Sampler};
pub use weights::{GpuWeights, kv_bytes_per_block};
pub(crate) use workspace::{Room, TILE_TOKENS_MAX};
