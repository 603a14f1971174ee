//! Certificates: what pods mount and are told of them, and what cert-manager is asked for.
//!
//! Nobody here reads a secret: pods name them, the kubelet brings them and brings them again when they change, and processes read
//! their files again. So what is renewed makes no new version.

use k8s_openapi::api::core::v1::{Volume, VolumeMount};
use serde_json::{Value, json};

use super::container::secret_files;
use super::{Kind, Manifest, Site, hashed};
use crate::api::parts::{EtcdTlsSpec, IssuerRef};
use crate::names;

/// Where the cluster's certificate is mounted.
const CLUSTER: &str = "/etc/galerne/cluster";
/// Where what etcd is spoken to with is mounted.
const ETCD: &str = "/etc/galerne/etcd";
/// The name that certificates within a cluster are made for (`galerne_tls::CLUSTER_NAME`).
const NAME: &str = "galerne";
/// So long a certificate of cert-manager holds, and so long before its end there is another one.
const DURATION: &str = "2160h";
const RENEW_BEFORE: &str = "720h";

impl Site<'_> {
    /// The secret with the cluster's certificate, if its parts speak TLS.
    pub(super) fn cluster_secret(&self) -> Option<String> {
        let tls = self.cluster.spec.tls.as_ref()?;
        Some(tls.secret.clone().unwrap_or_else(|| names::certificate(&self.name())))
    }

    /// Whether the managed etcd speaks TLS: with the cluster's certificate.
    pub(super) fn etcd_has_cluster_tls(&self) -> bool {
        self.cluster.spec.etcd.managed.is_some() && self.cluster.spec.tls.is_some()
    }

    /// The cluster's certificate, as its parts mount it.
    pub(super) fn cluster_files(&self) -> Option<(Volume, VolumeMount)> {
        self.cluster_secret().map(|secret| secret_files("cluster-tls", &secret, CLUSTER))
    }

    /// What routers and workers mount.
    pub(super) fn access_files(&self) -> Vec<(Volume, VolumeMount)> {
        let etcd = self.cluster.spec.etcd.tls.as_ref();
        let etcd = etcd.map(|tls| secret_files("etcd-tls", &tls.secret, ETCD));
        self.cluster_files().into_iter().chain(etcd).collect()
    }

    /// What they are told of it.
    pub(super) fn access_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut flag = |name: &str, folder: &str, file: &str| args.push(format!("--{name}={folder}/{file}"));
        if self.cluster.spec.tls.is_some() {
            flag("cluster-ca", CLUSTER, "ca.crt");
            flag("cluster-cert", CLUSTER, "tls.crt");
            flag("cluster-key", CLUSTER, "tls.key");
        }
        let shows_none = |tls: &EtcdTlsSpec| tls.anonymous;
        let etcd = match &self.cluster.spec.etcd.tls {
            _ if self.etcd_has_cluster_tls() => Some((CLUSTER, false)),
            tls => tls.as_ref().map(|tls| (ETCD, shows_none(tls))),
        };
        if let Some((folder, anonymous)) = etcd {
            flag("etcd-ca", folder, "ca.crt");
            if !anonymous {
                flag("etcd-cert", folder, "tls.crt");
                flag("etcd-key", folder, "tls.key");
            }
        }
        if self.etcd_has_cluster_tls() {
            args.push(format!("--etcd-tls-name={NAME}"));
        }
        args
    }

    /// Flags of a managed etcd that speaks TLS and lets in who is of the cluster.
    pub(super) fn etcd_tls_args(&self) -> Vec<String> {
        if !self.etcd_has_cluster_tls() {
            return Vec::new();
        }
        let file = |name: &str, file: &str| format!("--{name}={CLUSTER}/{file}");
        vec![
            file("cert-file", "tls.crt"),
            file("key-file", "tls.key"),
            file("trusted-ca-file", "ca.crt"),
            "--client-cert-auth".into(),
        ]
    }

    /// What cert-manager is asked for.
    pub(super) fn certificate(&self) -> Option<Manifest> {
        let issuer = self.cluster.spec.tls.as_ref()?.issuer.as_ref()?;
        let name = names::certificate(&self.name());
        let IssuerRef { name: issuer, kind, group } = issuer;
        let meta = self.meta(name.clone(), self.labels("certificate"));
        let body: Value = json!({
            "metadata": meta,
            "spec": {
                "secretName": name,
                "dnsNames": [NAME],
                "usages": ["digital signature", "server auth", "client auth"],
                "duration": DURATION,
                "renewBefore": RENEW_BEFORE,
                "privateKey": { "algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always" },
                "issuerRef": { "group": group, "kind": kind, "name": issuer },
            },
        });
        Some(hashed(Kind::Certificate, name, ("cert-manager.io/v1", "Certificate"), body))
    }
}
