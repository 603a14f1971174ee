//! Names, labels and annotations of what is made for a cluster.

use sha2::{Digest, Sha256};

/// The operator's name as an owner of fields and as a reporter of events.
pub const MANAGER: &str = "galerne-operator";
/// The owner of the annotation that says that a group is to end.
pub const RETIRER: &str = "galerne-operator-retire";
/// Label: the cluster that something is of.
pub const CLUSTER: &str = "galerne.dev/cluster";
/// Label: the group that something is of.
pub const GROUP: &str = "galerne.dev/group";
/// Label: what part of a cluster something is: `group`, `router`, `etcd`, `preload` or `certificate`.
pub const PART: &str = "galerne.dev/part";
/// Label: the version of a group's pods.
pub const REVISION: &str = "galerne.dev/revision";
/// Annotation of the routers' Deployment: how many of them spec.router.replicas said when that was last heeded.
pub const REPLICAS: &str = "galerne.dev/replicas";
/// Annotation of a pod that brings a version to a node: which node.
pub const NODE: &str = "galerne.dev/node";
/// Annotation: hash of what was applied.
pub const HASH: &str = "galerne.dev/hash";
/// Annotation of a group's StatefulSet: since when it is to end, in Unix seconds, and why: `1764254000 the version is old`.
pub const RETIRED: &str = "galerne.dev/retired";
/// Finalizer: a cluster's groups are forgotten in etcd before it goes.
pub const FINALIZER: &str = "galerne.dev/groups";

/// Characters of a cluster's name in etcd, at most: what `galerne --cluster` takes.
const CLUSTER_CHARS_MAX: usize = 64;

/// A group's name in etcd.
pub fn group(number: u32) -> String {
    format!("g{number}")
}

/// The number in a group's name.
pub fn group_number(name: &str) -> Option<u32> {
    name.strip_prefix('g')?.parse().ok()
}

/// What a group's StatefulSet and PodDisruptionBudget are called.
pub fn group_object(cluster: &str, number: u32) -> String {
    format!("{cluster}-g{number}")
}

/// The headless Service that names all pods of groups.
pub fn pods_service(cluster: &str) -> String {
    format!("{cluster}-groups")
}

/// The routers' Deployment and PodDisruptionBudget.
pub fn router(cluster: &str) -> String {
    format!("{cluster}-router")
}

/// The pod that brings a version to a node.
pub fn preload(cluster: &str, node: &str, revision: &str) -> String {
    format!("{cluster}-preload-{}", hash(format!("{node} {revision}").as_bytes()))
}

/// The Certificate that cert-manager is asked for, and its secret.
pub fn certificate(cluster: &str) -> String {
    format!("{cluster}-tls")
}

/// The managed etcd's StatefulSet and Service.
pub fn etcd(cluster: &str) -> String {
    format!("{cluster}-etcd")
}

/// The cluster's name in etcd: several namespaces may share one.
pub fn in_etcd(namespace: &str, cluster: &str) -> String {
    let name = format!("{namespace}.{cluster}");
    if name.len() <= CLUSTER_CHARS_MAX {
        return name;
    }
    let hash = hash(name.as_bytes());
    format!("{}.{hash}", &name[..CLUSTER_CHARS_MAX - hash.len() - 1])
}

/// A short hash: the first ten hexadecimal digits of SHA-256.
pub fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(5).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_and_stays_its_own() {
        let (namespace, cluster) = ("n".repeat(40), "c".repeat(40));
        let name = in_etcd(&namespace, &cluster);
        assert_eq!(name.len(), 64);
        assert_ne!(name, in_etcd(&namespace, &"c".repeat(41)));
        assert_eq!(in_etcd("serving", "mistral"), "serving.mistral");
    }
}
