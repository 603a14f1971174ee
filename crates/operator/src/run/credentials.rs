//! How the operator speaks to clusters that speak TLS: with files of its own. It reads no secrets.

use std::sync::Arc;

use galerne_coord::{EtcdAccess, EtcdTls};
use galerne_tls::{Client, ClusterFiles, TlsError};

use crate::api::GalerneClusterSpec;

/// What to do about an operator that nobody in a cluster believes.
pub(crate) const NO_CERTIFICATE: &str = "the operator has no certificate of the cluster's authority: name one with its \
     --cluster-ca, --cluster-cert and --cluster-key";

/// What the operator shows, and whom it believes.
pub(crate) struct Credentials {
    /// To etcds that clusters name.
    etcd: EtcdAccess,
    /// To clusters that have certificates.
    cluster: Option<(ClusterFiles, Arc<Client>)>,
}

/// How a cluster's etcd is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// One that is named, under TLS.
    Secured,
    /// One that is named, in the open.
    Open,
    /// The managed one, in the open.
    Managed,
    /// The managed one, as one of the cluster.
    ManagedSecured,
}

impl Way {
    pub(crate) fn of(spec: &GalerneClusterSpec) -> Self {
        match (&spec.etcd.managed, &spec.tls, &spec.etcd.tls) {
            (Some(_), Some(_), _) => Self::ManagedSecured,
            (Some(_), None, _) => Self::Managed,
            (None, _, Some(_)) => Self::Secured,
            (None, _, None) => Self::Open,
        }
    }
}

impl Credentials {
    /// Reads the cluster's files, if there are any. Blocks on them.
    pub(crate) fn load(etcd: EtcdAccess, cluster: Option<ClusterFiles>) -> Result<Self, TlsError> {
        let load = |files: ClusterFiles| Ok((files.clone(), galerne_tls::cluster(&files)?.1));
        Ok(Self { etcd, cluster: cluster.map(load).transpose()? })
    }

    /// How an etcd is spoken to; where nothing is known of TLS, its endpoints are refused with a sentence.
    pub(crate) fn access(&self, way: Way) -> EtcdAccess {
        match way {
            Way::Secured => self.etcd.clone(),
            Way::Open => EtcdAccess { tls: None, ..self.etcd.clone() },
            Way::Managed => EtcdAccess::default(),
            Way::ManagedSecured => {
                EtcdAccess { tls: self.cluster.as_ref().map(|(files, _)| of_cluster(files)), login: None }
            }
        }
    }

    /// Calls leaders of clusters that have certificates.
    pub(crate) fn client(&self) -> Option<&Arc<Client>> {
        self.cluster.as_ref().map(|(_, client)| client)
    }

    /// What somebody has to do before the operator can speak to a cluster's etcd.
    pub(crate) fn lacks(&self, way: Way) -> Option<&'static str> {
        let (etcd, cluster) = (self.etcd.tls.is_none(), self.cluster.is_none());
        match way {
            Way::Secured if etcd => {
                Some("the operator does not know whom to believe: name etcd's authority with its --etcd-ca")
            }
            Way::ManagedSecured if cluster => Some(NO_CERTIFICATE),
            _ => None,
        }
    }

    /// Reads the cluster's files again when they change, for ever.
    pub(crate) async fn keep_fresh(&self) {
        if let Some(client) = self.client().cloned() {
            galerne_tls::keep_fresh("the clusters' certificates", move || client.reload()).await;
        }
        std::future::pending::<()>().await;
    }
}

fn of_cluster(files: &ClusterFiles) -> EtcdTls {
    let ClusterFiles { ca, cert, key } = files.clone();
    EtcdTls { ca, identity: Some((cert, key)), name: Some(galerne_tls::CLUSTER_NAME.to_owned()) }
}
