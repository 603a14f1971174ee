//! What a worker is told to do. The command line parses into these once; ranks get theirs through [`rank_args`].

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use galerne_coord::{EtcdAccess, EtcdLogin, EtcdTls};
use galerne_sched::Cost;
use galerne_tls::ClusterFiles;
use galerne_types::{Compute, GroupId, KvDtype, Quantize, RankId};

pub use self::processor::{CoresShare, Processor};

mod processor;

/// How much KV memory a rank gets. All ranks of a group must be told the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvSize {
    /// 1 GiB, or more where one full context needs more, or less where all sequences together can use less.
    #[default]
    Auto,
    /// At most this many bytes at each rank.
    Bytes(u64),
    /// Exactly this many blocks.
    Blocks(u32),
}

/// What a rank computes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// This machine's processor.
    #[default]
    Cpu,
    /// The GPU of this index among those that the driver shows; of a supervisor's ranks the first one's, and one more for
    /// each that follows.
    Cuda(u16),
}

impl Device {
    /// That of the rank that stands so many behind this one on its host.
    pub fn behind(self, ranks: u16) -> Self {
        match self {
            Self::Cpu => Self::Cpu,
            Self::Cuda(first) => Self::Cuda(first.saturating_add(ranks)),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|index| index.parse().ok()),
        };
        index.map(Self::Cuda).ok_or_else(|| {
            format!("{text:?} is no device: cpu, cuda, or cuda:K to begin with GPU K of those that the driver shows")
        })
    }
}

/// Options of one rank process.
#[derive(Clone, Debug, PartialEq)]
pub struct RankOptions {
    /// Checkpoint directory or GGUF file.
    pub model: PathBuf,
    /// Name to serve the model under, instead of its file's.
    pub model_name: Option<String>,
    /// Cluster: the prefix of all keys in etcd.
    pub cluster: String,
    /// The group that the rank stands for.
    pub group: GroupId,
    /// N: ranks in the group.
    pub world_size: usize,
    /// S, instead of the smallest that suits the model and N.
    pub virtual_shards: Option<usize>,
    /// What weights that are not quantized become at load, if not what they are.
    pub quantize: Option<Quantize>,
    /// How products are computed, instead of the way that suits the weights.
    pub compute: Option<Compute>,
    /// Whether a GPU's products of many tokens may depend on what runs beside them, if that is quicker.
    pub fast: bool,
    /// How keys and values are kept.
    pub kv_dtype: KvDtype,
    /// What computes.
    pub device: Device,
    /// How much of a GPU's memory all of this may take, as a share; KV memory gets what weights and workspace leave of it.
    pub gpu_memory_utilization: f64,
    /// Name of this machine: ranks of one host share memory.
    pub host: String,
    /// The rank's index among those of its host and group.
    pub index: u16,
    /// Address to listen on; routers and other hosts reach the rank there.
    pub bind: IpAddr,
    /// etcd's endpoints.
    pub etcd: Vec<String>,
    /// How etcd is spoken to.
    pub etcd_access: EtcdAccess,
    /// Certificates for the connections between routers, leaders and ranks; without them these are in the open.
    pub cluster_tls: Option<ClusterFiles>,
    /// Compute threads.
    pub threads: usize,
    /// What they are compiled for, and where they run.
    pub processor: Processor,
    /// KV memory.
    pub kv: KvSize,
    /// Sequences that run at once, at most.
    pub sequences_max: u32,
    /// Tokens in one step, at most.
    pub step_tokens_max: u32,
    /// Requests that wait at the group before it refuses more.
    pub waiting_requests_max: u32,
    /// KV blocks are kept for prompts to come.
    pub prefix_cache: bool,
    /// Answers are run ahead where they seem to repeat something.
    pub speculation: bool,
    /// Milliseconds between two tokens of an answer, as far as other prompts make them longer.
    pub itl_target_ms: Option<u32>,
    /// Run no model: take as long as this law says, and draw tokens by lot.
    pub rehearse: Option<Cost>,
}

impl RankOptions {
    /// The rank's place.
    pub fn id(&self) -> RankId {
        RankId(format!("{}/{}", self.host, self.index))
    }
}

/// Options of a host's supervisor.
#[derive(Clone, Debug, PartialEq)]
pub struct SupervisorOptions {
    /// Options of the first rank on this host; the others differ in their index only, which counts up.
    pub first: RankOptions,
    /// Ranks to run on this host.
    pub ranks: u16,
    /// How long the group may take until it is ready for the first time.
    pub start_timeout: Duration,
}

impl SupervisorOptions {
    /// Indices of this host's ranks.
    pub fn indices(&self) -> std::ops::Range<u16> {
        self.first.index..self.first.index.saturating_add(self.ranks)
    }
}

/// The command line, behind the binary's name, that starts this host's rank `index`.
pub fn rank_args(options: &SupervisorOptions, index: u16) -> Vec<OsString> {
    let RankOptions {
        model,
        model_name,
        cluster,
        group,
        world_size,
        virtual_shards,
        quantize,
        compute,
        fast,
        kv_dtype,
        device,
        gpu_memory_utilization,
        host,
        index: first,
        bind,
        etcd,
        etcd_access,
        cluster_tls,
        threads,
        processor,
        kv,
        sequences_max,
        step_tokens_max,
        waiting_requests_max,
        prefix_cache,
        speculation,
        itl_target_ms,
        rehearse,
    } = &options.first;
    let mut args = vec![OsString::from("rank")];
    let mut flag = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
    flag("--model", model.into());
    if let Some(name) = model_name {
        flag("--model-name", name.into());
    }
    flag("--cluster", cluster.into());
    flag("--group", group.0.clone().into());
    flag("--tp", world_size.to_string().into());
    numerics_args(*virtual_shards, *quantize, *compute, *kv_dtype, &mut flag);
    flag("--device", device.behind(index - first).to_string().into());
    flag("--gpu-memory-utilization", gpu_memory_utilization.to_string().into());
    flag("--host", host.into());
    flag("--index", index.to_string().into());
    flag("--bind", bind.to_string().into());
    flag("--etcd", etcd.join(",").into());
    access_args(etcd_access, cluster_tls.as_ref(), &mut flag);
    flag("--threads", threads.to_string().into());
    processor.args(&mut flag);
    match kv {
        KvSize::Auto => {}
        KvSize::Bytes(bytes) => flag("--kv-memory", bytes.to_string().into()),
        KvSize::Blocks(blocks) => flag("--kv-blocks", blocks.to_string().into()),
    }
    flag("--sequences-max", sequences_max.to_string().into());
    flag("--step-tokens-max", step_tokens_max.to_string().into());
    flag("--waiting-requests-max", waiting_requests_max.to_string().into());
    if let Some(ms) = itl_target_ms {
        flag("--itl-target-ms", ms.to_string().into());
    }
    if let Some(cost) = rehearse {
        flag("--rehearse", cost.to_string().into());
    }
    let switches =
        [("--fast", *fast), ("--no-prefix-cache", !prefix_cache), ("--no-speculation", !speculation)];
    args.extend(switches.into_iter().filter(|(_, on)| *on).map(|(name, _)| OsString::from(name)));
    args
}

/// What the numbers depend on.
fn numerics_args(
    virtual_shards: Option<usize>,
    quantize: Option<Quantize>,
    compute: Option<Compute>,
    kv_dtype: KvDtype,
    flag: &mut impl FnMut(&str, OsString),
) {
    if let Some(count) = virtual_shards {
        flag("--virtual-shards", count.to_string().into());
    }
    if let Some(quantize) = quantize {
        flag("--quantize", quantize.to_string().into());
    }
    if let Some(compute) = compute {
        flag("--compute", compute.to_string().into());
    }
    flag("--kv-dtype", kv_dtype.to_string().into());
}

/// How the rank is let in: at etcd, and by the other ranks.
fn access_args(
    EtcdAccess { tls, login }: &EtcdAccess,
    cluster_tls: Option<&ClusterFiles>,
    flag: &mut impl FnMut(&str, OsString),
) {
    if let Some(EtcdTls { ca, identity, name }) = tls {
        flag("--etcd-ca", ca.into());
        if let Some((cert, key)) = identity {
            flag("--etcd-cert", cert.into());
            flag("--etcd-key", key.into());
        }
        if let Some(name) = name {
            flag("--etcd-tls-name", name.into());
        }
    }
    if let Some(EtcdLogin { user, password_file }) = login {
        flag("--etcd-user", user.into());
        flag("--etcd-password-file", password_file.into());
    }
    if let Some(ClusterFiles { ca, cert, key }) = cluster_tls {
        flag("--cluster-ca", ca.into());
        flag("--cluster-cert", cert.into());
        flag("--cluster-key", key.into());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn options() -> SupervisorOptions {
        SupervisorOptions {
            first: RankOptions {
                model: "/models/tiny".into(),
                model_name: None,
                cluster: "c".into(),
                group: GroupId("g".into()),
                world_size: 2,
                virtual_shards: None,
                quantize: None,
                compute: None,
                fast: false,
                kv_dtype: KvDtype::F32,
                device: Device::Cpu,
                gpu_memory_utilization: 0.9,
                host: "h".into(),
                index: 0,
                bind: "127.0.0.1".parse().unwrap(),
                etcd: vec!["a:1".into(), "b:2".into()],
                etcd_access: EtcdAccess::default(),
                cluster_tls: None,
                threads: 3,
                processor: Processor::default(),
                kv: KvSize::Auto,
                sequences_max: 64,
                step_tokens_max: 256,
                waiting_requests_max: 1024,
                prefix_cache: true,
                speculation: true,
                itl_target_ms: None,
                rehearse: None,
            },
            ranks: 2,
            start_timeout: Duration::from_secs(60),
        }
    }

    #[test]
    fn a_ranks_command_line() {
        let args = rank_args(&options(), 1);
        let line: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(
            line.join(" "),
            "rank --model /models/tiny --cluster c --group g --tp 2 --kv-dtype f32 --device cpu --gpu-memory-utilization 0.9 \
             --host h --index 1 \
             --bind 127.0.0.1 --etcd a:1,b:2 --threads 3 --sequences-max 64 --step-tokens-max 256 --waiting-requests-max 1024"
        );
    }

    #[test]
    fn what_was_chosen_is_passed_on() {
        let mut options = options();
        options.first.model_name = Some("m".into());
        options.first.virtual_shards = Some(8);
        options.first.quantize = Some(Quantize::Q4_0);
        options.first.compute = Some(Compute::F32);
        options.first.fast = true;
        options.first.kv_dtype = KvDtype::Int8;
        options.first.kv = KvSize::Blocks(9);
        options.first.prefix_cache = false;
        options.first.speculation = false;
        options.first.itl_target_ms = Some(30);
        options.first.device = Device::Cuda(2);
        options.first.processor = Processor {
            isa: Some("portable".parse().unwrap()),
            cores: Some("0-3,8".parse().unwrap()),
            share: CoresShare::new(1, 2).unwrap(),
        };
        let tls = EtcdTls {
            ca: "e.ca".into(),
            identity: Some(("e.pem".into(), "e.key".into())),
            name: Some("e".into()),
        };
        let login = EtcdLogin { user: "u".into(), password_file: "e.pw".into() };
        options.first.etcd_access = EtcdAccess { tls: Some(tls), login: Some(login) };
        options.first.cluster_tls =
            Some(ClusterFiles { ca: "c.ca".into(), cert: "c.pem".into(), key: "c.key".into() });
        let files = [
            ["--etcd-ca", "e.ca"],
            ["--etcd-cert", "e.pem"],
            ["--etcd-key", "e.key"],
            ["--etcd-tls-name", "e"],
            ["--etcd-user", "u"],
            ["--etcd-password-file", "e.pw"],
            ["--cluster-ca", "c.ca"],
            ["--cluster-cert", "c.pem"],
            ["--cluster-key", "c.key"],
        ];
        let args = rank_args(&options, 0);
        for pair in files {
            assert!(args.windows(2).any(|window| window == pair), "{pair:?} in {args:?}");
        }
        let others = [
            ["--model-name", "m"],
            ["--virtual-shards", "8"],
            ["--quantize", "q4_0"],
            ["--compute", "f32"],
            ["--kv-dtype", "int8"],
            ["--kv-blocks", "9"],
            ["--itl-target-ms", "30"],
            ["--index", "0"],
            ["--device", "cuda:2"],
            ["--isa", "portable"],
            ["--cores", "0-3,8"],
            ["--cores-share", "1/2"],
        ];
        for pair in others {
            assert!(args.windows(2).any(|window| window == pair), "{pair:?} in {args:?}");
        }
        for flag in ["--no-prefix-cache", "--no-speculation", "--fast"] {
            assert!(args.contains(&flag.into()), "{flag} in {args:?}");
        }
        let second = rank_args(&options, 1);
        assert!(second.windows(2).any(|window| window == ["--device", "cuda:3"]), "{second:?}");
        assert!("gpu".parse::<Device>().unwrap_err().contains("is no device"));
    }
}
