//! Why an epoch ends at this rank, when the process goes on.

use std::time::Duration;

use galerne_collective::CollectiveError;
use galerne_coord::CoordError;
use galerne_model::ModelError;
use galerne_types::{Loss, LossKind, Member};

/// Why this rank gives up an epoch; a newer one may follow with the weights kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EpochError {
    /// The weights cannot be loaded, or not run with these options: no epoch can succeed.
    #[error(transparent)]
    Model(ModelError),
    /// The epoch's record cannot be followed.
    #[error("the epoch's record is wrong: {0}")]
    Record(String),
    /// The ranks were told different things: no epoch can succeed.
    #[error(
        "the leader runs with {leader} and this rank with {here}: start all ranks of a group with the same options"
    )]
    Options {
        /// The leader's limits.
        leader: String,
        /// Ours.
        here: String,
    },
    /// The ranks do not meet, or one was lost.
    #[error("collective: {0}")]
    Collective(#[from] CollectiveError),
    /// The first all-reduce gave a wrong sum.
    #[error("the checked all-reduce gave {found} instead of {expected}")]
    Checked {
        /// The sum over all virtual shards.
        expected: f32,
        /// What came out.
        found: f32,
    },
    /// A step failed.
    #[error("a step failed: {0}")]
    Step(ModelError),
    /// The compute thread has gone to something else.
    #[error("the compute thread has ended this epoch")]
    Ended,
    /// A wait had a deadline.
    #[error("{what} took longer than {} ms", deadline.as_millis())]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        deadline: Duration,
    },
    /// A rank cannot be reached.
    #[error("rank {rank} cannot be reached: {reason}")]
    Unreachable {
        /// Which rank.
        rank: usize,
        /// What the connection says.
        reason: String,
    },
    /// A rank lives, as far as is known, and does not say so.
    #[error("rank {rank} has said nothing for {} ms", silence.as_millis())]
    Silent {
        /// Which rank.
        rank: usize,
        /// How long.
        silence: Duration,
    },
    /// All others wait for a rank.
    #[error("rank {rank} takes more than ten times as long as the others")]
    Slow {
        /// Which rank.
        rank: usize,
    },
    /// A rank's registration is gone before the ranks have met.
    #[error("rank {rank} is not registered any more")]
    Vanished {
        /// Which rank.
        rank: usize,
    },
    /// The group is to end, and has nothing left to do.
    #[error("the group is drained")]
    Drained,
    /// A follower has ended its stream.
    #[error("follower {rank}: {reason}")]
    Follower {
        /// Which rank.
        rank: usize,
        /// Its status.
        reason: String,
    },
    /// A rank computed something else.
    #[error("follower {rank} has diverged at step {number}")]
    Diverged {
        /// Which rank.
        rank: usize,
        /// Where.
        number: u64,
    },
    /// The leader's stream of steps has ended.
    #[error("the leader's steps have ended: {0}")]
    Leader(String),
    /// etcd refuses.
    #[error(transparent)]
    Coord(#[from] CoordError),
}

impl EpochError {
    /// What this rank says of the epoch's end, and whom it blames.
    pub(crate) fn loss(&self, members: &[Member]) -> Loss {
        let (kind, rank) = match self {
            Self::Collective(error) | Self::Step(ModelError::Collective(error)) => of_collective(error),
            Self::Silent { rank, .. } | Self::Unreachable { rank, .. } => (LossKind::Hung, Some(*rank)),
            Self::Slow { rank } => (LossKind::Slow, Some(*rank)),
            Self::Vanished { rank } => (LossKind::Vanished, Some(*rank)),
            Self::Diverged { rank, .. } => (LossKind::Diverged, Some(*rank)),
            Self::Drained => (LossKind::Drained, None),
            _ => (LossKind::Failed, None),
        };
        let rank = rank.and_then(|rank| members.get(rank)).map(|member| member.id.clone());
        Loss { kind, rank }
    }
}

fn of_collective(error: &CollectiveError) -> (LossKind, Option<usize>) {
    match error {
        CollectiveError::Lost { rank } => (LossKind::Died, Some(*rank)),
        CollectiveError::Timeout { rank, .. } | CollectiveError::NotMet { rank, .. } => {
            (LossKind::Hung, Some(*rank))
        }
        _ => (LossKind::Failed, None),
    }
}
