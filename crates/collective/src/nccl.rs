//! NCCL: how the devices of a group move their partial sums. Sums themselves are made elsewhere: NCCL's own
//! all-reduce adds in another order from length to length, so here every rank [gets](Communicator::all_gather) what all
//! have, and adds it up in the order of [`crate::tree`], as [`Gathered`] says.
//!
//! The collective between the ranks' processes ([`crate::CpuCollective`]) stays beside it: over it the
//! [rendezvous id](UniqueId::share) comes to each rank, and deaths are noticed, which NCCL by itself would take minutes
//! to.

mod communicator;
mod gathered;
mod id;
mod library;
mod life;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use communicator::{ABORT_TIMEOUT, Communicator, Exchange, Transfer, connect};
pub use gathered::Gathered;
pub use id::UniqueId;
pub use library::{LIBRARY_FILE, Library, Version};
