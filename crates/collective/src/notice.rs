//! The last words of a rank on its control connections: why its epoch ended, so that all ranks name the same
//! culprit instead of each other.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::CollectiveError;
use crate::message::Operation;

const NOTICE_BYTES: usize = 8;

/// The collective was closed in peace.
const CLOSED: u8 = 0;
/// The rank named, the sender or another, ended the epoch for a reason of its own.
const GAVE_UP: u8 = 1;
/// The rank named is lost.
const LOST: u8 = 2;
/// The rank named did not answer in time.
const TIMEOUT: u8 = 3;

/// What a control connection told.
#[derive(Debug)]
pub(crate) enum Heard {
    /// Nothing yet.
    Nothing,
    /// The peer needs nothing more from this epoch; what it sent before stands.
    Closed,
    /// The epoch is over.
    Failed(CollectiveError),
}

/// Rank `myself` tells the peer at the other end of `control` why the epoch ends. Best effort: the peer may be
/// gone.
pub(crate) fn send(mut control: &TcpStream, myself: usize, cause: &CollectiveError) {
    // Ranks are below 64 (RANKS_MAX).
    let notice = match cause {
        CollectiveError::Closed => [CLOSED, myself as u8, 0, 0, 0, 0, 0, 0],
        CollectiveError::Lost { rank } => [LOST, *rank as u8, 0, 0, 0, 0, 0, 0],
        CollectiveError::AbortedBy { rank } => [GAVE_UP, *rank as u8, 0, 0, 0, 0, 0, 0],
        CollectiveError::Timeout { rank, operation, waited } => {
            let [a, b, c, d] = u32::try_from(waited.as_millis()).unwrap_or(u32::MAX).to_le_bytes();
            [TIMEOUT, *rank as u8, *operation as u8, 0, a, b, c, d]
        }
        _ => [GAVE_UP, myself as u8, 0, 0, 0, 0, 0, 0],
    };
    let _ = control.write_all(&notice);
}

/// Looks what came from rank `sender` to rank `myself`; does not wait.
pub(crate) fn receive(mut control: &TcpStream, sender: usize, myself: usize) -> Heard {
    let mut notice = [0; NOTICE_BYTES];
    match control.read(&mut notice) {
        Ok(NOTICE_BYTES) => decode(&notice, sender, myself),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Heard::Nothing
        }
        // The end, an error, or a part of a notice, which is written in one go.
        _ => Heard::Failed(CollectiveError::Lost { rank: sender }),
    }
}

fn decode(notice: &[u8; NOTICE_BYTES], sender: usize, myself: usize) -> Heard {
    let [code, rank, operation, _, waited_ms @ ..] = *notice;
    let rank = usize::from(rank);
    if code == CLOSED {
        return Heard::Closed;
    }
    if rank == myself {
        // A rank that is held to be lost or hanging knows better, but the sender is out.
        return Heard::Failed(CollectiveError::AbortedBy { rank: sender });
    }
    Heard::Failed(match (code, Operation::from_code(operation)) {
        (LOST, _) => CollectiveError::Lost { rank },
        (TIMEOUT, Some(operation)) => {
            let waited = Duration::from_millis(u32::from_le_bytes(waited_ms).into());
            CollectiveError::Timeout { rank, operation, waited }
        }
        _ => CollectiveError::AbortedBy { rank },
    })
}
