//! A host's supervisor and one rank: the leader's loop, the follower's loop.
//!
//! [`supervise`] runs a host's share of a group: one child process a rank, which the command line turns into
//! [`run_rank`]. A rank registers, and for each epoch that it is a member of it loads its virtual shards, meets
//! the others in the collective, tries both, and then runs steps: those that its own scheduler plans if it is the
//! leader (rank 0), else those that the leader sends. Whatever breaks an epoch ends it at every rank at once:
//! each says why, open streams are told so that routers take them elsewhere, and the ranks wait for a newer epoch with their
//! weights kept.

mod backoff;
mod error;
mod grpc;
mod options;
mod rank;
mod supervisor;

pub use error::{ERROR_PREFIX, EXIT_CONFIG, EXIT_DRAINED, EXIT_FAILURE, EXIT_REPLACED, WorkerError};
pub use galerne_sched::Cost;
pub use options::{CoresShare, Device, KvSize, Processor, RankOptions, SupervisorOptions, rank_args};
pub use rank::run_rank;
pub use supervisor::supervise;
