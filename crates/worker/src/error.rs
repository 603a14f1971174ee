//! What can go wrong with a worker, and which exit code says so.

use std::time::Duration;

use galerne_coord::CoordError;
use galerne_types::{GroupId, RankId, ShardsError};

/// Exit code of a process that can never start as it was told to: bad options, bad model file, too little memory.
pub const EXIT_CONFIG: u8 = 2;

/// Exit code of a process that failed in a way that a restart may cure.
pub const EXIT_FAILURE: u8 = 1;

/// Exit code of a rank process whose place another one has taken: starting it again would only take it back.
pub const EXIT_REPLACED: u8 = 3;

/// Exit code of a rank process whose group was drained.
pub const EXIT_DRAINED: u8 = 4;

/// How a process's last line on standard error begins when it fails; its supervisor passes the rest on.
pub const ERROR_PREFIX: &str = "error: ";

/// Why a worker ends.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] galerne_checkpoint::CheckpointError),
    /// The cluster's certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] galerne_tls::TlsError),
    /// The model cannot be cut as asked.
    #[error(transparent)]
    Shards(#[from] ShardsError),
    /// The model's weights cannot be loaded, or cannot be run with these options.
    #[error(transparent)]
    Model(galerne_model::ModelError),
    /// An option does not fit the model or the machine.
    #[error("{0}")]
    Options(String),
    /// The machine is too small.
    #[error(
        "rank {rank} needs {needed_mib} MiB for its share of the weights and its KV memory, but this machine has \
         {available_mib} MiB left: give it less KV memory, or use more ranks or hosts"
    )]
    Memory {
        /// Which rank.
        rank: RankId,
        /// What it needs.
        needed_mib: u64,
        /// What is left.
        available_mib: u64,
    },
    /// A port cannot be opened.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// etcd cannot be reached, or refuses.
    #[error(transparent)]
    Coord(#[from] CoordError),
    /// The gRPC server ended.
    #[error("the rank's gRPC server ended: {0}")]
    Server(String),
    /// A part of the process panicked.
    #[error("{0} panicked: this is a bug, please report it with the log")]
    Panicked(String),
    /// The compute thread does not come back from an epoch that was aborted.
    #[error("the compute thread did not end its epoch within {} s", .0.as_secs())]
    Hung(Duration),
    /// The compute thread does not get on with its step.
    #[error("the compute thread has not met the other ranks for {} ms", .0.as_millis())]
    Stuck(Duration),
    /// All other ranks waited for this one.
    #[error("this rank took more than ten times as long as the others: it starts again")]
    Slow,
    /// Somebody wanted the group to end. No failure, but an end.
    #[error("the group is drained")]
    Drained,
    /// A process or thread cannot be started.
    #[error("cannot start a process or thread: {0}")]
    Spawn(std::io::Error),
    /// A rank process says that it can never start.
    #[error("rank {rank} cannot start: {sentence}")]
    Child {
        /// Which rank.
        rank: RankId,
        /// What it says.
        sentence: String,
    },
    /// The group did not serve in time.
    #[error("group {group} is not ready after {} s: {missing}", timeout.as_secs_f32())]
    StartTimeout {
        /// Which group.
        group: GroupId,
        /// How long it had.
        timeout: Duration,
        /// What it waits for.
        missing: String,
    },
}

impl WorkerError {
    /// The exit code that tells a supervisor whether a restart can help: [`EXIT_CONFIG`] or [`EXIT_FAILURE`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Checkpoint(_)
            | Self::Shards(_)
            | Self::Tls(_)
            | Self::Model(_)
            | Self::Options(_)
            | Self::Memory { .. }
            | Self::Bind { .. }
            | Self::Child { .. }
            | Self::Coord(
                CoordError::Endpoint { .. } | CoordError::Access { .. } | CoordError::Name { .. },
            ) => EXIT_CONFIG,
            Self::Coord(CoordError::Replaced { .. }) => EXIT_REPLACED,
            Self::Drained => EXIT_DRAINED,
            Self::Coord(_)
            | Self::Server(_)
            | Self::Panicked(_)
            | Self::Hung(_)
            | Self::Stuck(_)
            | Self::Slow
            | Self::Spawn(_)
            | Self::StartTimeout { .. } => EXIT_FAILURE,
        }
    }
}
