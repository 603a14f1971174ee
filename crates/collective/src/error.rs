use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::message::Operation;

/// Why a collective call, or the meeting of the ranks, failed. The first failure of an epoch ends it; later
/// calls repeat it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CollectiveError {
    /// The configuration contradicts itself.
    #[error("the group's description is inconsistent: {0}")]
    Config(String),
    /// [`crate::AbortHandle::abort`] was called here.
    #[error("the collective was aborted on this rank: join a newer epoch")]
    Aborted,
    /// The collective was dropped here.
    #[error("the collective is closed on this rank: join a newer epoch")]
    Closed,
    /// A peer gave up on the epoch for a reason of its own.
    #[error("rank {rank} left the collective: see that rank's log for its reason, and join a newer epoch")]
    AbortedBy {
        /// Who left.
        rank: usize,
    },
    /// A peer's connection closed without a word.
    #[error("rank {rank} is lost: its process died or its host is unreachable; join a newer epoch")]
    Lost {
        /// Who died.
        rank: usize,
    },
    /// A peer did not do its part in time.
    #[error(
        "rank {rank} did not answer within {waited:?} during {operation}: it hangs or is too slow; join a newer epoch"
    )]
    Timeout {
        /// Who was waited for.
        rank: usize,
        /// The call that waited.
        operation: Operation,
        /// How long.
        waited: Duration,
    },
    /// A rank did not come to the meeting in time.
    #[error(
        "rank {rank} at {address} did not join epoch {epoch} within {waited:?}: check that it runs, is in the same \
         epoch, and is reachable"
    )]
    NotMet {
        /// Who is missing; the lowest if several are.
        rank: usize,
        /// Where it was expected.
        address: SocketAddr,
        /// The epoch.
        epoch: u64,
        /// How long.
        waited: Duration,
    },
    /// A peer's message is not the one that this rank's call expects.
    #[error(
        "rank {rank} is out of step: expected {expected}, got {received}; every rank must make the same calls with \
         the same lengths in the same order"
    )]
    OutOfStep {
        /// Whose message.
        rank: usize,
        /// What this rank's call expects.
        expected: String,
        /// What came.
        received: String,
    },
    /// The arguments of a call contradict each other or the group.
    #[error("{operation}: {argument} has length {given}, expected {expected}")]
    Length {
        /// The call.
        operation: Operation,
        /// Which argument.
        argument: &'static str,
        /// Its length.
        given: usize,
        /// What it should be.
        expected: usize,
    },
    /// `root` is no rank of the group.
    #[error("{operation}: root {root} is no rank of a group of {world_size}")]
    Root {
        /// The call.
        operation: Operation,
        /// The argument.
        root: usize,
        /// N.
        world_size: usize,
    },
    /// A message beyond the limit.
    #[error("{operation}: a message of {bytes} bytes is over the limit of {bytes_max}: send it in parts")]
    TooLarge {
        /// The call.
        operation: Operation,
        /// The message.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The shared memory of a rank on the same host cannot be opened.
    #[error(
        "cannot share memory with rank {rank}: {reason}; ranks that do not share a process namespace need \
         different host names, then they talk TCP"
    )]
    Memory {
        /// Whose memory.
        rank: usize,
        /// Why not.
        reason: Arc<std::io::Error>,
    },
    /// NCCL cannot be loaded.
    #[error(
        "cannot load NCCL: {reason}; install NCCL 2.14 or newer (libnccl2 in NVIDIA's package repositories, \
         nvidia-nccl-cu13 on PyPI) and put the folder of libnccl.so.2 on LD_LIBRARY_PATH"
    )]
    NcclMissing {
        /// What was not found.
        reason: String,
    },
    /// NCCL refused a call, or failed some time after it.
    #[error("{call} failed: {reason}; NCCL_DEBUG=INFO tells more")]
    Nccl {
        /// Which call.
        call: &'static str,
        /// NCCL's words.
        reason: String,
    },
    /// A rendezvous id of NCCL was brought to another epoch than its own, or a second time.
    #[error(
        "NCCL's rendezvous id of epoch {of} is of no use in epoch {epoch}: every epoch needs a new one, once"
    )]
    StaleId {
        /// The id's epoch.
        of: u64,
        /// The one that wanted to use it.
        epoch: u64,
    },
    /// The ranks did not meet in NCCL in time.
    #[error(
        "the ranks of epoch {epoch} did not meet in NCCL within {waited:?}: check NCCL_SOCKET_IFNAME and firewalls \
         between their hosts, and see each rank's log"
    )]
    NcclNotMet {
        /// The epoch.
        epoch: u64,
        /// How long.
        waited: Duration,
    },
    /// What was enqueued on the device did not come to its end in time.
    #[error(
        "the group's GPUs did not end {call} within {waited:?}: one hangs or is too slow; join a newer epoch"
    )]
    NcclTimeout {
        /// What was waited for.
        call: &'static str,
        /// How long.
        waited: Duration,
    },
    /// NCCL does not let go of the device. Only the end of the process helps.
    #[error(
        "NCCL did not let go of the GPU within {waited:?}: exit this process, its supervisor starts the rank again"
    )]
    NcclStuck {
        /// How long.
        waited: Duration,
    },
    /// The operating system refused something.
    #[error("cannot {doing}: {reason}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        reason: Arc<std::io::Error>,
    },
}

impl CollectiveError {
    /// For `map_err`: the operating system refused `doing`.
    pub(crate) fn system<E: Into<std::io::Error>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |reason| Self::System { doing, reason: Arc::new(reason.into()) }
    }
}

/// An argument's length is what the call needs.
pub(crate) fn expect_length(
    operation: Operation,
    argument: &'static str,
    given: usize,
    expected: usize,
) -> Result<(), CollectiveError> {
    if given == expected {
        Ok(())
    } else {
        Err(CollectiveError::Length { operation, argument, given, expected })
    }
}
