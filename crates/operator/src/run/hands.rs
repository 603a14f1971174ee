//! What is done to Kubernetes and to etcd. Every write is in the index before the next pass looks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use galerne_types::GroupId;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::error::{PassError, not_there};
use super::extras::Meta;
use super::fleets::View;
use super::index::Key;
use super::metrics::Metrics;
use super::observe::Shown;
use super::shown::{Made, Preload};
use crate::api::{ClusterStatus, GalerneCluster};
use crate::build::{Kind, Manifest, Site, group_objects};
use crate::names;
use crate::plan::Step;

/// Hands in Kubernetes.
pub(crate) struct Hands {
    pub(crate) client: Client,
    pub(crate) shown: Arc<Shown>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Hands {
    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self, cluster: &Key) -> Api<K> {
        Api::namespaced(self.client.clone(), &cluster.0)
    }

    /// Those of these nodes that there are not.
    pub(crate) async fn gone_nodes(&self, mut nodes: BTreeSet<String>) -> BTreeSet<String> {
        let all = Api::<Node>::all(self.client.clone());
        let mut gone = BTreeSet::new();
        while let Some(node) = nodes.pop_first() {
            if all.get_metadata(&node).await.is_err_and(|error| not_there(&error)) {
                gone.insert(node);
            }
        }
        gone
    }

    /// Applies `manifest`, if it is not what is there already; without its number of pods, where that has become another's to set.
    pub(crate) async fn keep(&self, cluster: &Key, manifest: &Manifest) -> Result<(), PassError> {
        let made = self.shown.made(manifest.kind).of(cluster).remove(&manifest.name);
        let rescaled =
            made.as_ref().filter(|made| made.is_rescaled(manifest)).map(|_| manifest.without_replicas());
        let manifest = rescaled.as_ref().unwrap_or(manifest);
        match made {
            Some(made) if made.deleting => Ok(()),
            Some(made) if made.hash == manifest.hash => self.mend(cluster, manifest, &made).await,
            _ => self.apply(cluster, manifest).await,
        }
    }

    /// Keeps a group that stands: its StatefulSet as it was made, if that is of the version of the spec, and what belongs to it. It
    /// is not brought to another version, nor into a gang if it was made without one.
    pub(crate) async fn keep_group(&self, at: &At<'_>, number: u32, set: &Made) -> Result<(), PassError> {
        let is_it = |objects: &[Manifest]| objects.last().is_some_and(|made| made.hash == set.hash);
        let mut objects = group_objects(at.site, number, at.revision);
        if !is_it(&objects) && at.site.gangs.is_some() {
            objects = group_objects(&Site { gangs: None, ..*at.site }, number, at.revision);
        }
        if !is_it(&objects) {
            objects.truncate(1); // the budget, which is the same for all
        }
        for manifest in &objects {
            match manifest.kind {
                Kind::StatefulSet => self.mend(at.cluster, manifest, set).await?,
                _ => self.keep(at.cluster, manifest).await?,
            }
        }
        Ok(())
    }

    /// Applies `manifest` again, if somebody has changed what it says.
    async fn mend(&self, cluster: &Key, manifest: &Manifest, made: &Made) -> Result<(), PassError> {
        if !made.has_drifted(manifest) {
            return Ok(());
        }
        let (kind, name) = (manifest.kind, &manifest.name);
        tracing::warn!(namespace = cluster.0, ?kind, name, "somebody has changed it: it is applied again");
        self.apply(cluster, manifest).await
    }

    async fn apply(&self, cluster: &Key, manifest: &Manifest) -> Result<(), PassError> {
        match manifest.kind {
            Kind::StatefulSet => {
                self.apply_as(self.api::<StatefulSet>(cluster), cluster, manifest, made).await
            }
            Kind::Deployment => {
                self.apply_as(self.api(cluster), cluster, manifest, Made::of_deployment).await
            }
            Kind::Service => self.apply_as(self.api::<Service>(cluster), cluster, manifest, made).await,
            Kind::PodDisruptionBudget => {
                self.apply_as(self.api::<PodDisruptionBudget>(cluster), cluster, manifest, made).await
            }
            Kind::Certificate | Kind::PodGroup => match self.extra_api(cluster, manifest.kind) {
                Some(api) => self.apply_as(api, cluster, manifest, made).await,
                None => Ok(()), // it went, and what needs it says so
            },
        }
    }

    /// Objects of a kind that not every Kubernetes has, if this one does.
    fn extra_api(&self, cluster: &Key, kind: Kind) -> Option<Api<Meta>> {
        let resource = match kind {
            Kind::Certificate => self.shown.certificates.resource(),
            Kind::PodGroup => self.shown.pod_groups.resource(),
            _ => None,
        };
        resource.map(|resource| Api::namespaced_with(self.client.clone(), &cluster.0, &resource))
    }

    async fn apply_as<K>(
        &self,
        api: Api<K>,
        cluster: &Key,
        manifest: &Manifest,
        read: fn(&K) -> Made,
    ) -> Result<(), PassError>
    where
        K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Serialize,
    {
        let (kind, name) = (format!("{:?}", manifest.kind), &manifest.name);
        let known = self.shown.made(manifest.kind).of(cluster).contains_key(name);
        if !known && is_anothers(&api, manifest).await.map_err(PassError::writes("look for", &*kind, name))? {
            return Err(PassError::Taken { kind, name: name.clone() });
        }
        let params = PatchParams::apply(names::MANAGER).force();
        let mut written = api.patch(name, &params, &Patch::Apply(&manifest.body)).await;
        if written.as_ref().is_err_and(is_invalid) {
            // What somebody has put into our lists cannot stand beside ours, such as a port of the same name: it goes first.
            let params = PatchParams { field_manager: Some(names::MANAGER.into()), ..PatchParams::default() };
            let spec = json!({ "spec": manifest.body["spec"] });
            written = match api.patch(name, &params, &Patch::Merge(&spec)).await {
                Ok(_) => {
                    api.patch(
                        name,
                        &PatchParams::apply(names::MANAGER).force(),
                        &Patch::Apply(&manifest.body),
                    )
                    .await
                }
                Err(_) => written, // the first one tells more
            };
        }
        let written = written.map_err(PassError::writes("apply", &*kind, name))?;
        self.metrics.wrote("apply", &kind);
        let made = Made { fresh: true, ..read(&written) };
        self.shown.made(manifest.kind).put(cluster, written.meta(), made);
        Ok(())
    }

    /// Deletes something that we have made; what is gone already is gone.
    pub(crate) async fn delete(&self, cluster: &Key, kind: Kind, name: &str) -> Result<(), PassError> {
        match kind {
            Kind::StatefulSet => self.delete_as(self.api::<StatefulSet>(cluster), kind, name).await,
            Kind::Deployment => self.delete_as(self.api::<Deployment>(cluster), kind, name).await,
            Kind::Service => self.delete_as(self.api::<Service>(cluster), kind, name).await,
            Kind::PodDisruptionBudget => {
                self.delete_as(self.api::<PodDisruptionBudget>(cluster), kind, name).await
            }
            Kind::Certificate | Kind::PodGroup => match self.extra_api(cluster, kind) {
                Some(api) => self.delete_as(api, kind, name).await,
                None => Ok(()),
            },
        }?;
        self.shown.made(kind).deleted(cluster, name);
        Ok(())
    }

    async fn delete_as<K>(&self, api: Api<K>, kind: Kind, name: &str) -> Result<(), PassError>
    where
        K: Clone + std::fmt::Debug + DeserializeOwned,
    {
        self.delete_with(api, &format!("{kind:?}"), name, &DeleteParams::background()).await
    }

    async fn delete_with<K>(
        &self,
        api: Api<K>,
        kind: &str,
        name: &str,
        params: &DeleteParams,
    ) -> Result<(), PassError>
    where
        K: Clone + std::fmt::Debug + DeserializeOwned,
    {
        match api.delete(name, params).await {
            Err(error) if not_there(&error) => Ok(()),
            result => {
                self.metrics.wrote("delete", kind);
                result.map(drop).map_err(PassError::writes("delete", kind, name))
            }
        }
    }

    async fn delete_pod(&self, cluster: &Key, name: &str, params: &DeleteParams) -> Result<(), PassError> {
        self.delete_with(self.api::<Pod>(cluster), "Pod", name, params).await
    }

    /// Writes a cluster's status.
    pub(crate) async fn tell(
        &self,
        cluster: &Key,
        status: &ClusterStatus,
    ) -> Result<GalerneCluster, PassError> {
        let body = json!({
            "apiVersion": GalerneCluster::api_version(&()),
            "kind": GalerneCluster::kind(&()),
            "metadata": { "name": cluster.1 },
            "status": status,
        });
        let params = PatchParams::apply(names::MANAGER).force();
        let written =
            self.api::<GalerneCluster>(cluster).patch_status(&cluster.1, &params, &Patch::Apply(&body)).await;
        self.metrics.wrote("apply", "GalerneCluster status");
        written.map_err(PassError::writes("write the status of", "GalerneCluster", &cluster.1))
    }

    /// Has a cluster stay until its groups are forgotten, or lets it go. Fails when somebody else has written it meanwhile.
    pub(crate) async fn finalize(&self, cluster: &GalerneCluster, stays: bool) -> Result<(), PassError> {
        let mut finalizers = cluster.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != names::FINALIZER);
        finalizers.extend(stays.then(|| names::FINALIZER.to_owned()));
        let version = cluster.resource_version();
        let body = json!({ "metadata": { "resourceVersion": version, "finalizers": finalizers } });
        let key = (cluster.namespace().unwrap_or_default(), cluster.name_any());
        let params = PatchParams { field_manager: Some(names::MANAGER.into()), ..PatchParams::default() };
        let written = self.api::<GalerneCluster>(&key).patch(&key.1, &params, &Patch::Merge(&body)).await;
        self.metrics.wrote("patch", "GalerneCluster");
        written.map(drop).map_err(PassError::writes("write", "GalerneCluster", &key.1))
    }

    /// Takes a step that is no trial.
    pub(crate) async fn take(&self, step: &Step, at: &At<'_>) -> Result<(), PassError> {
        let At { cluster, site, revision, drain, view, .. } = at;
        let group = |number: &u32| GroupId(names::group(*number));
        let etcd = || view.map(|view| &view.coord).ok_or(PassError::NoEtcd);
        match step {
            Step::Hold(number) => Ok(etcd()?.hold(&group(number), Some("its version is on trial")).await?),
            Step::Release(number) => Ok(etcd()?.hold(&group(number), None).await?),
            Step::Create(number) => self.create(cluster, site, *number, revision).await,
            Step::Remake(number) => match at.passed {
                Some(passed) => self.create(cluster, passed, *number, &passed.revision()).await,
                None => Ok(()),
            },
            Step::Preload(node) => self.preload(cluster, &site.preload(node, revision)).await,
            Step::Unload(pod) => {
                // Nobody waits for it: what it has read it has read.
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                self.delete_pod(cluster, pod, &now).await?;
                self.shown.preloads.deleted(cluster, pod);
                Ok(())
            }
            Step::Retire(number, why) => self.retire(cluster, &site.group_object(*number), why).await,
            Step::Drain(number) => Ok(etcd()?.drain(&group(number), *drain).await?),
            Step::Delete(number) => {
                let name = site.group_object(*number);
                self.delete(cluster, Kind::PodDisruptionBudget, &name).await?;
                self.delete(cluster, Kind::StatefulSet, &name).await?;
                if self.shown.pod_groups.made.of(cluster).contains_key(&name) {
                    self.delete(cluster, Kind::PodGroup, &name).await?;
                }
                Ok(())
            }
            Step::Forget(number) => Ok(etcd()?.drained(&group(number)).await?),
            Step::Replace(_, pod) => {
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                self.delete_pod(cluster, pod, &now).await
            }
            Step::Restart(number, _) => {
                let pods = self.shown.pods.of(cluster);
                for (pod, _) in pods.into_iter().filter(|(_, pod)| pod.group == *number) {
                    self.delete_pod(cluster, &pod, &DeleteParams::default()).await?;
                }
                Ok(())
            }
            Step::Try(_) => Ok(()),
        }
    }

    async fn create(
        &self,
        cluster: &Key,
        site: &Site<'_>,
        number: u32,
        revision: &str,
    ) -> Result<(), PassError> {
        for manifest in group_objects(site, number, revision) {
            self.keep(cluster, &manifest).await?;
        }
        Ok(())
    }

    async fn preload(&self, cluster: &Key, pod: &Pod) -> Result<(), PassError> {
        let name = pod.name_any();
        let created = self.api::<Pod>(cluster).create(&PostParams::default(), pod).await;
        self.metrics.wrote("create", "Pod");
        match created {
            // Of this very version and node: the watch will tell.
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            // A quota, say: it has failed like one that was made, and is tried again like one.
            Err(kube::Error::Api(status)) if status.is_forbidden() || status.is_invalid() => {
                self.shown.preloads.put(
                    cluster,
                    &refused_meta(&name),
                    Preload::refused(pod, &status.message),
                );
                Ok(())
            }
            Err(error) => Err(PassError::writes("create", "Pod", name)(error)),
            Ok(pod) => {
                self.shown.preloads.put(cluster, pod.meta(), Preload::of(&pod));
                Ok(())
            }
        }
    }

    /// Notes on a group's StatefulSet that it is to end. A merge, because its other fields are of the version that made it.
    async fn retire(&self, cluster: &Key, name: &str, why: &str) -> Result<(), PassError> {
        let since = jiff::Timestamp::now().as_second();
        let note: Value =
            json!({ "metadata": { "annotations": { names::RETIRED: format!("{since} {why}") } } });
        let params = PatchParams { field_manager: Some(names::RETIRER.into()), ..PatchParams::default() };
        match self.api::<StatefulSet>(cluster).patch(name, &params, &Patch::Merge(&note)).await {
            Err(error) if not_there(&error) => Ok(()),
            Err(error) => Err(PassError::writes("retire", "StatefulSet", name)(error)),
            Ok(set) => {
                self.metrics.wrote("patch", "StatefulSet");
                self.shown.sets.put(cluster, &set.metadata, Made::of(&set.metadata));
                Ok(())
            }
        }
    }
}

/// Where steps are taken.
pub(crate) struct At<'a> {
    pub(crate) cluster: &'a Key,
    pub(crate) site: &'a Site<'a>,
    pub(crate) revision: &'a str,
    /// The cluster as it was when a version passed its trial last.
    pub(crate) passed: Option<&'a Site<'a>>,
    /// How long running answers may take to finish.
    pub(crate) drain: Duration,
    pub(crate) view: Option<&'a View>,
}

/// Of a pod that there is not: its name, and a uid that nothing else has.
fn refused_meta(name: &str) -> ObjectMeta {
    let uid = format!("refused {}", jiff::Timestamp::now());
    ObjectMeta { name: Some(name.to_owned()), uid: Some(uid), ..ObjectMeta::default() }
}

/// Whether something of this name is there that is not its cluster's. What bears no label of ours any more may be all the same.
async fn is_anothers<K>(api: &Api<K>, manifest: &Manifest) -> kube::Result<bool>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    let Some(there) = api.get_metadata_opt(&manifest.name).await? else { return Ok(false) };
    let cluster = manifest.body["metadata"]["ownerReferences"][0]["uid"].as_str();
    let mut owners = there.metadata.owner_references.iter().flatten();
    Ok(!owners.any(|owner| owner.controller == Some(true) && Some(&*owner.uid) == cluster))
}

fn made<K: Resource>(object: &K) -> Made {
    Made::of(object.meta())
}

fn is_invalid(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_invalid())
}
