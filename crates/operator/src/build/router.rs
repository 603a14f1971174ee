//! The routers: as many pods as were asked for, the Service that clients call, and a budget that leaves one.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{
    ContainerPort, HTTPGetAction, PodSpec, PodTemplateSpec, Probe, Service, ServicePort, ServiceSpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::container::{restricted_pod, secret_files};
use super::{Kind, Manifest, Site, manifest, select};
use crate::names;

/// Ports: OpenAI's API, gRPC, and the operator's.
const PORTS: [(&str, i32); 3] = [("http", 8000), ("grpc", 8001), ("admin", 8002)];
/// Seconds that a router may take to end: answers that run may end, and those that do not are asked for again.
const END_S: i64 = 30;

impl Site<'_> {
    pub(super) fn router_objects(&self) -> [Manifest; 3] {
        [
            manifest(Kind::Service, &self.router_service()),
            manifest(Kind::PodDisruptionBudget, &self.router_budget()),
            manifest(Kind::Deployment, &self.router_deployment()),
        ]
    }

    fn router_service(&self) -> Service {
        let port = |(name, port): (&str, i32)| ServicePort {
            name: Some(name.into()),
            port,
            target_port: Some(IntOrString::String(name.into())),
            ..ServicePort::default()
        };
        // The operator's port is for those who can reach the pods, not for those who call the Service.
        let ports = PORTS.iter().filter(|(name, _)| *name != "admin").map(|named| port(*named)).collect();
        Service {
            metadata: self.meta(self.name(), self.labels("router")),
            spec: Some(ServiceSpec {
                selector: Some(self.selector("router")),
                ports: Some(ports),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        }
    }

    fn router_budget(&self) -> PodDisruptionBudget {
        PodDisruptionBudget {
            metadata: self.meta(names::router(&self.name()), self.labels("router")),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                selector: Some(select(self.selector("router"))),
                ..PodDisruptionBudgetSpec::default()
            }),
            status: None,
        }
    }

    fn router_deployment(&self) -> Deployment {
        let surge = RollingUpdateDeployment {
            max_surge: Some(IntOrString::Int(1)),
            max_unavailable: Some(IntOrString::Int(0)),
        };
        let mut metadata = self.meta(names::router(&self.name()), self.labels("router"));
        let asked = (names::REPLICAS.to_owned(), self.cluster.spec.router.replicas.to_string());
        metadata.annotations = Some([asked].into());
        Deployment {
            metadata,
            spec: Some(DeploymentSpec {
                replicas: Some(self.cluster.spec.router.replicas.into()),
                selector: select(self.selector("router")),
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".into()),
                    rolling_update: Some(surge),
                }),
                template: self.router_template(),
                ..DeploymentSpec::default()
            }),
            status: None,
        }
    }

    fn router_template(&self) -> PodTemplateSpec {
        let spec = &self.cluster.spec.router;
        let mut args = self.common_args("router");
        args.extend(PORTS.map(|(name, port)| format!("--{name}=0.0.0.0:{port}")));
        let (mut volumes, mut mounts): (Vec<_>, Vec<_>) = self.access_files().into_iter().unzip();
        volumes.insert(0, self.models_volume());
        let mut files = |name: &str, secret: &str| {
            let path = format!("/etc/galerne/{name}");
            let (volume, mount) = secret_files(name, secret, &path);
            volumes.push(volume);
            mounts.push(mount);
            path
        };
        match &spec.api_keys_secret {
            Some(secret) => args.push(format!("--api-keys={}/keys.toml", files("keys", secret))),
            None => args.push("--no-auth".into()),
        }
        if let Some(hold) = self.hold_flag() {
            args.push(hold);
        }
        if let Some(secret) = &spec.tls_secret {
            let path = files("tls", secret);
            args.extend([format!("--tls-cert={path}/tls.crt"), format!("--tls-key={path}/tls.key")]);
        }
        args.extend(spec.args.iter().cloned());
        let mut container = self.container("router", args);
        container.volume_mounts.get_or_insert_default().extend(mounts);
        let port = |(name, port): (&str, i32)| ContainerPort {
            name: Some(name.into()),
            container_port: port,
            ..ContainerPort::default()
        };
        container.ports = Some(PORTS.map(port).into());
        // A cluster that may sleep is woken by the requests that its routers hold, so they must get them.
        let ready = if self.cluster.spec.may_sleep() { "/healthz" } else { "/readyz" };
        container.readiness_probe = Some(self.probe(ready, 2));
        container.liveness_probe = Some(self.probe("/healthz", 10));
        PodTemplateSpec {
            metadata: Some(ObjectMeta { labels: Some(self.labels("router")), ..ObjectMeta::default() }),
            spec: Some(PodSpec {
                init_containers: self.fetch_container().map(|fetch| vec![fetch]),
                containers: vec![container],
                volumes: Some(volumes),
                security_context: Some(restricted_pod()),
                termination_grace_period_seconds: Some(END_S),
                automount_service_account_token: Some(false),
                enable_service_links: Some(false),
                ..PodSpec::default()
            }),
        }
    }

    /// Where no group may be, a request waits for as long as one may take to start, unless somebody has said how long.
    fn hold_flag(&self) -> Option<String> {
        const FLAG: &str = "--hold-s-max";
        let told = self.cluster.spec.router.args.iter().any(|arg| arg.starts_with(FLAG));
        (self.cluster.spec.may_sleep() && !told)
            .then(|| format!("{FLAG}={}", self.cluster.spec.start_seconds))
    }

    fn probe(&self, path: &str, period_s: i32) -> Probe {
        let scheme = if self.cluster.spec.router.tls_secret.is_some() { "HTTPS" } else { "HTTP" };
        Probe {
            http_get: Some(HTTPGetAction {
                path: Some(path.into()),
                port: IntOrString::String("http".into()),
                scheme: Some(scheme.into()),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(period_s),
            ..Probe::default()
        }
    }
}
