//! `galerne status`: the fleet as a router sees it.

use clap::Args;
use galerne_wire::v1::FleetRequest;

use crate::client::ClientArgs;
use crate::fleet;

/// Shows groups and ranks: state, epoch, process, shards, memory.
#[derive(Args)]
pub(crate) struct Status {
    #[command(flatten)]
    router: ClientArgs,
}

impl Status {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        println!("{}", table(&self.router).await?);
        Ok(())
    }
}

/// The fleet's table, as a router tells it.
pub(crate) async fn table(router: &ClientArgs) -> anyhow::Result<String> {
    let mut client = router.connect().await?;
    let answer = client.fleet(FleetRequest {}).await;
    let answer = answer.map_err(|status| anyhow::anyhow!("the router answered: {}", status.message()))?;
    Ok(fleet::table(&answer.into_inner()))
}
