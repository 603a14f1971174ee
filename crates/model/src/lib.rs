//! The Mistral forward pass on virtual shards: weights, kernels, paged attention, sampler.
//!
//! [`Weights::load`] reads one rank's shards ([`Cut`] says which) and packs them; a [`Rank`] joins them with KV memory
//! and a [`Collective`](galerne_collective::Collective) and runs [`Step`](galerne_types::Step)s. Everything that
//! decides about bits is fixed: products are chains of fused multiply-adds over the inputs in sequence
//! (`linear`) or over blocks of exact sums (`dots`), as the group's [`Compute`](galerne_types::Compute) says; sums across
//! virtual shards follow one tree (`galerne_collective::tree`), attention is merged piece by piece by absolute position
//! (`attention`), exp and the norms are our own (`math`). So tokens and logits are bit-identical for every number of
//! ranks that share the same S, for every batch, split of the prefill and number of threads, and for every instruction
//! set ([`Isa`]).
//!
//! `Rank::step` → `forward` (one layer reads as the paper does) → `linear`, `dots`, `attention`, `math` on `team`'s
//! threads.

mod attention;
mod backend;
mod check;
mod cores;
mod cut;
mod dots;
mod error;
mod forward;
pub mod gpu;
mod head;
mod kv;
mod linear;
mod math;
mod memory;
mod packed;
mod pairs;
mod products;
mod quants;
mod rank;
mod rows;
pub mod sampler;
mod simd;
mod team;
mod weights;

pub use cores::{Cores, CpuList};
pub use cut::Cut;
pub use error::ModelError;
pub use kv::kv_bytes_per_block;
pub use rank::{Masks, Options, Rank, Trace, WindowChoice};
pub use sampler::Mask;
pub use simd::Isa;
pub use weights::{Weights, compute_for};
