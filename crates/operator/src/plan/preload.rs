//! What a version needs is brought to a node before the group goes that has to make room there: its answers are missed for as long
//! as the next group takes to start, and that is mostly the reading of weights.

use super::step::{Planner, Step};
use super::{GroupSeen, PRELOAD_AGAIN_S};
use crate::api::PreloadPhase;
use crate::api::parts::Strategy;

impl Planner<'_> {
    /// Whether `group` may go as far as its nodes are concerned. If not, they are being seen to. `surplus`: nobody takes its place.
    pub(super) fn has_preloaded(&mut self, group: &GroupSeen, surplus: bool) -> bool {
        let in_turn = self.asked.update.strategy == Strategy::Rolling && self.surge() > 0;
        let needs = self.asked.preload && !in_turn && !surplus;
        if !needs || self.is_new(group) || !group.available() || group.displaced() {
            return true;
        }
        match self.asked.update.strategy {
            Strategy::Rolling => self.preload(group),
            // They all go at once, so all wait for the last node.
            Strategy::Recreate => {
                let seen = self.seen;
                let groups = seen.groups.values().filter(|group| group.available());
                groups.fold(true, |all, group| (self.is_new(group) || self.preload(group)) & all)
            }
        }
    }

    fn preload(&mut self, group: &GroupSeen) -> bool {
        // Where no pod may stay none of the next group will be.
        let pods =
            group.pods.iter().filter(|pod| !pod.node_leaving && !pod.node_lost && !pod.node.is_empty());
        pods.fold(true, |all, pod| self.preload_node(&pod.node) & all)
    }

    fn preload_node(&mut self, node: &str) -> bool {
        let seen = self.seen;
        let revision = &self.asked.revision;
        let Some(there) = seen.preloads.iter().find(|it| it.node == node && it.revision == *revision) else {
            self.once(Step::Preload(node.to_owned()));
            self.deadlines.push(seen.now + 1); // it may be refused, of which nobody tells
            return false;
        };
        let most_s = match there.phase {
            PreloadPhase::Done => return true,
            PreloadPhase::Loading => self.asked.start_s,
            PreloadPhase::Failed => PRELOAD_AGAIN_S,
        };
        if self.overdue(there.since, most_s) {
            self.once(Step::Unload(there.pod.clone())); // and again
        }
        false
    }

    fn once(&mut self, step: Step) {
        if !self.steps.contains(&step) {
            self.steps.push(step);
        }
    }

    /// Pods that have done what they were for go: there is no old group any more, or the version is another one.
    pub(super) fn unload(&mut self) {
        let old = self.groups().any(|(_, group)| group.stays() && !self.is_new(group));
        let (seen, revision) = (self.seen, &self.asked.revision);
        let over = seen.preloads.iter().filter(|it| !old || it.revision != *revision);
        let over: Vec<Step> = over.map(|it| Step::Unload(it.pod.clone())).collect();
        self.steps.extend(over);
    }
}
