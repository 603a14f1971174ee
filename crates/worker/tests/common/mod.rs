//! A cluster within the test's process: the embedded store, and ranks each in a runtime of its own.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use galerne_coord::{Coord, EtcdAccess, embedded};
use galerne_types::{Compute, Epoch, Fleet, GroupId, Health, KvDtype, RankId, RankState, Sampling};
use galerne_wire::v1::ask::Ask;
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::run_event::Event;
use galerne_wire::{show_epoch, show_secret, v1};
use galerne_worker::{KvSize, RankOptions, WorkerError, run_rank};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

/// Nothing here takes as long, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A store and what it knows.
pub(crate) struct Cluster {
    pub(crate) endpoint: String,
    pub(crate) coord: Coord,
    pub(crate) fleet: watch::Receiver<Fleet>,
    pub(crate) group: GroupId,
}

/// One rank. Dropping it kills it: its tasks, its sockets, its lease.
pub(crate) struct RankProcess {
    pub(crate) id: RankId,
    shutdown: CancellationToken,
    ended: JoinHandle<Result<(), WorkerError>>,
    runtime: Option<Runtime>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        tokio::spawn(embedded::serve(listener, std::future::pending()));
        let coord = Coord::connect(std::slice::from_ref(&endpoint), "test", PATIENCE).await.unwrap();
        let fleet = coord.watch_fleet();
        Self { endpoint, coord, fleet, group: GroupId("g".into()) }
    }

    pub(crate) fn options(&self, host: &str, index: u16, world_size: usize) -> RankOptions {
        RankOptions {
            model: golden("bard-1m"),
            model_name: None,
            cluster: "test".into(),
            group: self.group.clone(),
            world_size,
            virtual_shards: None,
            quantize: None,
            compute: Some(Compute::F32),
            fast: false,
            kv_dtype: KvDtype::F32,
            device: galerne_worker::Device::Cpu,
            gpu_memory_utilization: 0.9,
            host: host.into(),
            index,
            bind: "127.0.0.1".parse().unwrap(),
            etcd: vec![self.endpoint.clone()],
            etcd_access: EtcdAccess::default(),
            cluster_tls: None,
            threads: 1,
            processor: galerne_worker::Processor::default(),
            kv: KvSize::Auto,
            sequences_max: 8,
            step_tokens_max: 64,
            waiting_requests_max: 1024,
            prefix_cache: true,
            speculation: true,
            itl_target_ms: None,
            rehearse: None,
        }
    }

    /// Kills a rank as a supervisor sees it happen.
    pub(crate) async fn kill(&self, mut rank: RankProcess) {
        if let Some(runtime) = rank.runtime.take() {
            runtime.shutdown_background();
        }
        self.coord.evict(&self.group, &rank.id, std::process::id()).await.unwrap();
    }

    /// Waits until the group serves an epoch newer than `after`.
    pub(crate) async fn serving(&self, after: Epoch) -> Health {
        let newer = |fleet: &Fleet| health(fleet, &self.group).is_some_and(|health| health.epoch > after);
        let mut fleet = self.fleet.clone();
        let fleet =
            tokio::time::timeout(PATIENCE, fleet.wait_for(newer)).await.expect("the group serves").unwrap();
        health(&fleet, &self.group).unwrap()
    }

    /// Waits until the rank's registration says so.
    pub(crate) async fn until(&self, says: &str, is: impl Fn(&Fleet) -> bool) {
        let mut fleet = self.fleet.clone();
        let seen = tokio::time::timeout(PATIENCE, fleet.wait_for(is)).await;
        seen.unwrap_or_else(|_| panic!("{says}")).unwrap();
    }
}

/// Starts a rank.
pub(crate) fn start(options: RankOptions) -> RankProcess {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (id, shutdown) = (options.id(), CancellationToken::new());
    let ended = runtime.spawn(run_rank(options, shutdown.clone()));
    RankProcess { id, shutdown, ended, runtime: Some(runtime) }
}

impl RankProcess {
    /// Asks it to end, and returns what it ends with.
    pub(crate) async fn stop(mut self) -> Result<(), WorkerError> {
        self.shutdown.cancel();
        self.outcome().await
    }

    /// What it ends with.
    pub(crate) async fn outcome(&mut self) -> Result<(), WorkerError> {
        tokio::time::timeout(PATIENCE, &mut self.ended).await.expect("the rank ends").unwrap()
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn health(fleet: &Fleet, group: &GroupId) -> Option<Health> {
    fleet.groups.get(group)?.serving().cloned()
}

/// The state of a rank.
pub(crate) fn state(fleet: &Fleet, group: &GroupId, id: &RankId) -> Option<RankState> {
    fleet.groups.get(group)?.ranks.get(id).map(|rank| rank.state)
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// A prompt of the golden values, and its greedy continuation. The reference is sure of every token, and has no
/// window; all of it fits into the checkpoint's own.
pub(crate) fn case() -> (Vec<u32>, Vec<u32>) {
    let text = std::fs::read_to_string(golden("bard-1m.json")).unwrap();
    let values: serde_json::Value = serde_json::from_str(&text).unwrap();
    let case = values["cases"].as_array().unwrap().iter().find(|case| case["key"] == "full.2").unwrap();
    let ids = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
    let gaps: Vec<f64> = serde_json::from_value(case["top1_minus_top2"].clone()).unwrap();
    assert!(gaps.iter().all(|gap| *gap > 0.01), "a case without near ties");
    let (prompt, answer) = (ids("prompt_ids"), ids("greedy_ids"));
    assert!(prompt.len() + answer.len() <= 64, "no longer than the checkpoint's window");
    (prompt, answer)
}

/// A client of the leader.
pub(crate) async fn client(health: &Health) -> EngineClient<Channel> {
    EngineClient::connect(format!("http://{}", health.leader)).await.unwrap()
}

/// A request, and what opens its link.
#[derive(Clone)]
pub(crate) struct Asked {
    pub(crate) run: v1::RunRequest,
    pub(crate) epoch: Epoch,
    pub(crate) secret: Option<String>,
}

impl Cluster {
    /// A request as a router sends it: with the secret of the last epoch.
    pub(crate) fn request(&self, epoch: Epoch, prompt: &[u32], tokens: u32) -> Asked {
        let sampling = Some(v1::Sampling::from(&Sampling::greedy()));
        let prompt = prompt.to_vec();
        let run = v1::RunRequest { prompt, max_tokens: tokens, sampling, ..Default::default() };
        let secret = self.fleet.borrow().groups[&self.group].epoch.as_ref().unwrap().1.secret.clone();
        Asked { run, epoch, secret: Some(secret) }
    }
}

/// One request on a link of its own. Dropping it leaves.
pub(crate) struct Running {
    asks: mpsc::UnboundedSender<v1::Ask>,
    news: Streaming<v1::News>,
    events: VecDeque<Event>,
    ended: bool,
}

/// Sends a request.
pub(crate) async fn run(engine: &EngineClient<Channel>, asked: Asked) -> Result<Running, Status> {
    let (asks, asking) = mpsc::unbounded_channel();
    asks.send(v1::Ask { ask: Some(Ask::Run(asked.run)) }).unwrap();
    let mut request = Request::new(UnboundedReceiverStream::new(asking));
    show_epoch(&mut request, asked.epoch);
    if let Some(secret) = &asked.secret {
        show_secret(&mut request, secret).unwrap();
    }
    let news = engine.clone().serve(request).await?.into_inner();
    Ok(Running { asks, news, events: VecDeque::new(), ended: false })
}

/// Sends a request that is refused.
pub(crate) async fn refused(engine: &EngineClient<Channel>, asked: Asked) -> Status {
    match run(engine, asked).await {
        Ok(mut running) => running.next().await.unwrap_err(),
        Err(status) => status,
    }
}

impl Running {
    /// Says on the same link that a request of this name begins at another group.
    pub(crate) fn supersede(&self, key: &[u8]) {
        self.asks.send(v1::Ask { ask: Some(Ask::Superseded(key.to_vec())) }).unwrap();
    }

    /// The next event but that it has begun; none behind the one that finishes it.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Status> {
        while !self.ended && self.events.is_empty() {
            let news = self.news.message().await?.expect("a last word");
            let events = news.into_events().unwrap().into_iter().map(|event| event.event.unwrap());
            self.events.extend(events.filter(|event| !matches!(event, Event::Begun(_))));
        }
        let event = self.events.pop_front();
        if let Some(Event::Failed(failed)) = event {
            return Err(failed.status());
        }
        self.ended |= matches!(event, Some(Event::Finished(_)));
        Ok(event)
    }

    /// Reads to the end: the tokens, and the status that ended them if they did not finish.
    pub(crate) async fn read(mut self) -> (Vec<u32>, Option<Status>) {
        let mut tokens = Vec::new();
        loop {
            match self.next().await {
                Ok(None) => return (tokens, None),
                Err(status) => return (tokens, Some(status)),
                Ok(Some(Event::Token(token))) => {
                    assert_eq!(token.index as usize, tokens.len());
                    tokens.push(token.token.unwrap().id);
                }
                Ok(Some(_)) => {}
            }
        }
    }
}
