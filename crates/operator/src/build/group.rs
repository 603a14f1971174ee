//! A group: a StatefulSet whose pods start and go together, and a budget that lets none of them go by itself.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy};
use k8s_openapi::api::core::v1::{
    Affinity, Container, EmptyDirVolumeSource, PodAffinity, PodAffinityTerm, PodAntiAffinity, PodSpec,
    PodTemplateSpec, ResourceRequirements, Volume, VolumeMount, WeightedPodAffinityTerm,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::json;

use super::container::restricted_pod;
use super::{Kind, Manifest, Site, hashed, manifest, select};
use crate::api::parts::DeviceKind;
use crate::names;

/// Seconds that a pod may take to end: its group was drained before, or is lost.
const END_S: i64 = 15;
/// Where ranks on GPUs of one host meet.
const SHARED_MEMORY: &str = "/dev/shm";
/// As much of it as a pod may have: far more than NCCL's buffers for 16 ranks. Without a volume it has 64 MB.
const SHARED_MEMORY_MAX: &str = "1Gi";
/// A node name is what tells one host from another.
const HOST_KEY: &str = "kubernetes.io/hostname";

/// What a group is made of: its StatefulSet comes last, so that its pods find the rest there.
pub fn group_objects(site: &Site<'_>, number: u32, revision: &str) -> Vec<Manifest> {
    let budget = manifest(Kind::PodDisruptionBudget, &site.group_budget(number));
    let set = manifest(Kind::StatefulSet, &site.group_set(number, revision));
    let Some(gangs) = site.gangs.filter(|_| site.hosts() > 1) else { return vec![budget, set] };
    vec![budget, site.gang(gangs, number), site.in_gang(&set)]
}

impl Site<'_> {
    /// The version that the spec describes: what pods of groups are made from, whatever their number.
    pub fn revision(&self) -> String {
        let template =
            serde_json::to_string(&self.group_template(0, "")).expect("an object of Kubernetes is JSON");
        names::hash(format!("{} {template}", self.hosts()).as_bytes())
    }

    fn ranks_per_host(&self) -> u16 {
        self.cluster.spec.ranks_per_host.unwrap_or(self.cluster.spec.tensor_parallel).max(1)
    }

    fn hosts(&self) -> u16 {
        self.cluster.spec.tensor_parallel / self.ranks_per_host()
    }

    fn group_labels(&self, number: u32) -> BTreeMap<String, String> {
        let mut labels = self.selector("group");
        labels.insert(names::GROUP.to_owned(), names::group(number));
        labels
    }

    fn group_budget(&self, number: u32) -> PodDisruptionBudget {
        let mut labels = self.labels("group");
        labels.insert(names::GROUP.to_owned(), names::group(number));
        PodDisruptionBudget {
            metadata: self.meta(names::group_object(&self.name(), number), labels),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(0)),
                selector: Some(select(self.group_labels(number))),
                // Pods that do not run hold nobody's stream: they may go.
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
                ..PodDisruptionBudgetSpec::default()
            }),
            status: None,
        }
    }

    /// Says that the pods of a group find places together or not at all.
    fn gang(&self, api_version: &str, number: u32) -> Manifest {
        let mut labels = self.labels("group");
        labels.insert(names::GROUP.to_owned(), names::group(number));
        let name = names::group_object(&self.name(), number);
        let policy = json!({ "gang": { "minCount": self.hosts() } });
        let body =
            json!({ "metadata": self.meta(name.clone(), labels), "spec": { "schedulingPolicy": policy } });
        hashed(Kind::PodGroup, name, (api_version, "PodGroup"), body)
    }

    /// `set`, with pods of the gang that is called like it. That is no part of its version: where Kubernetes learns of gangs, groups
    /// that stand stay.
    fn in_gang(&self, set: &Manifest) -> Manifest {
        let mut body = set.body.clone();
        body["metadata"]["annotations"].as_object_mut().map(|noted| noted.remove(names::HASH));
        body["spec"]["template"]["spec"]["schedulingGroup"] = json!({ "podGroupName": set.name });
        hashed(Kind::StatefulSet, set.name.clone(), ("apps/v1", "StatefulSet"), body)
    }

    fn group_set(&self, number: u32, revision: &str) -> StatefulSet {
        let mut labels = self.labels("group");
        labels.insert(names::GROUP.to_owned(), names::group(number));
        labels.insert(names::REVISION.to_owned(), revision.to_owned());
        StatefulSet {
            metadata: self.meta(names::group_object(&self.name(), number), labels),
            spec: Some(StatefulSetSpec {
                replicas: Some(self.hosts().into()),
                selector: select(self.group_labels(number)),
                service_name: Some(names::pods_service(&self.name())),
                pod_management_policy: Some("Parallel".into()),
                update_strategy: Some(StatefulSetUpdateStrategy {
                    type_: Some("OnDelete".into()),
                    rolling_update: None,
                }),
                template: self.group_template(number, revision),
                ..StatefulSetSpec::default()
            }),
            status: None,
        }
    }

    fn group_template(&self, number: u32, revision: &str) -> PodTemplateSpec {
        let spec = &self.cluster.spec;
        let mut labels = self.labels("group");
        labels.insert(names::GROUP.to_owned(), names::group(number));
        labels.insert(names::REVISION.to_owned(), revision.to_owned());
        let placement = &spec.placement;
        let files = self.access_files().into_iter().map(|(volume, _)| volume);
        let volumes = [self.models_volume()].into_iter().chain(files);
        PodTemplateSpec {
            metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
            spec: Some(PodSpec {
                init_containers: self.fetch_container().map(|fetch| vec![fetch]),
                containers: vec![self.worker(number)],
                volumes: Some(volumes.chain(self.shared_memory()).collect()),
                affinity: self.affinity(number),
                node_selector: Some(placement.node_selector.clone()).filter(|selector| !selector.is_empty()),
                tolerations: Some(placement.tolerations.clone())
                    .filter(|tolerations| !tolerations.is_empty()),
                priority_class_name: placement.priority_class.clone(),
                runtime_class_name: placement.runtime_class.clone(),
                security_context: Some(restricted_pod()),
                termination_grace_period_seconds: Some(END_S),
                automount_service_account_token: Some(false),
                enable_service_links: Some(false),
                ..PodSpec::default()
            }),
        }
    }

    fn worker(&self, number: u32) -> Container {
        let spec = &self.cluster.spec;
        let mut args = self.common_args("worker");
        let mut flag =
            |name: &str, value: Option<String>| args.extend(value.map(|value| format!("--{name}={value}")));
        flag("group", Some(names::group(number)));
        flag("tp", Some(spec.tensor_parallel.to_string()));
        flag("ranks", Some(self.ranks_per_host().to_string()));
        flag("spares", (spec.spares > 0).then(|| spec.spares.to_string()));
        // A pod keeps its name when it is replaced, so its ranks find their places again.
        flag("host", Some("$(POD_NAME)".into()));
        flag("bind", Some("$(POD_IP)".into()));
        flag("start-timeout-s", Some(spec.start_seconds.to_string()));
        flag("virtual-shards", spec.numerics.virtual_shards.map(|shards| shards.to_string()));
        flag("compute", spec.numerics.compute.clone());
        flag("kv-dtype", spec.numerics.kv_dtype.clone());
        flag("quantize", spec.numerics.quantize.clone());
        flag("device", (spec.device.kind == DeviceKind::Cuda).then(|| "cuda".to_owned()));
        flag("threads", spec.device.threads.map(|threads| threads.to_string()));
        if spec.numerics.fast == Some(true) {
            args.push("--fast".into());
        }
        // What has drained waits to be deleted: kubelet would start it again.
        args.push("--stay-when-drained".into());
        args.extend(spec.worker_args.iter().cloned());
        let mut worker = Container { resources: Some(self.resources()), ..self.container("worker", args) };
        let shared = self.shared_memory().map(|volume| VolumeMount {
            name: volume.name,
            mount_path: SHARED_MEMORY.into(),
            ..VolumeMount::default()
        });
        let files = self.access_files().into_iter().map(|(_, mount)| mount);
        worker.volume_mounts.get_or_insert_default().extend(files.chain(shared));
        worker
    }

    /// Memory that the GPU ranks of a pod share.
    fn shared_memory(&self) -> Option<Volume> {
        let spec = &self.cluster.spec;
        let several = self.ranks_per_host() + spec.spares > 1;
        let memory = EmptyDirVolumeSource {
            medium: Some("Memory".into()),
            size_limit: Some(Quantity(SHARED_MEMORY_MAX.into())),
        };
        (several && spec.device.kind == DeviceKind::Cuda).then(|| Volume {
            name: "shared-memory".into(),
            empty_dir: Some(memory),
            ..Volume::default()
        })
    }

    fn resources(&self) -> ResourceRequirements {
        let device = &self.cluster.spec.device;
        let ranks = self.ranks_per_host() + self.cluster.spec.spares;
        let (mut requests, mut limits) = (BTreeMap::new(), BTreeMap::new());
        if let Some(resource) = &device.resource {
            limits.insert(resource.clone(), Quantity(ranks.to_string()));
        }
        if let Some(cpu) = &device.cpu {
            requests.insert("cpu".to_owned(), cpu.clone());
        }
        if let Some(memory) = &device.memory {
            requests.insert("memory".to_owned(), memory.clone());
            limits.insert("memory".to_owned(), memory.clone());
        }
        let some = |map: BTreeMap<String, Quantity>| Some(map).filter(|map| !map.is_empty());
        ResourceRequirements { requests: some(requests), limits: some(limits), claims: None }
    }

    /// Hosts of a group are different nodes, near each other.
    fn affinity(&self, number: u32) -> Option<Affinity> {
        if self.hosts() <= 1 {
            return None;
        }
        let placement = &self.cluster.spec.placement;
        let term = |key: &str| PodAffinityTerm {
            label_selector: Some(select(self.group_labels(number))),
            topology_key: key.to_owned(),
            ..PodAffinityTerm::default()
        };
        let near = placement.topology_key.as_deref().map(term);
        let (required, preferred) = if placement.topology_required { (near, None) } else { (None, near) };
        let weighted = |term| vec![WeightedPodAffinityTerm { pod_affinity_term: term, weight: 100 }];
        Some(Affinity {
            pod_anti_affinity: Some(PodAntiAffinity {
                required_during_scheduling_ignored_during_execution: Some(vec![term(HOST_KEY)]),
                ..PodAntiAffinity::default()
            }),
            pod_affinity: placement.topology_key.is_some().then(|| PodAffinity {
                required_during_scheduling_ignored_during_execution: required.map(|term| vec![term]),
                preferred_during_scheduling_ignored_during_execution: preferred.map(weighted),
            }),
            ..Affinity::default()
        })
    }
}
