//! Each cluster's fleet, as etcd shows it: one connection a cluster, for as long as the cluster is there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use galerne_coord::{Coord, EtcdAccess};
use galerne_types::Fleet;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::bell::Bell;
use super::index::Key;

/// How long etcd may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Pause between two attempts to reach it.
const PAUSE: Duration = Duration::from_secs(2);

/// The fleets of all clusters.
pub(crate) struct Fleets {
    access: EtcdAccess,
    /// Hears of clusters whose fleets have changed.
    changed: Bell,
    open: Mutex<BTreeMap<Key, Open>>,
}

/// Where a cluster's fleet is: endpoints, and its name there.
pub(crate) type Place = (Vec<String>, String);

struct Open {
    place: Place,
    view: watch::Receiver<Option<View>>,
    follower: AbortHandle,
}

/// A cluster's etcd, and what it shows.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) coord: Coord,
    pub(crate) fleet: watch::Receiver<Fleet>,
}

impl Fleets {
    pub(crate) fn new(access: EtcdAccess, changed: Bell) -> Arc<Self> {
        Arc::new(Self { access, changed, open: Mutex::default() })
    }

    /// The cluster's fleet, if etcd has shown it already. The first question begins to follow it.
    pub(crate) fn view(&self, cluster: &Key, place: &Place) -> Option<View> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get(cluster).filter(|known| known.place == *place) {
            return known.view.borrow().clone();
        }
        let (sender, view) = watch::channel(None);
        let follower =
            follow(self.access.clone(), place.clone(), cluster.clone(), sender, self.changed.clone());
        let follower = tokio::spawn(follower).abort_handle();
        if let Some(before) = open.insert(cluster.clone(), Open { place: place.clone(), view, follower }) {
            before.follower.abort();
        }
        None
    }

    /// The cluster is gone.
    pub(crate) fn close(&self, cluster: &Key) {
        let closed = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(cluster);
        if let Some(closed) = closed {
            closed.follower.abort();
        }
    }
}

/// Reaches etcd, sooner or later, and then tells of every change.
async fn follow(
    access: EtcdAccess,
    (endpoints, name): Place,
    cluster: Key,
    view: watch::Sender<Option<View>>,
    changed: Bell,
) {
    let coord = loop {
        match Coord::connect_as(&access, &endpoints, &name, CONNECT_TIMEOUT).await {
            Ok(coord) => break coord,
            Err(error) => tracing::warn!(cluster = name, %error, "a cluster's etcd cannot be reached"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    let mut fleet = coord.watch_fleet();
    while fleet.changed().await.is_ok() {
        if view.borrow().is_none() {
            view.send_replace(Some(View { coord: coord.clone(), fleet: fleet.clone() }));
        }
        fleet.mark_unchanged();
        changed.ring(cluster.clone());
    }
}
