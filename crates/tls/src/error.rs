//! What can be wrong with TLS's files.

/// Each says which file is wrong, and what a right one would be. Keys are never repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{file} cannot be read: {reason}")]
    Read {
        /// Which.
        file: String,
        /// Why not.
        reason: String,
    },
    /// A file does not hold what it should.
    #[error("{file} holds no {what} in PEM form")]
    Empty {
        /// Which.
        file: String,
        /// What it should hold.
        what: &'static str,
    },
    /// A certificate is not valid now.
    #[error("the certificate in {file} {what}: renew it")]
    Expired {
        /// Which.
        file: String,
        /// `expired on …` or `is not valid before …`.
        what: String,
    },
    /// A certificate and a key are no pair, or something is wrong inside them.
    #[error("the certificate in {cert} cannot be used with the key in {key}: {reason}")]
    Pair {
        /// The certificate's file.
        cert: String,
        /// The key's file.
        key: String,
        /// Why not.
        reason: String,
    },
    /// Certificates of an authority that cannot be one.
    #[error("the certificates in {file} are no authority's: {reason}")]
    Authority {
        /// Which.
        file: String,
        /// Why not.
        reason: String,
    },
    /// A name that no certificate can be made for.
    #[error("{0:?} is no name that a certificate can be made for")]
    Name(String),
}
