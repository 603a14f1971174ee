//! `galerne status`: the fleet as a router sees it.

use clap::Args;
use galerne_wire::v1::FleetRequest;

use crate::{chat, fleet};

/// Shows groups and ranks: state, epoch, process, shards, memory.
#[derive(Args)]
pub(crate) struct Status {
    /// gRPC address of a router.
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDR")]
    grpc: String,
}

impl Status {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        println!("{}", table(&self.grpc).await?);
        Ok(())
    }
}

/// The fleet's table, from the router at `address`.
pub(crate) async fn table(address: &str) -> anyhow::Result<String> {
    let mut client = chat::connect(address).await?;
    let answer = client.fleet(FleetRequest {}).await;
    let answer = answer.map_err(|status| anyhow::anyhow!("the router answered: {}", status.message()))?;
    Ok(fleet::table(&answer.into_inner()))
}
