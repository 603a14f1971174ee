//! The side that is called.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::server::TlsStream;

use crate::error::TlsError;
use crate::fresh::Fresh;
use crate::pem;

/// Time for a handshake.
const HANDSHAKE_S_MAX: Duration = Duration::from_secs(10);

/// What a server shows, and whose certificates it wants to see: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFiles {
    /// Its certificate, and what leads from it to an authority that clients know.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Certificates of the authority of its clients; without it, clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// What is spoken inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    H2,
}

impl Alpn {
    pub(crate) fn name(self) -> Vec<u8> {
        match self {
            Self::Http1 => b"http/1.1".to_vec(),
            Self::H2 => b"h2".to_vec(),
        }
    }
}

/// Makes TLS connections of those that come.
pub struct Server {
    files: ServerFiles,
    alpn: Alpn,
    config: Fresh<ServerConfig>,
}

impl Server {
    /// Reads the files. Blocks on them.
    ///
    /// # Errors
    /// A sentence that names the file that is wrong.
    pub fn load(files: ServerFiles, alpn: Alpn) -> Result<Arc<Self>, TlsError> {
        let names = [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()];
        let names = names.into_iter().flatten().cloned().collect();
        let config = Fresh::load(names, |bytes| config(&files, alpn, bytes))?;
        Ok(Arc::new(Self { files, alpn, config }))
    }

    /// Reads the files again if they have changed, for the handshakes to come; returns whether they had. Blocks on
    /// them.
    ///
    /// # Errors
    /// As [`load`](Self::load); what held before goes on to hold.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.config.reload(|bytes| config(&self.files, self.alpn, bytes))
    }

    /// Shakes hands with a client, within a deadline.
    ///
    /// # Errors
    /// When it does not speak TLS, shows no certificate that is wanted, or takes too long.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let handshake = TlsAcceptor::from(self.config.get()).accept(stream);
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long");
        timeout(HANDSHAKE_S_MAX, handshake).await.map_err(late)?
    }
}

fn config(files: &ServerFiles, alpn: Alpn, bytes: &[Vec<u8>]) -> Result<ServerConfig, TlsError> {
    let ServerFiles { cert, key, client_ca } = files;
    let pair = |reason: tokio_rustls::rustls::Error| TlsError::Pair {
        cert: cert.display().to_string(),
        key: key.display().to_string(),
        reason: reason.to_string(),
    };
    let builder = ServerConfig::builder_with_provider(pem::provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(pair)?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let roots = Arc::new(pem::authorities(file, &bytes[2])?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, pem::provider()).build();
            let refused = |error: tokio_rustls::rustls::server::VerifierBuilderError| TlsError::Authority {
                file: file.display().to_string(),
                reason: error.to_string(),
            };
            builder.with_client_cert_verifier(verifier.map_err(refused)?)
        }
    };
    let (chain, private) = pem::identity((cert, &bytes[0]), (key, &bytes[1]))?;
    let mut config = builder.with_single_cert(chain, private).map_err(pair)?;
    config.alpn_protocols = vec![alpn.name()];
    Ok(config)
}
