//! Files that are read again when they change.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::error::TlsError;
use crate::pem;

/// How often files are looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// Calls `reload` for ever, every two seconds, and logs what comes of it: `Ok(true)` when `what` has changed, an error
/// once for each that is another than the last. `reload` may block.
pub async fn keep_fresh<E: Display + Send + 'static>(
    what: &'static str,
    reload: impl Fn() -> Result<bool, E> + Send + Sync + 'static,
) {
    let (reload, mut told) = (Arc::new(reload), String::new());
    loop {
        tokio::time::sleep(INTERVAL).await;
        let reload = reload.clone();
        match tokio::task::spawn_blocking(move || reload().map_err(|error| error.to_string())).await {
            Ok(Ok(changed)) => {
                if changed {
                    tracing::info!("{what} were read again");
                }
                told.clear();
            }
            Ok(Err(sentence)) if sentence == told => {}
            Ok(Err(sentence)) => {
                tracing::warn!("{sentence}; the {what} that were read before hold on");
                told = sentence;
            }
            Err(error) => tracing::warn!(%error, "reading the {what} failed"),
        }
    }
}

/// What is made of some files, as they were when they last made sense.
pub(crate) struct Fresh<C> {
    files: Vec<PathBuf>,
    state: RwLock<State<C>>,
}

struct State<C> {
    bytes: Vec<Vec<u8>>,
    made: Arc<C>,
}

impl<C> Fresh<C> {
    /// Reads the files and makes something of their bytes.
    pub(crate) fn load(
        files: Vec<PathBuf>,
        make: impl Fn(&[Vec<u8>]) -> Result<C, TlsError>,
    ) -> Result<Self, TlsError> {
        let bytes = read(&files)?;
        let made = Arc::new(make(&bytes)?);
        Ok(Self { files, state: RwLock::new(State { bytes, made }) })
    }

    /// Does it again if the files have changed; returns whether they had.
    pub(crate) fn reload(&self, make: impl Fn(&[Vec<u8>]) -> Result<C, TlsError>) -> Result<bool, TlsError> {
        let bytes = read(&self.files)?;
        if bytes == self.state.read().unwrap_or_else(PoisonError::into_inner).bytes {
            return Ok(false);
        }
        let made = Arc::new(make(&bytes)?);
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = State { bytes, made };
        Ok(true)
    }

    /// What was made last.
    pub(crate) fn get(&self) -> Arc<C> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).made.clone()
    }
}

fn read(files: &[PathBuf]) -> Result<Vec<Vec<u8>>, TlsError> {
    files.iter().map(|file| pem::read(file)).collect()
}
