//! What goes to a GPU beside its work: through pinned memory, in order with what it is given to do.

use std::sync::Arc;

use super::device::{Buffer, Device, DeviceError, Stage};

/// Two pieces of pinned memory, of which one is filled while the other's copies come to an end. What is put is there for all work
/// that is given afterwards.
pub(super) struct Post {
    pieces: [Box<dyn Stage>; 2],
    bytes: usize,
    /// Which piece is filled, and up to where.
    now: usize,
    used: usize,
}

/// Pieces begin with what comes next at multiples of this.
const ALIGNMENT: usize = 64;

impl Post {
    /// Room to put at least so many bytes at once.
    ///
    /// # Errors
    /// As [`Device::stage`].
    pub(super) fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        let piece = || Arc::clone(device).stage(bytes);
        Ok(Self { pieces: [piece()?, piece()?], bytes, now: 0, used: 0 })
    }

    /// Copies `bytes` to the beginning of `to`.
    ///
    /// # Errors
    /// As [`Stage::send`].
    ///
    /// # Panics
    /// If they are more than there is room for, here or there.
    pub(super) fn put(&mut self, to: &Buffer, bytes: &[u8]) -> Result<(), DeviceError> {
        assert!(bytes.len() <= self.bytes, "there is room for the longest message");
        if self.bytes - self.used < bytes.len() {
            (self.now, self.used) = (1 - self.now, 0);
            self.pieces[self.now].wait()?;
        }
        let (piece, at) = (&mut *self.pieces[self.now], self.used);
        piece.bytes()[at..at + bytes.len()].copy_from_slice(bytes);
        self.used = (at + bytes.len()).next_multiple_of(ALIGNMENT).min(self.bytes);
        to.take(0, piece, at..at + bytes.len())
    }
}
