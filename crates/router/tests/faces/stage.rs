//! Everything around a test: the model, the fleet, the router, and an HTTP client that hides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use galerne_checkpoint::Checkpoint;
use galerne_router::{
    Gate, GateOptions, Listeners, ModelSource, RequestLimits, RouterError, RouterOptions, RouterTls,
    ServerLimits, SharedBans,
};
use galerne_text::Tokenizer;
use galerne_types::{
    Compute, Epoch, EpochRecord, Fleet, Group, GroupId, Health, KvDtype, Member, ModelCard, RankId,
    RankRecord, RankState, RouterRecord, Shards,
};
use galerne_wire::v1::galerne_client::GalerneClient;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::leader::{Leader, SECRET};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// bard-1m with a chat template, under the name `bard`.
pub(crate) struct Bard {
    dir: tempfile::TempDir,
    pub(crate) card: ModelCard,
    pub(crate) tokenizer: Tokenizer,
}

pub(crate) static BARD: LazyLock<Bard> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bard-1m");
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(golden.join(file), dir.path().join(file)).unwrap();
    }
    let template = "{{ preface }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}assistant:{{ '\n' }}";
    let config = serde_json::json!({ "bos_token": "<s>", "eos_token": "</s>", "chat_template": template });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let card = ModelCard {
        name: "bard".to_owned(),
        digest: checkpoint.digest().to_owned(),
        context_tokens_max: 2048,
        vocab: 1024,
        shards: Shards::new(4, 2).unwrap(),
        quantize: None,
        compute: Compute::F32,
        kv: KvDtype::F32,
    };
    let tokenizer = Tokenizer::load(checkpoint.text()).unwrap();
    Bard { dir, card, tokenizer }
});

/// Ids of a text, without anything added.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    BARD.tokenizer.encode(text, false).unwrap()
}

const LOOPBACK: &str = "127.0.0.1:0";

/// A router with its fleet.
pub(crate) struct Stage {
    pub(crate) fleet: watch::Sender<Fleet>,
    pub(crate) http: String,
    pub(crate) grpc: String,
    pub(crate) admin: String,
    /// What the router tells of the requests that it gets.
    pub(crate) counts: watch::Receiver<RouterRecord>,
    /// Requests that any router has told of as refused.
    pub(crate) bans: watch::Sender<BTreeSet<String>>,
    /// Those that this one tells of.
    pub(crate) banned: mpsc::Receiver<String>,
    shutdown: Option<oneshot::Sender<()>>,
    served: JoinHandle<Result<(), RouterError>>,
}

/// A request that finds no group is not held for one.
fn impatient() -> RequestLimits {
    RequestLimits { hold_s_max: Duration::ZERO, ..RequestLimits::DEFAULT }
}

impl Stage {
    /// A router in front of these leaders, each with a group of its own: `g0`, `g1` …
    pub(crate) async fn with(leaders: &[&Leader]) -> Self {
        let groups = leaders.iter().enumerate();
        Self::set(groups.map(|(at, leader)| group(&format!("g{at}"), 7, &leader.address)).collect()).await
    }

    pub(crate) async fn set(groups: BTreeMap<GroupId, Group>) -> Self {
        Self::with_grace(groups, PATIENCE).await
    }

    pub(crate) async fn with_grace(groups: BTreeMap<GroupId, Group>, shutdown_grace: Duration) -> Self {
        Self::build(
            groups,
            shutdown_grace,
            ServerLimits::default(),
            impatient(),
            anybody(),
            RouterTls::default(),
            LOOPBACK,
        )
        .await
    }

    /// A router in front of one leader whose connections may take no more than this.
    pub(crate) async fn limited(leader: &Leader, limits: ServerLimits) -> Self {
        Self::build(
            BTreeMap::from([group("g0", 7, &leader.address)]),
            PATIENCE,
            limits,
            impatient(),
            anybody(),
            RouterTls::default(),
            LOOPBACK,
        )
        .await
    }

    /// A router that works on no more requests than this.
    pub(crate) async fn busy(leader: &Leader, requests: RequestLimits) -> Self {
        Self::build(
            BTreeMap::from([group("g0", 7, &leader.address)]),
            PATIENCE,
            ServerLimits::default(),
            requests,
            anybody(),
            RouterTls::default(),
            LOOPBACK,
        )
        .await
    }

    /// A router behind a gate, with one leader; other machines could reach its admin port.
    pub(crate) async fn behind(gate: &Arc<Gate>, leader: &Leader) -> Self {
        let groups = BTreeMap::from([group("g0", 7, &leader.address)]);
        Self::build(
            groups,
            PATIENCE,
            ServerLimits::default(),
            impatient(),
            gate.clone(),
            RouterTls::default(),
            "0.0.0.0:0",
        )
        .await
    }

    /// A router with certificates, in front of one leader.
    pub(crate) async fn secured(leader: &Leader, tls: RouterTls) -> Self {
        let groups = BTreeMap::from([group("g0", 7, &leader.address)]);
        let (limits, requests) = (ServerLimits::default(), impatient());
        Self::build(groups, PATIENCE, limits, requests, anybody(), tls, LOOPBACK).await
    }

    async fn build(
        groups: BTreeMap<GroupId, Group>,
        shutdown_grace: Duration,
        limits: ServerLimits,
        requests: RequestLimits,
        gate: Arc<Gate>,
        tls: RouterTls,
        admin: &str,
    ) -> Self {
        let (fleet, view) = watch::channel(Fleet { groups });
        let http = TcpListener::bind(LOOPBACK).await.unwrap();
        let grpc = TcpListener::bind(LOOPBACK).await.unwrap();
        let admin = TcpListener::bind(admin).await.unwrap();
        let addresses = [&http, &grpc, &admin]
            .map(|listener| format!("127.0.0.1:{}", listener.local_addr().unwrap().port()));
        let (shutdown, asked) = oneshot::channel::<()>();
        let model = ModelSource {
            path: BARD.dir.path().to_owned(),
            name: Some("bard".to_owned()),
            chat_format: None,
        };
        let (counts, counted) = watch::channel(RouterRecord::default());
        let (bans, seen) = watch::channel(BTreeSet::new());
        let (shared, banned) = SharedBans::new(seen);
        let options = RouterOptions {
            models: vec![model],
            shutdown_grace,
            limits,
            requests,
            gate,
            tls,
            log: None,
            tell: |_| {},
            counts: Some(counts),
            bans: Some(shared),
        };
        let listeners = Listeners { http, grpc, inside: None, admin: Some(admin) };
        let served = tokio::spawn(galerne_router::serve(options, view, listeners, async {
            let _ = asked.await;
        }));
        let [http, grpc, admin] = addresses;
        Self { fleet, http, grpc, admin, counts: counted, bans, banned, shutdown: Some(shutdown), served }
    }

    pub(crate) fn shut_down(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    pub(crate) async fn ended(self) -> Result<(), RouterError> {
        patiently(self.served).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        if path == "/metrics" {
            return self.operate("GET", path, "").await;
        }
        self.open(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await.rest().await
    }

    /// Asks the operator's port.
    pub(crate) async fn operate(&self, method: &str, path: &str, body: &str) -> Reply {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close");
        let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        open(&self.admin, &request).await.rest().await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.start(path, body).await.rest().await
    }

    /// Sends a request and does not wait for the answer.
    pub(crate) async fn start(&self, path: &str, body: &Value) -> Connection {
        self.post_raw(path, &body.to_string()).await
    }

    pub(crate) async fn post_raw(&self, path: &str, body: &str) -> Connection {
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}", body.len());
        self.open(&format!("{head}\r\n\r\n{body}")).await
    }

    pub(crate) async fn open(&self, request: &str) -> Connection {
        open(&self.http, request).await
    }

    pub(crate) async fn client(&self) -> GalerneClient<Channel> {
        GalerneClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.grpc)).unwrap().connect().await.unwrap()
    }
}

/// A gate that lets everybody in.
fn anybody() -> Arc<Gate> {
    Gate::open(GateOptions::default(), &[]).unwrap()
}

pub(crate) async fn open(address: &str, request: &str) -> Connection {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    Connection { stream, read: Vec::new() }
}

/// One HTTP/1.1 connection with one request on it.
pub(crate) struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads until a text has come.
    pub(crate) async fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.read).contains(text) {
            assert!(
                patiently(self.stream.read_buf(&mut self.read)).await.unwrap() > 0,
                "ended without {text:?}"
            );
        }
    }

    /// Reads to the end.
    pub(crate) async fn rest(mut self) -> Reply {
        patiently(self.stream.read_to_end(&mut self.read)).await.unwrap();
        Reply::parse(&String::from_utf8(self.read).unwrap())
    }

    /// Reads to the end, and tells all bytes; a reset is an end, too.
    pub(crate) async fn all(mut self) -> Vec<u8> {
        let _ = patiently(self.stream.read_to_end(&mut self.read)).await;
        self.read
    }
}

/// An HTTP response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    fn parse(raw: &str) -> Self {
        let (head, body) = raw.split_once("\r\n\r\n").unwrap();
        let head = head.to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.contains("transfer-encoding: chunked");
        Self { status, body: if chunked { unchunk(body) } else { body.to_owned() }, head }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The data of server-sent events, in order.
    pub(crate) fn events(&self) -> Vec<&str> {
        assert!(self.head.contains("content-type: text/event-stream"), "{self:?}");
        let events = self.body.split_terminator("\n\n");
        events.map(|event| event.strip_prefix("data: ").unwrap()).collect()
    }

    /// The events as JSON, which must end with `[DONE]`.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

fn unchunk(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    out
}

/// A group of two ranks that serves `bard` at `leader`.
pub(crate) fn group(name: &str, epoch: u64, leader: &str) -> (GroupId, Group) {
    let id = GroupId(name.to_owned());
    let card = BARD.card.clone();
    let member = |rank: usize| Member {
        id: RankId(format!("host/{name}/{rank}")),
        host: "host".to_owned(),
        address: leader.to_owned(),
        collective: "127.0.0.1:1".to_owned(),
        pid: 100 + rank as u32,
        shards: card.shards.of_rank(rank),
    };
    let members = vec![member(0), member(1)];
    let record = |(index, member): (usize, &Member)| {
        let record = RankRecord {
            id: member.id.clone(),
            group: id.clone(),
            host: member.host.clone(),
            index: index as u16,
            address: member.address.clone(),
            collective: member.collective.clone(),
            pid: member.pid,
            device: "cpu x1".to_owned(),
            build: "test".to_owned(),
            model: card.clone(),
            state: RankState::Ready,
            memory_bytes: 1 << 20,
            ranks_min: 1,
            left: Epoch(0),
            loss: None,
        };
        (member.id.clone(), record)
    };
    let ranks = members.iter().enumerate().map(record).collect();
    let health = Health {
        group: id.clone(),
        epoch: Epoch(epoch),
        leader: leader.to_owned(),
        model: card.clone(),
        kv_blocks: 64,
        sequences_max: 8,
        step_tokens_max: 64,
        draining: false,
    };
    let record = EpochRecord::new(id.clone(), card.shards, members, SECRET.into());
    (id, Group { ranks, epoch: Some((Epoch(epoch), record)), health: Some(health), drain: None, hold: None })
}

/// An address where nobody listens.
pub(crate) async fn deserted() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
}

pub(crate) async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("within patience")
}
