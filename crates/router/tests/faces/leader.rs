//! A leader that plays a script instead of running a model.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use galerne_wire::v1;
use galerne_wire::v1::ask::Ask;
use galerne_wire::v1::engine_server::{Engine, EngineServer};
use galerne_wire::v1::run_event::Event;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// The secret of every epoch here.
pub(crate) const SECRET: &str = "5ec2e7";

/// What a leader does next.
#[derive(Clone)]
pub(crate) enum Act {
    /// Sends a token.
    Token(v1::Token),
    /// Sends a token, and that so many tokens of the prompt were found among what is kept.
    Cached(v1::Token, u32),
    /// Sends the token whose place in the list is the request's seed.
    Seeded(Vec<v1::Token>),
    /// Sends scores of the prompt, from this position on.
    Score(u32, Vec<v1::Token>),
    /// Sends a finished event.
    Finish(v1::FinishReason),
    /// Ends the stream with an error.
    Fail(v1::Failed),
    /// Says that the ranks work on it.
    Begin,
    /// Ends the router's stream, as when the group is lost, unless that was done so often.
    Lose(Arc<AtomicU64>),
    /// Waits for a permit of this semaphore; one without permits waits for ever.
    Wait(Arc<Semaphore>),
}

/// A leader on a runtime of its own, so that it can die with all its connections.
pub(crate) struct Leader {
    pub(crate) address: String,
    /// Requests as they come.
    pub(crate) requests: mpsc::UnboundedReceiver<v1::RunRequest>,
    /// One message for each stream that was dropped before its script's end.
    pub(crate) cancelled: mpsc::UnboundedReceiver<()>,
    /// Names of requests that begin at other groups.
    pub(crate) superseded: mpsc::UnboundedReceiver<Vec<u8>>,
    /// One message for each request that waits, and has told what came before.
    pub(crate) waiting: mpsc::UnboundedReceiver<()>,
    /// One message for each stream that a router opened in the belief in another epoch.
    pub(crate) refused: mpsc::UnboundedReceiver<u64>,
    /// Calls for reports of an epoch that it does not lead.
    pub(crate) strangers: Arc<AtomicU64>,
    epoch: Arc<AtomicU64>,
    script: Arc<Mutex<Vec<Act>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Leader {
    pub(crate) async fn start(script: Vec<Act>) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), script).await
    }

    pub(crate) async fn start_at(address: SocketAddr, script: Vec<Act>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (requests, seen) = mpsc::unbounded_channel();
        let (dropped, cancelled) = mpsc::unbounded_channel();
        let (waits, waiting) = mpsc::unbounded_channel();
        let (over, superseded) = mpsc::unbounded_channel();
        let script = Arc::new(Mutex::new(script));
        let (refusing, refused) = mpsc::unbounded_channel();
        let epoch = Arc::new(AtomicU64::new(7));
        let player = Player { script: script.clone(), requests, dropped, over, waits };
        let strangers = Arc::new(AtomicU64::new(0));
        let service = Service {
            player: Arc::new(player),
            epoch: epoch.clone(),
            refusing,
            strangers: strangers.clone(),
        };
        let bound = runtime.spawn(async move {
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let address = listener.local_addr().unwrap();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let server = tonic::transport::Server::builder().add_service(EngineServer::new(service));
            tokio::spawn(server.serve_with_incoming(incoming));
            address
        });
        let address = bound.await.unwrap().to_string();
        let runtime = Some(runtime);
        Self {
            address,
            requests: seen,
            cancelled,
            superseded,
            waiting,
            refused,
            strangers,
            epoch,
            script,
            runtime,
        }
    }

    pub(crate) fn play(&self, script: Vec<Act>) {
        *self.script.lock().unwrap() = script;
    }

    /// Leads this epoch from now on; 7 in the beginning.
    pub(crate) fn lead(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    pub(crate) fn die(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.die();
    }
}

struct Service {
    player: Arc<Player>,
    epoch: Arc<AtomicU64>,
    refusing: mpsc::UnboundedSender<u64>,
    strangers: Arc<AtomicU64>,
}

/// What all links share.
struct Player {
    script: Arc<Mutex<Vec<Act>>>,
    requests: mpsc::UnboundedSender<v1::RunRequest>,
    dropped: mpsc::UnboundedSender<()>,
    over: mpsc::UnboundedSender<Vec<u8>>,
    waits: mpsc::UnboundedSender<()>,
}

/// Tells when it is dropped before it was disarmed.
struct Guard(Option<mpsc::UnboundedSender<()>>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(dropped) = self.0.take() {
            let _ = dropped.send(());
        }
    }
}

impl Player {
    /// Plays the script for one request, from the token on that it asks for first. Those before it have to stand behind
    /// its prompt.
    fn play(&self, request: v1::RunRequest) -> BoxStream<'static, Result<v1::RunEvent, Status>> {
        let script = self.script.lock().unwrap().clone(); // before the test hears of it, and plays another one
        let seed = request.sampling.as_ref().and_then(|sampling| sampling.seed).unwrap_or(0) as usize;
        let (id, first) = (request.id, request.first_index);
        let script = rest(script, seed, &request.prompt[request.prompt.len() - first as usize..]);
        let _ = self.requests.send(request);
        let state = (script.into_iter(), first, Guard(Some(self.dropped.clone())));
        let waits = self.waits.clone();
        let events = stream::unfold(state, move |(mut script, mut index, mut guard)| {
            let waits = waits.clone();
            async move {
                loop {
                    let event = match script.next() {
                        Some(Act::Token(token)) => {
                            index += 1;
                            Event::Token(v1::RunToken { index: index - 1, token: Some(token), timing: None })
                        }
                        Some(Act::Cached(token, cached_tokens)) => {
                            index += 1;
                            let timing = Some(v1::Timing { cached_tokens, ..Default::default() });
                            Event::Token(v1::RunToken { index: index - 1, token: Some(token), timing })
                        }
                        Some(Act::Seeded(_)) => unreachable!("turned into a token before"),
                        Some(Act::Score(position, scores)) => Event::Scored(v1::Scored { position, scores }),
                        Some(Act::Begin) => Event::Begun(v1::Begun {}),
                        Some(Act::Finish(reason)) => Event::Finished(reason.into()),
                        Some(Act::Fail(failed)) => Event::Failed(failed),
                        Some(Act::Wait(gate)) => {
                            let _ = waits.send(());
                            gate.acquire().await.unwrap().forget();
                            continue;
                        }
                        Some(Act::Lose(times)) => {
                            let take = |left: u64| left.checked_sub(1);
                            if times.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
                                continue;
                            }
                            guard.0.take();
                            let lost = Status::unavailable("the group was lost");
                            return Some((Err(lost), (Vec::new().into_iter(), index, guard)));
                        }
                        None => {
                            guard.0.take();
                            return None;
                        }
                    };
                    return Some((Ok(v1::RunEvent { id, event: Some(event) }), (script, index, guard)));
                }
            }
        });
        events.boxed()
    }
}

/// What is left of a script behind tokens that were told before.
fn rest(script: Vec<Act>, seed: usize, told: &[u32]) -> Vec<Act> {
    let mut told = told.iter();
    let mut rest = Vec::new();
    for act in script {
        let act = match act {
            Act::Seeded(tokens) => Act::Token(tokens[seed].clone()),
            act => act,
        };
        let due = match (&act, told.as_slice()) {
            (Act::Token(token) | Act::Cached(token, _), [due, ..]) => Some((token.id, *due)),
            (Act::Fail(_), _) | (_, []) => None,
            _ => continue,
        };
        match due {
            Some((token, due)) if token == due => drop(told.next()),
            Some((token, due)) => {
                let says = format!("a replay says {due} where token {token} was told");
                return vec![Act::Fail(Status::internal(says).into())];
            }
            None => rest.push(act),
        }
    }
    rest
}

#[tonic::async_trait]
impl Engine for Service {
    type ServeStream = BoxStream<'static, Result<v1::News, Status>>;

    async fn serve(
        &self,
        request: Request<Streaming<v1::Ask>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        assert!(galerne_wire::shows_secret(&request, SECRET), "a router shows the epoch's secret");
        let epoch = galerne_wire::shown_epoch(&request).expect("a router says which epoch it believes in").0;
        if epoch != self.epoch.load(Ordering::Relaxed) {
            let _ = self.refusing.send(epoch);
            return Err(Status::failed_precondition("another epoch"));
        }
        let (player, mut asks) = (self.player.clone(), request.into_inner());
        let (news, told) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut plays = HashMap::new();
            while let Ok(Some(v1::Ask { ask: Some(ask) })) = asks.message().await {
                match ask {
                    Ask::Run(request) => {
                        let (id, news, mut play) = (request.id, news.clone(), player.play(request));
                        let play = tokio::spawn(async move {
                            while let Some(event) = play.next().await {
                                let told = |event| v1::News { events: vec![event], ..Default::default() };
                                let _ = news.send(event.map(told));
                                tokio::task::yield_now().await; // a step lies between two tokens
                            }
                        });
                        plays.insert(id, AbortOnDropHandle::new(play));
                    }
                    Ask::Cancel(id) => drop(plays.remove(&id)),
                    Ask::Superseded(key) => drop(player.over.send(key)),
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(told).boxed()))
    }

    type LoadStream = stream::Pending<Result<v1::LoadReport, Status>>;

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        assert!(galerne_wire::shows_secret(&request, SECRET), "a router shows the epoch's secret");
        if request.get_ref().epoch != self.epoch.load(Ordering::Relaxed) {
            self.strangers.fetch_add(1, Ordering::Relaxed);
            return Err(Status::failed_precondition("another epoch"));
        }
        Ok(Response::new(stream::pending()))
    }
}

/// Sends these tokens, then ends the answer.
pub(crate) fn tokens(ids: &[u32], finish: v1::FinishReason) -> Vec<Act> {
    let mut script: Vec<_> = ids.iter().map(|&id| Act::Token(token(id))).collect();
    script.push(Act::Finish(finish));
    script
}

/// Scores tokens of the prompt, from that position on.
pub(crate) fn scored(position: u32, ids: &[u32]) -> Act {
    Act::Score(position, ids.iter().map(|&id| token(id)).collect())
}

/// A token with log probabilities that its id foretells: its own -id/100, then two alternatives;
/// its rank is id % 100.
pub(crate) fn token(id: u32) -> v1::Token {
    let logprob = -(id as f32) / 100.0;
    let top = vec![v1::TopToken { id, logprob }, v1::TopToken { id: 301, logprob: f32::NEG_INFINITY }];
    v1::Token { id, logprob, top, rank: id % 100 }
}

/// A loss of the group that happens so often.
pub(crate) fn losses(times: u64) -> Act {
    Act::Lose(Arc::new(AtomicU64::new(times)))
}

/// A wait that only `add_permits` ends.
pub(crate) fn gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}
