//! `galerne status`: the fleet as a router sees it, or clusters as Kubernetes does.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use galerne_operator::api::GalerneCluster;
use galerne_wire::v1::{FleetRequest, FleetResponse, PastEpoch};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::{self, Client, ClientArgs};
use crate::{fleet, kube};

/// Shows groups and ranks: state, epoch, process, shards, memory.
///
/// With --kube: GalerneClusters and their groups, and what is amiss.
#[derive(Args)]
pub(crate) struct Status {
    #[command(flatten)]
    router: ClientArgs,
    /// Show the GalerneClusters of the Kubernetes cluster that KUBECONFIG names, or that this runs in, in place of a router's fleet.
    #[arg(long)]
    kube: bool,
    /// With --kube: those of one namespace, in place of all.
    #[arg(long, value_name = "NAMESPACE", requires = "kube")]
    namespace: Option<String>,
    /// Show it again and again, every so many seconds (2 by default), until Ctrl-C.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
    /// As JSON: one object, with --watch one a line.
    #[arg(long)]
    json: bool,
}

/// What was seen.
enum Seen {
    Fleet(FleetResponse),
    Clusters(Vec<GalerneCluster>),
}

impl Seen {
    fn table(&self) -> String {
        match self {
            Self::Fleet(fleet) => fleet::table(fleet),
            Self::Clusters(clusters) => kube::table(clusters),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Fleet(fleet) => as_json(fleet),
            Self::Clusters(clusters) => kube::as_json(clusters),
        }
    }
}

impl Status {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Some(period) = self.watch.map(Duration::from_secs) else {
            let seen = self.look().await?;
            let shown = if self.json { serde_json::to_string_pretty(&seen.json())? } else { seen.table() };
            println!("{shown}");
            return Ok(());
        };
        let mut interrupts = signal(SignalKind::interrupt())?; // one for all looks: it remembers
        loop {
            self.show(self.look().await)?;
            tokio::select! {
                () = tokio::time::sleep(period) => {}
                _ = interrupts.recv() => return Ok(()),
            }
        }
    }

    async fn look(&self) -> anyhow::Result<Seen> {
        if !self.kube {
            return Ok(Seen::Fleet(fleet_of(&mut self.router.connect().await?).await?));
        }
        let client = ::kube::Client::try_from(kube::config().await?)?;
        Ok(Seen::Clusters(kube::clusters(client, self.namespace.as_deref()).await?))
    }

    /// One look of several; what is away for a while is looked for again.
    fn show(&self, seen: anyhow::Result<Seen>) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        let shown = match (seen, self.json) {
            (Ok(seen), true) => seen.json().to_string(),
            (Ok(seen), false) => seen.table(),
            (Err(error), true) => json!({ "error": error.to_string() }).to_string(),
            (Err(error), false) => format!("error: {error}"),
        };
        if out.is_terminal() && !self.json {
            write!(out, "\x1b[H\x1b[2J")?; // to the corner of an empty screen
        }
        writeln!(out, "{shown}")?;
        Ok(out.flush()?)
    }
}

/// The fleet's table, as a router tells it.
pub(crate) async fn table(client: &mut Client) -> anyhow::Result<String> {
    Ok(fleet::table(&fleet_of(client).await?))
}

async fn fleet_of(client: &mut Client) -> anyhow::Result<FleetResponse> {
    let answer = client.fleet(FleetRequest {}).await;
    let answer = answer.map_err(|status| client::said(&status))?;
    Ok(answer.into_inner())
}

fn past(past: &PastEpoch) -> Value {
    let PastEpoch { epoch, ranks, began_ms, ended_ms, reason, rank } = past;
    json!({
        "epoch": epoch, "ranks": ranks, "began_ms": began_ms, "ended_ms": ended_ms, "reason": reason, "rank": rank,
    })
}

fn as_json(fleet: &FleetResponse) -> Value {
    let groups = fleet.groups.iter().map(|group| {
        let ranks = group.ranks.iter().map(|rank| {
            json!({
                "id": rank.id,
                "address": rank.address,
                "pid": rank.pid,
                "device": rank.device,
                "state": rank.state,
                "first_shard": rank.first_shard,
                "shards": rank.shards,
                "memory_bytes": rank.memory_bytes,
            })
        });
        json!({
            "name": group.name,
            "state": group.state,
            "epoch": group.epoch,
            "model": group.model,
            "virtual_shards": group.virtual_shards,
            "world_size": group.world_size,
            "requests": group.requests,
            "ranks": ranks.collect::<Vec<_>>(),
            "past": group.past.iter().map(past).collect::<Vec<_>>(),
        })
    });
    json!({ "groups": groups.collect::<Vec<_>>() })
}
