//! A store in memory that speaks the etcd v3 gRPC API as far as this crate and a curious `etcdctl` need it:
//! keys, transactions, leases, watches, compaction. For one machine: it keeps nothing when it ends.
//!
//! `store`, `kv`, `lease` and `watch` are pure: time comes in as an argument. `service` and `session` put a
//! lock, a clock and gRPC around them. A watcher holds no queue but a revision to go on from: a slow one
//! falls behind, and is cancelled when history has been compacted past it.
//!
//! Deliberately absent: disk, replication, authentication, nested transactions.

mod kv;
mod lease;
mod range;
mod refusal;
mod service;
mod session;
mod store;
mod watch;

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use etcd_client::proto::{PbKvServer, PbLeaseServer, PbMaintenanceServer, PbWatchServer};
use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::time::{interval, timeout};
use tonic::transport::Server;
use tonic::transport::server::{Connected, TcpIncoming};

use crate::error::CoordError;
pub(crate) use service::Service;

/// Largest request, in bytes of keys and values; etcd's own limit.
pub const REQUEST_BYTES_MAX: usize = 3 << 19;
/// Operations in a transaction; etcd's own limit.
pub const TXN_OPS_MAX: usize = 128;
/// Keys and values that are held, in bytes.
pub const STORE_BYTES_MAX: usize = 64 << 20;
/// Revisions that a watch can go back, at most.
pub const HISTORY_REVISIONS_MAX: usize = 10_000;
/// Keys and values in the history, in bytes; older revisions are compacted beyond it.
pub const HISTORY_BYTES_MAX: usize = 32 << 20;
/// Leases at a time.
pub const LEASES_MAX: usize = 10_000;
/// Shortest lease, in seconds. etcd's own follows its election timeout.
pub const LEASE_TTL_S_MIN: i64 = 1;
/// Longest lease, in seconds; etcd's own limit.
pub const LEASE_TTL_S_MAX: i64 = 9_000_000_000;
/// Watchers on one stream.
pub const WATCHERS_MAX: usize = 1_000;
/// Keys and values in one answer of a watch, in bytes; a single revision may be larger.
pub const WATCH_ANSWER_BYTES_MAX: usize = 1 << 20;

/// Room for a message's other fields, in bytes.
const REQUEST_OVERHEAD_BYTES: usize = 512 << 10;
/// Leases are looked through so often.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(100);
/// Watchers that asked for it hear of an idle store so often; etcd's default.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(600);
/// Connections are pinged so often, and dropped when they do not answer for as long.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Clients that do not let go of their connections within so long are cut off.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(1);

/// Serves a new, empty store on `listener` until `shutdown` resolves.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), CoordError> {
    serve_connections(TcpIncoming::from(listener).with_nodelay(Some(true)), shutdown).await
}

/// The same for connections that somebody else accepts.
///
/// # Errors
/// When no more can be accepted.
pub async fn serve_connections<C, E>(
    connections: impl Stream<Item = Result<C, E>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordError>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let service = Service::new();
    let message_bytes_max = REQUEST_BYTES_MAX + REQUEST_OVERHEAD_BYTES;
    let kv = PbKvServer::new(service.clone()).max_decoding_message_size(message_bytes_max);
    let server = Server::builder()
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_INTERVAL))
        .add_service(kv)
        .add_service(PbLeaseServer::new(service.clone()))
        .add_service(PbWatchServer::new(service.clone()))
        .add_service(PbMaintenanceServer::new(service.clone()))
        .serve_with_incoming_shutdown(connections, service.stopped().cancelled_owned());
    let expiry = async {
        let mut ticks = interval(EXPIRY_INTERVAL);
        loop {
            ticks.tick().await;
            service.expire();
        }
    };
    let mut server = std::pin::pin!(server);
    tokio::select! {
        served = &mut server => return Ok(served?),
        () = expiry => {}
        () = shutdown => {}
    }
    service.stopped().cancel();
    match timeout(SHUTDOWN_DEADLINE, server).await {
        Ok(served) => Ok(served?),
        Err(_) => Ok(()),
    }
}
