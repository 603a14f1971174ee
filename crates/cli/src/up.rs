//! `galerne up`: a whole cluster on this machine.

use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use galerne_coord::{Coord, EtcdAccess, embedded};
use galerne_router::Listeners;
use galerne_telemetry::LogHandle;
use galerne_types::GroupId;
use galerne_wire::v1::{ChatMessage, Sampling};
use galerne_worker::{CoresShare, SupervisorOptions};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::args::{self, ClusterTlsArgs, EngineArgs, EtcdAccessArgs, ModelArgs, Place};
use crate::client::{self, Client};
use crate::router::FaceArgs;
use crate::{chat, fleet, status};

/// Tokens of the answer to --prompt.
const PROMPT_ANSWER_TOKENS_MAX: u32 = 256;

/// Runs everything on this machine: a store for coordination, a router, and groups of rank processes.
///
/// Waits until all groups are ready, then serves until Ctrl-C, which ends every process it started.
#[derive(Args)]
pub(crate) struct Up {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    faces: FaceArgs,
    /// Groups: replicas of the model, each of N ranks.
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=64))]
    replicas: u16,
    /// Ranks of each group beyond its N that stand by: one takes the place of a rank that is lost.
    #[arg(long, default_value_t = 0, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(..=16))]
    spares: u16,
    /// etcd's endpoints, separated by commas; without it, a store inside this process.
    #[arg(long, value_name = "ENDPOINTS", value_delimiter = ',')]
    etcd: Vec<String>,
    #[command(flatten)]
    etcd_access: EtcdAccessArgs,
    #[command(flatten)]
    tls: ClusterTlsArgs,
    /// Name of the cluster: several can share one etcd.
    #[arg(long, default_value = "default", value_name = "NAME", value_parser = args::name)]
    cluster: String,
    /// Ask this once everything is ready, and stream the answer to the terminal.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// How long the groups may take until they are ready, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    start_timeout_s: u64,
}

/// Everything that `up` runs; the first part that ends on its own ends all.
type Parts = JoinSet<anyhow::Result<()>>;

impl Up {
    pub(crate) async fn run(self, log: LogHandle) -> anyhow::Result<()> {
        let shutdown = args::shutdown_on_signal()?;
        let cut = self.engine.cut(&self.model)?;
        let tls = self.faces.tls(&self.tls)?;
        let (listeners, gate) = self.faces.open().await?;
        let addresses = [listeners.http.local_addr()?, listeners.grpc.local_addr()?];
        let (channel, inside) = galerne_router::inside();
        let listeners = Listeners { inside: Some(inside), ..listeners };

        // The store ends with this process: the ranks give up their leases before that.
        let mut store = Parts::new();
        let (coord, etcd) = self.coordinate(&mut store).await?;
        let mut parts = Parts::new();
        for replica in 0..self.replicas {
            let options = self.supervisor(&etcd, replica);
            let shutdown = shutdown.clone();
            parts.spawn(async move {
                let group = options.first.group.clone();
                galerne_worker::supervise(options, shutdown.clone()).await?;
                if !shutdown.is_cancelled() {
                    println!("group {group} is drained");
                    shutdown.cancelled().await; // the others go on
                }
                Ok(())
            });
        }
        let options = crate::router::options(&self.model, &self.faces, gate, tls, log);
        let fleet = coord.watch_fleet();
        parts.spawn({
            let (fleet, shutdown) = (fleet.clone(), shutdown.clone().cancelled_owned());
            async move { Ok(galerne_router::serve(options, fleet, listeners, shutdown).await?) }
        });
        println!("{cut}, {} group(s)", self.replicas);

        let served = tokio::select! {
            ended = first_to_end(&mut parts) => ended,
            ended = first_to_end(&mut store), if !store.is_empty() => ended,
            result = self.serve(&coord, addresses, client::over(channel), &shutdown) => result,
        };
        shutdown.cancel();
        served.and(all_to_end(&mut parts).await)
    }

    /// Connects to etcd, or starts the embedded store and connects to that.
    async fn coordinate(&self, store: &mut Parts) -> anyhow::Result<(Coord, Vec<String>)> {
        let mut endpoints = self.etcd.clone();
        let access = self.etcd_access.access();
        if endpoints.is_empty() {
            let open = access == EtcdAccess::default();
            anyhow::ensure!(
                open,
                "--etcd-ca and --etcd-user are for an etcd: name its endpoints with --etcd"
            );
            let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen on loopback")?;
            let address = listener.local_addr()?;
            let connections = galerne_tls::incoming(listener, None);
            store.spawn(async move { Ok(embedded::serve_connections(connections, pending()).await?) });
            println!(
                "coordination: embedded store on {address}, in memory, for this machine only (--etcd takes a real one)"
            );
            endpoints.push(format!("http://{address}"));
        } else {
            println!("coordination: etcd on {}", endpoints.join(", "));
        }
        let coord = args::connect(&endpoints, &access, &self.cluster).await?;
        Ok((coord, endpoints))
    }

    fn supervisor(&self, etcd: &[String], replica: u16) -> SupervisorOptions {
        let place = Place {
            cluster: &self.cluster,
            etcd,
            etcd_access: self.etcd_access.access(),
            cluster_tls: self.tls.files(),
            group: GroupId(format!("g{replica}")),
            host: args::host_name(Ipv4Addr::LOCALHOST.into()),
            index: 0,
            bind: Ipv4Addr::LOCALHOST.into(),
            ranks_on_host: self.engine.tp.saturating_mul(self.replicas),
        };
        let mut first = self.engine.rank(&self.model, place);
        let ranks = self.engine.tp + self.spares;
        first.processor.share = CoresShare::new(replica, self.replicas).unwrap_or_default();
        first.device = first.device.behind(ranks.saturating_mul(replica));
        let start_timeout = Duration::from_secs(self.start_timeout_s);
        SupervisorOptions { first, ranks, start_timeout }
    }

    /// Waits for the groups, shows an answer and the fleet, then serves until the end.
    async fn serve(
        &self,
        coord: &Coord,
        [http, grpc]: [SocketAddr; 2],
        mut router: Client,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        let started = std::time::Instant::now();
        let mut groups = coord.watch_fleet();
        tokio::select! {
            () = fleet::until_ready(&mut groups, self.replicas.into()) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        println!("ready after {:.1} s\n", started.elapsed().as_secs_f64());
        if let Some(prompt) = &self.prompt {
            println!("> {prompt}");
            let messages =
                vec![ChatMessage { role: "user".to_owned(), content: prompt.clone(), ..Default::default() }];
            let greedy = Sampling { temperature: Some(0.0), ..Sampling::default() };
            tokio::select! {
                answer = chat::ask(&mut router, "", messages, greedy, PROMPT_ANSWER_TOKENS_MAX) => { answer?; }
                () = shutdown.cancelled() => return Ok(()),
            }
            println!();
        }
        println!("{}\n", status::table(&mut router).await?);
        let (scheme, flags) = (self.faces.scheme(), self.faces.curl_flags());
        println!("HTTP  {scheme}://{http}/v1   gRPC  {grpc}   Ctrl-C ends everything. Try:");
        println!(
            "  curl{flags} {scheme}://{http}/v1/chat/completions -H 'content-type: application/json' \
             -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hello!\"}}],\"max_tokens\":64}}'"
        );
        shutdown.cancelled().await;
        println!("ending");
        Ok(())
    }
}

async fn first_to_end(parts: &mut Parts) -> anyhow::Result<()> {
    match parts.join_next().await {
        Some(ended) => ended.context("a part of the cluster panicked")?,
        None => Ok(()),
    }
}

async fn all_to_end(parts: &mut Parts) -> anyhow::Result<()> {
    let mut result = Ok(());
    while let Some(ended) = parts.join_next().await {
        result = result.and(ended.context("a part of the cluster panicked").and_then(|ended| ended));
    }
    result
}
