//! One pass over one cluster: observe, validate, plan, apply, say so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Resource, ResourceExt};

use super::bell::Bell;
use super::credentials::{Credentials, Way};
use super::error::PassError;
use super::extras;
use super::fleets::{Fleets, Reach, View};
use super::hands::{At, Hands};
use super::index::Key;
use super::metrics::Metrics;
use super::observe::Shown;
use super::scalers::{Passed, Scalers};
use super::trial::{self, Caller};
use crate::api::{self, AutoscaleStatus, ClusterStatus, GalerneCluster, GalerneClusterSpec, Trial};
use crate::build::{Kind, Manifest, Site};
use crate::names;
use crate::plan::{
    About, Asked, END_S_MAX, GroupSeen, Invalid, Plan, Refusal, Seen, Step, TrialSeen, plan, refused, status,
    validate,
};
use crate::scale::Order;

/// A cluster is looked at again after so long, whatever has happened.
const AGAIN: Duration = Duration::from_secs(600);
/// First pause after a pass that failed; the next ones double.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(120);

/// Pause before a trial that was cut short is begun anew.
const TRIAL_PAUSE: Duration = Duration::from_secs(3);

/// What passes need.
pub(crate) struct Context {
    pub(crate) hands: Hands,
    pub(crate) shown: Arc<Shown>,
    pub(crate) fleets: Arc<Fleets>,
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) scalers: Scalers,
    pub(crate) recorder: Recorder,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) bell: Bell,
    /// Image of the galerne binary, where a cluster names none.
    pub(crate) image: String,
    pub(crate) memory: Mutex<BTreeMap<Key, Memory>>,
}

/// What is remembered of a cluster while this process lives; whatever must outlive it is in the status.
#[derive(Default)]
pub(crate) struct Memory {
    /// Passes that failed in a row.
    failures: u32,
    /// The status that was written last, with the resource version that it got: a watch may be late.
    status: Option<(u64, ClusterStatus)>,
    /// The version on trial, and how it went, once that is known.
    trial: Option<(String, Option<TrialSeen>)>,
    /// What was refused last, as it was told then.
    refusal: Option<(Instant, Refusal)>,
}

impl Context {
    fn memory(&self) -> MutexGuard<'_, BTreeMap<Key, Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status that was written last, as far as is known.
    fn last(&self, key: &Key, cluster: &GalerneCluster) -> ClusterStatus {
        let version = version(cluster);
        let written = self.memory().get(key).and_then(|memory| memory.status.clone());
        let newer = written.filter(|(written, _)| *written > version).map(|(_, status)| status);
        newer.or_else(|| cluster.status.clone()).unwrap_or_default()
    }

    async fn pass(self: &Arc<Self>, cluster: &GalerneCluster) -> Result<Action, PassError> {
        let key = (cluster.namespace().unwrap_or_default(), cluster.name_any());
        let ending = cluster.metadata.deletion_timestamp.is_some();
        let kept = cluster.finalizers().iter().any(|finalizer| finalizer == names::FINALIZER);
        match (ending, kept) {
            (true, false) => return Ok(Action::await_change()), // others keep it
            (false, false) => self.hands.finalize(cluster, true).await?,
            (_, true) => {}
        }
        let gangs = self.shown.gangs();
        let site = Site { cluster, image: &self.image, gangs: gangs.as_deref() };
        let way = Way::of(&cluster.spec);
        let place = ((site.etcd_endpoints(), way), site.in_etcd());
        let reach = self.fleets.reach(&key, &place);
        let view = reach.view();
        let now = Timestamp::now().as_second();
        let last = self.last(&key, cluster);
        let passed = as_it_passed(cluster, &last);
        let passed = passed.as_ref().map(|cluster| Site { cluster, ..site });
        let order = Order::of(&cluster.spec);
        // Until it is decided anew, what was decided before this operator began holds.
        let scaled = order.as_ref().and_then(|_| self.scalers.told(&key).or(last.autoscale.clone()));
        let load = scaled.as_ref().map(|it| it.groups);
        let mut asked = match self.asked(&site, passed.as_ref(), load, ending) {
            Ok(asked) => asked,
            Err((why, again)) => return self.refuse(&key, cluster, &last, &why, again).await,
        };
        let gone = self.hands.gone_nodes(self.shown.unseen_nodes(&key)).await;
        let (mut seen, look_at) = self.see(&key, &asked, view, &gone, now);
        seen.lacks = self.credentials.lacks(way).map(str::to_owned);
        let patience = ends(cluster, &reach, &mut asked, &mut seen);
        let planned = plan(&asked, &seen, &last);
        self.metrics.saw(&key, &asked, &seen);
        if !ending {
            let start_s = asked.start_s;
            let passed = Passed { order, seen: &seen, planned: &planned, last: &last, start_s };
            self.scalers.passed(&key, place, view, &passed);
        }
        let drain = Duration::from_secs(asked.drain_s.unsigned_abs());
        let at = At {
            cluster: &key,
            site: &site,
            revision: &asked.revision,
            passed: passed.as_ref(),
            drain,
            view,
        };
        let done = self.act(&at, &asked, &planned, ending).await;
        if ending && done.is_ok() && planned.is_silent() && !seen.groups.values().any(GroupSeen::occupies) {
            // Nobody needs the status of what goes, and the finalizer is taken from the version that was looked at.
            self.hands.finalize(cluster, false).await?;
            self.forget(&key);
            return Ok(Action::await_change());
        }
        let about = About {
            generation: cluster.metadata.generation,
            model: &cluster.spec.model.name,
            selector: site.group_selector(),
            autoscale: scaled,
            refusal: self.refusal(&key, &done),
            passed: Some(api::Passed::new(asked.revision.clone(), &cluster.spec, &self.image)),
        };
        // That etcd has not answered yet is nothing to tell: it is asked this very moment.
        if !matches!(reach, Reach::Asked) || ending {
            self.tell(&key, cluster, &last, status(&asked, &seen, &planned, about, &last)).await?;
        }
        done?;
        Ok(again([planned.again_after_s, look_at.or(patience).map(|at| at - now)]))
    }

    /// What is told of a pass that failed. Why something is refused may be said in other words each time: they are told anew now and
    /// then only, because what is written begins the next pass.
    fn refusal(&self, key: &Key, done: &Result<(), PassError>) -> Option<Refusal> {
        let new = done.as_ref().err().and_then(PassError::refusal);
        let mut memory = self.memory();
        let told = &mut memory.entry(key.clone()).or_default().refusal;
        *told = match (told.take(), new) {
            (Some((at, old)), Some(new)) if old.what == new.what && at.elapsed() < PAUSE_MAX => {
                Some((at, old))
            }
            (_, new) => new.map(|new| (Instant::now(), new)),
        };
        told.as_ref().map(|(_, refusal)| refusal.clone())
    }

    /// What is asked of a cluster, or why it cannot be, and when to look again. `passed`: as it was when a version passed last.
    fn asked(
        &self,
        site: &Site<'_>,
        passed: Option<&Site<'_>>,
        load: Option<u32>,
        ending: bool,
    ) -> Result<Asked, (String, Duration)> {
        let spec = &site.cluster.spec;
        let lacks = self.shown.lacks(spec).filter(|_| !ending);
        let asked = match (validate(spec, site.revision(), load), lacks) {
            (Ok(asked), None) => asked,
            (Err(_), _) if ending => Asked::nothing(),
            (Err(Invalid(why)), _) => return Err((why, AGAIN)),
            // Nobody tells of a kind that Kubernetes learns.
            (Ok(_), Some(why)) => return Err((why.to_owned(), extras::LOOK_INTERVAL)),
        };
        Ok(Asked { gangs: site.gangs.is_some(), passed: passed.map(Site::revision), ..asked })
    }

    /// Says what cannot be; what runs goes on.
    async fn refuse(
        &self,
        key: &Key,
        cluster: &GalerneCluster,
        last: &ClusterStatus,
        why: &str,
        again: Duration,
    ) -> Result<Action, PassError> {
        let now = Timestamp::now().as_second();
        self.tell(key, cluster, last, refused(why, now, cluster.metadata.generation, last)).await?;
        Ok(Action::requeue(again))
    }

    fn see(
        &self,
        key: &Key,
        asked: &Asked,
        view: Option<&View>,
        gone: &BTreeSet<String>,
        now: i64,
    ) -> (Seen, Option<i64>) {
        let (fleet, needs) = (view.map(|view| view.fleet.borrow()), asked.resource.as_deref());
        let (mut seen, look_at) = self.shown.seen(key, fleet.as_deref(), gone, needs, now);
        let trial = self.memory().get(key).and_then(|memory| memory.trial.clone());
        seen.trial = trial.and_then(|(_, seen)| seen);
        (seen, look_at)
    }

    /// Applies what is shared, takes the steps, and deletes what nobody needs any more.
    async fn act(
        self: &Arc<Self>,
        at: &At<'_>,
        asked: &Asked,
        planned: &Plan,
        ending: bool,
    ) -> Result<(), PassError> {
        let At { cluster: key, site, .. } = at;
        if !ending {
            let wanted = site.shared_objects();
            for manifest in &wanted {
                match manifest.kind {
                    Kind::Deployment if planned.routers_stay => self.keep_routers(at, manifest).await?,
                    _ => self.hands.keep(key, manifest).await?,
                }
            }
            for kind in [Kind::StatefulSet, Kind::Service, Kind::Certificate] {
                let made = self
                    .shown
                    .made(kind)
                    .of(key)
                    .into_iter()
                    .filter(|(_, made)| made.group.is_none() && !made.deleting);
                for (name, _) in made {
                    if !wanted.iter().any(|manifest| manifest.kind == kind && manifest.name == name) {
                        self.hands.delete(key, kind, &name).await?; // an etcd that is not managed any more, a certificate that is another's
                    }
                }
            }
        }
        let sets = if ending { BTreeMap::new() } else { self.shown.sets.of(key) };
        for set in sets.values().filter(|set| set.retired.is_none() && !set.deleting) {
            if let Some(number) = set.group {
                self.hands.keep_group(at, number, set).await?;
            }
        }
        for step in &planned.steps {
            if let Step::Try(number) = step {
                self.try_out(key, *number, asked, at.view, site.cluster.spec.tls.is_some());
                continue;
            }
            tracing::info!(namespace = key.0, cluster = key.1, ?step, "a step");
            self.hands.take(step, at).await?;
            self.publish(site.cluster, step).await;
        }
        Ok(())
    }

    /// Keeps routers of the version that passed last; of none that is known, those that are there.
    async fn keep_routers(&self, at: &At<'_>, asked: &Manifest) -> Result<(), PassError> {
        let of = |site: &Site<'_>| site.shared_objects().into_iter().find(|it| it.kind == Kind::Deployment);
        match at.passed.and_then(of) {
            Some(passed) => self.hands.keep(at.cluster, &passed).await,
            None if self.shown.deployments.of(at.cluster).contains_key(&asked.name) => Ok(()),
            None => self.hands.keep(at.cluster, asked).await,
        }
    }

    /// Puts fixed prompts to a group, in the background: how it went is seen in the next pass.
    fn try_out(self: &Arc<Self>, key: &Key, number: u32, asked: &Asked, view: Option<&View>, has_tls: bool) {
        let Some(view) = view.cloned() else { return };
        let mut memory = self.memory();
        let memory_of = memory.entry(key.clone()).or_default();
        if memory_of.trial.as_ref().is_some_and(|(revision, _)| *revision == asked.revision) {
            return; // it is under way
        }
        memory_of.trial = Some((asked.revision.clone(), None));
        drop(memory);
        let (context, key) = (self.clone(), key.clone());
        let (revision, most) = (asked.revision.clone(), asked.update.canary.answer_ms_max);
        tokio::spawn(async move {
            let way = if has_tls { Caller::Tls(context.credentials.client()) } else { Caller::Open };
            let verdict = trial::run(&view, number, Duration::from_millis(most.into()), way).await;
            let told = |trial, message| {
                let revision = revision.clone();
                context.tried(&key, Some((revision.clone(), Some(TrialSeen { revision, trial, message }))));
            };
            match verdict {
                Ok((trial, message)) => told(trial, message),
                Err(lost) => {
                    tracing::warn!(
                        group = names::group(number),
                        lost,
                        "a trial ended early; there will be another one"
                    );
                    told(Trial::Pending, lost);
                    tokio::time::sleep(TRIAL_PAUSE).await;
                    context.tried(&key, None);
                }
            }
        });
    }

    /// Notes how a trial went, or that there may be another one.
    fn tried(&self, key: &Key, verdict: Option<(String, Option<TrialSeen>)>) {
        if let Some(memory) = self.memory().get_mut(key) {
            memory.trial = verdict;
        }
        self.bell.ring(key.clone());
    }

    /// Tells people what they should know.
    async fn publish(&self, cluster: &GalerneCluster, step: &Step) {
        let (type_, reason, note) = match step {
            Step::Create(number) | Step::Remake(number) => {
                (EventType::Normal, "GroupCreated", format!("group g{number} begins"))
            }
            Step::Retire(number, why) => {
                (EventType::Normal, "GroupRetired", format!("group g{number} is to end: {why}"))
            }
            Step::Delete(number) => (EventType::Normal, "GroupEnded", format!("group g{number} has drained")),
            Step::Restart(number, why) => {
                (EventType::Warning, "GroupRestarted", format!("group g{number} starts afresh: {why}"))
            }
            Step::Replace(_, pod) => {
                (EventType::Warning, "PodReplaced", format!("the node of pod {pod} is lost"))
            }
            Step::Preload(node) => {
                (EventType::Normal, "Preload", format!("the next version is brought to node {node}"))
            }
            Step::Unload(_)
            | Step::Hold(_)
            | Step::Try(_)
            | Step::Release(_)
            | Step::Drain(_)
            | Step::Forget(_) => return,
        };
        self.say(cluster, type_, reason, note).await;
    }

    async fn say(&self, cluster: &GalerneCluster, type_: EventType, reason: &str, note: String) {
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note),
            action: "Reconcile".into(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &cluster.object_ref(&())).await {
            tracing::warn!(%error, reason, "an event could not be told");
        }
    }

    /// Writes the status if it says something new.
    async fn tell(
        &self,
        key: &Key,
        cluster: &GalerneCluster,
        last: &ClusterStatus,
        new: ClusterStatus,
    ) -> Result<(), PassError> {
        if new == *last {
            return Ok(());
        }
        let written = self.hands.tell(key, &new).await?;
        let failed = |status: &ClusterStatus| {
            let bad = |condition: &&k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition| {
                condition.reason == "RolloutFailed"
                    || condition.type_ == "Degraded" && condition.status == "True"
            };
            status
                .conditions
                .iter()
                .find(bad)
                .map(|condition| (condition.reason.clone(), condition.message.clone()))
        };
        let (before, now) = (failed(last), failed(&new));
        let decided = new.autoscale.clone().filter(|_| cluster.spec.groups.replicas.is_none());
        let scaled =
            decided.filter(|now| last.autoscale.as_ref().is_some_and(|was| was.groups != now.groups));
        self.memory().entry(key.clone()).or_default().status = Some((version(&written), new));
        if let Some(AutoscaleStatus { message, .. }) = scaled {
            self.say(cluster, EventType::Normal, "Scaled", message).await;
        }
        if let Some((reason, message)) =
            now.filter(|(reason, _)| before.is_none_or(|(before, _)| before != *reason))
        {
            self.say(cluster, EventType::Warning, &reason, message).await;
        }
        Ok(())
    }

    fn forget(&self, key: &Key) {
        self.memory().remove(key);
        self.scalers.close(key);
        self.fleets.close(key);
        self.metrics.forget(key);
    }
}

/// The controller's reconciler.
pub(crate) async fn reconcile(
    cluster: Arc<GalerneCluster>,
    context: Arc<Context>,
) -> Result<Action, PassError> {
    let began = Instant::now();
    let result = context.pass(&cluster).await;
    context.metrics.passed(result.is_ok(), began.elapsed());
    let key = (cluster.namespace().unwrap_or_default(), cluster.name_any());
    if let (Ok(_), Some(memory)) = (&result, context.memory().get_mut(&key)) {
        memory.failures = 0;
    }
    result
}

impl Context {
    /// When to try again after a pass that failed: later and later.
    pub(crate) fn later(&self, cluster: &GalerneCluster, error: &PassError) -> Action {
        let key = (cluster.namespace().unwrap_or_default(), cluster.name_any());
        let mut memory = self.memory();
        let failures = &mut memory.entry(key).or_default().failures;
        *failures += 1;
        let pause = PAUSE_MIN.saturating_mul(1 << (*failures - 1).min(16)).min(PAUSE_MAX);
        tracing::warn!(cluster = cluster.name_any(), %error, ?pause, "a pass failed");
        Action::requeue(pause)
    }
}

/// The cluster as it was when a version passed its trial last: what makes its groups. `None` where they met in another etcd.
fn as_it_passed(cluster: &GalerneCluster, last: &ClusterStatus) -> Option<GalerneCluster> {
    let asked = &cluster.spec;
    let spec = last.passed.as_ref()?.spec().filter(|passed| passed.etcd == asked.etcd)?;
    // What is no part of a version is as it is now.
    let (router, groups) = (asked.router.clone(), asked.groups.clone());
    let spec = GalerneClusterSpec { router, groups, sla: asked.sla.clone(), ..spec };
    Some(GalerneCluster { metadata: cluster.metadata.clone(), spec, status: None })
}

/// Has a cluster end that is deleted. If etcd was not reached nobody can be asked to drain, and it ends all the same; if it is silent,
/// it does so a while later: then.
fn ends(cluster: &GalerneCluster, reach: &Reach, asked: &mut Asked, seen: &mut Seen) -> Option<i64> {
    let since = cluster.metadata.deletion_timestamp.as_ref()?.0.as_second();
    asked.wanted = 0;
    let patience_s = if matches!(reach, Reach::Silent) { asked.drain_s + END_S_MAX } else { 0 };
    let ends_at = since + patience_s;
    seen.fleet_known |= patience_s == 0 || seen.now >= ends_at;
    (!seen.fleet_known).then_some(ends_at)
}

/// A pass after the first of these, in seconds.
fn again(deadlines: [Option<i64>; 2]) -> Action {
    let first = deadlines.into_iter().flatten().min();
    let pause = first.map(|seconds| Duration::from_secs(seconds.max(1).unsigned_abs()));
    Action::requeue(pause.map_or(AGAIN, |pause| pause.min(AGAIN)))
}

fn version(cluster: &GalerneCluster) -> u64 {
    cluster.resource_version().and_then(|version| version.parse().ok()).unwrap_or(0)
}
