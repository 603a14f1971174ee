//! The router as a whole: what it is told at start, and its life from the first request to the last.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_telemetry::LogHandle;
use galerne_tls::{Server, TlsError, Way, keep_fresh};
use galerne_types::{Fleet, RouterRecord, TokenId};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::again::{Again, SharedBans};
use crate::ask::Prompt;
use crate::failure::Failure;
use crate::gate::Gate;
use crate::groups::{Groups, Listed};
use crate::inside::Inside;
use crate::limits::{FLUSH_MS_MAX, INLINE_TEXT_BYTES_MAX, RequestLimits};
use crate::metrics::Metrics;
use crate::model::{self, Model, ModelError, ModelSource, Models};
use crate::repeats::Repeats;
use crate::server::{Bodies, Places, ServerLimits};
use crate::traffic::Traffic;
use crate::{admin, demand, grpc, http, loads, standing, trace};

/// What a router is told at start.
#[derive(Clone, Debug)]
pub struct RouterOptions {
    /// The models whose text it handles; at least one.
    pub models: Vec<ModelSource>,
    /// How long running answers may go on after the shutdown was asked for; those that have not ended by then end
    /// with one error each.
    pub shutdown_grace: Duration,
    /// What the connections of each face may take.
    pub limits: ServerLimits,
    /// Who may use the faces.
    pub gate: Arc<Gate>,
    /// Certificates, of the faces and within the cluster.
    pub tls: RouterTls,
    /// What requests may take.
    pub requests: RequestLimits,
    /// Changes what this process logs, if an operator may.
    pub log: Option<LogHandle>,
    /// Told at start, for each model, how its conversations become prompts: a line for whoever started the router.
    pub tell: fn(&str),
    /// Told what is counted of requests, now and then, if somebody wants to know.
    pub counts: Option<watch::Sender<RouterRecord>>,
    /// What the routers of the cluster refuse together, if there are others.
    pub bans: Option<SharedBans>,
}

/// Where a router listens.
#[derive(Debug)]
pub struct Listeners {
    /// OpenAI's API.
    pub http: TcpListener,
    /// `galerne.v1`.
    pub grpc: TcpListener,
    /// The way of the process itself to `galerne.v1`, which needs no key.
    pub inside: Option<Inside>,
    /// The operator's port: metrics, the fleet, draining, what goes on inside.
    pub admin: Option<TcpListener>,
}

/// TLS, where it is not spoken in the open.
#[derive(Clone, Default)]
pub struct RouterTls {
    /// For the HTTP face.
    pub http: Option<Arc<Server>>,
    /// For the gRPC face.
    pub grpc: Option<Arc<Server>>,
    /// How leaders are called.
    pub cluster: Way,
}

impl std::fmt::Debug for RouterTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { http, grpc, cluster } = self;
        let mut shown = f.debug_struct("RouterTls");
        shown.field("http", &http.is_some()).field("grpc", &grpc.is_some());
        shown.field("cluster", &!matches!(cluster, Way::Open)).finish()
    }
}

impl RouterTls {
    /// Reloads all certificates for ever.
    async fn keep(self) {
        let Self { http, grpc, cluster } = self;
        if http.is_none() && grpc.is_none() && !matches!(cluster, Way::Tls(_)) {
            return std::future::pending().await;
        }
        let reload = move || {
            let faces = [&http, &grpc].into_iter().flatten();
            let mut changed = false;
            for face in faces {
                changed |= face.reload()?;
            }
            Ok::<_, TlsError>(changed | cluster.reload()?)
        };
        keep_fresh("certificates", reload).await;
    }
}

/// Why a router did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// A model's text side cannot be served.
    #[error("cannot serve a model: {0}")]
    Model(#[from] ModelError),
    /// There is nothing to serve.
    #[error("a router needs at least one model: name its path")]
    NoModels,
    /// The descriptors for reflection are broken.
    #[error("gRPC reflection cannot be offered: {0}")]
    Reflection(tonic_reflection::server::Error),
    /// The task that reads the models did not end well.
    #[error("reading the models failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// What all requests share.
pub(crate) struct Router {
    pub(crate) models: Models,
    pub(crate) groups: Arc<Groups>,
    pub(crate) metrics: Metrics,
    pub(crate) limits: ServerLimits,
    pub(crate) requests: RequestLimits,
    /// Bodies that are being read.
    pub(crate) bodies: Arc<Bodies>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) tls: RouterTls,
    /// Connections of each face.
    pub(crate) http_places: Arc<Places>,
    pub(crate) grpc_places: Arc<Places>,
    /// Requests that are sent again.
    pub(crate) again: Again,
    /// Requests that their clients have named.
    pub(crate) repeats: Arc<Repeats>,
    /// Requests under way.
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) log: Option<LogHandle>,
    pub(crate) began: Instant,
    /// Cancelled when running answers have to end.
    pub(crate) closing: CancellationToken,
    /// Prompts that are turned into tokens at once: as many as there are cores.
    tokenizing: Arc<Semaphore>,
    cores: usize,
}

/// Serves all ports until `shutdown` resolves, or an operator drains the router, and the running answers have ended.
///
/// `fleet` is the cluster as etcd tells of it. The listeners are bound by the caller, who thereby knows their ports
/// and that nobody else holds them; connections that come while the models are read wait.
///
/// # Errors
/// A sentence, when a model cannot be read or a face cannot start.
pub async fn serve(
    mut options: RouterOptions,
    fleet: watch::Receiver<Fleet>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RouterError> {
    let (shutdown_grace, counts, bans) = (options.shutdown_grace, options.counts.take(), options.bans.take());
    let (bans_seen, bans_told) = bans.map(|SharedBans { seen, told }| (seen, told)).unzip();
    let router = Router::new(options, fleet, bans_told).await?;
    let Listeners { http, grpc, inside, admin } = listeners;
    let end = CancellationToken::new();
    let _counts = counts.map(|told| AbortOnDropHandle::new(tokio::spawn(demand::tell(router.clone(), told))));
    let _bans = bans_seen.map(|seen| {
        let router = router.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { router.again.heed(seen).await }))
    });
    let faces = async {
        let ended = serve_faces(&router, http, (grpc, inside), shutdown, shutdown_grace).await;
        end.cancel();
        ended
    };
    let operator = async {
        let Some(listener) = admin else { return };
        let flushed = async {
            end.cancelled().await;
            tokio::time::sleep(FLUSH_MS_MAX).await;
        };
        tokio::select! {
            () = admin::serve(router.clone(), listener, end.clone()) => {}
            () = flushed => {} // a profile that still runs is not waited for
        }
    };
    tokio::join!(faces, operator).0
}

async fn serve_faces(
    router: &Arc<Router>,
    http: TcpListener,
    (grpc, inside): (TcpListener, Option<Inside>),
    shutdown: impl Future<Output = ()>,
    shutdown_grace: Duration,
) -> Result<(), RouterError> {
    let stop = CancellationToken::new();
    let _keys = AbortOnDropHandle::new(tokio::spawn(router.gate.clone().keep()));
    let _certificates = AbortOnDropHandle::new(tokio::spawn(router.tls.clone().keep()));
    let faces = async {
        tokio::try_join!(
            async {
                http::serve(router.clone(), http, stop.clone()).await;
                Ok(())
            },
            grpc::serve(router.clone(), grpc, inside, stop.clone())
        )
    };
    tokio::pin!(faces);
    let _groups = AbortOnDropHandle::new(tokio::spawn({
        let groups = router.groups.clone();
        async move { groups.keep().await }
    }));
    let _loads = AbortOnDropHandle::new(tokio::spawn(loads::listen(router.clone())));
    tokio::select! {
        ended = &mut faces => return ended.map(|_| ()),
        () = shutdown => {}
        () = router.traffic.drained() => tracing::warn!("this router is drained: it ends"),
    }
    stop.cancel();
    if let Ok(ended) = timeout(shutdown_grace, &mut faces).await {
        return ended.map(|_| ());
    }
    tracing::warn!(
        grace_s = shutdown_grace.as_secs_f64(),
        "answers still run: they end now, with an error each"
    );
    router.closing.cancel();
    match timeout(FLUSH_MS_MAX, faces).await {
        Ok(ended) => ended.map(|_| ()),
        Err(_) => Ok(()), // a client that does not even read its error is not waited for
    }
}

impl Router {
    async fn new(
        options: RouterOptions,
        fleet: watch::Receiver<Fleet>,
        bans_told: Option<mpsc::Sender<String>>,
    ) -> Result<Arc<Self>, RouterError> {
        let RouterOptions { models: sources, limits, gate, tls, requests, log, tell, .. } = options;
        if sources.is_empty() {
            return Err(RouterError::NoModels);
        }
        let metrics = Metrics::default();
        let (metrics, models) = tokio::task::spawn_blocking(move || {
            let models = model::load(&sources, &metrics, tell);
            (metrics, models)
        })
        .await?;
        let models = models?;
        let digests = models.values().map(|model| (model.name.clone(), model.digest.clone())).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Arc::new(Self {
            models,
            groups: Groups::new(fleet, digests, tls.cluster.clone()),
            metrics,
            http_places: Places::new(&limits),
            grpc_places: Places::new(&limits),
            limits,
            gate,
            tls,
            traffic: Traffic::new(requests.requests_max),
            again: Again::new(bans_told),
            repeats: Arc::default(),
            bodies: Bodies::new(requests.bodies_bytes_max),
            requests,
            log,
            began: Instant::now(),
            closing: CancellationToken::new(),
            tokenizing: Arc::new(Semaphore::new(cores)),
            cores,
        }))
    }

    /// The model of that name; the only one there is if no name was given.
    pub(crate) fn model(&self, name: &str) -> Result<Arc<Model>, Failure> {
        let known = || self.models.keys().map(String::as_str);
        if !name.is_empty() {
            return self.models.get(name).cloned().ok_or_else(|| Failure::no_model(name, known()));
        }
        match self.models.values().next() {
            Some(model) if self.models.len() == 1 => Ok(model.clone()),
            _ => {
                let names: Vec<_> = known().collect();
                Err(Failure::invalid("model", format!("model must be one of {}", names.join(", "))))
            }
        }
    }

    /// Turns a prompt into tokens.
    pub(crate) async fn tokenize(&self, model: &Arc<Model>, prompt: Prompt) -> Result<Vec<TokenId>, Failure> {
        prompt.check(&self.requests)?;
        let (model, span, bytes) = (model.clone(), trace::tokenize(), prompt.text_bytes());
        let work = move || {
            let _span = span;
            prompt.into_tokens(&model)
        };
        self.beside(bytes, work).await
    }

    /// Does work on a text of that many bytes, or tokens; on a long one on a thread that serves no connections.
    pub(crate) async fn beside<T: Send + 'static>(
        &self,
        length: usize,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        if length <= INLINE_TEXT_BYTES_MAX {
            return work();
        }
        let broken = || Failure::Engine("the text could not be tokenized".to_owned());
        let wait = self.requests.first_token_s_max;
        let permit = timeout(wait, self.tokenizing.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| Failure::Queued { wait })?.map_err(|_| broken())?;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit; // held to the end, even when the client has left meanwhile
            work()
        });
        done.await.map_err(|_| broken())?
    }

    /// Prompts that are being turned into tokens beside the connections.
    pub(crate) fn tokenizing(&self) -> usize {
        self.cores.saturating_sub(self.tokenizing.available_permits())
    }

    /// Whether any model takes requests; if none does, why not.
    pub(crate) fn ready(&self) -> Result<(), Vec<String>> {
        if self.traffic.draining() {
            return Err(vec!["this router is draining".to_owned()]);
        }
        if self.models.keys().any(|name| self.groups.card(name).is_some()) {
            return Ok(());
        }
        let listed = self.groups.list();
        if listed.is_empty() {
            return Err(vec!["no rank has registered yet".to_owned()]);
        }
        Err(listed.iter().map(missing).collect())
    }
}

/// A sentence about a group that takes no requests: what it waits for.
fn missing(listed: &Listed) -> String {
    let Listed { id, group, standing, same_weights, in_flight: _, breaker: _ } = listed;
    if !same_weights {
        return format!(
            "group {id} serves other weights than this router's files: start both from the same files"
        );
    }
    let wanted = group.ranks.values().next().map_or(0, |rank| rank.model.shards.world_size());
    let ranks = standing::in_rank_order(group);
    let states: Vec<_> =
        ranks.iter().map(|r| format!("{} {}", r.id, standing::rank_state(r.state))).collect();
    let states = if states.is_empty() { "none".to_owned() } else { states.join(", ") };
    format!("group {id} is {}; {} of {wanted} ranks are up: {states}", standing.name(), ranks.len())
}
