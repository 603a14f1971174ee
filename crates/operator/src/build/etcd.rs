//! A small etcd for trials: one member, whose data lives as long as its pod. Groups that serve go on without it.

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EmptyDirVolumeSource, PodSpec, PodTemplateSpec, Service, ServicePort,
    ServiceSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::container::{restricted, restricted_pod};
use super::{Kind, Manifest, Site, manifest, select};
use crate::api::parts::ManagedEtcd;
use crate::names;

/// Where clients call it.
pub(super) const CLIENT_PORT: i32 = 2379;
const DATA: &str = "/var/lib/etcd";

impl Site<'_> {
    pub(super) fn etcd_objects(&self, managed: &ManagedEtcd) -> [Manifest; 2] {
        [manifest(Kind::Service, &self.etcd_service()), manifest(Kind::StatefulSet, &self.etcd_set(managed))]
    }

    fn etcd_service(&self) -> Service {
        let port = ServicePort { name: Some("client".into()), port: CLIENT_PORT, ..ServicePort::default() };
        Service {
            metadata: self.meta(names::etcd(&self.name()), self.labels("etcd")),
            spec: Some(ServiceSpec {
                selector: Some(self.selector("etcd")),
                ports: Some(vec![port]),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        }
    }

    fn etcd_set(&self, managed: &ManagedEtcd) -> StatefulSet {
        let scheme = if self.etcd_has_cluster_tls() { "https" } else { "http" };
        let client = format!("{scheme}://0.0.0.0:{CLIENT_PORT}");
        let advertised = self.etcd_endpoints().join(",");
        let command = [
            "etcd",
            "--data-dir",
            DATA,
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &advertised,
        ];
        let command = command.map(str::to_owned).into_iter().chain(self.etcd_tls_args());
        let (volumes, mounts): (Vec<_>, Vec<_>) = self.cluster_files().into_iter().unzip();
        let data_mount =
            VolumeMount { name: "data".into(), mount_path: DATA.into(), ..VolumeMount::default() };
        let container = Container {
            name: "etcd".into(),
            image: Some(managed.image.clone()),
            command: Some(command.collect()),
            ports: Some(vec![ContainerPort {
                name: Some("client".into()),
                container_port: CLIENT_PORT,
                ..ContainerPort::default()
            }]),
            volume_mounts: Some([data_mount].into_iter().chain(mounts).collect()),
            security_context: Some(restricted()),
            ..Container::default()
        };
        let data = Volume {
            name: "data".into(),
            empty_dir: Some(EmptyDirVolumeSource::default()),
            ..Volume::default()
        };
        StatefulSet {
            metadata: self.meta(names::etcd(&self.name()), self.labels("etcd")),
            spec: Some(StatefulSetSpec {
                replicas: Some(1),
                selector: select(self.selector("etcd")),
                service_name: Some(names::etcd(&self.name())),
                template: PodTemplateSpec {
                    metadata: Some(ObjectMeta { labels: Some(self.labels("etcd")), ..ObjectMeta::default() }),
                    spec: Some(PodSpec {
                        containers: vec![container],
                        volumes: Some([data].into_iter().chain(volumes).collect()),
                        security_context: Some(restricted_pod()),
                        automount_service_account_token: Some(false),
                        enable_service_links: Some(false),
                        ..PodSpec::default()
                    }),
                },
                ..StatefulSetSpec::default()
            }),
            status: None,
        }
    }
}
