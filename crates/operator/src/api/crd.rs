//! The CustomResourceDefinition, as text.

use kube::CustomResourceExt;

use super::GalerneCluster;

/// What `k8s/crds/galerneclusters.yaml` holds and `galerne operator crd` prints.
pub fn crd_yaml() -> String {
    crate::yaml::write(&GalerneCluster::crd())
}
