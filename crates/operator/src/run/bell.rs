//! Clusters that must be looked at: each of them once, however often it rings.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::Stream;
use futures_util::stream::unfold;
use tokio::sync::Notify;

use super::index::Key;

/// Rings for clusters. No more of them wait than there are.
#[derive(Clone, Default)]
pub(crate) struct Bell(Arc<Rung>);

#[derive(Default)]
struct Rung {
    clusters: Mutex<BTreeSet<Key>>,
    notify: Notify,
}

impl Bell {
    pub(crate) fn ring(&self, cluster: Key) {
        self.0.clusters.lock().unwrap_or_else(PoisonError::into_inner).insert(cluster);
        self.0.notify.notify_one();
    }

    /// Those it has rung for, for ever.
    pub(crate) fn heard(&self) -> impl Stream<Item = Key> + Send + 'static {
        unfold(self.0.clone(), |rung| async move {
            loop {
                let first = rung.clusters.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
                match first {
                    Some(cluster) => return Some((cluster, rung)),
                    None => rung.notify.notified().await,
                }
            }
        })
    }
}
