//! What a gRPC service of this process may hand to the epoch under way, if there is one.

use std::sync::{Arc, Mutex, PoisonError};

/// A place that holds a `T` while an epoch wants visitors.
#[derive(Debug)]
pub(crate) struct Door<T>(Arc<Mutex<Option<T>>>);

impl<T> Clone for Door<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Clone> Door<T> {
    /// A closed door.
    pub(crate) fn closed() -> Self {
        Self(Arc::new(Mutex::new(None)))
    }

    /// Opens it until the guard is dropped.
    pub(crate) fn open(&self, behind: T) -> OpenDoor<T> {
        self.put(Some(behind));
        OpenDoor(self.clone())
    }

    /// What is behind it, while it is open.
    pub(crate) fn enter(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, behind: Option<T>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = behind;
    }
}

/// Closes a door when dropped.
#[derive(Debug)]
pub(crate) struct OpenDoor<T: Clone>(Door<T>);

impl<T: Clone> Drop for OpenDoor<T> {
    fn drop(&mut self) {
        self.0.put(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_a_door_is_there_while_it_is_open() {
        let door = Door::closed();
        assert_eq!(door.enter(), None);
        let open = door.open(7);
        assert_eq!(door.enter(), Some(7));
        drop(open);
        assert_eq!(door.enter(), None);
    }
}
