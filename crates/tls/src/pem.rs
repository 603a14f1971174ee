//! PEM files.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::TlsError;
use crate::validity::Validity;

/// Bytes of one file: a bundle of every public authority has a quarter of that.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The cryptography that all of this uses.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

pub(crate) fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(file).and_then(|open| open.take(FILE_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| TlsError::Read { file: file.display().to_string(), reason: error.to_string() })?;
    Ok(bytes)
}

/// A chain of certificates, the first one's holder being us, and its key.
pub(crate) fn identity(
    (cert, cert_pem): (&Path, &[u8]),
    (key, key_pem): (&Path, &[u8]),
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = certificates(cert, cert_pem)?;
    if let Some(what) = chain.first().and_then(|own| Validity::of(own)?.trouble_at(now_s())) {
        return Err(TlsError::Expired { file: cert.display().to_string(), what });
    }
    let key = PrivateKeyDer::from_pem_slice(key_pem)
        .map_err(|_| TlsError::Empty { file: key.display().to_string(), what: "private key" })?;
    Ok((chain, key))
}

/// Authorities whose certificates are trusted.
pub(crate) fn authorities(file: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file, pem)? {
        let refused = |error: tokio_rustls::rustls::Error| TlsError::Authority {
            file: file.display().to_string(),
            reason: error.to_string(),
        };
        roots.add(certificate).map_err(refused)?;
    }
    Ok(roots)
}

fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let empty = || TlsError::Empty { file: file.display().to_string(), what: "certificate" };
    all.ok().filter(|all| !all.is_empty()).ok_or_else(empty)
}

fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
