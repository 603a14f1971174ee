//! Autoscalers, one for each cluster that promises something: each looks at what its routers tell, and rings when it has something
//! to say.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_autoscale::Room;
use galerne_coord::Coord;
use galerne_types::Fleet;
use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::bell::Bell;
use super::fleets::{Place, View};
use super::index::Key;
use super::metrics::Metrics;
use crate::api::{AutoscaleStatus, ClusterStatus};
use crate::plan::{Plan, Seen};
use crate::scale::{Counted, Order, Scaler, started};

/// A window: the law was held against its traces with windows of this length.
const WINDOW: Duration = Duration::from_secs(5);

/// The autoscalers of all clusters.
pub(crate) struct Scalers {
    /// Hears of clusters for which there is something new to say.
    news: Bell,
    metrics: Arc<Metrics>,
    open: Mutex<BTreeMap<Key, Open>>,
}

struct Open {
    place: Place,
    scaler: Arc<Mutex<Scaler>>,
    _looks: AbortOnDropHandle<()>,
}

/// What a pass has seen of a cluster.
pub(crate) struct Passed<'a> {
    pub(crate) order: Option<Order>,
    pub(crate) seen: &'a Seen,
    pub(crate) planned: &'a Plan,
    pub(crate) last: &'a ClusterStatus,
    /// So long a group may take to start, in seconds.
    pub(crate) start_s: i64,
}

impl Scalers {
    pub(crate) fn new(news: Bell, metrics: Arc<Metrics>) -> Self {
        Self { news, metrics, open: Mutex::default() }
    }

    /// What was decided for a cluster, if anything was since this operator acts.
    pub(crate) fn told(&self, cluster: &Key) -> Option<AutoscaleStatus> {
        let open = lock(&self.open);
        open.get(cluster).and_then(|open| lock(&open.scaler).told().cloned())
    }

    /// A pass has seen a cluster: its autoscaler is told, and made if there is none yet.
    pub(crate) fn passed(&self, cluster: &Key, place: Place, view: Option<&View>, passed: &Passed<'_>) {
        let Passed { order, seen, planned, last, start_s } = passed;
        let Some(order) = order else { return self.close(cluster) };
        let Some(view) = view else { return };
        let mut open = lock(&self.open);
        let known = open.remove(cluster).filter(|open| open.place == place);
        let entry = known.unwrap_or_else(|| {
            let scaler = Arc::new(Mutex::new(Scaler::new(*order, last.autoscale.as_ref())));
            let (news, metrics) = (self.news.clone(), self.metrics.clone());
            let looks = look(cluster.clone(), view.coord.clone(), scaler.clone(), news, metrics);
            Open { place, scaler, _looks: AbortOnDropHandle::new(tokio::spawn(looks)) }
        });
        let counted = Counted::of(seen, rooms(&view.fleet.borrow()).into_iter());
        lock(&entry.scaler).saw(*order, counted, started(seen, &planned.groups, last, *start_s));
        open.insert(cluster.clone(), entry);
    }

    /// The cluster is gone, or promises nothing any more.
    pub(crate) fn close(&self, cluster: &Key) {
        lock(&self.open).remove(cluster);
        self.metrics.undecided(cluster);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What each group that serves takes up at once, as far as its leader tells.
fn rooms(fleet: &Fleet) -> Vec<Room> {
    let serving = fleet.groups.values().filter_map(galerne_types::Group::serving);
    let room = |health: &galerne_types::Health| Room {
        sequences_max: health.sequences_max,
        step_tokens_max: health.step_tokens_max,
    };
    serving.map(room).filter(|room| room.step_tokens_max > 0).collect()
}

/// Looks once a window, and at once when there are to be no groups and somebody waits for one.
async fn look(cluster: Key, coord: Coord, scaler: Arc<Mutex<Scaler>>, news: Bell, metrics: Arc<Metrics>) {
    let mut records = coord.watch_routers();
    if records.changed().await.is_err() {
        return;
    }
    let mut ticks = interval(WINDOW);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (began, mut asleep) = (Instant::now(), false);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(_) = records.wait_for(|records| records.values().any(|record| record.held > 0)), if asleep => {}
        }
        let is_silent = !records.has_changed().unwrap_or(false);
        let counted = records.borrow_and_update().clone();
        // That nobody comes is believed of routers that are there, and of an etcd that answers; until then nothing is decided.
        if !asleep && (counted.is_empty() || (is_silent && coord.answers().await.is_err())) {
            continue;
        }
        let mut scaler = lock(&scaler);
        let is_news = scaler.look(began.elapsed(), Timestamp::now().as_second(), &counted);
        if let Some(decision) = scaler.decision() {
            asleep = decision.groups == 0;
            metrics.decided(&cluster, decision);
        }
        drop(scaler);
        if is_news {
            news.ring(cluster.clone());
        }
    }
}
