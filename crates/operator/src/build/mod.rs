//! The objects that a cluster is made of, as they are applied. Pure.
//!
//! A group's StatefulSet is made once and never changed: what would change it is another version, and another version is another
//! group. Everything else is applied again when its hash differs from the one that it bears. Both are mended when somebody else
//! has changed or removed a field that was applied: it is not among those that the operator owns any more.

mod container;
mod etcd;
mod group;
mod owned;
mod preload;
mod router;
mod tls;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde_json::Value;

use crate::api::GalerneCluster;
use crate::names;

pub use group::group_objects;
pub use owned::is_owned;

/// Something to apply: `apiVersion`, `kind` and name stand in the manifest, and so does its hash.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Which kind of thing it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// What its annotation says: the hash of all the rest.
    pub hash: String,
    /// The whole.
    pub body: Value,
}

/// The kinds of objects that are made for a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `apps/v1`: a group, or the managed etcd.
    StatefulSet,
    /// `apps/v1`: the routers.
    Deployment,
    /// `v1`: names for pods, and the faces.
    Service,
    /// `policy/v1`: nobody but the operator ends a group.
    PodDisruptionBudget,
    /// `cert-manager.io/v1`: the cluster's certificate, if cert-manager is to make it.
    Certificate,
    /// `scheduling.k8s.io`: the pods of a group find places together or not at all, if Kubernetes can do that.
    PodGroup,
}

/// What is built from: a cluster, and what the operator itself was told.
pub struct Site<'a> {
    /// The cluster.
    pub cluster: &'a GalerneCluster,
    /// Image of the galerne binary, where the cluster names none.
    pub image: &'a str,
    /// API version of PodGroups, if Kubernetes has them.
    pub gangs: Option<&'a str>,
}

impl Site<'_> {
    fn name(&self) -> String {
        self.cluster.name_any()
    }

    /// What a group's objects are called.
    pub fn group_object(&self, number: u32) -> String {
        names::group_object(&self.name(), number)
    }

    fn image(&self) -> String {
        self.cluster.spec.image.clone().unwrap_or_else(|| self.image.to_owned())
    }

    /// The cluster's name in etcd.
    pub fn in_etcd(&self) -> String {
        names::in_etcd(&self.cluster.namespace().unwrap_or_default(), &self.name())
    }

    /// Endpoints of its etcd, as its pods reach them.
    pub fn etcd_endpoints(&self) -> Vec<String> {
        let endpoints = self.cluster.spec.etcd.endpoints.clone();
        endpoints.unwrap_or_else(|| {
            let namespace = self.cluster.namespace().unwrap_or_default();
            let scheme = if self.etcd_has_cluster_tls() { "https" } else { "http" };
            vec![format!("{scheme}://{}.{namespace}:{}", names::etcd(&self.name()), etcd::CLIENT_PORT)]
        })
    }

    /// What all things of the cluster have in common with those of this part.
    fn labels(&self, part: &str) -> BTreeMap<String, String> {
        let labels = [
            ("app.kubernetes.io/name", "galerne"),
            ("app.kubernetes.io/managed-by", names::MANAGER),
            (names::CLUSTER, &self.name()),
            (names::PART, part),
        ];
        labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// Selects the pods of a part.
    fn selector(&self, part: &str) -> BTreeMap<String, String> {
        let labels = [(names::CLUSTER, self.name()), (names::PART, part.to_owned())];
        labels.map(|(name, value)| (name.to_owned(), value)).into()
    }

    fn meta(&self, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
        let owner: Option<OwnerReference> = self.cluster.controller_owner_ref(&());
        ObjectMeta {
            name: Some(name),
            namespace: self.cluster.namespace(),
            labels: Some(labels),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        }
    }

    /// Everything of the cluster but its groups.
    pub fn shared_objects(&self) -> Vec<Manifest> {
        let mut objects: Vec<Manifest> = self.certificate().into_iter().collect();
        objects.push(manifest(Kind::Service, &self.pods_service()));
        objects.extend(self.router_objects());
        if let Some(managed) = &self.cluster.spec.etcd.managed {
            objects.extend(self.etcd_objects(managed));
        }
        objects
    }

    /// Selects the pods of all groups: what the scale subresource tells autoscalers.
    pub fn group_selector(&self) -> String {
        let labels = self.selector("group");
        labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",")
    }

    fn pods_service(&self) -> Service {
        Service {
            metadata: self.meta(names::pods_service(&self.name()), self.labels("group")),
            spec: Some(k8s_openapi::api::core::v1::ServiceSpec {
                cluster_ip: Some("None".into()),
                publish_not_ready_addresses: Some(true),
                selector: Some(self.selector("group")),
                ..Default::default()
            }),
            ..Service::default()
        }
    }
}

fn select(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), ..LabelSelector::default() }
}

/// `object` as it is applied, with its hash.
fn manifest<K: Resource<DynamicType = ()> + Serialize>(kind: Kind, object: &K) -> Manifest {
    let body = serde_json::to_value(object).expect("an object of Kubernetes is JSON");
    hashed(kind, object.name_any(), (&K::api_version(&()), &K::kind(&())), body)
}

/// The same for one that is JSON already, of this API version and kind.
fn hashed(kind: Kind, name: String, of: (&str, &str), mut body: Value) -> Manifest {
    let hash = names::hash(body.to_string().as_bytes());
    (body["apiVersion"], body["kind"]) = (of.0.into(), of.1.into());
    body["metadata"]["annotations"][names::HASH] = hash.clone().into();
    Manifest { kind, name, hash, body }
}

impl Manifest {
    /// The same without a number of pods, which is somebody else's to set.
    #[must_use]
    pub fn without_replicas(&self) -> Self {
        let mut other = self.clone();
        other.body["spec"].as_object_mut().map(|spec| spec.remove("replicas"));
        other
    }
}
