//! The nouns of Galerne, shared by every crate and depending on none.
//!
//! Nothing here does I/O, reads a clock or starts a thread. Token ids, positions and block ids are `u32`;
//! probabilities and logits are `f32`; times are durations since a start that the caller chose.

mod compute;
mod demand;
mod fleet;
mod hex;
mod kv;
pub mod limits;
mod quantize;
mod request;
mod shards;
mod step;

pub use compute::Compute;
pub use demand::{GroupLoad, Moments, RouterRecord};
pub use fleet::{
    Absence, Drain, EpochRecord, Fleet, Group, GroupId, Health, Hold, Loss, LossKind, Member, ModelCard,
    Past, RankId, RankRecord, RankState,
};
pub use hex::hex;
pub use kv::KvDtype;
pub use quantize::Quantize;
pub use request::{
    Event, FinishReason, Grammar, Refusal, Request, RequestId, Sampling, TenantId, TokenId, TokenOut,
    TopToken,
};
pub use shards::{Shards, ShardsError};
pub use step::{BlockId, Draw, Epoch, History, Input, Sampled, Score, Slice, Step};
