//! How a cluster's servers are called.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tower_service::Service;

use crate::client::Client;
use crate::error::TlsError;

/// Makes a connection within this process, as [`Way::By`] wants it.
pub type Dial = Arc<dyn Fn(Uri) -> Dialling + Send + Sync>;

/// A connection in the making.
pub type Dialling = Pin<Box<dyn Future<Output = io::Result<DuplexStream>> + Send>>;

/// How servers of the cluster are called.
#[derive(Clone, Default)]
pub enum Way {
    /// In the open.
    #[default]
    Open,
    /// Under TLS.
    Tls(Arc<Client>),
    /// Over a network that is not the system's: a process has one within itself, a simulation one of its own.
    By(Dial),
}

impl Way {
    /// Connects at once.
    ///
    /// # Errors
    /// When nobody answers there, or is not believed.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        match self {
            Self::Open => endpoint.connect().await,
            Self::Tls(client) => endpoint.connect_with_connector(client.dialer()).await,
            Self::By(dial) => endpoint.connect_with_connector(Connector(dial.clone())).await,
        }
    }

    /// Connects when there is something to say, and again when a connection has ended.
    pub fn connect_lazy(&self, endpoint: &Endpoint) -> Channel {
        match self {
            Self::Open => endpoint.connect_lazy(),
            Self::Tls(client) => endpoint.connect_with_connector_lazy(client.dialer()),
            Self::By(dial) => endpoint.connect_with_connector_lazy(Connector(dial.clone())),
        }
    }

    /// Reads the files of certificates again if they have changed, and returns whether they had. Blocks on them.
    ///
    /// # Errors
    /// As [`Client::reload`].
    pub fn reload(&self) -> Result<bool, TlsError> {
        match self {
            Self::Tls(client) => client.reload(),
            Self::Open | Self::By(_) => Ok(false),
        }
    }
}

#[derive(Clone)]
struct Connector(Dial);

impl Service<Uri> for Connector {
    type Response = TokioIo<DuplexStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialling = (self.0)(uri);
        Box::pin(async move { Ok(TokioIo::new(dialling.await?)) })
    }
}
