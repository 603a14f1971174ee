//! Each cluster's fleet, as etcd shows it. Clusters with the same etcd share a connection and a watch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_coord::{Clusters, Coord, EtcdAccess};
use galerne_types::Fleet;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::bell::Bell;
use super::credentials::{Credentials, Way};
use super::index::Key;

/// How long etcd may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Pause between two attempts to reach it.
const PAUSE: Duration = Duration::from_secs(2);
/// An etcd of which nothing is heard for so long is away: what it has shown may not be so any more.
const SILENT_MAX: Duration = Duration::from_secs(5);
/// Pause between two looks whether it is heard of.
const LISTEN_INTERVAL: Duration = Duration::from_millis(500);

/// The fleets of all clusters.
pub(crate) struct Fleets {
    credentials: Arc<Credentials>,
    /// Hears of clusters whose fleets have changed.
    changed: Bell,
    open: Mutex<Open>,
}

/// An etcd: its endpoints, and how it is spoken to.
pub(crate) type At = (Vec<String>, Way);
/// Where a cluster's fleet is: an etcd, and its name there.
pub(crate) type Place = (At, String);

#[derive(Default)]
struct Open {
    clusters: BTreeMap<Key, Followed>,
    /// As many as clusters need.
    etcds: BTreeMap<At, Etcd>,
}

struct Followed {
    place: Place,
    view: watch::Receiver<Reach>,
    follower: AbortHandle,
}

struct Etcd {
    clusters: watch::Receiver<Reached>,
    connector: AbortHandle,
}

/// What has come of reaching for an etcd.
enum Reached {
    Asked,
    Away,
    There(Clusters),
    /// It was there, and is silent.
    Silent(Clusters),
}

/// What is known of a cluster's fleet.
#[derive(Clone)]
pub(crate) enum Reach {
    /// etcd has just been asked: the bell rings when there is more to tell.
    Asked,
    /// etcd did not answer, and is asked again.
    Away,
    /// etcd has answered, and does not any more.
    Silent,
    /// This.
    Shown(View),
}

/// A cluster's etcd, and what it shows.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) coord: Coord,
    pub(crate) fleet: watch::Receiver<Fleet>,
}

impl Reach {
    pub(crate) fn view(&self) -> Option<&View> {
        if let Self::Shown(view) = self { Some(view) } else { None }
    }
}

impl Fleets {
    pub(crate) fn new(credentials: Arc<Credentials>, changed: Bell) -> Arc<Self> {
        Arc::new(Self { credentials, changed, open: Mutex::default() })
    }

    /// The cluster's fleet, as far as etcd has shown it already. The first question begins to follow it.
    pub(crate) fn reach(&self, cluster: &Key, place: &Place) -> Reach {
        let mut open = self.open();
        if let Some(known) = open.clusters.get(cluster).filter(|known| known.place == *place) {
            return known.view.borrow().clone();
        }
        open.close(cluster);
        let etcd = open.etcds.entry(place.0.clone()).or_insert_with(|| {
            let (sender, clusters) = watch::channel(Reached::Asked);
            let (endpoints, way) = place.0.clone();
            let connector = tokio::spawn(connect(self.credentials.access(way), endpoints, sender));
            Etcd { clusters, connector: connector.abort_handle() }
        });
        let (sender, view) = watch::channel(Reach::Asked);
        let follower =
            follow(etcd.clusters.clone(), place.1.clone(), cluster.clone(), sender, self.changed.clone());
        let follower = tokio::spawn(follower).abort_handle();
        open.clusters.insert(cluster.clone(), Followed { place: place.clone(), view, follower });
        Reach::Asked
    }

    /// The cluster is gone.
    pub(crate) fn close(&self, cluster: &Key) {
        self.open().close(cluster);
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn close(&mut self, cluster: &Key) {
        let Some(Followed { place: (at, _), follower, .. }) = self.clusters.remove(cluster) else {
            return;
        };
        follower.abort();
        if !self.clusters.values().any(|other| other.place.0 == at)
            && let Some(Etcd { connector, .. }) = self.etcds.remove(&at)
        {
            connector.abort();
        }
    }
}

/// Reaches an etcd, sooner or later, and tells from then on whether it is heard of.
async fn connect(access: EtcdAccess, endpoints: Vec<String>, reached: watch::Sender<Reached>) {
    let clusters = loop {
        match Clusters::connect_as(&access, &endpoints, CONNECT_TIMEOUT).await {
            Ok(clusters) => break clusters,
            Err(error) => tracing::warn!(%error, "an etcd of clusters cannot be reached"),
        }
        reached.send_replace(Reached::Away);
        tokio::time::sleep(PAUSE).await;
    };
    loop {
        reached.send_replace(Reached::There(clusters.clone()));
        while clusters.silent_for() < SILENT_MAX {
            tokio::time::sleep(LISTEN_INTERVAL).await;
        }
        tracing::warn!(?endpoints, "an etcd of clusters is silent: none of their groups is ended meanwhile");
        reached.send_replace(Reached::Silent(clusters.clone()));
        while clusters.silent_for() >= SILENT_MAX {
            tokio::time::sleep(LISTEN_INTERVAL).await;
        }
    }
}

/// Waits for etcd, and then tells of every change.
async fn follow(
    mut etcd: watch::Receiver<Reached>,
    name: String,
    cluster: Key,
    view: watch::Sender<Reach>,
    changed: Bell,
) {
    let coord = loop {
        let found = match &*etcd.borrow_and_update() {
            Reached::There(clusters) | Reached::Silent(clusters) => Some(clusters.cluster(&name)),
            Reached::Asked => None,
            Reached::Away => {
                if matches!(view.send_replace(Reach::Away), Reach::Asked) {
                    changed.ring(cluster.clone());
                }
                None
            }
        };
        match found {
            Some(Ok(coord)) => break coord,
            Some(Err(error)) => {
                return tracing::warn!(cluster = name, %error, "a cluster has no place in etcd");
            }
            // Who reaches it lives as long as this does.
            None => drop(etcd.changed().await),
        }
    };
    let mut fleet = coord.watch_fleet();
    let mut listed = false;
    loop {
        tokio::select! {
            told = fleet.changed() => match told {
                Ok(()) => listed = true,
                Err(_) => return,
            },
            Ok(()) = etcd.changed() => {}
        }
        fleet.mark_unchanged();
        let silent = matches!(&*etcd.borrow_and_update(), Reached::Silent(_));
        if !listed {
            continue;
        }
        if silent {
            view.send_replace(Reach::Silent);
        } else if view.borrow().view().is_none() {
            view.send_replace(Reach::Shown(View { coord: coord.clone(), fleet: fleet.clone() }));
        }
        changed.ring(cluster.clone());
    }
}
