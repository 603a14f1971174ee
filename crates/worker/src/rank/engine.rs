//! The face towards routers: `Engine.Serve` and `Engine.Load`, at the leader.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::future::{AbortHandle, Abortable, BoxFuture};
use futures_util::stream::{self, BoxStream, FuturesUnordered, StreamExt as _};
use galerne_grammar::Constraint;
use galerne_types::{Epoch, Refusal, Request as RunRequest, RequestId};
use galerne_wire::v1::ask::Ask;
use galerne_wire::{RepeatKey, shown_epoch, shows_secret, v1};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::door::Door;
use super::grammars::{Counts, Grammars};
use super::link::{LinkReceiver, LinkSender, link};
use super::streams::{lost, request_id};
use super::trace::Traced;

/// Calls that wait for the leader's loop before routers are not listened to.
pub(crate) const CALLS_MAX: usize = 256;

/// What the leader's loop hears of a router.
#[derive(Debug)]
pub(crate) enum Call {
    Run(Box<Run>),
    /// Nobody waits for it any more.
    Cancel(RequestId),
    /// What its client calls it begins at another group.
    Superseded(RepeatKey),
    /// The router of the link with that number.
    Left(u32),
    /// Nothing new is to be taken, and what runs may do so until then.
    Drain(Instant),
}

/// A request on its way to the leader's loop.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) request: RunRequest,
    /// Another leader had accepted it.
    pub(crate) accepted: bool,
    /// What its client calls it.
    pub(crate) key: Option<RepeatKey>,
    /// What its grammar was compiled to, if it has one.
    pub(crate) constraint: Option<Box<Constraint>>,
    /// Where its events go.
    pub(crate) link: LinkSender,
    /// Its spans, if it is traced.
    pub(crate) traced: Option<Box<Traced>>,
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
    grammars: Arc<Grammars>,
    next_link: AtomicU32,
}

impl EngineService {
    pub(crate) fn new(door: Door<Inbox>, grammars: Grammars) -> Self {
        Self { door, grammars: Arc::new(grammars), next_link: AtomicU32::new(1) }
    }

    /// The epoch under way, for callers who know it and its secret.
    fn enter<T>(&self, request: &Request<T>, epoch: Option<Epoch>) -> Result<Inbox, Status> {
        let inbox =
            self.door.enter().ok_or_else(|| Status::failed_precondition("this rank leads no group"))?;
        let epoch = epoch.ok_or_else(|| Status::invalid_argument("the call says no epoch"))?;
        if epoch != inbox.epoch {
            let says = format!("this rank leads epoch {}, not {}", inbox.epoch.0, epoch.0);
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
    type ServeStream = LinkReceiver;
    type LoadStream = BoxStream<'static, Result<v1::LoadReport, Status>>;

    async fn serve(
        &self,
        request: Request<Streaming<v1::Ask>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let inbox = self.enter(&request, shown_epoch(&request))?;
        let (sender, news) = link();
        let link = Link {
            number: self.next_link.fetch_add(1, Ordering::Relaxed),
            inbox,
            sender,
            grammars: self.grammars.clone(),
            compiling: FuturesUnordered::new(),
            aborts: BTreeMap::new(),
        };
        tokio::spawn(link.listen(request.into_inner()));
        Ok(Response::new(news))
    }

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        let inbox = self.enter(&request, Some(Epoch(request.get_ref().epoch)))?;
        let (cache, epoch) = (self.grammars.cache(), inbox.epoch);
        let reports = WatchStream::new(inbox.load).map(move |report| {
            let Counts { hits, misses } = cache.counts(epoch);
            Ok(v1::LoadReport { grammar_hits: hits, grammar_misses: misses, ..report })
        });
        Ok(Response::new(reports.chain(stream::once(async { Err(lost()) })).boxed()))
    }
}

/// A request that may be passed on, or what is wrong with it.
type Judged = Result<Run, v1::Failed>;

/// A router's stream, as it is read.
struct Link {
    number: u32,
    inbox: Inbox,
    sender: LinkSender,
    grammars: Arc<Grammars>,
    /// Requests whose grammars are being compiled.
    compiling: FuturesUnordered<BoxFuture<'static, (u32, Option<Judged>)>>,
    /// Gives them up.
    aborts: BTreeMap<u32, AbortHandle>,
}

impl Link {
    /// Passes on what the router asks until it leaves or the epoch is over.
    async fn listen(mut self, mut asks: Streaming<v1::Ask>) {
        let calls = self.inbox.calls.clone();
        loop {
            let call = tokio::select! {
                ask = asks.message() => match ask {
                    Ok(Some(v1::Ask { ask: Some(ask) })) => self.take(ask),
                    Ok(Some(v1::Ask { ask: None })) => None,
                    Ok(None) | Err(_) => break,
                },
                Some((id, compiled)) = self.compiling.next() => {
                    self.aborts.remove(&id);
                    compiled.and_then(|compiled| self.judge(id, compiled))
                }
                () = calls.closed() => break,
            };
            if let Some(call) = call
                && calls.send(call).await.is_err()
            {
                break;
            }
        }
        // Whichever side has left, the other hears of it.
        let _ = calls.send(Call::Left(self.number)).await;
        self.sender.end(lost());
    }

    fn take(&mut self, ask: Ask) -> Option<Call> {
        let run = match ask {
            Ask::Run(run) => run,
            Ask::Cancel(id) => {
                if let Some(compiling) = self.aborts.remove(&id) {
                    compiling.abort();
                }
                return Some(Call::Cancel(request_id(self.number, id)));
            }
            // What is no key is nobody's.
            Ask::Superseded(key) => return RepeatKey::try_from(&*key).ok().map(Call::Superseded),
        };
        let id = run.id;
        match self.request(run) {
            Ok(run) if run.request.grammar.is_none() => Some(Call::Run(Box::new(run))),
            Ok(run) => {
                self.compile(id, run);
                None
            }
            Err(failed) => self.judge(id, Err(failed)),
        }
    }

    fn request(&self, run: v1::RunRequest) -> Judged {
        let traced = Traced::begin(&run.traceparent, self.inbox.epoch);
        let (id, accepted) = (request_id(self.number, run.id), run.accepted);
        let request = run.key().and_then(|key| Ok((key, run.into_request(id)?)));
        let (key, mut request) =
            request.map_err(|error| v1::Failed::new(Code::InvalidArgument, error.to_string()))?;
        if let Some(traced) = &traced {
            traced.mark(&mut request);
        }
        Ok(Run { request, accepted, key, constraint: None, link: self.sender.clone(), traced })
    }

    /// Compiles a request's grammar while the link is read further.
    fn compile(&mut self, id: u32, mut run: Run) {
        let grammars = self.grammars.clone();
        let compile = async move {
            let compiled = grammars.constraint(&run.request).await;
            run.constraint = compiled.map_err(|status| v1::Failed::from(status).about("grammar"))?;
            Ok(run)
        };
        let (abort, registration) = AbortHandle::new_pair();
        self.aborts.insert(id, abort);
        let compile = Abortable::new(compile, registration);
        self.compiling.push(Box::pin(async move { (id, compile.await.ok()) }));
    }

    /// The call of a request, unless something is wrong with it, which its router is told.
    fn judge(&self, id: u32, run: Judged) -> Option<Call> {
        match run {
            Ok(run) => Some(Call::Run(Box::new(run))),
            Err(failed) => {
                self.sender.push(id, v1::run_event::Event::Failed(failed));
                self.sender.flush();
                None
            }
        }
    }
}

/// What a router is told when its request is refused.
pub(crate) fn refused(refusal: &Refusal) -> v1::Failed {
    let failed = |code| v1::Failed::new(code, refusal.to_string());
    match refusal {
        Refusal::TooLong { .. } => failed(Code::InvalidArgument).about("prompt"),
        Refusal::NeverFits { .. } => failed(Code::InvalidArgument).about("max_tokens"),
        Refusal::Invalid(_) => failed(Code::InvalidArgument),
        Refusal::Overloaded { .. } => failed(Code::ResourceExhausted),
        Refusal::NoGroup { .. } => failed(Code::Unavailable),
    }
}
