//! The bodies that are being read: how many bytes they may hold together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::failure::Failure;

/// Bytes that a value of a JSON text takes where it has been read: it can be written in two.
const JSON_VALUE_BYTES: usize = 64;

/// Counts the bytes of bodies, and of what their JSON becomes, from when they arrive until somebody has made tokens of
/// them.
#[derive(Debug)]
pub(crate) struct Bodies {
    bytes_max: usize,
    bytes: AtomicUsize,
}

/// The bytes that one body holds; they are given back when this is dropped, or before.
#[derive(Debug)]
pub(crate) struct Held {
    bodies: Arc<Bodies>,
    bytes: AtomicUsize,
}

impl Bodies {
    pub(crate) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, bytes: AtomicUsize::new(0) })
    }

    /// Begins a body.
    pub(crate) fn begin(self: &Arc<Self>) -> Arc<Held> {
        Arc::new(Held { bodies: self.clone(), bytes: AtomicUsize::new(0) })
    }

    /// Bytes that are held now.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }
}

impl Held {
    /// Holds a piece of the body, if all bodies together have room for it.
    pub(crate) fn piece(&self, piece: &[u8]) -> Result<(), Failure> {
        let values = piece.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
        self.more(piece.len() + values * JSON_VALUE_BYTES)
    }

    /// Holds so many bytes more.
    pub(crate) fn more(&self, bytes: usize) -> Result<(), Failure> {
        let max = self.bodies.bytes_max;
        let own = self.bytes().saturating_add(bytes);
        if own > max {
            let message = format!(
                "this body and its JSON would take {own} bytes, and all bodies together may take {max}: send less at once"
            );
            return Err(Failure::Invalid { field: None, message });
        }
        let room = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= max);
        if self.bodies.bytes.fetch_update(Relaxed, Relaxed, room).is_err() {
            let message =
                format!("this router holds at most {max} bytes of bodies that come in at once: retry later");
            return Err(Failure::Overloaded(message));
        }
        self.bytes.fetch_add(bytes, Relaxed);
        Ok(())
    }

    /// Bytes that it holds now.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Gives all of them back.
    pub(crate) fn release(&self) {
        self.bodies.bytes.fetch_sub(self.bytes.swap(0, Relaxed), Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_share_a_room_and_give_it_back() {
        let bodies = Bodies::new(10);
        let (one, other) = (bodies.begin(), bodies.begin());
        one.more(6).unwrap();
        other.more(4).unwrap();
        let full = other.more(1).unwrap_err().to_string();
        assert!(full.contains("at most 10 bytes"), "{full}");
        one.release();
        other.more(6).unwrap();
        assert_eq!(bodies.bytes(), 10);
        let never = other.more(1).unwrap_err();
        assert!(
            matches!(never, Failure::Invalid { .. }) && never.to_string().contains("would take 11 bytes")
        );
        drop((one, other));
        assert_eq!(bodies.bytes(), 0);
    }

    #[test]
    fn json_counts_as_what_it_becomes() {
        let bodies = Bodies::new(1 << 20);
        let body = bodies.begin();
        let text = b"{\"a\":[[],1,2]}";
        body.piece(text).unwrap();
        assert_eq!(bodies.bytes(), text.len() + 5 * JSON_VALUE_BYTES);
        assert!(size_of::<serde_json::Value>() <= 2 * JSON_VALUE_BYTES);
    }
}
