//! A leader that runs nothing: it sends tokens at a pace, and remembers when it let go of the last one of each request.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use galerne_checkpoint::Checkpoint;
use galerne_coord::{Coord, Formed, Registration, embedded};
use galerne_types::{
    Compute, Epoch, GroupId, Health, KvDtype, ModelCard, RankId, RankRecord, RankState, Shards,
};
use galerne_wire::v1;
use galerne_wire::v1::ask::Ask;
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::engine_server::{Engine, EngineServer};
use galerne_wire::v1::run_event::Event;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// Time for the group to form.
const FORM_TIMEOUT: Duration = Duration::from_secs(20);

/// The leader, and the store in which routers find it.
pub(crate) struct Leader {
    /// Where the store listens.
    pub(crate) store: String,
    /// Where it listens itself.
    address: String,
    /// When the last token of a request left, by the request's seed.
    last: Arc<Mutex<HashMap<u64, Instant>>>,
    _registration: Registration,
    _runtime: tokio::runtime::Runtime,
}

impl Leader {
    /// Stands for a group of `model` whose tokens come `pace` apart.
    pub(crate) fn start(model: &str, pace: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let last = Arc::default();
        let (store, address, registration) = runtime.block_on(stand(model, pace, Arc::clone(&last)));
        Self { store, address, last, _registration: registration, _runtime: runtime }
    }

    /// How long the last token of each request is under way to a bare client of the leader: the part of its way to a
    /// router's client that is behind it when it arrives at the router.
    pub(crate) async fn ask(&self, seeds: Range<u64>, max_tokens: u32) -> Vec<Duration> {
        let client = EngineClient::connect(format!("http://{}", self.address)).await;
        let (asks, asked) = mpsc::unbounded_channel();
        let news = client.expect("a leader").serve(UnboundedReceiverStream::new(asked)).await;
        let (mut news, mut times) = (news.expect("a stream").into_inner(), Vec::new());
        for seed in seeds {
            let sampling = Some(v1::Sampling { seed: Some(seed), ..Default::default() });
            let run = v1::RunRequest { id: seed as u32, sampling, max_tokens, ..Default::default() };
            asks.send(v1::Ask { ask: Some(Ask::Run(run)) }).expect("a leader that listens");
            while news.message().await.expect("no error").expect("news").ends.is_empty() {}
            times.push(self.sent(seed).elapsed());
        }
        times
    }

    /// When the last token of the request with that seed left.
    pub(crate) fn sent(&self, seed: u64) -> Instant {
        self.last.lock().expect("no panic")[&seed]
    }
}

async fn stand(
    model: &str,
    pace: Duration,
    last: Arc<Mutex<HashMap<u64, Instant>>>,
) -> (String, String, Registration) {
    let listen = || async { TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
    let (store, own) = (listen().await, listen().await);
    let (endpoint, address) =
        (store.local_addr().expect("a port").to_string(), own.local_addr().expect("a port").to_string());
    tokio::spawn(embedded::serve(store, std::future::pending()));
    let incoming = TcpIncoming::from(own).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder().add_service(EngineServer::new(Service { pace, last }));
    tokio::spawn(server.serve_with_incoming(incoming));

    let coord =
        Coord::connect(std::slice::from_ref(&endpoint), "default", FORM_TIMEOUT).await.expect("a store");
    let record = record(model, &address);
    let registration = coord.register(record.clone()).await.expect("a registration");
    let formed = tokio::time::timeout(FORM_TIMEOUT, registration.form()).await.expect("a group in time");
    let Formed { epoch, .. } = formed.expect("a group");
    registration.update(RankState::Ready, 0);
    let health = Health {
        group: record.group,
        epoch,
        leader: address.clone(),
        model: record.model,
        kv_blocks: 1,
        sequences_max: 1,
        step_tokens_max: 1,
        draining: false,
    };
    registration.declare(health).await.expect("a leader's word");
    (endpoint, address, registration)
}

/// A rank that is a whole group.
fn record(model: &str, address: &str) -> RankRecord {
    let checkpoint = Checkpoint::open(Path::new(model)).expect("a model");
    let model = ModelCard {
        name: checkpoint.name().to_owned(),
        digest: checkpoint.digest().to_owned(),
        context_tokens_max: checkpoint.config().context_tokens_max as u32,
        vocab: checkpoint.config().vocab as u32,
        shards: Shards::new(1, 1).expect("one shard"),
        quantize: None,
        compute: Compute::F32,
        kv: KvDtype::F32,
    };
    RankRecord {
        id: RankId("bench/0".to_owned()),
        group: GroupId("bench".to_owned()),
        host: "bench".to_owned(),
        index: 0,
        address: address.to_owned(),
        collective: address.to_owned(),
        pid: std::process::id(),
        device: "none".to_owned(),
        build: "bench".to_owned(),
        model,
        state: RankState::Waiting,
        memory_bytes: 0,
        ranks_min: 1,
        left: Epoch::default(),
        loss: None,
    }
}

struct Service {
    pace: Duration,
    last: Arc<Mutex<HashMap<u64, Instant>>>,
}

#[tonic::async_trait]
impl Engine for Service {
    type ServeStream = UnboundedReceiverStream<Result<v1::News, Status>>;
    type LoadStream = BoxStream<'static, Result<v1::LoadReport, Status>>;

    async fn serve(
        &self,
        request: Request<Streaming<v1::Ask>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let (news, told) = mpsc::unbounded_channel();
        let (pace, last, mut asks) = (self.pace, Arc::clone(&self.last), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(v1::Ask { ask })) = asks.message().await {
                if let Some(Ask::Run(run)) = ask {
                    tokio::spawn(answer(run, pace, news.clone(), Arc::clone(&last)));
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(told)))
    }

    async fn load(&self, _: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        Ok(Response::new(futures_util::stream::pending().boxed()))
    }
}

async fn answer(
    run: v1::RunRequest,
    pace: Duration,
    news: mpsc::UnboundedSender<Result<v1::News, Status>>,
    last: Arc<Mutex<HashMap<u64, Instant>>>,
) {
    let seed = run.sampling.and_then(|sampling| sampling.seed).unwrap_or_default();
    for index in 0..run.max_tokens {
        tokio::time::sleep(pace).await;
        let mut tokens = v1::Tokens::default();
        tokens.push(run.id, index, 1000 + index);
        let finished = Event::Finished(v1::FinishReason::Length.into());
        let last_one = index + 1 == run.max_tokens;
        if last_one {
            last.lock().expect("no panic").insert(seed, Instant::now());
        }
        let ends = last_one.then_some(v1::RunEvent { id: run.id, event: Some(finished) });
        let told = v1::News { tokens: Some(tokens), ends: ends.into_iter().collect(), ..Default::default() };
        if news.send(Ok(told)).is_err() {
            return;
        }
    }
}
