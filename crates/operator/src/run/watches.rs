//! Watches of everything that clusters are made of. What they show goes into indexes, in a few words; what is news rings.

use std::fmt::Debug;
use std::sync::Arc;

use futures_util::{StreamExt, pin_mut};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Event as CoreEvent, Node, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use super::bell::Bell;
use super::extras::{self, Extra};
use super::index::{Index, Key};
use super::observe::{Shown, nobody};
use super::shown::{self, Made, NodeShown, PodShown, PodState, Preload};
use crate::names;

/// Starts all watches; they go on until the set is dropped.
pub(crate) fn start(
    client: &Client,
    namespace: Option<&str>,
    shown: &Arc<Shown>,
    bell: &Bell,
) -> JoinSet<()> {
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::MANAGER));
    let groups = watcher::Config::default().labels(&format!("{}=group", names::PART));
    let mut all = JoinSet::new();
    let made = |meta: &kube::core::ObjectMeta, made: Made| Some((shown::cluster_of(meta)?, made));

    let (sets, to) = (api::<PartialObjectMeta<StatefulSet>>(client, namespace), shown.clone());
    let read = move |set: &PartialObjectMeta<StatefulSet>| made(&set.metadata, Made::of(&set.metadata));
    all.spawn(follow(watch(sets, ours.clone()), to, bell.clone(), |shown| &shown.sets, read));

    let (deployments, to) = (api::<Deployment>(client, namespace), shown.clone());
    let read = move |deployment: &Deployment| made(&deployment.metadata, Made::of_deployment(deployment));
    all.spawn(follow(watch(deployments, ours.clone()), to, bell.clone(), |shown| &shown.deployments, read));

    let (services, to) = (api::<PartialObjectMeta<Service>>(client, namespace), shown.clone());
    let read =
        move |service: &PartialObjectMeta<Service>| made(&service.metadata, Made::of(&service.metadata));
    all.spawn(follow(watch(services, ours.clone()), to, bell.clone(), |shown| &shown.services, read));

    let (budgets, to) = (api::<PartialObjectMeta<PodDisruptionBudget>>(client, namespace), shown.clone());
    let read = move |budget: &PartialObjectMeta<PodDisruptionBudget>| {
        made(&budget.metadata, Made::of(&budget.metadata))
    };
    all.spawn(follow(watch(budgets, ours), to, bell.clone(), |shown| &shown.budgets, read));

    let (pods, to) = (api::<Pod>(client, namespace), shown.clone());
    let read = |pod: &Pod| Some((shown::cluster_of(&pod.metadata)?, PodShown::of(pod)?));
    all.spawn(follow(watch(pods, groups), to, bell.clone(), |shown| &shown.pods, read));

    let routers = watcher::Config::default().labels(&format!("{}=router", names::PART));
    let (pods, to) = (api::<Pod>(client, namespace), shown.clone());
    let read = |pod: &Pod| Some((shown::cluster_of(&pod.metadata)?, PodState::of(pod)));
    all.spawn(follow(watch(pods, routers), to, bell.clone(), |shown| &shown.routers, read));

    let etcds = watcher::Config::default().labels(&format!("{}=etcd", names::PART));
    let (pods, to) = (api::<Pod>(client, namespace), shown.clone());
    let read = |pod: &Pod| Some((shown::cluster_of(&pod.metadata)?, PodState::of(pod)));
    all.spawn(follow(watch(pods, etcds), to, bell.clone(), |shown| &shown.etcds, read));

    let preloads = watcher::Config::default().labels(&format!("{}=preload", names::PART));
    let (pods, to) = (api::<Pod>(client, namespace), shown.clone());
    let read = |pod: &Pod| Some((shown::cluster_of(&pod.metadata)?, Preload::of(pod)));
    all.spawn(follow(watch(pods, preloads), to, bell.clone(), |shown| &shown.preloads, read));

    let extras: [fn(&Shown) -> &Extra; 2] = [|shown| &shown.certificates, |shown| &shown.pod_groups];
    for extra in extras {
        let namespace = namespace.map(str::to_owned);
        all.spawn(extras::follow(client.clone(), namespace, shown.clone(), bell.clone(), extra));
    }

    if shown.sees_events {
        all.spawn(follow_refusals(api(client, namespace), shown.clone(), bell.clone()));
        let follow_volumes = |reason, which| {
            follow_volumes(api(client, namespace), reason, shown.clone(), bell.clone(), which)
        };
        all.spawn(follow_volumes("FailedMount", |shown| &shown.unmounted));
        all.spawn(follow_volumes("FailedAttachVolume", |shown| &shown.unattached));
    }

    if shown.sees_nodes {
        all.spawn(follow_nodes(Api::all(client.clone()), shown.clone(), bell.clone()));
    }
    all
}

/// Whether the operator may see objects of a kind: it does without those that it may not. Only the API server's word counts.
pub(crate) async fn may_list<K: Clone + DeserializeOwned + Debug>(api: &Api<K>) -> bool {
    loop {
        match api.list(&ListParams::default().limit(1)).await {
            Ok(_) => return true,
            Err(kube::Error::Api(status)) if status.is_forbidden() => return false,
            Err(error) => tracing::warn!(%error, "the API server does not say what the operator may see"),
        }
        tokio::time::sleep(extras::ASK_AGAIN).await;
    }
}

/// Follows what the controller of StatefulSets says when it cannot make pods.
async fn follow_refusals(events: Api<CoreEvent>, shown: Arc<Shown>, bell: Bell) {
    let refusals = watcher::Config::default().fields("involvedObject.kind=StatefulSet,reason=FailedCreate");
    let read = |event: &CoreEvent| {
        let (object, why) = shown::refusal(event)?;
        let cluster = cluster_in(&object)?.to_owned();
        Some(((event.namespace()?, cluster), (object, why)))
    };
    follow(watch(events, refusals), shown, bell, |shown| &shown.refusals, read).await;
}

/// The cluster in the name of a StatefulSet or of a pod.
fn cluster_in(name: &str) -> Option<&str> {
    let numbered = |mark: &str| {
        let (cluster, rest) = name.rsplit_once(mark)?;
        let is_number = rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
        is_number.then_some(cluster)
    };
    let routers = || name.rsplit_once("-router-").map(|(cluster, _)| cluster);
    numbered("-g").or_else(|| numbered("-etcd")).or_else(routers)
}

/// Follows what is said when volumes of pods cannot be mounted, or attached to nodes. Those that are not ours are nobody's.
async fn follow_volumes(
    events: Api<CoreEvent>,
    reason: &'static str,
    shown: Arc<Shown>,
    bell: Bell,
    index: fn(&Shown) -> &Index<(String, String)>,
) {
    let told = watcher::Config::default().fields(&format!("involvedObject.kind=Pod,reason={reason}"));
    let read = |event: &CoreEvent| {
        let (pod, uid, why) = shown::unmounted(event)?;
        let cluster = cluster_in(&pod)?.to_owned();
        Some(((event.namespace()?, cluster), (uid, why)))
    };
    follow(watch(events, told), shown, bell, index, read).await;
}

/// A kind in one namespace, or in all.
pub(crate) fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(
    client: &Client,
    namespace: Option<&str>,
) -> Api<K> {
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Follows one kind: `read` says whose an object is, and what of it is kept.
pub(crate) async fn follow<K, V>(
    events: impl futures_util::Stream<Item = watcher::Result<Event<K>>> + Send,
    shown: Arc<Shown>,
    bell: Bell,
    index: impl for<'a> Fn(&'a Shown) -> &'a Index<V> + Send,
    read: impl Fn(&K) -> Option<(Key, V)> + Send,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    V: Clone + PartialEq,
{
    let events = events.default_backoff();
    pin_mut!(events);
    let index = index(&shown);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => index.listing(),
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                if let Some((cluster, value)) = read(&object)
                    && index.put(&cluster, object.meta(), value)
                {
                    bell.ring(cluster);
                }
            }
            Ok(Event::Delete(object)) => {
                if let Some((cluster, _)) = read(&object)
                    && index.removed(&cluster, object.meta())
                {
                    bell.ring(cluster);
                }
            }
            Ok(Event::InitDone) => index.complete().into_iter().for_each(|cluster| bell.ring(cluster)),
            Err(error) => {
                tracing::warn!(%error, of = index.what, "a watch broke; what it has shown stays");
            }
        }
    }
}

/// Follows nodes: they ring for the clusters whose pods they run.
async fn follow_nodes(nodes: Api<Node>, shown: Arc<Shown>, bell: Bell) {
    let events = watch(nodes, watcher::Config::default()).default_backoff();
    pin_mut!(events);
    let ring = |name: &str| {
        let on_it = |pod: &PodShown| pod.node.as_deref() == Some(name);
        shown.pods.clusters(on_it).into_iter().for_each(|cluster| bell.ring(cluster));
    };
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => shown.nodes.listing(),
            Ok(Event::InitApply(node) | Event::Apply(node)) => {
                if shown.nodes.put(&nobody(), &node.metadata, NodeShown::of(&node)) {
                    ring(&node.name_any());
                }
            }
            Ok(Event::Delete(node)) => {
                if shown.nodes.removed(&nobody(), &node.metadata) {
                    ring(&node.name_any());
                }
            }
            Ok(Event::InitDone) => {
                shown.nodes.complete();
            }
            Err(error) => tracing::warn!(%error, "the watch of nodes broke; what it has shown stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_whose_it_is() {
        for (name, cluster) in [
            ("demo-g0", Some("demo")),
            ("demo-g12-1", Some("demo")),
            ("my-gpt-router-g0-0", Some("my-gpt-router")),
            ("my-gpt-etcd-0", Some("my-gpt")),
            ("my-gpt-etcd", Some("my-gpt")),
            ("my-gpt-router-7d9f6c-x2x4z", Some("my-gpt")),
            ("other", None),
        ] {
            assert_eq!(cluster_in(name), cluster, "{name}");
        }
    }
}
