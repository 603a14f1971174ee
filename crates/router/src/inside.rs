//! The way from a process to the gRPC face of its own router: no port, no TLS, no key.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint, Uri};
use tower_service::Service;

/// Bytes under way in one direction.
const BUFFER_BYTES: usize = 64 << 10;

/// The face's end: connections as they are made.
#[derive(Debug)]
pub struct Inside(pub(crate) mpsc::Receiver<DuplexStream>);

/// A channel to the router that is given the other end. It connects when it is first used. Within a tokio runtime.
pub fn inside() -> (Channel, Inside) {
    let (connections, taken) = mpsc::channel(1);
    let channel = Endpoint::from_static("http://inside").connect_with_connector_lazy(Connector(connections));
    (channel, Inside(taken))
}

struct Connector(mpsc::Sender<DuplexStream>);

impl Service<Uri> for Connector {
    type Response = TokioIo<DuplexStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connections = self.0.clone();
        Box::pin(async move {
            let (near, far) = duplex(BUFFER_BYTES);
            connections.send(far).await.map_err(|_| io::Error::other("the router has ended"))?;
            Ok(TokioIo::new(near))
        })
    }
}
