//! What the watches and etcd have shown of a cluster, put together for the planner.

use std::collections::{BTreeMap, BTreeSet};

use galerne_types::{Drain, Fleet, Group, GroupId, RankRecord, RankState};

use super::extras::{Extra, Offer};
use super::index::{Index, Key};
use super::shown::{Made, NodeShown, PodShown, PodState, Preload};
use crate::api::GalerneClusterSpec;
use crate::build::Kind;
use crate::names;
use crate::plan::{GroupSeen, PodPhase, PodSeen, PreloadSeen, Seen, TrialSeen};

/// So long a node may be silent before its pods are taken for lost, in seconds: what still runs there is fenced by its epoch.
pub(crate) const NODE_SILENT_S_MAX: i64 = 60;

/// Everything that is watched.
pub(crate) struct Shown {
    pub(crate) sets: Index<Made>,
    pub(crate) deployments: Index<Made>,
    pub(crate) services: Index<Made>,
    pub(crate) budgets: Index<Made>,
    pub(crate) pods: Index<PodShown>,
    /// Routers' pods.
    pub(crate) routers: Index<PodState>,
    /// Pods of managed etcds.
    pub(crate) etcds: Index<PodState>,
    /// Pods that bring weights to nodes.
    pub(crate) preloads: Index<Preload>,
    pub(crate) certificates: Extra,
    pub(crate) pod_groups: Extra,
    /// Under one key, because nodes are nobody's.
    pub(crate) nodes: Index<NodeShown>,
    /// Why pods of StatefulSets cannot be made, by the event's name.
    pub(crate) refusals: Index<(String, String)>,
    /// Pods' uids and why their volumes cannot be mounted, by the event's name.
    pub(crate) unmounted: Index<(String, String)>,
    /// The same of volumes that cannot be attached to a node.
    pub(crate) unattached: Index<(String, String)>,
    /// Whether nodes can be seen at all.
    pub(crate) sees_nodes: bool,
    /// Whether it is told why pods cannot be made.
    pub(crate) sees_events: bool,
}

impl Shown {
    pub(crate) fn new(sees_nodes: bool, sees_events: bool) -> Self {
        Self {
            sets: Index::new("StatefulSets"),
            deployments: Index::new("Deployments"),
            services: Index::new("Services"),
            budgets: Index::new("PodDisruptionBudgets"),
            pods: Index::new("pods of groups"),
            routers: Index::new("pods of routers"),
            etcds: Index::new("pods of etcds"),
            preloads: Index::new("pods that preload"),
            certificates: Extra::certificates(),
            pod_groups: Extra::pod_groups(),
            nodes: Index::new("nodes"),
            refusals: Index::new("events of StatefulSets"),
            unmounted: Index::new("events of mounts"),
            unattached: Index::new("events of attachments"),
            sees_nodes,
            sees_events,
        }
    }

    /// Returns once everything has been listed.
    pub(crate) async fn ready(&self) {
        let Self { sets, deployments, services, budgets, pods, preloads, nodes, refusals, .. } = self;
        let Self { routers, etcds, unmounted, unattached, certificates, pod_groups, .. } = self;
        let Self { sees_nodes, sees_events, .. } = self;
        tokio::join!(sets.ready(), deployments.ready(), services.ready(), budgets.ready(), pods.ready());
        tokio::join!(
            routers.ready(),
            etcds.ready(),
            preloads.ready(),
            certificates.ready(),
            pod_groups.ready()
        );
        if *sees_nodes {
            nodes.ready().await;
        }
        if *sees_events {
            tokio::join!(refusals.ready(), unmounted.ready(), unattached.ready());
        }
    }

    /// What has been made for a cluster.
    pub(crate) fn made(&self, kind: Kind) -> &Index<Made> {
        match kind {
            Kind::StatefulSet => &self.sets,
            Kind::Deployment => &self.deployments,
            Kind::Service => &self.services,
            Kind::PodDisruptionBudget => &self.budgets,
            Kind::Certificate => &self.certificates.made,
            Kind::PodGroup => &self.pod_groups.made,
        }
    }

    /// Why volumes are not there, by the uids of pods that wait for them.
    fn volumes(&self, cluster: &Key) -> BTreeMap<String, String> {
        let all = [&self.unattached, &self.unmounted].map(|index| index.of(cluster).into_values());
        all.into_iter().flatten().collect()
    }

    /// A router that fails; or one that waits for something, if that is `all` there is.
    fn router_trouble(&self, cluster: &Key, all: bool) -> Option<String> {
        let unmounted = self.volumes(cluster);
        let routers = self.routers.of(cluster).into_iter().map(|(name, mut state)| {
            state.explain(&unmounted);
            (name, state)
        });
        let troubles = |state: &PodState| match state.phase {
            PodPhase::Failing => true,
            PodPhase::Waiting => all && !state.message.is_empty(),
            PodPhase::Running => !state.message.is_empty(),
            PodPhase::Ending => false,
        };
        let mut bad = routers.filter(|(_, state)| troubles(state));
        let refused = || self.deployments.of(cluster).into_values().find_map(|made| made.refused);
        let bad = bad.next().map(|(name, state)| format!("{name}: {}", state.message));
        bad.or_else(|| refused().map(|why| format!("pods cannot be made: {why}")))
    }

    /// Why a managed etcd is not there.
    fn etcd_trouble(&self, cluster: &Key) -> Option<String> {
        let unmounted = self.volumes(cluster);
        let etcds = self.etcds.of(cluster).into_iter().map(|(name, mut state)| {
            state.explain(&unmounted);
            (name, state)
        });
        let mut told = etcds.filter(|(_, state)| !state.message.is_empty());
        let told = told.next().map(|(name, state)| format!("{name}: {}", state.message));
        let name = names::etcd(&cluster.1);
        let refused = || self.refusals.of(cluster).into_values().find(|(object, _)| *object == name);
        let missing = self.etcds.of(cluster).is_empty();
        told.or_else(|| {
            refused().filter(|_| missing).map(|(_, why)| format!("its pod cannot be made: {why}"))
        })
    }

    /// Why what a spec needs of Kubernetes is not there, if it is not.
    pub(crate) fn lacks(&self, spec: &GalerneClusterSpec) -> Option<&'static str> {
        spec.tls.as_ref()?.issuer.as_ref()?;
        match self.certificates.offer() {
            Offer::There(_) => None,
            Offer::Forbidden => Some(
                "spec.tls.issuer needs an operator that may make Certificates: set rbac.certificates in its chart, or name \
                 a secret with spec.tls.secret",
            ),
            Offer::Absent | Offer::Unknown => Some(
                "spec.tls.issuer needs cert-manager, which this Kubernetes does not have (cert-manager.io/v1): install it, or \
                 name a secret with spec.tls.secret",
            ),
        }
    }

    /// The API version of PodGroups, if there are any.
    pub(crate) fn gangs(&self) -> Option<String> {
        self.pod_groups.resource().map(|resource| resource.api_version)
    }

    /// Nodes of a cluster's pods that have not been seen. A watch may be late: who wants to know whether they are gone must ask.
    pub(crate) fn unseen_nodes(&self, cluster: &Key) -> BTreeSet<String> {
        if !self.sees_nodes {
            return BTreeSet::new(); // none is missed
        }
        let seen = self.nodes.of(&nobody());
        let of_pods = self.pods.of(cluster).into_values().filter_map(|pod| pod.node);
        of_pods.filter(|node| !seen.contains_key(node)).collect()
    }

    /// The pods of groups, and when, at the latest, their nodes must be looked at again. `gone`: nodes that there are not any more.
    fn pods_seen(
        &self,
        cluster: &Key,
        fleet: Option<&Fleet>,
        gone: &BTreeSet<String>,
        now: i64,
    ) -> (Vec<(u32, PodSeen)>, Option<i64>) {
        let (nodes, unmounted) = (self.nodes.of(&nobody()), self.volumes(cluster));
        let mut look_at = None;
        let mut pods = Vec::new();
        for (name, mut pod) in self.pods.of(cluster) {
            pod.state.explain(&unmounted);
            let node = pod.node.unwrap_or_default();
            let shown = nodes.get(&node);
            let deadline = shown.and_then(|shown| Some(shown.silent_since? + NODE_SILENT_S_MAX));
            look_at = [look_at, deadline.filter(|deadline| *deadline > now)].into_iter().flatten().min();
            let group = fleet.and_then(|fleet| fleet.groups.get(&GroupId(names::group(pod.group))));
            let seen = PodSeen {
                phase: pod.state.phase,
                message: pod.state.message,
                node_leaving: shown.is_some_and(|shown| shown.leaving),
                node_lost: deadline.is_some_and(|deadline| deadline <= now) || gone.contains(&node),
                ranks_living: group.map_or(0, |group| living(group).filter(|rank| rank.host == name).count())
                    as u16,
                node,
                name,
            };
            pods.push((pod.group, seen));
        }
        (pods, look_at)
    }

    /// The cluster at `now`, in Unix seconds; and when, at the latest, its nodes must be looked at again.
    pub(crate) fn seen(
        &self,
        cluster: &Key,
        fleet: Option<&Fleet>,
        gone: &BTreeSet<String>,
        needs: Option<&str>,
        now: i64,
    ) -> (Seen, Option<i64>) {
        let mut groups: BTreeMap<u32, GroupSeen> = BTreeMap::new();
        for made in self.sets.of(cluster).into_values() {
            let Some(group) = made.group.map(|number| groups.entry(number).or_default()) else { continue };
            group.revision = Some(made.revision).filter(|_| !made.deleting);
            (group.created, group.retired) = (made.created, made.retired);
        }
        let (pods, look_at) = self.pods_seen(cluster, fleet, gone, now);
        for (number, pod) in pods {
            groups.entry(number).or_default().pods.push(pod);
        }
        for (object, why) in self.refusals.of(cluster).into_values() {
            let number = object.rsplit_once("-g").and_then(|(_, number)| number.parse().ok());
            let group = number.and_then(|number: u32| groups.get_mut(&number));
            if let Some(group) = group.filter(|group| group.revision.is_some()) {
                group.refused = why;
            }
        }
        for (id, group) in fleet.into_iter().flat_map(|fleet| &fleet.groups) {
            if let Some(number) = names::group_number(&id.0) {
                from_etcd(groups.entry(number).or_default(), group);
            }
        }
        let preloads = self.preloads.of(cluster).into_iter().map(|(pod, it)| {
            let Preload { node, revision, phase, since, message } = it;
            PreloadSeen { pod, node, revision, phase, since, message }
        });
        let routers = self.deployments.of(cluster);
        let routers_ready = routers.values().map(|made| made.ready).sum();
        let nodes = self.nodes.of(&nobody());
        let offers =
            |resource: &str| nodes.values().any(|node| node.resources.iter().any(|has| has == resource));
        let resource_offered = needs.filter(|_| self.sees_nodes).map(offers);
        let fleet_known = fleet.is_some();
        (
            Seen {
                now,
                fleet_known,
                groups,
                routers_ready,
                routers_behind: routers.values().any(|made| made.behind),
                router_trouble: self.router_trouble(cluster, routers_ready == 0),
                resource_offered,
                preloads: preloads.collect(),
                etcd_trouble: self.etcd_trouble(cluster),
                lacks: None,
                trial: None::<TrialSeen>,
            },
            look_at,
        )
    }
}

/// The key of what belongs to no cluster.
pub(crate) fn nobody() -> Key {
    Key::default()
}

/// Ranks that are registered and not dead.
fn living(group: &Group) -> impl Iterator<Item = &RankRecord> {
    group.ranks.values().filter(|rank| rank.state != RankState::Dead)
}

fn from_etcd(seen: &mut GroupSeen, group: &Group) {
    let member_ready = |record: &&galerne_types::Member| {
        group.ranks.get(&record.id).is_some_and(|rank| record.is(rank) && rank.state == RankState::Ready)
    };
    let members = || group.epoch.iter().flat_map(|(_, record)| &record.members);
    seen.serving = group.serving().is_some_and(|health| !health.draining);
    seen.epoch = group.epoch.as_ref().map(|(epoch, _)| epoch.0);
    seen.ranks_ready = members().filter(member_ready).count() as u16;
    seen.ranks_living = living(group).count() as u16;
    seen.draining = is_meant(group.drain.as_ref(), seen.epoch);
    seen.held = group.hold.is_some();
    seen.remembered = true;
    seen.digest = group.serving().map(|health| health.model.digest.clone()).unwrap_or_default();
    let last = group.epoch.as_ref().and_then(|(_, record)| record.past.last());
    seen.last_loss = last.map(|past| past.loss.to_string());
}

/// Whether a wish to drain is meant for what a group formed last: ranks that came after it are not, and may have formed anew.
fn is_meant(drain: Option<&Drain>, epoch: Option<u64>) -> bool {
    drain.is_some_and(|drain| epoch.is_none_or(|epoch| epoch < drain.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_formed_after_a_wish_are_asked_again() {
        let drain = Drain { revision: 7, grace_ms: 0 };
        assert_eq!([None, Some(5), Some(9)].map(|epoch| is_meant(Some(&drain), epoch)), [true, true, false]);
        assert!(!is_meant(None, Some(5)));
    }
}
