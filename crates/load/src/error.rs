//! Why a load cannot run.

use std::error::Error;

use galerne_tls::TlsError;
use galerne_workload::WorkloadError;

/// Each says what was wrong and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No address of an endpoint.
    #[error(
        "{0:?} is no endpoint: give http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT"
    )]
    Url(String),
    /// A scheme that speaks TLS, and no authority.
    #[error(
        "{0} speaks TLS: name the authority of its certificate with --tls-ca (the system's: /etc/ssl/certs/ca-certificates.crt)"
    )]
    NoAuthority(String),
    /// Nobody answers.
    #[error("nobody answers at {address}: {reason}")]
    Connect {
        /// Where.
        address: String,
        /// What the connection was broken by.
        reason: String,
        /// The same, for those who know more about it.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A header cannot carry it.
    #[error("the API key must be plain ASCII")]
    ApiKey,
    /// A file of certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A trace that cannot be read.
    #[error("the trace {file} cannot be read: {reason}")]
    TraceFile {
        /// Which.
        file: String,
        /// Why not.
        reason: String,
    },
    /// A trace that cannot be replayed.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
}

impl LoadError {
    pub(crate) fn connect(address: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let source = source.into();
        Self::Connect { address: address.to_owned(), reason: root_cause(&*source), source }
    }
}

/// What an error says that was not caused by another one.
pub(crate) fn root_cause(mut error: &(dyn Error + 'static)) -> String {
    while let Some(deeper) = error.source() {
        error = deeper;
    }
    error.to_string()
}
