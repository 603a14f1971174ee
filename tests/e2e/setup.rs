//! What the tests start: the binary, a real etcd, clusters; and where the models are.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_wire::v1::generate_request::Prompt;
use galerne_wire::v1::{FleetRequest, FleetResponse, GenerateRequest, Sampling, Token, TokenIds};
use tonic::transport::Channel;

use crate::process::{self, Process};

/// The release binary, beside this test's own executable.
pub(crate) fn galerne() -> Command {
    let test = std::env::current_exe().expect("this test's path");
    let binary = test.ancestors().nth(2).expect("target/release").join("galerne");
    assert!(binary.exists(), "{} is missing: run `make build` first", binary.display());
    let mut command = Command::new(binary);
    command.env("GALERNE_ADMIN", "127.0.0.1:0"); // the default port is one for all tests
    command
}

pub(crate) fn cache(member: &str) -> PathBuf {
    let path = root().join(".cache").join(member);
    assert!(path.exists(), "{} is missing: run `make test`, which fetches it", path.display());
    path
}

/// SmolLM2-135M-Instruct: 9 query heads, 3 KV heads.
pub(crate) fn demo_model() -> PathBuf {
    cache("models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Tokens that a query of bard-1m sees.
const BARD_WINDOW: usize = 64;

/// A small model that lives in this repository: 8 query heads, 4 KV heads.
pub(crate) fn bard() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bard-1m")
}

/// Python with the packages that `make test` fetches.
pub(crate) fn python(script: &str) -> Command {
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e").join(script));
    command.env("PYTHONPATH", cache("python"));
    command
}

/// A real etcd with its data in a temporary folder.
pub(crate) struct Etcd {
    pub(crate) endpoint: String,
    pub(crate) process: Process,
    _data: tempfile::TempDir,
}

impl Etcd {
    pub(crate) fn start() -> Self {
        Self::start_with(Command::new(cache("bin/etcd")), "127.0.0.1")
    }

    /// Starts etcd on `ip` by way of `command`, which ends in the program's path.
    pub(crate) fn start_with(command: Command, ip: &str) -> Self {
        Self::start_on(command, "http", ip)
    }

    /// Starts etcd by way of `command`, whose flags name certificates.
    pub(crate) fn start_under_tls(command: Command) -> Self {
        Self::start_on(command, "https", "127.0.0.1")
    }

    fn start_on(mut command: Command, scheme: &str, ip: &str) -> Self {
        let data = tempfile::tempdir().expect("a temporary folder");
        let (client, peer) =
            (format!("{scheme}://{ip}:{}", free_port()), format!("http://{ip}:{}", free_port()));
        command
            .args(["--name", "test", "--unsafe-no-fsync", "--log-level", "warn", "--data-dir"])
            .arg(data.path());
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("test={peer}")]);
        let process = Process::start(&mut command);
        Self { endpoint: client, process, _data: data }
    }

    pub(crate) fn program() -> PathBuf {
        cache("bin/etcd")
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound address").port()
}

/// `galerne up`, ready, on free ports.
pub(crate) struct Cluster {
    pub(crate) process: Process,
    pub(crate) http: String,
    pub(crate) grpc: String,
    /// Of the operator's port, with its scheme.
    pub(crate) admin: String,
}

impl Cluster {
    /// Starts `galerne up --model MODEL ARGUMENTS` and waits until it serves.
    pub(crate) fn up(model: &Path, arguments: &[&str]) -> Self {
        let mut command = galerne();
        command
            .args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--model"])
            .arg(model)
            .args(arguments);
        let process = Process::start(&mut command);
        let line = process.line_with("Ctrl-C ends everything");
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |word: &str| words[words.iter().position(|found| *found == word).expect("the word") + 1];
        let http = after("HTTP").trim_end_matches("/v1").to_owned();
        let grpc = after("gRPC").to_owned();
        let line = process.line_with("admin on ");
        let admin = line.split_once("admin on ").expect("an address").1.to_owned();
        Self { process, http, grpc, admin }
    }

    /// Greedy continuation of `prompt`, token ids only.
    pub(crate) fn greedy(&self, prompt: &[u32], count: u32) -> Result<Vec<u32>, tonic::Status> {
        greedy(&self.grpc, prompt, count)
    }

    pub(crate) fn fleet(&self) -> FleetResponse {
        fleet(&self.grpc).expect("a router that answers")
    }

    /// Pids of all rank processes, in order.
    pub(crate) fn rank_pids(&self) -> Vec<u32> {
        self.fleet().groups.iter().flat_map(|group| group.ranks.iter().map(|rank| rank.pid)).collect()
    }

    /// Waits until all groups are ready.
    pub(crate) fn until_ready(&self, groups: usize) -> FleetResponse {
        process::eventually("all groups ready", || {
            let fleet = self.fleet();
            (fleet.groups.iter().filter(|group| group.state == "ready").count() == groups).then_some(fleet)
        })
    }
}

/// Runs a future to its end.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(future)
}

pub(crate) async fn client(grpc: &str) -> GalerneClient<Channel> {
    GalerneClient::connect(format!("http://{grpc}")).await.expect("a router that answers")
}

pub(crate) fn fleet(grpc: &str) -> Result<FleetResponse, tonic::Status> {
    block_on(async { Ok(client(grpc).await.fleet(FleetRequest {}).await?.into_inner()) })
}

pub(crate) fn greedy(grpc: &str, prompt: &[u32], count: u32) -> Result<Vec<u32>, tonic::Status> {
    let tokens = block_on(async { collect(&mut client(grpc).await, request(prompt, count)).await })?;
    Ok(tokens.into_iter().map(|token| token.id).collect())
}

/// `count` tokens after `prompt`, greedy, past any end-of-sequence token.
pub(crate) fn request(prompt: &[u32], count: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Tokens(TokenIds { ids: prompt.to_vec() })),
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        max_tokens: Some(count),
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}

pub(crate) async fn collect(
    client: &mut GalerneClient<Channel>,
    request: GenerateRequest,
) -> Result<Vec<Token>, tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(delta) = stream.message().await? {
        tokens.extend(delta.tokens);
    }
    Ok(tokens)
}

/// The golden continuations of bard-1m that fit its window: prompt, 32 greedy tokens, how many of them are
/// comparable.
pub(crate) fn bard_golden() -> Vec<(Vec<u32>, Vec<u32>, usize)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bard-1m.json");
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).expect("the golden file")).expect("JSON");
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let full =
        golden["cases"].as_array().expect("cases").iter().filter(|case| case["sliding_window"].is_null());
    full.map(|case| {
        let gaps = case["top1_minus_top2"].as_array().expect("gaps");
        let close = gaps.iter().position(|gap| gap.as_f64().expect("a gap") < 0.01);
        (ids(&case["prompt_ids"]), ids(&case["greedy_ids"]), close.unwrap_or(gaps.len()))
    })
    .filter(|(prompt, greedy, _)| prompt.len() + greedy.len() <= BARD_WINDOW)
    .collect()
}
