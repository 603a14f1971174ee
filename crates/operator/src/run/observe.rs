//! What the watches and etcd have shown of a cluster, put together for the planner.

use std::collections::BTreeMap;

use galerne_types::{Fleet, Group, RankState};

use super::index::{Index, Key};
use super::shown::{Made, NodeShown, PodShown};
use crate::build::Kind;
use crate::names;
use crate::plan::{GroupSeen, PodSeen, Seen, TrialSeen};

/// So long a node may be silent before its pods are taken for lost, in seconds: what still runs there is fenced by its epoch.
pub(crate) const NODE_SILENT_S_MAX: i64 = 60;

/// Everything that is watched.
pub(crate) struct Shown {
    pub(crate) sets: Index<Made>,
    pub(crate) deployments: Index<Made>,
    pub(crate) services: Index<Made>,
    pub(crate) budgets: Index<Made>,
    pub(crate) pods: Index<PodShown>,
    /// Under one key, because nodes are nobody's.
    pub(crate) nodes: Index<NodeShown>,
    /// Why pods of StatefulSets cannot be made, by the event's name.
    pub(crate) refusals: Index<(String, String)>,
    /// Whether nodes can be seen at all.
    pub(crate) sees_nodes: bool,
    /// Whether it is told why pods cannot be made.
    pub(crate) sees_events: bool,
}

impl Shown {
    pub(crate) fn new(sees_nodes: bool, sees_events: bool) -> Self {
        Self {
            sets: Index::new(),
            deployments: Index::new(),
            services: Index::new(),
            budgets: Index::new(),
            pods: Index::new(),
            nodes: Index::new(),
            refusals: Index::new(),
            sees_nodes,
            sees_events,
        }
    }

    /// Returns once everything has been listed.
    pub(crate) async fn ready(&self) {
        let Self { sets, deployments, services, budgets, pods, nodes, refusals, sees_nodes, sees_events } =
            self;
        tokio::join!(sets.ready(), deployments.ready(), services.ready(), budgets.ready(), pods.ready());
        if *sees_nodes {
            nodes.ready().await;
        }
        if *sees_events {
            refusals.ready().await;
        }
    }

    /// What has been made for a cluster.
    pub(crate) fn made(&self, kind: Kind) -> &Index<Made> {
        match kind {
            Kind::StatefulSet => &self.sets,
            Kind::Deployment => &self.deployments,
            Kind::Service => &self.services,
            Kind::PodDisruptionBudget => &self.budgets,
        }
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
        let mut look_at = None;
        for (name, pod) in self.pods.of(cluster) {
            let node = pod.node.as_ref().map(|name| nodes.get(name));
            let silent_since = node.and_then(|node| node?.silent_since);
            let deadline = silent_since.map(|since| since + NODE_SILENT_S_MAX);
            look_at = [look_at, deadline.filter(|deadline| *deadline > now)].into_iter().flatten().min();
            groups.entry(pod.group).or_default().pods.push(PodSeen {
                name,
                phase: pod.phase,
                message: pod.message,
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
        let routers = self.deployments.of(cluster).into_values().map(|made| made.ready).sum();
        let offers =
            |resource: &str| nodes.values().any(|node| node.resources.iter().any(|has| has == resource));
        let resource_offered = needs.filter(|_| self.sees_nodes).map(offers);
        let fleet_known = fleet.is_some();
        (
            Seen {
                now,
                fleet_known,
                groups,
                routers_ready: routers,
                resource_offered,
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
    seen.draining = group.drain.is_some();
    seen.held = group.hold.is_some();
    seen.remembered = true;
    seen.digest = group.serving().map(|health| health.model.digest.clone()).unwrap_or_default();
    let last = group.epoch.as_ref().and_then(|(_, record)| record.past.last());
    seen.last_loss = last.map(|past| past.loss.to_string());
}
