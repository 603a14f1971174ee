//! The face towards routers: `Engine.Run` and `Engine.Load`, at the leader.

use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::{self, BoxStream, StreamExt as _};
use galerne_grammar::Constraint;
use galerne_types::{Epoch, Refusal, Request as RunRequest, RequestId};
use galerne_wire::{blaming, shows_secret, v1};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status};

use super::door::Door;
use super::grammars::{Counts, Grammars};
use super::streams::{self, RunItem, StreamSender, lost};
use super::trace::Traced;

/// Calls that wait for the leader's loop before more are refused.
pub(crate) const CALLS_MAX: usize = 256;

/// A request on its way to the leader's loop.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) request: RunRequest,
    /// What its grammar was compiled to, if it has one.
    pub(crate) constraint: Option<Box<Constraint>>,
    pub(crate) stream: StreamSender,
    pub(crate) verdict: oneshot::Sender<Result<(), Refusal>>,
}

/// The leader's loop of one epoch, as seen from outside.
#[derive(Clone)]
pub(crate) struct Inbox {
    pub(crate) epoch: Epoch,
    /// The epoch's secret, as routers show it.
    pub(crate) secret: String,
    pub(crate) calls: mpsc::Sender<Call>,
    pub(crate) load: watch::Receiver<v1::LoadReport>,
}

/// The service: open while this rank leads a ready group.
pub(crate) struct EngineService {
    door: Door<Inbox>,
    grammars: Grammars,
    next_id: AtomicU64,
}

impl EngineService {
    pub(crate) fn new(door: Door<Inbox>, grammars: Grammars) -> Self {
        Self { door, grammars, next_id: AtomicU64::new(1) }
    }

    /// The epoch under way, for callers who know it and its secret.
    fn enter<T>(&self, request: &Request<T>, epoch: u64) -> Result<Inbox, Status> {
        let inbox =
            self.door.enter().ok_or_else(|| Status::failed_precondition("this rank leads no group"))?;
        if epoch != inbox.epoch.0 {
            let says = format!("this rank leads epoch {}, not {epoch}", inbox.epoch.0);
            return Err(Status::failed_precondition(says));
        }
        if !shows_secret(request, &inbox.secret) {
            return Err(Status::unauthenticated("not the secret of this rank's epoch"));
        }
        Ok(inbox)
    }
}

#[tonic::async_trait]
impl v1::engine_server::Engine for EngineService {
    type RunStream = ReceiverStream<RunItem>;
    type LoadStream = BoxStream<'static, Result<v1::LoadReport, Status>>;

    async fn run(&self, request: Request<v1::RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let inbox = self.enter(&request, request.get_ref().epoch)?;
        let traced = Traced::begin(request.metadata(), inbox.epoch);
        let request = request.into_inner();
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut request =
            request.into_request(id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let constraint =
            self.grammars.constraint(&request).await.map_err(|status| blaming(status, "grammar"))?;
        let (mut stream, events) = streams::stream();
        if let Some(traced) = traced {
            traced.mark(&mut request);
            stream.trace(traced);
        }
        let (verdict, judged) = oneshot::channel();
        inbox.calls.try_send(Call { request, constraint, stream, verdict }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => refused(&Refusal::Overloaded { waiting: CALLS_MAX }),
            mpsc::error::TrySendError::Closed(_) => lost(),
        })?;
        match judged.await {
            Ok(Ok(())) => Ok(Response::new(ReceiverStream::new(events))),
            Ok(Err(refusal)) => Err(refused(&refusal)),
            Err(_) => Err(lost()),
        }
    }

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        let inbox = self.enter(&request, request.get_ref().epoch)?;
        let (cache, epoch) = (self.grammars.cache(), inbox.epoch);
        let reports = WatchStream::new(inbox.load).map(move |report| {
            let Counts { hits, misses } = cache.counts(epoch);
            Ok(v1::LoadReport { grammar_hits: hits, grammar_misses: misses, ..report })
        });
        Ok(Response::new(reports.chain(stream::once(async { Err(lost()) })).boxed()))
    }
}

fn refused(refusal: &Refusal) -> Status {
    let says = refusal.to_string();
    match refusal {
        Refusal::TooLong { .. } => blaming(Status::invalid_argument(says), "prompt"),
        Refusal::NeverFits { .. } => blaming(Status::invalid_argument(says), "max_tokens"),
        Refusal::Invalid(_) => Status::invalid_argument(says),
        Refusal::Overloaded { .. } => Status::resource_exhausted(says),
        Refusal::NoGroup { .. } => Status::unavailable(says),
    }
}
