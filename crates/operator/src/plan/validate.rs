//! What is asked for, checked: what the API server's rules may have let pass is said in a sentence.

use galerne_types::Shards;

use crate::api::GalerneClusterSpec;
use crate::api::parts::{CanarySpec, DeviceKind, EtcdSpec, GroupsSpec, TlsSpec, UpdateSpec};

/// What is asked for, as the planner needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Groups that shall serve.
    pub wanted: u32,
    /// N.
    pub ranks: u16,
    /// Pods of a group.
    pub hosts: u16,
    /// The version that the spec describes.
    pub revision: String,
    /// How one version takes another's place.
    pub update: UpdateSpec,
    /// So long running answers may take to finish, in seconds.
    pub drain_s: i64,
    /// So long a group may take to start, in seconds.
    pub start_s: i64,
    /// What the model's digest must be.
    pub digest: Option<String>,
    /// Resource of which each rank needs one.
    pub resource: Option<String>,
    /// Whether what a version is made of can be brought to a node before its group is there.
    pub preload: bool,
    /// Whether its routers are ready without a group, so that whatever replaces them must have one.
    pub may_sleep: bool,
    /// Whether pods of a group find places together or not at all.
    pub gangs: bool,
    /// The version that passed its trial last, if groups of it can be made.
    pub passed: Option<String>,
}

impl Asked {
    /// What is asked of a cluster that ends.
    pub fn nothing() -> Self {
        Self {
            wanted: 0,
            ranks: 1,
            hosts: 1,
            revision: String::new(),
            update: UpdateSpec::default(),
            drain_s: 0,
            start_s: 0,
            digest: None,
            resource: None,
            preload: false,
            may_sleep: false,
            gangs: false,
            passed: None,
        }
    }
}

/// Why a spec cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// How many groups shall serve: what somebody has set, or else what the load wants, or else the least; within bounds.
pub(super) fn wanted(groups: &GroupsSpec, load: Option<u32>) -> u32 {
    let least = groups.min.into();
    groups.replicas.map(u32::from).or(load).unwrap_or(least).min(groups.max.into()).max(least)
}

/// What cannot be about certificates.
fn wrong_tls(spec: &GalerneClusterSpec) -> Option<String> {
    if let Some(TlsSpec { secret, issuer }) = &spec.tls
        && secret.is_some() == issuer.is_some()
    {
        return Some("spec.tls has either secret or issuer".into());
    }
    let EtcdSpec { endpoints, managed, tls } = &spec.etcd;
    if managed.is_some() && tls.is_some() {
        return Some(
            "spec.etcd.tls is for spec.etcd.endpoints: a managed etcd has the certificate of spec.tls".into(),
        );
    }
    let mut endpoints = endpoints.iter().flatten();
    let other = endpoints.find(|endpoint| endpoint.starts_with("https://") != tls.is_some())?;
    Some(match tls {
        None => format!("spec.etcd.tls must name a secret with ca.crt: {other} is to be spoken to under TLS"),
        Some(_) => {
            format!("with spec.etcd.tls all of spec.etcd.endpoints begin with https://, and {other} does not")
        }
    })
}

/// What a device does not do, and what storage cannot hold: such ranks would end whenever they begin.
fn wrong_device(spec: &GalerneClusterSpec) -> Option<&'static str> {
    let (numerics, gpu) = (&spec.numerics, spec.device.kind == DeviceKind::Cuda);
    let is_wrong =
        |value: &Option<String>, fits: &[&str]| value.as_ref().is_some_and(|it| !fits.contains(&it.as_str()));
    let (quantize, kv): (&[_], &[_]) =
        if gpu { (&["fp8"], &["bf16", "fp8"]) } else { (&["q8_0", "q4_0"], &["f32", "bf16", "int8"]) };
    match () {
        () if gpu && spec.device.resource.is_none() => {
            Some("spec.device.kind Cuda needs spec.device.resource, such as nvidia.com/gpu")
        }
        () if is_wrong(&numerics.quantize, quantize) => {
            Some("spec.numerics.quantize is fp8 with spec.device.kind Cuda, and q8_0 or q4_0 with Cpu")
        }
        () if is_wrong(&numerics.kv_dtype, kv) => Some(
            "spec.numerics.kvDtype is bf16 or fp8 with spec.device.kind Cuda, and f32, bf16 or int8 with Cpu",
        ),
        () if gpu && is_wrong(&numerics.compute, &["auto"]) => Some(
            "spec.numerics.compute is a choice between ways of a CPU: leave it out with spec.device.kind Cuda",
        ),
        () if !gpu && numerics.fast == Some(true) => {
            Some("spec.numerics.fast is for spec.device.kind Cuda: leave it out with Cpu")
        }
        () if spec.model.path.is_some() && spec.storage.ephemeral.is_some() => {
            Some("spec.model.path names what is in spec.storage already, and ephemeral storage begins empty")
        }
        () if spec.storage.host_path.as_ref().is_some_and(|path| !path.starts_with('/')) => {
            Some("spec.storage.hostPath begins at the root of a node (/models)")
        }
        () => None,
    }
}

/// Checks `spec`; `revision` is the version that it describes and `load` how many groups the load wants, if that is known.
///
/// # Errors
/// A sentence that names the fields.
pub fn validate(spec: &GalerneClusterSpec, revision: String, load: Option<u32>) -> Result<Asked, Invalid> {
    let ranks = spec.tensor_parallel;
    let per_host = spec.ranks_per_host.unwrap_or(ranks);
    if ranks == 0 || per_host == 0 || !ranks.is_multiple_of(per_host) {
        return Err(Invalid(format!(
            "spec.ranksPerHost ({per_host}) must divide spec.tensorParallel ({ranks})"
        )));
    }
    if let Some(shards) = spec.numerics.virtual_shards {
        Shards::new(shards.into(), ranks.into()).map_err(|error| {
            Invalid(format!(
                "spec.numerics.virtualShards and spec.tensorParallel do not go together: {error}"
            ))
        })?;
    }
    let CanarySpec { answer_ms_max: 1.., .. } = spec.update.canary else {
        return Err(Invalid("spec.update.canary.answerMsMax must not be 0".to_owned()));
    };
    if let Some(wrong) = wrong_tls(spec).or_else(|| wrong_device(spec).map(str::to_owned)) {
        return Err(Invalid(wrong));
    }
    let (min, max) = (spec.groups.min, spec.groups.max);
    if min > max {
        return Err(Invalid(format!("spec.groups.min ({min}) is above spec.groups.max ({max})")));
    }
    Ok(Asked {
        wanted: wanted(&spec.groups, load),
        ranks,
        hosts: ranks / per_host,
        revision,
        update: spec.update.clone(),
        drain_s: spec.drain_seconds.into(),
        start_s: spec.start_seconds.into(),
        digest: spec.model.digest.clone(),
        resource: spec.device.resource.clone(),
        // A pod's own storage begins empty.
        preload: spec.update.preload && spec.storage.ephemeral.is_none(),
        may_sleep: spec.may_sleep(),
        gangs: false,
        passed: None,
    })
}
