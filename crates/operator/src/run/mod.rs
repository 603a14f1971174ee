//! The loop: watches that fill indexes, a lease that says who acts, and passes over the clusters that ring.

mod admin;
mod bell;
mod credentials;
mod error;
mod extras;
mod fleets;
mod hands;
mod index;
mod lease;
mod metrics;
mod observe;
mod pass;
mod scalers;
mod shown;
mod trial;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use galerne_coord::EtcdAccess;
use galerne_tls::{ClusterFiles, TlsError};
use k8s_openapi::api::core::v1::{Event as CoreEvent, Node};
use kube::runtime::controller::{Config, Controller};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api::GalerneCluster;
use crate::names;
use bell::Bell;
use credentials::Credentials;
use fleets::Fleets;
use hands::Hands;
use lease::Candidate;
use metrics::Metrics;
use observe::Shown;
use pass::Context;
use scalers::Scalers;

/// Passes over different clusters that run at once.
const PASSES_MAX: u16 = 8;
/// What happens to a cluster within so long becomes one pass.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Name of the lease of those who may act.
const LEASE: &str = "galerne-operator";

/// What an operator is told.
pub struct Options {
    /// Looks after the clusters of these namespaces; of all if there are none.
    pub namespaces: Vec<String>,
    /// Namespace of the lease.
    pub lease_namespace: String,
    /// This operator's name among those that wait for the lease.
    pub identity: String,
    /// Image of the galerne binary, where a cluster names none.
    pub image: String,
    /// How the clusters' etcds are spoken to.
    pub etcd: EtcdAccess,
    /// Files with which clusters that have certificates are spoken to, as one of them.
    pub cluster_tls: Option<ClusterFiles>,
    /// Where metrics and health are asked for.
    pub admin: Option<TcpListener>,
}

/// Why an operator ended.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Another one may act now: this process must end, and may begin anew.
    #[error("the lease {LEASE} is lost: another operator may act now")]
    LeaseLost,
    /// A file is wrong.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Looks after clusters until `stop`, whenever this operator holds the lease.
///
/// # Errors
/// [`OperatorError::LeaseLost`] when it has held the lease and does not any more; [`OperatorError::Tls`] at once if its files
/// are no certificates.
pub async fn run(client: Client, options: Options, stop: CancellationToken) -> Result<(), OperatorError> {
    let credentials = Arc::new(Credentials::load(options.etcd, options.cluster_tls)?);
    let metrics = Arc::new(Metrics::default());
    let admin = options
        .admin
        .map(|listener| tokio::spawn(admin::serve(listener, metrics.clone(), client.clone(), stop.clone())));
    let mut candidate = Candidate::new(client.clone(), &options.lease_namespace, LEASE, &options.identity);
    let elected = tokio::select! {
        elected = candidate.elected() => elected,
        () = stop.cancelled() => return Ok(()),
    };
    tracing::info!(identity = options.identity, "this operator acts");
    metrics.leads(true);
    let reporter = Reporter { controller: names::MANAGER.into(), instance: Some(options.identity.clone()) };
    let site = Site {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        metrics: metrics.clone(),
        image: options.image,
        credentials: credentials.clone(),
    };
    let mut namespaces: Vec<Option<String>> = options.namespaces.into_iter().map(Some).collect();
    if namespaces.is_empty() {
        namespaces.push(None);
    }
    let acting = join_all(namespaces.into_iter().map(|namespace| act(&site, namespace)));
    let result = tokio::select! {
        _ = acting => Ok(()),
        () = credentials.keep_fresh() => Ok(()),
        () = candidate.hold(elected, &stop) => if stop.is_cancelled() { Ok(()) } else { Err(OperatorError::LeaseLost) },
    };
    metrics.leads(false);
    if let Some(admin) = admin {
        admin.abort();
    }
    result
}

/// What the clusters of all namespaces have in common.
struct Site {
    client: Client,
    recorder: Recorder,
    metrics: Arc<Metrics>,
    image: String,
    credentials: Arc<Credentials>,
}

/// Looks after the clusters of a namespace, or of all, until it is dropped.
async fn act(site: &Site, namespace: Option<String>) {
    let Site { client, recorder, metrics, image, credentials } = site;
    let bell = Bell::default();
    let sees_nodes = watches::may_list(&Api::<Node>::all(client.clone())).await;
    let sees_events = watches::may_list(&watches::api::<CoreEvent>(client, namespace.as_deref())).await;
    let shown = Arc::new(Shown::new(sees_nodes, sees_events));
    let _watches = watches::start(client, namespace.as_deref(), &shown, &bell);
    let scalers = Scalers::new(bell.clone(), metrics.clone());
    let context = Arc::new(Context {
        scalers,
        hands: Hands { client: client.clone(), shown: shown.clone(), metrics: metrics.clone() },
        fleets: Fleets::new(credentials.clone(), bell.clone()),
        credentials: credentials.clone(),
        recorder: recorder.clone(),
        metrics: metrics.clone(),
        image: image.clone(),
        memory: std::sync::Mutex::default(),
        shown,
        bell,
    });
    control(client.clone(), namespace.as_deref(), context).await;
}

/// Passes over clusters that have changed, that ring, or that it is time for.
async fn control(client: Client, namespace: Option<&str>, context: Arc<Context>) {
    context.shown.ready().await;
    let clusters = watches::api::<GalerneCluster>(&client, namespace);
    let rung = context.bell.heard().map(|(namespace, name)| ObjectRef::new(&name).within(&namespace));
    Controller::new(clusters, watcher::Config::default())
        .with_config(Config::default().concurrency(PASSES_MAX).debounce(DEBOUNCE))
        .reconcile_on(rung)
        .run(pass::reconcile, |cluster, error, context| context.later(&cluster, error), context)
        .for_each(|_| std::future::ready(()))
        .await;
}
