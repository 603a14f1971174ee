//! All-reduce, all-gather and broadcast between the ranks of a group: shared memory and TCP, one fixed summation tree.
//!
//! One process is one rank. [`connect`] meets all ranks of an epoch and gives a [`CpuCollective`]: ranks whose
//! host names are equal share memory, the others talk TCP. What [`Collective::all_reduce`] adds up is the sum
//! over *virtual shards*, in the fixed shape of [`tree`], so its bits do not depend on how many ranks there are,
//! where they stand or how long the message is.

#[cfg(target_endian = "big")]
compile_error!("messages carry f32 in little-endian order");

mod abort;
mod bytes;
mod config;
mod connect;
mod cpu;
mod dial;
mod error;
mod handshake;
mod interface;
mod meet;
mod mesh;
mod message;
mod monitor;
pub mod nccl;
mod notice;
mod segment;
mod solo;
mod spin;
mod stream;
pub mod tree;
mod wait;

pub use abort::AbortHandle;
pub use config::{Config, Peer, Secret};
pub use connect::{Listener, connect, listen};
pub use cpu::{CpuCollective, MESSAGE_BYTES_MAX};
pub use error::CollectiveError;
pub use interface::Collective;
pub use message::Operation;
pub use solo::Solo;
