//! One rank process: registers, and serves epoch after epoch until it is told to end.

mod compute;
mod desk;
mod digest;
mod door;
mod engagement;
mod engine;
mod error;
mod execute;
mod follower;
mod followers;
mod gpu;
mod grammars;
mod leader;
mod link;
mod memory;
mod neighbours;
mod paces;
mod process;
mod pulse;
mod setup;
#[cfg(test)]
mod simulation;
mod stats;
mod streams;
mod trace;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use galerne_coord::Coord;
use galerne_tls::{TlsError, Way, keep_fresh};
use galerne_types::RankRecord;
use galerne_types::limits::GRPC_MESSAGE_BYTES_MAX;
use galerne_wire::v1::engine_server::EngineServer;
use galerne_wire::v1::rank_server::RankServer;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::Router;

use crate::error::WorkerError;
use crate::grpc;
use crate::options::RankOptions;
use crate::supervisor::COORD_TIMEOUT;
use crate::supervisor::child::{BEAT_INTERVAL, BEATS_VARIABLE};
use compute::Compute;
use desk::Desk;
use door::Door;
use engine::EngineService;
use follower::RankService;
use grammars::Grammars;
use process::Process;
use setup::Setup;

/// How long clients may take to hear the last word when the process ends.
const FAREWELL: Duration = Duration::from_secs(1);

type Server = JoinHandle<Result<(), tonic::transport::Error>>;

/// What a rank process is made of, once its model is open and it knows where it listens.
pub(crate) struct Parts {
    pub(crate) setup: Arc<Setup>,
    /// What it registers as.
    pub(crate) record: RankRecord,
    pub(crate) coord: Coord,
    /// How it calls other ranks.
    pub(crate) way: Way,
    pub(crate) compute: Compute,
    pub(crate) desk: Desk,
    /// How much memory it has resident, in bytes.
    pub(crate) memory: fn() -> u64,
}

/// Runs one rank until `shutdown`: opens its model, registers, and serves every epoch that it is a member of.
/// When it ends it has given up its registration, and its open streams have been told.
///
/// # Errors
/// Whatever ends the process; [`WorkerError::exit_code`] says whether a restart may help.
pub async fn run_rank(options: RankOptions, shutdown: CancellationToken) -> Result<(), WorkerError> {
    let opened = tokio::task::spawn_blocking(move || Setup::open(options)).await;
    let setup = Arc::new(opened.unwrap_or_else(|error| Err(WorkerError::Panicked(error.to_string())))?);
    let options = &setup.options;
    let coord =
        Coord::connect_as(&options.etcd_access, &options.etcd, &options.cluster, COORD_TIMEOUT).await?;
    let bind = |source| WorkerError::Bind { address: options.bind.to_string(), source };
    let listener = TcpListener::bind((options.bind, 0)).await.map_err(bind)?;
    let address = listener.local_addr().map_err(bind)?.to_string();
    let (tls, client) = setup.tls.clone().unzip();
    let _certificates = setup.tls.clone().map(|(server, client)| {
        let reload = move || Ok::<_, TlsError>(server.reload()? | client.reload()?);
        AbortOnDropHandle::new(tokio::spawn(keep_fresh("the cluster's certificates", reload)))
    });
    let _beats = AbortOnDropHandle::new(tokio::spawn(tell_supervisor()));
    let desk = Desk::start()?;
    let parts = Parts {
        record: setup.record(address),
        coord,
        way: client.map_or(Way::Open, Way::Tls),
        compute: Compute::start(Arc::clone(&setup), desk.clone())?,
        desk,
        memory: memory::resident_bytes,
        setup,
    };
    let serve = |router, stop: CancellationToken| grpc::serve(router, listener, tls, stop.cancelled_owned());
    run(parts, serve, shutdown).await
}

/// The same of a rank whose parts are there; `serve` serves its gRPC face until it is told to stop.
pub(crate) async fn run<S>(
    parts: Parts,
    serve: impl FnOnce(Router, CancellationToken) -> S,
    shutdown: CancellationToken,
) -> Result<(), WorkerError>
where
    S: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
{
    let Parts { setup, record, coord, way, compute, desk, memory } = parts;
    let (engine_door, rank_door) = (Door::closed(), Door::closed());
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_not_serving::<EngineServer<EngineService>>().await;
    let engine = EngineServer::new(EngineService::new(engine_door.clone(), Grammars::new(&setup.checkpoint)));
    let rank = RankServer::new(RankService { door: rank_door.clone() });
    let router = grpc::server()
        .add_service(health_service)
        .add_service(engine.max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX))
        .add_service(rank.max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX));
    let stop = CancellationToken::new();
    let _stop_when_dropped = stop.clone().drop_guard();
    let mut server = tokio::spawn(serve(router, stop.clone()));
    let fleet = coord.watch_fleet();
    let address = record.address.clone();
    let registration = coord.register(record).await?;
    tracing::info!(rank = %setup.options.id(), group = %setup.options.group, address, "rank registered");
    let (panicked, pulse) = (compute.ended(), compute.pulse());
    let process = Process {
        setup,
        address,
        registration,
        fleet,
        way,
        compute,
        desk,
        engine_door,
        rank_door,
        health,
        memory,
    };
    let outcome = tokio::select! {
        error = process.live() => Err(error),
        ended = &mut server => Err(server_ended(ended)),
        stuck = pulse.stuck() => Err(WorkerError::Stuck(stuck)),
        () = panicked.cancelled() => Err(WorkerError::Panicked("the compute thread".into())),
        () = shutdown.cancelled() => Ok(()),
    };
    stop.cancel();
    process.end().await;
    farewell(server).await;
    outcome
}

/// Tells the supervisor, if there is one, that this process lives.
async fn tell_supervisor() {
    if std::env::var_os(BEATS_VARIABLE).is_none() {
        return;
    }
    let mut ticks = tokio::time::interval(BEAT_INTERVAL);
    let tell = || {
        let mut pipe = std::io::stdout();
        pipe.write_all(b".")?;
        pipe.flush()
    };
    while tell().is_ok() {
        ticks.tick().await;
    }
}

fn server_ended(ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>) -> WorkerError {
    WorkerError::Server(match ended {
        Ok(Ok(())) => "nobody asked it to".into(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    })
}

/// Waits until the open streams have had their last word, or nobody takes it.
async fn farewell(server: Server) {
    if !server.is_finished() && timeout(FAREWELL, server).await.is_err() {
        tracing::info!("some connections are still open at the end");
    }
}
