//! How gRPC connections between routers, leaders and ranks are set up.

use std::sync::Arc;
use std::time::Duration;

use galerne_tls::{Server as TlsServer, Way};
use tokio::net::TcpListener;
use tonic::transport::server::Router;
use tonic::transport::{Channel, Endpoint, Server};

/// An idle connection is pinged so often, from both sides.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// A connection whose ping is not answered for so long is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A server with the project's settings; services are added to it.
pub(crate) fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
}

/// Serves `router` on `listener` until `stop`, or until it fails.
pub(crate) async fn serve(
    router: Router,
    listener: TcpListener,
    tls: Option<Arc<TlsServer>>,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    router.serve_with_incoming_shutdown(galerne_tls::incoming(listener, tls), stop).await
}

/// A connection to the rank at `address`, `IP:PORT`; says in words why there is none.
pub(crate) async fn connect(address: &str, way: &Way) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|error| format!("{address} is no address: {error}"))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    way.connect(&endpoint).await.map_err(|error| format!("cannot connect to {address}: {error}"))
}
