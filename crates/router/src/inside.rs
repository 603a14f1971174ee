//! The way from a process to the gRPC face of its own router: no port, no TLS, no key.

use std::io;
use std::sync::Arc;

use galerne_tls::{Dialling, Way};
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

/// Bytes under way in one direction.
const BUFFER_BYTES: usize = 64 << 10;

/// The face's end: connections as they are made.
#[derive(Debug)]
pub struct Inside(pub(crate) mpsc::Receiver<DuplexStream>);

/// A channel to the router that is given the other end. It connects when it is first used. Within a tokio runtime.
pub fn inside() -> (Channel, Inside) {
    let (connections, taken) = mpsc::channel(1);
    let dial = move |_| -> Dialling {
        let connections = connections.clone();
        Box::pin(async move {
            let (near, far) = duplex(BUFFER_BYTES);
            connections.send(far).await.map_err(|_| io::Error::other("the router has ended"))?;
            Ok(near)
        })
    };
    let way = Way::By(Arc::new(dial));
    (way.connect_lazy(&Endpoint::from_static("http://inside")), Inside(taken))
}
