//! Messages to and from one rank of another host.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

use crate::bytes;
use crate::message::HEADER_BYTES;
use crate::segment::PAYLOAD_BYTES;

/// A connection, and how far the exchange in progress has got on it. Reading and writing never block, and go on
/// at the same time: a rank that is slow to read does not keep its peers from writing to it.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) socket: TcpStream,
    /// The peer's payload, at the offsets that it has in the peer's slot.
    inbox: Vec<f32>,
    header: [u8; HEADER_BYTES],
    outgoing: Flow,
    incoming: Flow,
}

/// One direction: a header and a part of a payload, or nothing.
#[derive(Debug, Default)]
struct Flow {
    part: Option<Range<usize>>,
    /// Bytes moved so far, the header's included.
    done: usize,
}

impl Flow {
    fn finished(&self) -> bool {
        self.part.as_ref().is_none_or(|part| self.done == HEADER_BYTES + part.len())
    }

    /// What is still to move of the header and of the part.
    fn rest(&self) -> (Range<usize>, Range<usize>) {
        let part = self.part.clone().unwrap_or_default();
        let of_part = self.done.saturating_sub(HEADER_BYTES);
        (self.done.min(HEADER_BYTES)..HEADER_BYTES, part.start + of_part..part.end)
    }
}

impl Stream {
    /// Takes a connected socket.
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            inbox: vec![0.0; PAYLOAD_BYTES / size_of::<f32>()],
            header: [0; HEADER_BYTES],
            outgoing: Flow::default(),
            incoming: Flow::default(),
        }
    }

    /// Begins an exchange: the parts of this rank's and of the peer's payload that are to move; `None`: nothing,
    /// not even a header.
    pub(crate) fn begin(&mut self, outgoing: Option<Range<usize>>, incoming: Option<Range<usize>>) {
        self.outgoing = Flow { part: outgoing, done: 0 };
        self.incoming = Flow { part: incoming, done: 0 };
    }

    /// Sends and receives as much as goes without waiting. Whether anything moved.
    pub(crate) fn advance(&mut self, header: &[u8; HEADER_BYTES], payload: &[u8]) -> io::Result<bool> {
        let before = self.outgoing.done + self.incoming.done;
        while !self.outgoing.finished() {
            let (of_header, of_part) = self.outgoing.rest();
            let rest = [IoSlice::new(&header[of_header]), IoSlice::new(&payload[of_part])];
            match unless_blocked(self.socket.write_vectored(&rest))? {
                Some(sent) => self.outgoing.done += sent,
                None => break,
            }
        }
        while !self.incoming.finished() {
            let (of_header, of_part) = self.incoming.rest();
            let inbox = bytes::of_mut(&mut self.inbox);
            let mut rest =
                [IoSliceMut::new(&mut self.header[of_header]), IoSliceMut::new(&mut inbox[of_part])];
            match unless_blocked(self.socket.read_vectored(&mut rest))? {
                Some(received) => self.incoming.done += received,
                None => break,
            }
        }
        Ok(self.outgoing.done + self.incoming.done > before)
    }

    /// The peer's header, as soon as it is there.
    pub(crate) fn header(&self) -> Option<&[u8; HEADER_BYTES]> {
        (self.incoming.part.is_some() && self.incoming.done >= HEADER_BYTES).then_some(&self.header)
    }

    /// Still to send, still to receive.
    pub(crate) fn pending(&self) -> (bool, bool) {
        (!self.outgoing.finished(), !self.incoming.finished())
    }

    /// The peer's payload of the exchange that has just finished; valid within the part asked for.
    pub(crate) fn payload(&self) -> &[u8] {
        bytes::of(&self.inbox)
    }
}

/// Bytes moved, `None` if that has to wait; an error also at the end of the stream.
fn unless_blocked(moved: io::Result<usize>) -> io::Result<Option<usize>> {
    match moved {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(moved) => Ok(Some(moved)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
