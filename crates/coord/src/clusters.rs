//! All clusters of one etcd, over one connection and by one watch: who looks after a thousand must not poll a thousand times.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use etcd_client::{Event, KeyValue};
use galerne_types::Fleet;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::access::EtcdAccess;
use crate::coord::Coord;
use crate::error::CoordError;
use crate::etcd::{Etcd, Listing};
use crate::fleet::{News, follow_for_ever, replace, take, view_of};
use crate::keys::{Keys, ROOT, cluster_of};
use crate::limits::CLUSTERS_RECONCILE_INTERVAL;
use crate::view::{self, Routers};

/// The clusters of one etcd. Clones share the connection and the watch, which end with the last of them.
#[derive(Clone)]
pub struct Clusters {
    etcd: Etcd,
    known: Arc<Mutex<Known>>,
    _follower: Arc<Follower>,
}

/// The clusters that were asked for, or that etcd holds.
struct Known {
    /// When etcd was heard of last: it is asked twice a second, and must answer.
    heard: Instant,
    /// Whether everything has been listed.
    listed: bool,
    clusters: BTreeMap<String, Views>,
}

/// What is known of one cluster.
#[derive(Default)]
struct Views {
    fleet: watch::Sender<Fleet>,
    routers: watch::Sender<Routers>,
}

struct Follower(AbortHandle);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Clusters {
    /// Connects as [`Coord::connect_as`] does, to read below `/galerne/`, and begins to follow what is there.
    ///
    /// # Errors
    /// One sentence that names the endpoints, or the file that is wrong.
    pub async fn connect_as(
        access: &EtcdAccess,
        endpoints: &[String],
        timeout: Duration,
    ) -> Result<Self, CoordError> {
        let etcd = Etcd::connect(endpoints, access, ROOT, timeout).await?;
        let known = Known { heard: Instant::now(), listed: false, clusters: BTreeMap::new() };
        let known = Arc::new(Mutex::new(known));
        let (followed, told) = (etcd.clone(), known.clone());
        let follower = tokio::spawn(async move {
            let tell = |news: News<'_>| {
                let mut known = lock(&told);
                known.heard = Instant::now();
                match news {
                    News::Listing(listing) => known.list(listing),
                    News::Events(events) => known.take(events),
                }
            };
            follow_for_ever(&followed, ROOT, CLUSTERS_RECONCILE_INTERVAL, tell).await;
        });
        Ok(Self { etcd, known, _follower: Arc::new(Follower(follower.abort_handle())) })
    }

    /// How long nothing has been heard of etcd: while it answers that is less than a second or two, whatever happens.
    pub fn silent_for(&self) -> Duration {
        lock(&self.known).heard.elapsed()
    }

    /// One of them, whether etcd holds something of it or not. Its [fleet](Coord::watch_fleet) and its
    /// [routers](Coord::watch_routers) go on as long as this does.
    ///
    /// # Errors
    /// When the name cannot be part of a key.
    pub fn cluster(&self, name: &str) -> Result<Coord, CoordError> {
        let keys = Keys::new(name)?;
        let mut known = lock(&self.known);
        let views = known.clusters.entry(name.to_owned()).or_default();
        let (mut fleet, mut routers) = (views.fleet.subscribe(), views.routers.subscribe());
        if known.listed {
            fleet.mark_changed();
            routers.mark_changed();
        }
        let (fleet, routers) = (Arc::new(OnceLock::from(fleet)), Arc::new(OnceLock::from(routers)));
        Ok(Coord { etcd: self.etcd.clone(), keys, fleet, routers })
    }
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Known {
    fn list(&mut self, listing: &Listing) {
        let mut records: BTreeMap<&str, Vec<&KeyValue>> = BTreeMap::new();
        for kv in &listing.kvs {
            records.entry(cluster_of(kv.key()).unwrap_or_default()).or_default().push(kv);
        }
        let first = !std::mem::replace(&mut self.listed, true);
        for name in records.keys().filter(|name| Keys::new(name).is_ok()) {
            self.clusters.entry((*name).to_owned()).or_default();
        }
        for (name, views) in &self.clusters {
            let Ok(keys) = Keys::new(name) else { continue };
            let records = records.remove(name.as_str()).unwrap_or_default();
            replace(&views.fleet, view_of(&keys, records.iter().copied(), view::apply), first);
            replace(&views.routers, view_of(&keys, records, view::apply_router), first);
        }
        self.forget();
    }

    fn take(&mut self, events: &[Event]) {
        let mut news: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
        for event in events {
            let cluster = event.kv().and_then(|kv| cluster_of(kv.key()));
            news.entry(cluster.unwrap_or_default()).or_default().push(event);
        }
        for (name, events) in news {
            let Ok(keys) = Keys::new(name) else { continue };
            let views = self.clusters.entry(name.to_owned()).or_default();
            take(&views.fleet, &keys, events.iter().copied(), view::apply);
            take(&views.routers, &keys, events, view::apply_router);
        }
    }

    /// Lets go of clusters of which there is nothing, and which nobody looks at.
    fn forget(&mut self) {
        self.clusters.retain(|_, Views { fleet, routers }| {
            fleet.receiver_count() + routers.receiver_count() > 0
                || *fleet.borrow() != Fleet::default()
                || !routers.borrow().is_empty()
        });
    }
}
