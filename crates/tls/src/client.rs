//! The side that calls.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::Uri;
use tower_service::Service;

use crate::error::TlsError;
use crate::fresh::Fresh;
use crate::pem;
use crate::server::Alpn;

/// Whom a client trusts, and what it shows: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// Certificates of the authority of its servers.
    pub ca: PathBuf,
    /// Its own certificate and key, for servers that want to see one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that servers' certificates are made for; without it, the host that is called.
    pub name: Option<String>,
}

/// Makes TLS connections to servers.
pub struct Client {
    files: ClientFiles,
    alpn: Alpn,
    name: Option<ServerName<'static>>,
    config: Fresh<ClientConfig>,
}

/// Connects tonic's channels: `Endpoint::connect_with_connector`, with an `http://` address, of a client that speaks
/// HTTP/2.
#[derive(Clone)]
pub struct Dialer(Arc<Client>);

impl Client {
    /// Reads the files. Blocks on them.
    ///
    /// # Errors
    /// A sentence that names the file that is wrong.
    pub fn load(files: ClientFiles, alpn: Alpn) -> Result<Arc<Self>, TlsError> {
        let name = files.name.clone().map(server_name).transpose()?;
        let mut names = vec![files.ca.clone()];
        names.extend(files.identity.iter().flat_map(|(cert, key)| [cert.clone(), key.clone()]));
        let config = Fresh::load(names, |bytes| config(&files, alpn, bytes))?;
        Ok(Arc::new(Self { files, alpn, name, config }))
    }

    /// Reads the files again if they have changed, for the connections to come; returns whether they had. Blocks on
    /// them.
    ///
    /// # Errors
    /// As [`load`](Self::load); what held before goes on to hold.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.config.reload(|bytes| config(&self.files, self.alpn, bytes))
    }

    /// For tonic's channels.
    pub fn dialer(self: &Arc<Self>) -> Dialer {
        Dialer(self.clone())
    }

    /// Connects to a server. The deadline is the caller's.
    ///
    /// # Errors
    /// When nobody listens there, or is not believed.
    pub async fn connect(&self, host: &str, port: u16) -> io::Result<TlsStream<TcpStream>> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => server_name(host.to_owned()).map_err(io::Error::other)?,
        };
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(self.config.get()).connect(name, stream).await
    }
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The deadline is the endpoint's (`connect_timeout`).
    fn call(&mut self, uri: Uri) -> Self::Future {
        let client = self.0.clone();
        Box::pin(async move {
            let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
                return Err(io::Error::other("an address is HOST:PORT"));
            };
            let host = host.trim_start_matches('[').trim_end_matches(']'); // of IPv6
            Ok(TokioIo::new(client.connect(host, port).await?))
        })
    }
}

fn server_name(name: String) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name))
}

fn config(files: &ClientFiles, alpn: Alpn, bytes: &[Vec<u8>]) -> Result<ClientConfig, TlsError> {
    let ClientFiles { ca, identity, name: _ } = files;
    let authority = |error: tokio_rustls::rustls::Error| TlsError::Authority {
        file: ca.display().to_string(),
        reason: error.to_string(),
    };
    let builder = ClientConfig::builder_with_provider(pem::provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(authority)?;
    let builder = builder.with_root_certificates(pem::authorities(ca, &bytes[0])?);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let (chain, private) = pem::identity((cert, &bytes[1]), (key, &bytes[2]))?;
            let pair = |reason: tokio_rustls::rustls::Error| TlsError::Pair {
                cert: cert.display().to_string(),
                key: key.display().to_string(),
                reason: reason.to_string(),
            };
            builder.with_client_auth_cert(chain, private).map_err(pair)?
        }
    };
    config.alpn_protocols = vec![alpn.name()];
    Ok(config)
}
