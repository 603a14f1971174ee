//! Flags that several commands share.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use galerne_checkpoint::Checkpoint;
use galerne_coord::{Coord, CoordError, EtcdAccess, EtcdLogin, EtcdTls};
use galerne_model::{CpuList, Isa};
use galerne_tls::ClusterFiles;
use galerne_types::limits::{WAITING_REQUESTS_MAX, WORLD_SIZE_MAX};
use galerne_types::{Compute, GroupId, KvDtype, Quantize, Shards};
use galerne_worker::{CoresShare, Cost, Device, KvSize, Processor, RankOptions};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How long etcd may take to answer at start.
const ETCD_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Which etcd, and which cluster in it.
#[derive(Args, Clone)]
pub(crate) struct EtcdArgs {
    /// etcd's endpoints, separated by commas, e.g. `http://10.0.0.1:2379`.
    #[arg(
        long,
        value_name = "ENDPOINTS",
        value_delimiter = ',',
        required = true,
        env = "GALERNE_ETCD_ENDPOINTS"
    )]
    pub(crate) etcd: Vec<String>,
    /// Name of the cluster: several can share one etcd.
    #[arg(long, default_value = "default", value_name = "NAME", value_parser = name)]
    pub(crate) cluster: String,
    #[command(flatten)]
    pub(crate) access: EtcdAccessArgs,
}

/// How etcd is spoken to.
#[derive(Args, Clone)]
pub(crate) struct EtcdAccessArgs {
    /// Authority of etcd's members (PEM): speak TLS with them.
    #[arg(long, value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd (PEM).
    #[arg(long, value_name = "FILE", requires_all = ["etcd_ca", "etcd_key"])]
    etcd_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// Name that the certificates of etcd's members are made for, where it is not the host of their endpoints.
    #[arg(long, value_name = "NAME", requires = "etcd_ca")]
    etcd_tls_name: Option<String>,
    /// User of etcd.
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    etcd_user: Option<String>,
    /// File with the user's password.
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,
}

impl EtcdAccessArgs {
    pub(crate) fn access(&self) -> EtcdAccess {
        let identity = self.etcd_cert.clone().zip(self.etcd_key.clone());
        let login = self.etcd_user.clone().zip(self.etcd_password_file.clone());
        EtcdAccess {
            tls: self.etcd_ca.clone().map(|ca| EtcdTls { ca, identity, name: self.etcd_tls_name.clone() }),
            login: login.map(|(user, password_file)| EtcdLogin { user, password_file }),
        }
    }
}

/// Certificates of the cluster's own.
#[derive(Args, Clone)]
pub(crate) struct ClusterTlsArgs {
    /// The cluster's authority (PEM): routers, leaders and ranks speak mutual TLS, and believe those whose
    /// certificates it has made for the name `galerne`.
    #[arg(long, value_name = "FILE", requires_all = ["cluster_cert", "cluster_key"])]
    cluster_ca: Option<PathBuf>,
    /// Certificate to show within the cluster (PEM).
    #[arg(long, value_name = "FILE", requires = "cluster_ca")]
    cluster_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", requires = "cluster_ca")]
    cluster_key: Option<PathBuf>,
}

impl ClusterTlsArgs {
    pub(crate) fn files(&self) -> Option<ClusterFiles> {
        let Self { cluster_ca, cluster_cert, cluster_key } = self.clone();
        Some(ClusterFiles { ca: cluster_ca?, cert: cluster_cert?, key: cluster_key? })
    }
}

/// Connects to etcd or says in a sentence why not.
pub(crate) async fn connect(
    endpoints: &[String],
    access: &EtcdAccess,
    cluster: &str,
) -> anyhow::Result<Coord> {
    let connected = Coord::connect_as(access, endpoints, cluster, ETCD_CONNECT_TIMEOUT).await;
    connected.map_err(|error| match &error {
        CoordError::Unreachable { reason, .. } if !reason.contains("--etcd") => {
            anyhow::anyhow!("{error}: start etcd there, or name its endpoints with --etcd")
        }
        _ => error.into(), // it says itself what to do
    })
}

/// What to serve.
#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// Checkpoint: a folder (Hugging Face or Mistral safetensors) or a GGUF file.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: PathBuf,
    /// Name that clients ask for; by default the folder's name, or the file's without its ending.
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) model_name: Option<String>,
}

/// How a group is cut and what each of its ranks may use.
#[derive(Args, Clone)]
pub(crate) struct EngineArgs {
    /// Tensor parallelism: ranks in a group, each a process.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=WORLD_SIZE_MAX as i64))]
    pub(crate) tp: u16,
    /// Virtual shards: into how many parts the model is cut (part of the numerics); by default the
    /// smallest multiple of N that gives every KV head a shard of its own.
    #[arg(long, value_name = "S")]
    pub(crate) virtual_shards: Option<usize>,
    /// Quantize matrices that the checkpoint holds in F32, F16 or BF16 as they are loaded (part of the numerics, the same on
    /// all hosts of a group): `q8_0`; or `q4_0`, but for embedding and head, which become Q8_0. On GPUs `fp8`: matrices of the
    /// layers become e4m3, whatever they were.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) quantize: Option<Quantize>,
    /// How products are computed (part of the numerics, the same on all hosts of a group): `f32`, the reference; `int8`,
    /// quantized weights by activations rounded to bytes, and `bf16`, weights in BF16 by activations rounded like them, which
    /// are faster and less exact; `auto`, for models of half a billion weights and more `int8` if they are quantized, `bf16`
    /// if they are in BF16 and the CPU multiplies such numbers, else `f32`.
    #[arg(long, default_value = "auto", value_name = "HOW", value_parser = compute)]
    pub(crate) compute: ComputeChoice,
    /// On GPUs, let cuBLASLt make products of many tokens (part of the numerics, the same on all hosts of a group): prompts may run
    /// quicker, and tokens then depend on what runs beside them, on how a prompt is cut, and on N.
    #[arg(long)]
    pub(crate) fast: bool,
    /// How keys and values are kept (part of the numerics, the same on all hosts of a group): `f32`, as they were computed;
    /// `bf16`, half of that memory; `int8`, bytes with a scale for each KV head and token: a quarter of it, and less exact. On
    /// GPUs `bf16` or `fp8`, a little more than a byte a number.
    #[arg(long, default_value_t = KvDtype::Bf16, value_name = "HOW")]
    pub(crate) kv_dtype: KvDtype,
    /// What computes: `cpu`, or `cuda`: a GPU a rank, the first ones of those that the driver shows; `cuda:K` begins with GPU K.
    #[arg(long, default_value_t = Device::Cpu, value_name = "DEVICE")]
    pub(crate) device: Device,
    /// Share of each GPU's memory that may be used; keys and values get what weights and workspace leave of it.
    #[arg(long, default_value_t = 0.9, value_name = "SHARE")]
    pub(crate) gpu_memory_utilization: f64,
    /// Compute threads of each rank; by default the machine's cores divided by its ranks.
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// CPUs that the ranks of this host have for themselves, such as `0-3,8`: every compute thread stays on one of them. By
    /// default all that the process may run on; threads stay on one each if these are not all of the machine's, and in one
    /// memory node each where there are several.
    #[arg(long, value_name = "CPUS")]
    pub(crate) cores: Option<CpuList>,
    /// Which of how many equal shares of them the group has.
    #[arg(long, value_name = "PART/PARTS", default_value_t = CoresShare::default(), hide = true)]
    pub(crate) cores_share: CoresShare,
    /// Instruction set of the CPU kernels, by default the best that the CPU has (`portable`, `avx2`, `avx512`, `avx512-vnni`,
    /// `avx512-bf16`, `neon`, `neon-dot`): it changes the speed and what --compute auto takes, and no result.
    #[arg(long, value_name = "NAME")]
    pub(crate) isa: Option<Isa>,
    /// KV memory of each rank in bytes; the same on all hosts of a group.
    #[arg(long, value_name = "BYTES", conflicts_with = "kv_blocks")]
    pub(crate) kv_memory: Option<u64>,
    /// KV memory of each rank in blocks of 32 tokens.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) kv_blocks: Option<u32>,
    /// Sequences that run at once in a group, at most; by default 64, on GPUs 256.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) sequences_max: Option<u32>,
    /// Tokens in one forward pass, at most: long prompts are cut into chunks of this. By default 256, on GPUs 2048.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub(crate) step_tokens_max: Option<u32>,
    /// Requests that wait at a group before it refuses more: one more is answered 429.
    #[arg(long, default_value_t = WAITING_REQUESTS_MAX, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) waiting_requests_max: u32,
    /// Milliseconds between two tokens that answers are to keep while long prompts come in: steps take only so many of
    /// their tokens as leave it. By default steps are as full as they can be.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub(crate) itl_target_ms: Option<u32>,
    /// Compute every prompt whole, and keep nothing of one for those that begin alike.
    #[arg(long)]
    pub(crate) no_prefix_cache: bool,
    /// Run no answer ahead. By default one that repeats what it has read or said is, while few answers are under way: it gets
    /// the same tokens, sooner.
    #[arg(long)]
    pub(crate) no_speculation: bool,
    /// Run no model: each step takes as long as this law says, and tokens are drawn by lot. For trying routers, groups
    /// and operators at scale; e.g. `step_ns=5000000,token_ns=20000`.
    #[arg(long, value_name = "LAW")]
    pub(crate) rehearse: Option<Cost>,
}

/// Where a rank stands; with [`ModelArgs`] and [`EngineArgs`], everything it is told.
pub(crate) struct Place<'a> {
    pub(crate) cluster: &'a str,
    pub(crate) etcd: &'a [String],
    pub(crate) etcd_access: EtcdAccess,
    pub(crate) cluster_tls: Option<ClusterFiles>,
    pub(crate) group: GroupId,
    pub(crate) host: String,
    pub(crate) index: u16,
    pub(crate) bind: IpAddr,
    /// Ranks on this machine: they share its cores.
    pub(crate) ranks_on_host: u16,
}

impl EngineArgs {
    /// Opens the model, so that a bad one is refused before anything is started, and tells how it is cut.
    pub(crate) fn cut(&self, model: &ModelArgs) -> anyhow::Result<String> {
        let mut checkpoint = Checkpoint::open(&model.model)?;
        let mut quantized = String::new();
        if let Some(quantize) = self.quantize {
            checkpoint = checkpoint.quantized(quantize);
            quantized = format!(", quantized to {quantize}");
            if !checkpoint.quantizes() {
                eprintln!(
                    "--quantize {quantize} changes nothing: no matrix of this checkpoint is in F32, F16 or BF16"
                );
                quantized.clear();
            }
        }
        let config = checkpoint.config();
        let shards = Shards::for_model(config.kv_heads, self.tp.into(), self.virtual_shards)?;
        Ok(format!(
            "{}{quantized}: {} layers, {} heads, {} KV heads; cut into S = {} virtual shards over N = {} ranks a group; \
             products in {}, keys and values in {}",
            model.model_name.as_deref().unwrap_or(checkpoint.name()),
            config.layers,
            config.heads,
            config.kv_heads,
            shards.virtual_shards(),
            shards.world_size(),
            self.products(&checkpoint),
            self.kv_dtype,
        ))
    }

    /// How products are computed.
    fn products(&self, checkpoint: &Checkpoint) -> String {
        match self.device {
            Device::Cpu => {
                let suits = || galerne_model::compute_for(checkpoint, self.processor().isa());
                self.compute.0.unwrap_or_else(suits).to_string()
            }
            Device::Cuda(_) if self.fast => "bf16 on GPUs, fast".to_owned(),
            Device::Cuda(_) => "bf16 on GPUs".to_owned(),
        }
    }

    fn processor(&self) -> Processor {
        Processor { isa: self.isa, cores: self.cores.clone(), share: self.cores_share }
    }

    /// The options of one rank.
    pub(crate) fn rank(&self, model: &ModelArgs, place: Place<'_>) -> RankOptions {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let cores = self.cores.as_ref().map_or_else(available, CpuList::count);
        let share = (cores / usize::from(place.ranks_on_host.max(1))).max(1);
        let kv = match (self.kv_memory, self.kv_blocks) {
            (Some(bytes), _) => KvSize::Bytes(bytes),
            (None, Some(blocks)) => KvSize::Blocks(blocks),
            (None, None) => KvSize::Auto,
        };
        let (sequences, tokens) = if self.device == Device::Cpu { (64, 256) } else { (256, 2048) };
        RankOptions {
            model: model.model.clone(),
            model_name: model.model_name.clone(),
            cluster: place.cluster.to_owned(),
            group: place.group,
            world_size: self.tp.into(),
            virtual_shards: self.virtual_shards,
            quantize: self.quantize,
            compute: self.compute.0,
            fast: self.fast,
            kv_dtype: self.kv_dtype,
            device: self.device,
            gpu_memory_utilization: self.gpu_memory_utilization,
            host: place.host,
            index: place.index,
            bind: place.bind,
            etcd: place.etcd.to_vec(),
            etcd_access: place.etcd_access,
            cluster_tls: place.cluster_tls,
            threads: self.threads.map_or(share, usize::from),
            processor: self.processor(),
            kv,
            sequences_max: self.sequences_max.unwrap_or(sequences),
            step_tokens_max: self.step_tokens_max.unwrap_or(tokens),
            waiting_requests_max: self.waiting_requests_max,
            prefix_cache: !self.no_prefix_cache,
            speculation: !self.no_speculation,
            itl_target_ms: self.itl_target_ms,
            rehearse: self.rehearse,
        }
    }
}

/// Where to listen.
pub(crate) fn address(text: &str) -> Result<String, String> {
    let parts = text.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    parts.map(|_| text.to_owned()).ok_or_else(|| "an address is HOST:PORT, such as 127.0.0.1:8000".to_owned())
}

/// What --compute says; `None` for `auto`.
#[derive(Clone, Copy)]
pub(crate) struct ComputeChoice(Option<Compute>);

fn compute(text: &str) -> Result<ComputeChoice, String> {
    Ok(ComputeChoice(if text == "auto" { None } else { Some(text.parse()?) }))
}

/// A name that can stand in a key of etcd.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !text.is_empty() && text.len() <= 64 && text.chars().all(ok) {
        Ok(text.to_owned())
    } else {
        Err("a name has 1 to 64 letters, digits, dots, dashes and underscores".to_owned())
    }
}

/// The name of a host whose ranks listen on `bind`: the machine's, or the address if others reach it.
pub(crate) fn host_name(bind: IpAddr) -> String {
    if !bind.is_loopback() {
        return bind.to_string().replace(':', "-");
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    self::name(name.trim()).unwrap_or_else(|_| "localhost".to_owned())
}

/// Listens on `address` (port 0: a free one) or says what stands in the way.
pub(crate) async fn listen(address: &str, flag: &str) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| anyhow::anyhow!("cannot listen on {flag} {address}: {error}"))
}

/// A token that is cancelled by Ctrl-C or SIGTERM.
pub(crate) fn shutdown_on_signal() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let cancelled = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        cancelled.cancel();
    });
    Ok(token)
}
