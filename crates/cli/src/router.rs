//! `galerne router`: the faces in front of a fleet.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use galerne_router::{
    BAN_S, ChatFormatKind, Gate, GateOptions, Listeners, ModelSource, RouterOptions, RouterTls, SharedBans,
};
use galerne_telemetry::LogHandle;
use galerne_tls::{Alpn, Server, ServerFiles, Way};
use galerne_types::RouterRecord;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::args::{self, ClusterTlsArgs, EtcdArgs, ModelArgs};
use crate::limits::LimitArgs;

/// What `--admin` says for no port at all.
pub(crate) const NO_ADMIN: &str = "off";

/// Where a router listens.
#[derive(Args, Clone)]
pub(crate) struct FaceArgs {
    /// Address of the HTTP API (OpenAI); port 0 takes a free one and prints it.
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDR", value_parser = args::address)]
    pub(crate) http: String,
    /// Address of the gRPC API (galerne.v1, health, reflection); port 0 takes a free one and prints it.
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDR", value_parser = args::address)]
    pub(crate) grpc: String,
    /// Address of the operator's port (metrics, fleet, drain, what goes on inside), which clients must not reach and
    /// which wants an operator's API key unless it is on loopback; port 0 takes a free one and prints it, `off` has none.
    #[arg(long, default_value = "127.0.0.1:8002", value_name = "ADDR", env = "GALERNE_ADMIN", value_parser = admin)]
    pub(crate) admin: String,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// How conversations become prompts: mistral-v1, mistral-v2, mistral-v3 or jinja; by default what the model's
    /// files call for.
    #[arg(long, value_name = "FORMAT")]
    chat_format: Option<ChatFormatKind>,
    /// File of API keys (see `galerne key new`), read again when it changes; needed on addresses that other
    /// machines reach.
    #[arg(long, value_name = "FILE", env = "GALERNE_API_KEYS")]
    api_keys: Option<PathBuf>,
    /// Serve without API keys, also on addresses that other machines reach.
    #[arg(long, conflicts_with = "api_keys")]
    no_auth: bool,
    /// Certificate chain of the HTTP and gRPC faces (PEM), which then speak TLS; read again when it changes.
    #[arg(long, value_name = "FILE", requires = "tls_key", env = "GALERNE_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "GALERNE_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Authority of clients (PEM): only those with a certificate of it are let in.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
}

/// Where the operator's port is, if there is one.
pub(crate) fn admin(text: &str) -> Result<String, String> {
    if text == NO_ADMIN { Ok(text.to_owned()) } else { args::address(text) }
}

impl FaceArgs {
    /// What a client needs that is to reach them: flags of curl's.
    pub(crate) fn curl_flags(&self) -> String {
        let tls = if self.tls_cert.is_some() { " --cacert FILE" } else { "" };
        let certificate = if self.tls_client_ca.is_some() { " --cert FILE --key FILE" } else { "" };
        let key = if self.api_keys.is_some() { " -H 'authorization: Bearer KEY'" } else { "" };
        format!("{tls}{certificate}{key}")
    }

    /// The scheme of the HTTP face.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls_cert.is_some() { "https" } else { "http" }
    }

    /// TLS of the faces, and of calls to leaders; wrong files are told at once.
    pub(crate) fn tls(&self, cluster: &ClusterTlsArgs) -> anyhow::Result<RouterTls> {
        let mut tls = RouterTls::default();
        if let Some((cert, key)) = self.tls_cert.clone().zip(self.tls_key.clone()) {
            let files = ServerFiles { cert, key, client_ca: self.tls_client_ca.clone() };
            tls.http = Some(Server::load(files.clone(), Alpn::Http1)?);
            tls.grpc = Some(Server::load(files, Alpn::H2)?);
        }
        if let Some(files) = cluster.files() {
            tls.cluster = Way::Tls(galerne_tls::cluster(&files)?.1);
        }
        Ok(tls)
    }

    /// Binds all ports, or says why not, and tells where the operator's is.
    pub(crate) async fn open(&self) -> anyhow::Result<(Listeners, Arc<Gate>)> {
        self.limits.check()?;
        self.limits.make_room_for_files();
        let http = args::listen(&self.http, "--http").await?;
        let grpc = args::listen(&self.grpc, "--grpc").await?;
        let mut faces = vec![("--http", http.local_addr()?), ("--grpc", grpc.local_addr()?)];
        let admin = match self.admin.as_str() {
            NO_ADMIN => None,
            address => Some(args::listen(address, "--admin").await?),
        };
        if let Some(admin) = &admin {
            let address = admin.local_addr()?;
            faces.push(("--admin", address));
            println!("admin on http://{address}");
        }
        let options = GateOptions { keys: self.api_keys.clone(), no_auth: self.no_auth };
        let gate = Gate::open(options, &faces)?;
        Ok((Listeners { http, grpc, inside: None, admin }, gate))
    }
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
    #[command(flatten)]
    tls: ClusterTlsArgs,
}

impl RouterCommand {
    pub(crate) async fn run(self, log: LogHandle) -> anyhow::Result<()> {
        let tls = self.faces.tls(&self.tls)?;
        let (listeners, gate) = self.faces.open().await?;
        let mut options = options(&self.model, &self.faces, gate, tls, log);
        let coord = args::connect(&self.etcd.etcd, &self.etcd.access.access(), &self.etcd.cluster).await?;
        println!(
            "HTTP on {}://{}  gRPC on {}",
            self.faces.scheme(),
            listeners.http.local_addr()?,
            listeners.grpc.local_addr()?
        );
        let shutdown = args::shutdown_on_signal()?.cancelled_owned();
        let (counts, counted) = watch::channel(RouterRecord::default());
        options.counts = Some(counts);
        let (bans, banned) = SharedBans::new(coord.watch_bans());
        options.bans = Some(bans);
        let banning = coord.clone();
        let banning = async move { banning.tell_bans(banned, BAN_S.as_secs() as i64).await };
        let _banning = AbortOnDropHandle::new(tokio::spawn(banning));
        let name = format!("{}-{}", args::host_name(Ipv4Addr::LOCALHOST.into()), std::process::id());
        let served = galerne_router::serve(options, coord.watch_fleet(), listeners, shutdown);
        let (served, told) = tokio::join!(served, coord.tell(&name, counted));
        served?;
        Ok(told?)
    }
}

/// How long answers that run may go on after Ctrl-C.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// A router that serves one model.
pub(crate) fn options(
    model: &ModelArgs,
    faces: &FaceArgs,
    gate: Arc<Gate>,
    tls: RouterTls,
    log: LogHandle,
) -> RouterOptions {
    let chat_format = faces.chat_format;
    let source = ModelSource { path: model.model.clone(), name: model.model_name.clone(), chat_format };
    RouterOptions {
        models: vec![source],
        shutdown_grace: SHUTDOWN_GRACE,
        gate,
        tls,
        limits: faces.limits.connections(),
        requests: faces.limits.requests(),
        log: Some(log),
        tell: |line| println!("{line}"),
        counts: None,
        bans: None,
    }
}
