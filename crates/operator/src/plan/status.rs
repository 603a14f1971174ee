//! What is said of a cluster: conditions, and each group.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::{Asked, Plan, PodPhase, Seen};
use crate::api::{
    AutoscaleStatus, ClusterStatus, GroupPhase, GroupStatus, Passed, PreloadPhase, PreloadStatus, Rollout,
    Trial,
};
use crate::names;

/// Bytes of a message, at most: what containers say at their end may be long.
const MESSAGE_BYTES_MAX: usize = 512;

/// What a status is about, besides the plan.
pub struct About<'a> {
    /// Generation of the spec.
    pub generation: Option<i64>,
    /// The name that clients ask for.
    pub model: &'a str,
    /// Selects the pods of all groups.
    pub selector: String,
    /// What spec.sla calls for.
    pub autoscale: Option<AutoscaleStatus>,
    /// What the API server has refused to do just now.
    pub refusal: Option<Refusal>,
    /// What has passed if the version that is asked for has.
    pub passed: Option<Passed>,
}

/// Something that cannot be done, whenever it is tried, before somebody changes something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In a word.
    pub reason: &'static str,
    /// What cannot be done.
    pub what: String,
    /// Why, as the API server says.
    pub why: String,
}

/// The status after a plan.
pub fn status(
    asked: &Asked,
    seen: &Seen,
    plan: &Plan,
    about: About<'_>,
    last: &ClusterStatus,
) -> ClusterStatus {
    let groups = plan.groups.iter().map(|(number, judged)| {
        let group = &seen.groups[number];
        GroupStatus {
            name: names::group(*number),
            phase: judged.phase,
            since: judged.since,
            revision: group.revision.clone().unwrap_or_default(),
            epoch: group.epoch,
            ranks_ready: group.ranks_ready,
            served: judged.served,
            last_reformation: group.last_loss.clone(),
            message: cut(&judged.message),
        }
    });
    let groups: Vec<GroupStatus> = groups.collect();
    let ready = |group: &&GroupStatus| matches!(group.phase, GroupPhase::Ready | GroupPhase::Degraded);
    let groups_ready = groups.iter().filter(ready).count() as u32;
    let updated = groups.iter().filter(ready).filter(|group| group.revision == asked.revision);
    let mut status = ClusterStatus {
        observed_generation: about.generation,
        summary: String::new(),
        model: about.model.to_owned(),
        groups_total: groups.len() as u32,
        groups_wanted: asked.wanted,
        groups_ready,
        groups_updated: updated.count() as u32,
        routers_ready: seen.routers_ready,
        selector: about.selector,
        conditions: Vec::new(),
        autoscale: about.autoscale,
        rollout: Some(plan.rollout.clone()),
        passed: about.passed.filter(|_| plan.rollout.trial == Trial::Passed).or_else(|| last.passed.clone()),
        groups,
    };
    let judged = [
        available(asked, &status),
        progressing(asked, seen, &status),
        refuses(about.refusal).unwrap_or_else(|| degraded(asked, seen, &status)),
    ];
    status.summary =
        judged[2].says_if(true).or(judged[1].says_if(true)).or(judged[1].says_if(false)).unwrap_or_default();
    let verdicts = judged.into_iter().chain(holds_sla(&status));
    let conditions = verdicts.map(|verdict| verdict.condition(&status, last, seen.now)).collect();
    status.conditions = conditions;
    status
}

/// The status of a spec that cannot be: what runs goes on.
pub fn refused(why: &str, now: i64, generation: Option<i64>, last: &ClusterStatus) -> ClusterStatus {
    let verdict = |kind, holds, reason| Verdict { kind, holds, reason, message: why.to_owned() };
    let mut status = ClusterStatus { observed_generation: generation, summary: cut(why), ..last.clone() };
    let stopped = [verdict("Progressing", false, "Invalid"), verdict("Degraded", true, "Invalid")];
    let mut conditions: Vec<Condition> =
        last.conditions.iter().filter(|condition| condition.type_ == "Available").cloned().collect();
    conditions.extend(stopped.map(|verdict| verdict.condition(&status, last, now)));
    status.conditions = conditions;
    status
}

/// One condition, before it is known since when it holds.
struct Verdict<'a> {
    kind: &'static str,
    holds: bool,
    reason: &'a str,
    message: String,
}

impl Verdict<'_> {
    fn says_if(&self, holds: bool) -> Option<String> {
        (self.holds == holds).then(|| self.message.clone())
    }

    fn condition(self, status: &ClusterStatus, last: &ClusterStatus, now: i64) -> Condition {
        let Self { kind, holds, reason, message } = self;
        let value = if holds { "True" } else { "False" };
        let before =
            last.conditions.iter().find(|condition| condition.type_ == kind && condition.status == value);
        let now = Time(Timestamp::from_second(now).unwrap_or(Timestamp::UNIX_EPOCH));
        Condition {
            type_: kind.into(),
            status: value.into(),
            reason: reason.into(),
            message: cut(&message),
            observed_generation: status.observed_generation,
            last_transition_time: before.map_or(now, |before| before.last_transition_time.clone()),
        }
    }
}

/// Whether what is promised is expected to be kept; nothing is said before that is known.
fn holds_sla(status: &ClusterStatus) -> Option<Verdict<'_>> {
    let AutoscaleStatus { reason, message, holds, .. } = status.autoscale.as_ref()?;
    Some(Verdict { kind: "HoldsSla", holds: (*holds)?, reason, message: message.clone() })
}

fn available(asked: &Asked, status: &ClusterStatus) -> Verdict<'static> {
    let verdict = |holds, reason, message| Verdict { kind: "Available", holds, reason, message };
    let ClusterStatus { groups_ready, routers_ready, .. } = status;
    match (asked.wanted, groups_ready, routers_ready) {
        (0, 0, _) => verdict(false, "Asleep", "no group is wanted".into()),
        (_, 0, _) => verdict(false, "NoGroup", "no group serves".into()),
        (_, _, 0) => verdict(false, "NoRouter", "no router is ready".into()),
        (wanted, ready, _) => verdict(true, "Serving", format!("{ready} of {wanted} groups serve")),
    }
}

fn progressing(asked: &Asked, seen: &Seen, status: &ClusterStatus) -> Verdict<'static> {
    let verdict = |holds, reason, message| Verdict { kind: "Progressing", holds, reason, message };
    let Rollout { trial, message, revision, preloads } = status.rollout.clone().unwrap_or_default();
    let old = seen
        .groups
        .values()
        .filter(|group| group.stays() && group.revision.as_ref() != Some(&asked.revision))
        .count();
    if trial == Trial::Failed {
        return verdict(false, "RolloutFailed", format!("version {revision} gets no requests: {message}"));
    }
    if old > 0 && asked.update.paused {
        return verdict(
            false,
            "Paused",
            format!("{old} groups are of an old version, and spec.update.paused is set"),
        );
    }
    if old > 0 {
        let mut says =
            format!("{} of {} groups are of version {revision}", status.groups_updated, asked.wanted);
        if let Some(PreloadStatus { node, .. }) = preloads.iter().find(|it| it.phase == PreloadPhase::Loading)
        {
            says += &format!(", which is brought to node {node}");
        }
        if trial == Trial::Pending && !message.is_empty() {
            says += &format!("; it is tried again: {message}");
        }
        return verdict(true, "Updating", says);
    }
    let moving =
        status.groups.iter().find(|group| !matches!(group.phase, GroupPhase::Ready | GroupPhase::Degraded));
    match moving {
        _ if status.groups_total == asked.wanted && status.groups_ready == asked.wanted => {
            let says = match asked.wanted {
                1 => "1 group serves".into(),
                wanted => format!("{wanted} groups serve"),
            };
            verdict(false, "Settled", says)
        }
        Some(GroupStatus { name, phase, message, .. }) => verdict(
            true,
            "Moving",
            format!("group {name} is {phase:?}: {message}").trim_end_matches(": ").to_owned(),
        ),
        None => verdict(
            true,
            "Scaling",
            format!("{} groups are there, {} are wanted", status.groups_total, asked.wanted),
        ),
    }
}

fn refuses(refusal: Option<Refusal>) -> Option<Verdict<'static>> {
    let Refusal { reason, what, why } = refusal?;
    let message = if why.is_empty() { what } else { format!("{what}: {why}") };
    Some(Verdict { kind: "Degraded", holds: true, reason, message })
}

fn degraded(asked: &Asked, seen: &Seen, status: &ClusterStatus) -> Verdict<'static> {
    let verdict = |holds, reason, message| Verdict { kind: "Degraded", holds, reason, message };
    if let (Some(resource), Some(false)) = (&asked.resource, seen.resource_offered) {
        let says = format!(
            "no node of this cluster offers {resource}: install the device plugin that does, or change spec.device.resource"
        );
        return verdict(true, "NoSuchResource", says);
    }
    let lacking =
        seen.groups.iter().find_map(|(number, group)| Some((*number, group.lacks_pods(asked.hosts)?)));
    if let Some((number, why)) = lacking {
        let says = format!("pods of group {} cannot be made: {why}", names::group(number));
        return verdict(true, "PodsRefused", says);
    }
    let first = |phase| status.groups.iter().find(|group| group.phase == phase && !group.message.is_empty());
    let bad = [
        (GroupPhase::Failing, "GroupFails"),
        (GroupPhase::Reforming, "GroupLost"),
        (GroupPhase::Degraded, "RanksMissing"),
    ];
    // One that runs again between two failures has not mended.
    let failed = seen.groups.iter().filter(|(_, group)| group.stays() && !group.serving).find_map(
        |(number, group)| {
            let pod =
                group.pods.iter().find(|pod| pod.phase == PodPhase::Running && !pod.message.is_empty())?;
            Some(format!("group {}: {}: {}", names::group(*number), pod.name, pod.message))
        },
    );
    if let Some(says) = failed.filter(|_| first(GroupPhase::Failing).is_none()) {
        return verdict(true, "GroupFails", says);
    }
    if let Some((group, reason)) = bad.into_iter().find_map(|(phase, reason)| Some((first(phase)?, reason))) {
        return verdict(true, reason, format!("group {}: {}", group.name, group.message));
    }
    if let Some(trouble) = &seen.router_trouble {
        return verdict(true, "RouterFails", format!("router {trouble}"));
    }
    if !seen.fleet_known {
        let says = "etcd cannot be asked which groups serve; those that do go on";
        let lacks = seen.lacks.as_ref().or(seen.etcd_trouble.as_ref());
        let says = lacks.map_or_else(|| says.to_owned(), |lacks| format!("{says}: {lacks}"));
        return verdict(true, "NoEtcd", says);
    }
    let Rollout { revision, preloads, .. } = status.rollout.clone().unwrap_or_default();
    if let Some(failed) = preloads.iter().find(|preload| preload.phase == PreloadPhase::Failed) {
        let PreloadStatus { node, message, .. } = failed;
        let says =
            format!("version {revision} cannot be brought to node {node}, which is tried again: {message}");
        return verdict(true, "PreloadFails", says);
    }
    // A pod that finds no place says why; one that pulls its image says nothing yet.
    if let Some(group) = first(GroupPhase::Pending) {
        return verdict(true, "GroupWaits", format!("group {}: {}", group.name, group.message));
    }
    verdict(false, "AsExpected", "nothing is amiss".into())
}

pub(super) fn cut(message: &str) -> String {
    let end = message.char_indices().map(|(place, _)| place).find(|place| *place >= MESSAGE_BYTES_MAX);
    message[..end.unwrap_or(message.len())].to_owned()
}
