//! What pods of groups and of routers have in common: the image, the model's files, and how little they may.

use k8s_openapi::api::core::v1::{
    Capabilities, Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, HostPathVolumeSource,
    ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodSecurityContext, SeccompProfile,
    SecretKeySelector, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
};

use super::Site;

/// Where the model's storage is mounted.
const MODELS: &str = "/models";
/// Who the containers run as: nobody in particular.
const USER: i64 = 65_532;

impl Site<'_> {
    /// Where the model is, in a container.
    pub(super) fn model_path(&self) -> String {
        let model = &self.cluster.spec.model;
        let fetched = || model.hub.as_ref().map(|hub| hub.replace(['/', '@'], "--"));
        format!("{MODELS}/{}", model.path.clone().or_else(fetched).unwrap_or_default())
    }

    /// Flags of a command that needs the model and etcd.
    pub(super) fn common_args(&self, command: &str) -> Vec<String> {
        let mut args = vec![command.to_owned()];
        args.push(format!("--etcd={}", self.etcd_endpoints().join(",")));
        args.push(format!("--cluster={}", self.in_etcd()));
        args.extend(self.access_args());
        args.push(format!("--model={}", self.model_path()));
        args.push(format!("--model-name={}", self.cluster.spec.model.name));
        args
    }

    /// A container of the galerne binary.
    pub(super) fn container(&self, name: &str, args: Vec<String>) -> Container {
        let read_only = self.cluster.spec.storage.read_only || self.cluster.spec.model.hub.is_none();
        Container {
            name: name.into(),
            image: Some(self.image()),
            args: Some(args),
            env: Some(vec![from_pod("POD_IP", "status.podIP"), from_pod("POD_NAME", "metadata.name")]),
            volume_mounts: Some(vec![VolumeMount {
                name: "models".into(),
                mount_path: MODELS.into(),
                read_only: Some(read_only),
                ..VolumeMount::default()
            }]),
            // The last words of a process that could not start are the sentence that a person needs.
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            security_context: Some(restricted()),
            ..Container::default()
        }
    }

    /// Fetches a model from its hub, as far as the storage does not have it.
    pub(super) fn fetch_container(&self) -> Option<Container> {
        let hub = self.cluster.spec.model.hub.as_ref()?;
        let args = ["model".into(), "fetch".into(), hub.clone(), format!("--to={}", self.model_path())];
        let mut fetch = self.container("fetch", args.into());
        if let Some(secret) = &self.cluster.spec.model.token_secret {
            fetch.env.get_or_insert_default().push(from_secret("HF_TOKEN", secret, "token"));
        }
        Some(fetch)
    }

    /// The volume of the model's files.
    pub(super) fn models_volume(&self) -> Volume {
        let storage = &self.cluster.spec.storage;
        Volume {
            name: "models".into(),
            persistent_volume_claim: storage.claim.as_ref().map(|claim| PersistentVolumeClaimVolumeSource {
                claim_name: claim.clone(),
                read_only: storage.read_only.then_some(true),
            }),
            host_path: storage
                .host_path
                .as_ref()
                .map(|path| HostPathVolumeSource { path: path.clone(), type_: None }),
            empty_dir: storage.ephemeral.as_ref().map(|size| EmptyDirVolumeSource {
                size_limit: Some(size.clone()),
                ..EmptyDirVolumeSource::default()
            }),
            ..Volume::default()
        }
    }
}

/// Files of a Secret, and where they are mounted.
pub(super) fn secret_files(name: &str, secret: &str, path: &str) -> (Volume, VolumeMount) {
    let source = SecretVolumeSource { secret_name: Some(secret.into()), ..SecretVolumeSource::default() };
    let volume = Volume { name: name.into(), secret: Some(source), ..Volume::default() };
    let mount = VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (volume, mount)
}

fn from_pod(name: &str, field: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: field.into(), ..ObjectFieldSelector::default() };
    let source = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    EnvVar { name: name.into(), value_from: Some(source), ..EnvVar::default() }
}

fn from_secret(name: &str, secret: &str, key: &str) -> EnvVar {
    let key = SecretKeySelector { name: secret.into(), key: key.into(), optional: None };
    let source = EnvVarSource { secret_key_ref: Some(key), ..EnvVarSource::default() };
    EnvVar { name: name.into(), value_from: Some(source), ..EnvVar::default() }
}

/// What Kubernetes calls the restricted profile.
pub(super) fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
        read_only_root_filesystem: Some(true),
        ..SecurityContext::default()
    }
}

/// The same for a pod.
pub(super) fn restricted_pod() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}
