//! `galerne worker`: this host's ranks of one group. `galerne rank`: one of them, started by the worker.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use galerne_types::GroupId;
use galerne_worker::SupervisorOptions;

use crate::args::{self, ClusterTlsArgs, EngineArgs, EtcdArgs, ModelArgs, Place};
use crate::limits;

/// Runs this host's ranks of one group, each in a process of its own, and restarts those that die.
///
/// A group of N ranks over two hosts is two workers with the same --group and --tp N, each with its --ranks.
/// Ranks of one host meet in shared memory, ranks of different hosts over TCP: --bind takes the address under
/// which the other hosts reach this one.
#[derive(Args)]
pub(crate) struct WorkerCommand {
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// Ranks on this host; by default all N of the group.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    ranks: Option<u16>,
    /// Ranks beyond them that stand by on this host: one takes the place of a rank of the group that is lost.
    #[arg(long, default_value_t = 0, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(..=16))]
    spares: u16,
    /// Index of the first of them among the group's ranks on this host: for a second worker beside this one.
    #[arg(long, default_value_t = 0, value_name = "INDEX", value_parser = clap::value_parser!(u16).range(..=1024))]
    first_index: u16,
    /// How long the group may take until it is ready for the first time, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    start_timeout_s: u64,
    /// Once the group is drained, wait for a signal before ending: for those who start again what has ended.
    #[arg(long)]
    stay_when_drained: bool,
}

/// One rank process (started by `galerne worker` and `galerne up`).
#[derive(Args)]
pub(crate) struct RankCommand {
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// The rank's index among those of its host and group.
    #[arg(long, value_name = "INDEX")]
    index: u16,
}

#[derive(Args)]
struct PlaceArgs {
    /// The group that the ranks stand for.
    #[arg(long, default_value = "g0", value_name = "NAME", value_parser = args::name)]
    group: String,
    /// Name of this host, unique in the cluster: ranks of one host share memory. By default the machine's, or
    /// what --bind says if that is not loopback.
    #[arg(long, value_name = "NAME", value_parser = args::name)]
    host: Option<String>,
    /// Address of this host that routers and the group's other hosts reach.
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    bind: IpAddr,
    #[command(flatten)]
    tls: ClusterTlsArgs,
}

impl PlaceArgs {
    fn place<'a>(&self, etcd: &'a EtcdArgs, index: u16, ranks_on_host: u16) -> Place<'a> {
        Place {
            cluster: &etcd.cluster,
            etcd: &etcd.etcd,
            etcd_access: etcd.access.access(),
            cluster_tls: self.tls.files(),
            group: GroupId(self.group.clone()),
            host: self.host.clone().unwrap_or_else(|| args::host_name(self.bind)),
            index,
            bind: self.bind,
            ranks_on_host,
        }
    }
}

impl WorkerCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let ranks = self.ranks.unwrap_or(self.engine.tp);
        anyhow::ensure!(
            ranks <= self.engine.tp,
            "--ranks {ranks} is more than the group's --tp {}",
            self.engine.tp
        );
        let first = self.engine.rank(&self.model, self.place.place(&self.etcd, self.first_index, ranks));
        println!("{}", self.engine.cut(&self.model)?);
        println!(
            "{} of {} ranks of group {} and {} spare(s) on host {}",
            ranks, self.engine.tp, self.place.group, self.spares, first.host
        );
        let start_timeout = Duration::from_secs(self.start_timeout_s);
        let options = SupervisorOptions { first, ranks: ranks + self.spares, start_timeout };
        let shutdown = args::shutdown_on_signal()?;
        galerne_worker::supervise(options, shutdown.clone()).await?;
        if self.stay_when_drained {
            shutdown.cancelled().await;
        }
        Ok(())
    }
}

impl RankCommand {
    /// Which rank it is, among those of its cluster.
    pub(crate) fn name(&self) -> String {
        let place = self.place.place(&self.etcd, self.index, 1);
        format!("{}/{}/{}", place.group, place.host, place.index)
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        limits::raise_files();
        let options = self.engine.rank(&self.model, self.place.place(&self.etcd, self.index, 1));
        galerne_worker::run_rank(options, args::shutdown_on_signal()?).await?;
        Ok(())
    }
}
