//! What stands before every message: enough to notice at once that two ranks are not making the same call.

use std::fmt;

/// A call of [`crate::Collective`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// [`crate::Collective::all_reduce`]
    AllReduce = 1,
    /// [`crate::Collective::all_gather`]
    AllGather,
    /// [`crate::Collective::gather`]
    Gather,
    /// [`crate::Collective::broadcast`]
    Broadcast,
    /// [`crate::Collective::barrier`]
    Barrier,
}

impl Operation {
    const ALL: [Self; 5] = [Self::AllReduce, Self::AllGather, Self::Gather, Self::Broadcast, Self::Barrier];

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u8 == code)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::Gather => "gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        })
    }
}

/// Bytes of a header on the wire and in a slot.
pub(crate) const HEADER_BYTES: usize = 24;

/// Equal on all ranks for one exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Number of the exchange in this epoch, from 1.
    pub(crate) sequence: u64,
    /// Length of the whole message that the call moves, which may take several exchanges.
    pub(crate) message_bytes: u64,
    pub(crate) operation: Operation,
    /// 0 where the operation has none.
    pub(crate) root: u16,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.message_bytes.to_le_bytes());
        bytes[16] = self.operation as u8;
        bytes[18..20].copy_from_slice(&self.root.to_le_bytes());
        bytes
    }
}

/// A header in words, ours or whatever came instead.
pub(crate) fn describe(bytes: &[u8; HEADER_BYTES]) -> String {
    let number = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    match Operation::from_code(bytes[16]) {
        Some(operation) => format!(
            "{operation} of {} bytes with root {} as message {}",
            number(8),
            u16::from_le_bytes([bytes[18], bytes[19]]),
            number(0),
        ),
        None => "bytes that are no message header".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_what_it_is() {
        let header = Header { sequence: 7, message_bytes: 4096, operation: Operation::Broadcast, root: 3 };
        assert_eq!(describe(&header.encode()), "broadcast of 4096 bytes with root 3 as message 7");
        assert_eq!(describe(&[0xff; HEADER_BYTES]), "bytes that are no message header");
    }
}
