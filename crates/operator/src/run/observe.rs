//! What the watches and etcd have shown of a cluster, put together for the planner.

use std::collections::BTreeMap;

use galerne_types::{Drain, Fleet, Group, RankState};

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
            preloads: Index::new("pods that preload"),
            certificates: Extra::certificates(),
            pod_groups: Extra::pod_groups(),
            nodes: Index::new("nodes"),
            refusals: Index::new("events of StatefulSets"),
            unmounted: Index::new("events of pods"),
            sees_nodes,
            sees_events,
        }
    }

    /// Returns once everything has been listed.
    pub(crate) async fn ready(&self) {
        let Self { sets, deployments, services, budgets, pods, preloads, nodes, refusals, .. } = self;
        let Self { routers, unmounted, certificates, pod_groups, sees_nodes, sees_events, .. } = self;
        tokio::join!(sets.ready(), deployments.ready(), services.ready(), budgets.ready(), pods.ready());
        tokio::join!(routers.ready(), preloads.ready(), certificates.ready(), pod_groups.ready());
        if *sees_nodes {
            nodes.ready().await;
        }
        if *sees_events {
            tokio::join!(refusals.ready(), unmounted.ready());
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

    /// A router that fails; or one that waits for something, if that is `all` there is.
    fn router_trouble(
        &self,
        cluster: &Key,
        unmounted: &BTreeMap<String, String>,
        all: bool,
    ) -> Option<String> {
        let routers = self.routers.of(cluster).into_iter().map(|(name, mut state)| {
            state.explain(unmounted);
            (name, state)
        });
        let troubles = |state: &PodState| match state.phase {
            PodPhase::Failing => true,
            PodPhase::Waiting => all && !state.message.is_empty(),
            PodPhase::Running | PodPhase::Ending => false,
        };
        let mut bad = routers.filter(|(_, state)| troubles(state));
        bad.next().map(|(name, state)| format!("{name}: {}", state.message))
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

    /// The cluster at `now`, in Unix seconds; and when, at the latest, its nodes must be looked at again.
    pub(crate) fn seen(
        &self,
        cluster: &Key,
        fleet: Option<&Fleet>,
        needs: Option<&str>,
        now: i64,
    ) -> (Seen, Option<i64>) {
        let mut groups: BTreeMap<u32, GroupSeen> = BTreeMap::new();
        for made in self.sets.of(cluster).into_values() {
            let Some(group) = made.group.map(|number| groups.entry(number).or_default()) else { continue };
            group.revision = Some(made.revision).filter(|_| !made.deleting);
            (group.created, group.retired) = (made.created, made.retired);
        }
        let nodes = self.nodes.of(&nobody());
        let unmounted: BTreeMap<String, String> = self.unmounted.of(cluster).into_values().collect();
        let mut look_at = None;
        for (name, mut pod) in self.pods.of(cluster) {
            pod.state.explain(&unmounted);
            let node = pod.node.as_ref().map(|name| nodes.get(name));
            let silent_since = node.and_then(|node| node?.silent_since);
            let deadline = silent_since.map(|since| since + NODE_SILENT_S_MAX);
            look_at = [look_at, deadline.filter(|deadline| *deadline > now)].into_iter().flatten().min();
            groups.entry(pod.group).or_default().pods.push(PodSeen {
                name,
                phase: pod.state.phase,
                message: pod.state.message,
                node: pod.node.clone().unwrap_or_default(),
                node_leaving: node.is_some_and(|node| node.is_some_and(|node| node.leaving)),
                // Where nodes cannot be seen, none is missed.
                node_lost: deadline.is_some_and(|deadline| deadline <= now)
                    || (self.sees_nodes && node.is_some_and(|node| node.is_none())),
            });
        }
        for (object, why) in self.refusals.of(cluster).into_values() {
            let number = object.rsplit_once("-g").and_then(|(_, number)| number.parse().ok());
            let group = number.and_then(|number: u32| groups.get_mut(&number));
            // Events outlive what they tell of.
            if let Some(group) = group.filter(|group| group.pods.is_empty() && group.revision.is_some()) {
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
        let routers_ready = self.deployments.of(cluster).into_values().map(|made| made.ready).sum();
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
                router_trouble: self.router_trouble(cluster, &unmounted, routers_ready == 0),
                resource_offered,
                preloads: preloads.collect(),
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

fn from_etcd(seen: &mut GroupSeen, group: &Group) {
    let member_ready = |record: &&galerne_types::Member| {
        group.ranks.get(&record.id).is_some_and(|rank| record.is(rank) && rank.state == RankState::Ready)
    };
    let members = || group.epoch.iter().flat_map(|(_, record)| &record.members);
    let living = group.ranks.values().filter(|rank| rank.state != RankState::Dead);
    seen.serving = group.serving().is_some_and(|health| !health.draining);
    seen.epoch = group.epoch.as_ref().map(|(epoch, _)| epoch.0);
    seen.ranks_ready = members().filter(member_ready).count() as u16;
    seen.ranks_living = living.count() as u16;
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
