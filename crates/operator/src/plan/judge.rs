//! What each group is doing, and since when.

use std::collections::BTreeMap;

use super::{Asked, GroupSeen, PodPhase, Seen};
use crate::api::{ClusterStatus, GroupPhase, GroupStatus};

/// One group, judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// What it is doing.
    pub phase: GroupPhase,
    /// Since when, in Unix seconds.
    pub since: i64,
    /// It has taken requests since it was made.
    pub served: bool,
    /// Why it is not Ready, as far as that is known.
    pub message: String,
}

/// Judges all groups by what is seen, and by what they were doing last.
pub fn judge(asked: &Asked, seen: &Seen, last: &ClusterStatus) -> BTreeMap<u32, Judged> {
    let before = |number: u32| last.groups.iter().find(|group| group.name == crate::names::group(number));
    let judged = seen.groups.iter().filter(|(_, group)| group.occupies()).map(|(number, group)| {
        let before = before(*number);
        let was = before.map(|before| before.phase);
        let (phase, message) = match (seen.fleet_known, was) {
            // What cannot be seen is taken to be as it was.
            (false, Some(was)) if group.stays() && group.runs(asked.hosts) => {
                (was, "etcd cannot be asked".into())
            }
            _ => phase(asked, group, was),
        };
        let since = before.filter(|before| before.phase == phase).map_or(seen.now, |before| before.since);
        let served = group.available() || before.is_some_and(has_served);
        (*number, Judged { phase, since, served, message })
    });
    judged.collect()
}

/// Whether it has, also by what was written before that was noted.
fn has_served(before: &GroupStatus) -> bool {
    before.served || matches!(before.phase, GroupPhase::Ready | GroupPhase::Degraded | GroupPhase::Reforming)
}

fn phase(asked: &Asked, group: &GroupSeen, was: Option<GroupPhase>) -> (GroupPhase, String) {
    if let Some(retired) = &group.retired {
        let phase = if group.revision.is_some() { GroupPhase::Draining } else { GroupPhase::Ending };
        return (phase, retired.why.clone());
    }
    if group.revision.is_none() {
        return (GroupPhase::Ending, String::new());
    }
    if group.serving && group.held {
        return (GroupPhase::Trial, String::new());
    }
    if group.serving && group.ranks_ready >= asked.ranks {
        return (GroupPhase::Ready, String::new());
    }
    if group.serving {
        return (GroupPhase::Degraded, format!("{} of {} ranks are ready", group.ranks_ready, asked.ranks));
    }
    if let Some(pod) = group.pods.iter().find(|pod| pod.phase == PodPhase::Failing) {
        return (GroupPhase::Failing, format!("{}: {}", pod.name, pod.message));
    }
    if !group.runs(asked.hosts) {
        let waiting = group.pods.iter().find(|pod| !pod.message.is_empty());
        let message = waiting.map(|pod| format!("{}: {}", pod.name, pod.message));
        return (
            GroupPhase::Pending,
            message.unwrap_or_else(|| group.lacks_pods(asked.hosts).unwrap_or_default().to_owned()),
        );
    }
    let served = matches!(was, Some(GroupPhase::Ready | GroupPhase::Degraded | GroupPhase::Reforming));
    let phase = if served { GroupPhase::Reforming } else { GroupPhase::Starting };
    (phase, format!("{} of {} ranks are ready", group.ranks_ready, asked.ranks))
}
