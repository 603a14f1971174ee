//! How the version that is asked for comes in.

use super::status::cut;
use super::{Asked, GroupSeen, PreloadSeen, REFORM_S_MAX, Seen};
use crate::api::parts::{OnFailure, Strategy};
use crate::api::{ClusterStatus, PreloadStatus, Rollout, Trial};

/// How the version comes in, by what is known so far. A verdict stays for as long as the version is asked for.
pub(super) fn rollout(asked: &Asked, seen: &Seen, last: &ClusterStatus) -> Rollout {
    let known = last.rollout.clone().filter(|rollout| rollout.revision == asked.revision);
    let rollout = known.unwrap_or_else(|| Rollout { revision: asked.revision.clone(), ..Rollout::default() });
    let rollout = Rollout { preloads: preloads(asked, seen), ..rollout };
    if rollout.trial != Trial::Pending || !seen.fleet_known {
        return rollout;
    }
    let tried = seen.trial.as_ref().filter(|trial| trial.revision == asked.revision);
    let told = || tried.map(|trial| (trial.trial, trial.message.clone()));
    let verdict = told().filter(|(trial, _)| *trial != Trial::Pending);
    // One that could not be asked to the end says why, and is no verdict.
    match verdict.or_else(|| look(asked, seen)).or_else(told) {
        Some((trial, message)) => Rollout { trial, message, ..rollout },
        None => rollout,
    }
}

fn preloads(asked: &Asked, seen: &Seen) -> Vec<PreloadStatus> {
    let of_it = seen.preloads.iter().filter(|preload| preload.revision == asked.revision);
    let told = of_it.map(|PreloadSeen { node, phase, message, .. }| PreloadStatus {
        node: node.clone(),
        phase: *phase,
        message: cut(message),
    });
    told.collect()
}

/// A verdict for which no prompt is needed.
fn look(asked: &Asked, seen: &Seen) -> Option<(Trial, String)> {
    let new: Vec<&GroupSeen> = seen.groups.values().filter(|group| is_new(asked, group)).collect();
    let mut serving = new.iter().filter(|group| group.serving);
    if let Some(digest) = &asked.digest
        && let Some(wrong) = serving.clone().find(|group| group.digest != *digest)
    {
        let message = format!("the model's digest is {}, and not what spec.model.digest says", wrong.digest);
        return Some((Trial::Failed, message));
    }
    // One that takes requests already, because nobody else served when it began, is past its trial.
    if serving.clone().any(|group| group.available())
        || serving.next().is_some() && !others_serve(asked, seen)
    {
        return Some((Trial::Passed, String::new()));
    }
    let most_s = asked.start_s + REFORM_S_MAX;
    let late = new.iter().any(|group| !group.serving && seen.now - group.created >= most_s);
    let gives_up = asked.update.canary.on_failure == OnFailure::Rollback && others_serve(asked, seen);
    (late && gives_up).then(|| (Trial::Failed, format!("no group of it has come to serve within {most_s} s")))
}

/// Whether another version serves, beside which this one's first group is to be tried before it gets requests.
pub(super) fn others_serve(asked: &Asked, seen: &Seen) -> bool {
    let others = seen.groups.values().any(|group| group.available() && !is_new(asked, group));
    asked.update.canary.enabled && asked.update.strategy == Strategy::Rolling && others
}

fn is_new(asked: &Asked, group: &GroupSeen) -> bool {
    group.revision.as_ref() == Some(&asked.revision)
}
