//! `galerne router`: the faces in front of a fleet.

use std::time::Duration;

use clap::Args;
use galerne_router::{ModelSource, RouterOptions};

use crate::args::{self, EtcdArgs, ModelArgs};
use crate::limits::LimitArgs;

/// Where a router listens.
#[derive(Args, Clone)]
pub(crate) struct FaceArgs {
    /// Address of the HTTP API (OpenAI); port 0 takes a free one and prints it.
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDR")]
    pub(crate) http: String,
    /// Address of the gRPC API (galerne.v1, health, reflection); port 0 takes a free one and prints it.
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDR")]
    pub(crate) grpc: String,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

/// Answers HTTP and gRPC requests from the groups that etcd tells of.
///
/// A router holds nothing that cannot be had again: run as many as you like. It needs the model's files for
/// the tokenizer and the chat template only.
#[derive(Args)]
pub(crate) struct RouterCommand {
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    faces: FaceArgs,
}

impl RouterCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let options = options(&self.model, &self.faces);
        let http = args::listen(&self.faces.http, "--http").await?;
        let grpc = args::listen(&self.faces.grpc, "--grpc").await?;
        let coord = args::connect(&self.etcd.etcd, &self.etcd.cluster).await?;
        println!("HTTP on http://{}  gRPC on {}", http.local_addr()?, grpc.local_addr()?);
        let shutdown = args::shutdown_on_signal()?.cancelled_owned();
        galerne_router::serve(options, coord.watch_fleet(), http, grpc, shutdown).await?;
        Ok(())
    }
}

/// How long answers that run may go on after Ctrl-C.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// A router that serves one model.
pub(crate) fn options(model: &ModelArgs, faces: &FaceArgs) -> RouterOptions {
    let source = ModelSource { path: model.model.clone(), name: model.model_name.clone() };
    RouterOptions { models: vec![source], shutdown_grace: SHUTDOWN_GRACE, limits: faces.limits.limits() }
}
