//! Kinds that not every Kubernetes has. Each is looked for until it is there, and watched from then on; by their metadata alone.

use std::sync::Arc;
use std::time::Duration;

use kube::api::ListParams;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind, PartialObjectMeta};
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::watch;

use super::bell::Bell;
use super::error::not_there;
use super::index::{Index, Key};
use super::observe::Shown;
use super::shown::{self, Made};
use super::watches;
use crate::names;

/// Pause between two looks for a kind that is not there, or that the operator may not use.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// The same where the API server has not said whether it is.
pub(crate) const ASK_AGAIN: Duration = Duration::from_secs(2);

/// What is kept of an object of such a kind.
pub(crate) type Meta = PartialObjectMeta<DynamicObject>;

/// One kind.
pub(crate) struct Extra {
    wanted: Wanted,
    pub(crate) made: Index<Made>,
    offer: watch::Sender<Offer>,
}

/// What is looked for: the first of these versions that is served.
struct Wanted {
    group: &'static str,
    versions: &'static [&'static str],
    kind: &'static str,
    plural: &'static str,
}

/// Whether a kind is there.
#[derive(Clone, Debug)]
pub(crate) enum Offer {
    /// Nobody has looked yet.
    Unknown,
    Absent,
    /// It is, and the operator may not use it.
    Forbidden,
    /// It is watched.
    There(ApiResource),
}

impl Extra {
    fn new(wanted: Wanted) -> Self {
        Self { made: Index::new(wanted.plural), wanted, offer: watch::Sender::new(Offer::Unknown) }
    }

    /// cert-manager's certificates.
    pub(crate) fn certificates() -> Self {
        let (kind, plural) = ("Certificate", "certificates");
        Self::new(Wanted { group: "cert-manager.io", versions: &["v1"], kind, plural })
    }

    /// Groups of pods that find places together or not at all (Kubernetes 1.36 and later, behind a feature gate). What is said
    /// of one here is the same in all these versions.
    pub(crate) fn pod_groups() -> Self {
        let versions = &["v1beta1", "v1alpha3", "v1alpha2"];
        Self::new(Wanted { group: "scheduling.k8s.io", versions, kind: "PodGroup", plural: "podgroups" })
    }

    pub(crate) fn offer(&self) -> Offer {
        self.offer.borrow().clone()
    }

    /// The kind as it is called, if it is watched.
    pub(crate) fn resource(&self) -> Option<ApiResource> {
        match self.offer() {
            Offer::There(resource) => Some(resource),
            _ => None,
        }
    }

    /// Returns once it has been looked for, and listed if it is there.
    pub(crate) async fn ready(&self) {
        // The sender lives as long as this does.
        let _ = self.offer.subscribe().wait_for(|offer| !matches!(offer, Offer::Unknown)).await;
    }

    /// Looks for it once.
    async fn look(&self, client: &Client, namespace: Option<&str>) -> Offer {
        let Wanted { group, versions, kind, plural } = self.wanted;
        for version in versions {
            let listed = client.list_api_group_resources(&format!("{group}/{version}")).await;
            let served = match listed {
                Ok(list) => list.resources.iter().any(|resource| resource.name == plural),
                Err(error) if not_there(&error) => false,
                Err(error) => {
                    tracing::warn!(%error, group, "the API server does not say what it serves");
                    return Offer::Unknown;
                }
            };
            if served {
                let resource =
                    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
                return match api(client, namespace, &resource).list(&ListParams::default().limit(1)).await {
                    Err(kube::Error::Api(status)) if status.is_forbidden() => Offer::Forbidden,
                    _ => Offer::There(resource),
                };
            }
        }
        Offer::Absent
    }
}

/// All objects of the kind, in one namespace or in all.
fn api(client: &Client, namespace: Option<&str>, resource: &ApiResource) -> Api<Meta> {
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
        None => Api::all_with(client.clone(), resource),
    }
}

/// Looks for a kind until it is there, and then follows it for ever.
pub(crate) async fn follow(
    client: Client,
    namespace: Option<String>,
    shown: Arc<Shown>,
    bell: Bell,
    which: fn(&Shown) -> &Extra,
) {
    let extra = which(&shown);
    let resource = loop {
        let pause = match extra.look(&client, namespace.as_deref()).await {
            Offer::There(resource) => break resource,
            Offer::Unknown => ASK_AGAIN,
            other => {
                extra.offer.send_replace(other);
                LOOK_INTERVAL
            }
        };
        tokio::time::sleep(pause).await;
    };
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::MANAGER));
    let events = watcher::watcher(api(&client, namespace.as_deref(), &resource), ours);
    let read = |object: &Meta| -> Option<(Key, Made)> {
        Some((shown::cluster_of(&object.metadata)?, Made::of(&object.metadata)))
    };
    let listed = async {
        extra.made.ready().await;
        tracing::info!(
            kind = resource.kind,
            version = resource.version,
            "a kind that not everybody has is there"
        );
        extra.offer.send_replace(Offer::There(resource.clone()));
    };
    let watching = watches::follow(events, shown.clone(), bell, move |shown| &which(shown).made, read);
    tokio::join!(watching, listed);
}
