//! What the operator counts, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_autoscale::{Decision, METRICS};

use super::index::Key;
use crate::plan::{Asked, GroupSeen, Seen};

/// What the [`METRICS`] of decisions are.
const METRICS_HELP: [&str; METRICS.len()] = [
    "Groups that spec.sla calls for, within bounds.",
    "Groups that are needed for what is expected, whatever the bounds.",
    "The promised percentile that is kept worst, as a share of what is promised.",
    "Time to the first token that is expected, at the promised percentile.",
    "Time between two tokens that is expected, at the promised percentile.",
    "Requests a second that are expected at most.",
];

/// Counts, for as long as the process lives.
#[derive(Default)]
pub(crate) struct Metrics {
    passes: AtomicU64,
    failures: AtomicU64,
    pass_micros: AtomicU64,
    leads: AtomicU64,
    writes: Mutex<BTreeMap<(&'static str, String), u64>>,
    clusters: Mutex<BTreeMap<Key, Groups>>,
    /// What was decided for clusters that promise something.
    decided: Mutex<BTreeMap<Key, Decided>>,
}

/// Values by their names.
type Decided = Vec<(&'static str, f64)>;

/// Groups of a cluster.
#[derive(Clone, Copy)]
struct Groups {
    wanted: u32,
    there: u32,
    available: u32,
    updated: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    pub(crate) fn passed(&self, well: bool, took: Duration) {
        if well { &self.passes } else { &self.failures }.fetch_add(1, Relaxed);
        self.pass_micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn leads(&self, leads: bool) {
        self.leads.store(leads.into(), Relaxed);
    }

    pub(crate) fn wrote(&self, verb: &'static str, kind: &str) {
        *lock(&self.writes).entry((verb, kind.to_owned())).or_default() += 1;
    }

    pub(crate) fn saw(&self, cluster: &Key, asked: &Asked, seen: &Seen) {
        let count =
            |is: &dyn Fn(&GroupSeen) -> bool| seen.groups.values().filter(|group| is(group)).count() as u32;
        let groups = Groups {
            wanted: asked.wanted,
            there: count(&GroupSeen::occupies),
            available: count(&GroupSeen::available),
            updated: count(&|group| group.available() && group.revision.as_ref() == Some(&asked.revision)),
        };
        lock(&self.clusters).insert(cluster.clone(), groups);
    }

    pub(crate) fn decided(&self, cluster: &Key, decision: &Decision) {
        lock(&self.decided).insert(cluster.clone(), decision.metrics().collect());
    }

    pub(crate) fn undecided(&self, cluster: &Key) {
        lock(&self.decided).remove(cluster);
    }

    pub(crate) fn forget(&self, cluster: &Key) {
        lock(&self.clusters).remove(cluster);
    }

    /// All of it.
    pub(crate) fn page(&self) -> String {
        let mut page = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
            // Writing to a string cannot fail.
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(page, "{name}{labels} {value}");
            }
        };
        let plain = |value: u64| vec![(String::new(), value.to_string())];
        family(
            "galerne_operator_leads",
            "gauge",
            "1 at the operator that acts.",
            plain(self.leads.load(Relaxed)),
        );
        let (well, badly) = (self.passes.load(Relaxed), self.failures.load(Relaxed));
        let passes = [("ok", well), ("error", badly)];
        let passes = passes.map(|(result, count)| (format!("{{result=\"{result}\"}}"), count.to_string()));
        family("galerne_operator_passes_total", "counter", "Passes over a cluster.", passes.into());
        let seconds = self.pass_micros.load(Relaxed) as f64 / 1e6;
        let seconds = vec![(String::new(), seconds.to_string())];
        family("galerne_operator_pass_seconds_total", "counter", "Time in passes.", seconds);
        let writes = lock(&self.writes).clone().into_iter();
        let writes = writes
            .map(|((verb, kind), count)| (format!("{{verb=\"{verb}\",kind=\"{kind}\"}}"), count.to_string()));
        family("galerne_operator_writes_total", "counter", "Writes to the API server.", writes.collect());
        let clusters = lock(&self.clusters).clone();
        let samples = clusters.iter().flat_map(|((namespace, name), groups)| {
            let Groups { wanted, there, available, updated } = *groups;
            let states =
                [("wanted", wanted), ("there", there), ("available", available), ("updated", updated)];
            states.map(|(state, count)| {
                (
                    format!("{{namespace=\"{namespace}\",cluster=\"{name}\",state=\"{state}\"}}"),
                    count.to_string(),
                )
            })
        });
        family("galerne_cluster_groups", "gauge", "Groups of a cluster.", samples.collect());
        let decided = lock(&self.decided).clone();
        for (metric, help) in METRICS.into_iter().zip(METRICS_HELP) {
            let of =
                |values: &Decided| values.iter().find(|(name, _)| *name == metric).map(|(_, value)| *value);
            let samples = decided.iter().filter_map(|((namespace, name), values)| {
                let labels = format!("{{namespace=\"{namespace}\",cluster=\"{name}\"}}");
                Some((labels, of(values)?.to_string()))
            });
            family(metric, "gauge", help, samples.collect());
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_as_prometheus_reads_it() {
        let metrics = Metrics::default();
        metrics.passed(true, Duration::from_millis(1500));
        metrics.wrote("apply", "Service");
        metrics.leads(true);
        let page = metrics.page();
        for line in [
            "galerne_operator_leads 1",
            "galerne_operator_passes_total{result=\"ok\"} 1",
            "galerne_operator_pass_seconds_total 1.5",
            "galerne_operator_writes_total{verb=\"apply\",kind=\"Service\"} 1",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }
}
