//! Who may use the faces: API keys from a file, and what each tenant may use.
//!
//! Without a key file everybody is the same nameless tenant, without limits; that is the default on loopback only. The
//! file is read again every few seconds, so keys come and go without a restart; one that is broken is not
//! taken in, and the last good one holds. Quotas are counted by each router on its own: n routers together let
//! through n times as much.

mod file;
mod headers;
mod key;
mod visit;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, header};
use galerne_dispatch::Quotas;
use galerne_tls::keep_fresh;
use galerne_types::TenantId;

use file::{Holder, KeyTable};
pub use file::{KeyFileError, key_entry};
pub use key::ApiKey;
pub(crate) use key::sha256;
pub(crate) use visit::Caller;

/// Where clients of other APIs show their keys.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Who may use the faces, as it was told at start.
#[derive(Clone, Debug, Default)]
pub struct GateOptions {
    /// File of API keys; without it, no key is asked for.
    pub keys: Option<PathBuf>,
    /// Serve without keys on addresses that other machines reach.
    pub no_auth: bool,
}

/// Why the faces cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The key file is wrong.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// Anybody could use it.
    #[error(
        "{flag} {address} can be reached from other machines: name a file of API keys with --api-keys (`galerne key \
         new` makes one), or say --no-auth if everybody there may use it"
    )]
    Open {
        /// The face's flag.
        flag: &'static str,
        /// Where it listens.
        address: SocketAddr,
    },
}

/// Asks callers for their keys and counts what they use.
#[derive(Debug)]
pub struct Gate {
    file: Option<PathBuf>,
    keys: RwLock<Arc<KeyTable>>,
    quotas: Mutex<Quotas>,
    began: Instant,
}

/// A caller showed no key, or a wrong one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stranger {
    #[error("an API key is needed: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`")]
    NoKey,
    #[error("this API key is not valid here")]
    WrongKey,
    #[error("this API key is no operator's: `galerne key new --operator` makes one that is")]
    NoOperator,
}

/// Whether other machines can reach what listens on this address.
pub(crate) fn is_public(address: SocketAddr) -> bool {
    !address.ip().to_canonical().is_loopback()
}

impl Gate {
    /// Reads the keys for faces that listen on `faces`, each with the flag that says so.
    ///
    /// # Errors
    /// When the key file cannot be used, or when there is none and a face is not on loopback.
    pub fn open(options: GateOptions, faces: &[(&'static str, SocketAddr)]) -> Result<Arc<Self>, GateError> {
        let GateOptions { keys: file, no_auth } = options;
        let public = faces.iter().find(|(_, address)| is_public(*address));
        if let (None, false, Some((flag, address))) = (&file, no_auth, public) {
            return Err(GateError::Open { flag, address: *address });
        }
        let table = file.as_deref().map(KeyTable::read).transpose()?.unwrap_or_default();
        let mut quotas = Quotas::default();
        quotas.set(table.quotas(), Duration::ZERO);
        Ok(Arc::new(Self {
            file,
            keys: RwLock::new(Arc::new(table)),
            quotas: Mutex::new(quotas),
            began: Instant::now(),
        }))
    }

    /// Takes the key file in as it is now, if it has changed; returns whether it had. Blocks on the file.
    ///
    /// # Errors
    /// When the file cannot be used; what held before goes on to hold.
    pub fn reload(&self) -> Result<bool, KeyFileError> {
        let Some(file) = self.file.as_deref() else { return Ok(false) };
        let table = KeyTable::read(file)?;
        if table == **self.keys.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(false);
        }
        self.quotas().set(table.quotas(), self.began.elapsed());
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        Ok(true)
    }

    /// Reloads for ever.
    pub(crate) async fn keep(self: Arc<Self>) {
        if self.file.is_none() {
            return std::future::pending().await;
        }
        keep_fresh("API keys", move || self.reload()).await;
    }

    /// Who sends a request with these headers.
    pub(crate) fn admit(self: &Arc<Self>, headers: &HeaderMap) -> Result<Caller, Stranger> {
        if self.file.is_none() {
            return Ok(Caller::default());
        }
        Ok(Caller::new(self.holder(headers)?.tenant, self.clone()))
    }

    /// Whether whoever sends a request with these headers may operate the router.
    pub(crate) fn admit_operator(&self, headers: &HeaderMap) -> Result<(), Stranger> {
        let open = self.file.is_none();
        if open || self.holder(headers)?.operator { Ok(()) } else { Err(Stranger::NoOperator) }
    }

    fn holder(&self, headers: &HeaderMap) -> Result<Holder, Stranger> {
        let key = shown(headers).ok_or(Stranger::NoKey)?;
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        keys.holder(key).ok_or(Stranger::WrongKey)
    }

    /// Tells a tenant in a response's headers how it stands with its quota, if it has one.
    pub(crate) fn tell(&self, tenant: TenantId, headers: &mut HeaderMap) {
        if self.file.is_none() {
            return;
        }
        let standing = self.quotas().standing(tenant, self.began.elapsed());
        headers::insert(headers, standing);
    }

    fn quotas(&self) -> std::sync::MutexGuard<'_, Quotas> {
        self.quotas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key that a request shows: gRPC's metadata are headers too. A proxy may need `Authorization` for itself, with a
/// scheme of its own.
fn shown(headers: &HeaderMap) -> Option<&[u8]> {
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
    authorization.or_else(|| headers.get(X_API_KEY).map(|value| value.as_bytes().trim_ascii()))
}

/// The token of `Bearer TOKEN`; the scheme's case does not matter (RFC 7235).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}
