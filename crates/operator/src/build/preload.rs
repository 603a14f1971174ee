//! A pod that brings a version to a node: its image, what its hub has and the storage has not, and the files into the node's page
//! cache.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
    ResourceRequirements, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::Site;
use super::container::restricted_pod;
use crate::names;

/// What it asks for: it reads, and computes nothing. It has no limit of memory, because the page cache that it fills would count.
const CPU: &str = "100m";
const MEMORY: &str = "128Mi";

impl Site<'_> {
    /// The pod that brings `revision` to `node`.
    pub fn preload(&self, node: &str, revision: &str) -> Pod {
        let spec = &self.cluster.spec;
        let mut metadata = self.meta(names::preload(&self.name(), node, revision), self.labels("preload"));
        metadata.labels.get_or_insert_default().insert(names::REVISION.to_owned(), revision.to_owned());
        metadata.annotations = Some([(names::NODE.to_owned(), node.to_owned())].into());
        let args = ["model".into(), "preload".into(), self.model_path()];
        let mut container = self.container("preload", args.into());
        let requests: BTreeMap<String, Quantity> = [("cpu", CPU), ("memory", MEMORY)]
            .map(|(name, amount)| (name.into(), Quantity(amount.into())))
            .into();
        container.resources =
            Some(ResourceRequirements { requests: Some(requests), ..ResourceRequirements::default() });
        // As Kubernetes may do for pods that ask for a device: nodes that have some often let in nobody else.
        let device = spec.device.resource.as_ref().map(|resource| Toleration {
            key: Some(resource.clone()),
            operator: Some("Exists".into()),
            effect: Some("NoSchedule".into()),
            ..Toleration::default()
        });
        let tolerations: Vec<Toleration> = spec.placement.tolerations.iter().cloned().chain(device).collect();
        Pod {
            metadata,
            spec: Some(PodSpec {
                init_containers: self.fetch_container().map(|fetch| vec![fetch]),
                containers: vec![container],
                volumes: Some(vec![self.models_volume()]),
                affinity: Some(on(node)),
                tolerations: Some(tolerations).filter(|tolerations| !tolerations.is_empty()),
                restart_policy: Some("Never".into()),
                active_deadline_seconds: Some(spec.start_seconds.into()),
                security_context: Some(restricted_pod()),
                automount_service_account_token: Some(false),
                enable_service_links: Some(false),
                ..PodSpec::default()
            }),
            status: None,
        }
    }
}

/// On this node. The scheduler is asked all the same: it knows whether the node's volumes and taints let the pod in.
fn on(node: &str) -> Affinity {
    let field = NodeSelectorRequirement {
        key: "metadata.name".into(),
        operator: "In".into(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_fields: Some(vec![field]), match_expressions: None };
    Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: vec![term],
            }),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    }
}
