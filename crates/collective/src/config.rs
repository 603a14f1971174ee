use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use crate::{CollectiveError, tree};

/// One epoch of a group as one rank sees it. Apart from `rank`, all ranks hold the same.
#[derive(Debug, Clone)]
pub struct Config {
    /// This rank, an index into `peers`.
    pub rank: usize,
    /// S, the leaves of the summation tree.
    pub leaves: usize,
    /// All ranks in order, this one included.
    pub peers: Vec<Peer>,
    /// Authenticates the ranks to each other; used for this epoch only.
    pub secret: Secret,
    /// The epoch's number: connections of another one are refused.
    pub epoch: u64,
    /// Compute threads of each rank: waits spin less where ranks and threads outnumber the cores.
    pub threads: usize,
    /// How long [`crate::connect`] waits for all peers.
    pub meet_timeout: Duration,
    /// How long a call waits for a peer.
    pub timeout: Duration,
}

/// One rank of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its host's name: ranks with equal names share memory, others talk TCP.
    pub host: String,
    /// Where its [`crate::Listener`] listens.
    pub address: SocketAddr,
    /// The virtual shards it hosts.
    pub leaves: Range<usize>,
}

/// 32 random bytes that only the ranks of one epoch know. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(crate) [u8; 32]);

impl From<[u8; 32]> for Secret {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The most ranks that one group may have.
const RANKS_MAX: usize = 64;

/// The most leaves of the tree.
const LEAVES_MAX: usize = 1024;

/// The longest wait that may be asked for.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

impl Config {
    /// The pieces of all ranks in leaf order, and which of them are each rank's.
    pub(crate) fn pieces(&self) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
        let mut pieces = Vec::new();
        let mut pieces_of = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            let first = pieces.len();
            pieces.extend(tree::pieces(self.leaves, peer.leaves.clone()));
            pieces_of.push(first..pieces.len());
        }
        (pieces, pieces_of)
    }

    /// Whether messages to and from `peer` (this rank itself included) go through shared memory.
    pub(crate) fn shares_memory(&self, peer: usize) -> bool {
        self.peers[peer].host == self.peers[self.rank].host
    }

    /// Checks what the rest relies on: `rank` stands in `peers`, and their leaves are `0..leaves` in order.
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        let refuse = |reason: String| Err(CollectiveError::Config(reason));
        if self.peers.len() > RANKS_MAX || self.leaves > LEAVES_MAX {
            return refuse(format!(
                "{} ranks over {} leaves; the limits are {RANKS_MAX} and {LEAVES_MAX}",
                self.peers.len(),
                self.leaves
            ));
        }
        if self.rank >= self.peers.len() {
            return refuse(format!("rank {} of {}", self.rank, self.peers.len()));
        }
        if self.timeout > TIMEOUT_MAX || self.meet_timeout > TIMEOUT_MAX {
            return refuse(format!("a timeout is over {TIMEOUT_MAX:?}"));
        }
        let mut covered = 0;
        for (rank, peer) in self.peers.iter().enumerate() {
            if peer.leaves.start != covered || peer.leaves.end <= covered {
                return refuse(format!(
                    "rank {rank} hosts leaves {:?}, expected some from {covered} on",
                    peer.leaves
                ));
            }
            covered = peer.leaves.end;
        }
        if covered != self.leaves {
            return refuse(format!("the ranks host {covered} leaves of {}", self.leaves));
        }
        Ok(())
    }
}
