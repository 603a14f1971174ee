//! TLS by rustls: certificates from PEM files, read again when they change; servers, clients, and the cluster's mutual
//! TLS.
//!
//! A [`Server`] or [`Client`] is made once from the names of its files. What it does next uses the files as they were
//! when they were last taken in ([`keep_fresh`] does that every few seconds); connections that stand go on as they
//! are. Files that make no sense together are not taken in: the last good ones hold.
//!
//! Within a cluster ([`cluster`]) both sides show a certificate of the cluster's own authority, made for the name
//! [`CLUSTER_NAME`]: ranks come and go on addresses that nobody knows beforehand, so a certificate says that its holder
//! belongs to the cluster, and not where it runs.

mod client;
mod error;
mod fresh;
mod incoming;
mod pem;
mod server;
mod validity;
mod way;

use std::path::PathBuf;
use std::sync::Arc;

pub use client::{Client, ClientFiles, Dialer};
pub use error::TlsError;
pub use fresh::keep_fresh;
pub use incoming::{Opened, incoming};
pub use server::{Alpn, Server, ServerFiles};
pub use way::{Dial, Dialling, Way};

/// The name that certificates within a cluster are made for (a DNS name among their subject's alternative names).
pub const CLUSTER_NAME: &str = "galerne";

/// A certificate with its key, and the authority of the cluster that made it: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterFiles {
    /// Certificates of the authority.
    pub ca: PathBuf,
    /// Certificate of this host or of all, and what leads from it to the authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Both sides of a cluster's connections.
///
/// # Errors
/// A sentence that names the file that is wrong.
pub fn cluster(files: &ClusterFiles) -> Result<(Arc<Server>, Arc<Client>), TlsError> {
    let ClusterFiles { ca, cert, key } = files.clone();
    let server = ServerFiles { cert: cert.clone(), key: key.clone(), client_ca: Some(ca.clone()) };
    let client = ClientFiles { ca, identity: Some((cert, key)), name: Some(CLUSTER_NAME.to_owned()) };
    Ok((Server::load(server, Alpn::H2)?, Client::load(client, Alpn::H2)?))
}
