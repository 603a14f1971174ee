//! Files over HTTP: in ranges, so that a broken connection costs one range and an interrupted download goes on.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, ensure};
use indicatif::ProgressBar;
use ureq::Agent;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);

/// Time for the body of one answer: 16 kB/s at least.
const BODY_TIMEOUT: Duration = Duration::from_secs(1024);

/// Bytes that are asked for at once.
const RANGE_BYTES: u64 = 16 << 20;

/// Tries of one range before the download is given up.
const TRIES_MAX: u32 = 5;

/// Bytes of a listing.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// A client, and the token that it shows to its first host (never to one that it is redirected to).
pub(super) struct Client {
    agent: Agent,
    token: Option<String>,
}

/// Why a request did not succeed.
enum Trouble {
    /// Another try may help.
    Again(String),
    Final(String),
}

impl Client {
    pub(super) fn new(token: Option<String>) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .user_agent(concat!("galerne/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(HEADERS_TIMEOUT))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .build();
        Self { agent: config.into(), token }
    }

    /// A small text.
    pub(super) fn text(&self, url: &str) -> anyhow::Result<String> {
        self.tries(url, || {
            let answer = self.get(url, None)?;
            let mut body = answer.into_body();
            body.with_config()
                .limit(TEXT_BYTES_MAX)
                .read_to_string()
                .map_err(|error| Trouble::Again(error.to_string()))
        })
    }

    /// Writes what `url` holds to `path`, going on where an earlier download into `path` has ended.
    pub(super) fn file(&self, url: &str, path: &Path, bar: &ProgressBar) -> anyhow::Result<()> {
        let mut have = fs::metadata(path).map_or(0, |file| file.len());
        bar.inc(have);
        loop {
            let before = have;
            let done = self.tries(url, || self.range(url, path, &mut have, bar))?;
            if done {
                return Ok(());
            }
            ensure!(have > before, "{url} sends nothing more after {have} bytes");
        }
    }

    /// Appends the next range; true when the file is whole.
    fn range(&self, url: &str, path: &Path, have: &mut u64, bar: &ProgressBar) -> Result<bool, Trouble> {
        let answer = self.get(url, Some(*have))?;
        let total = match answer.status() {
            StatusCode::RANGE_NOT_SATISFIABLE => return Ok(true), // there is nothing behind what we have
            StatusCode::PARTIAL_CONTENT => {
                Some(total(&answer).ok_or_else(|| odd("no total size in its ranges"))?)
            }
            _ => None,
        };
        let mut file = open(path, total.is_some())
            .map_err(|error| Trouble::Final(format!("cannot write {}: {error}", path.display())))?;
        if total.is_none() {
            bar.dec(*have); // it does not do ranges: from the start
            *have = 0;
        }
        let (mut body, mut chunk) = (answer.into_body().into_reader(), vec![0; 1 << 16]);
        loop {
            let read = body.read(&mut chunk).map_err(|error| Trouble::Again(error.to_string()))?;
            if read == 0 {
                return Ok(total.is_none_or(|total| *have >= total));
            }
            file.write_all(&chunk[..read])
                .map_err(|error| Trouble::Final(format!("cannot write {}: {error}", path.display())))?;
            *have += read as u64;
            bar.inc(read as u64);
        }
    }

    fn get(&self, url: &str, from: Option<u64>) -> Result<Response<ureq::Body>, Trouble> {
        let mut request = self.agent.get(url);
        if let Some(from) = from {
            request = request.header(header::RANGE, format!("bytes={from}-{}", from + RANGE_BYTES - 1));
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let answer = request.call().map_err(|error| Trouble::Again(error.to_string()))?;
        match answer.status() {
            StatusCode::RANGE_NOT_SATISFIABLE if from.is_some() => Ok(answer),
            status if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(odd("it wants a token that may read this: set HF_TOKEN"))
            }
            StatusCode::NOT_FOUND => Err(odd("there is no such thing")),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(Trouble::Again(status.to_string()))
            }
            status => Err(Trouble::Final(status.to_string())),
        }
    }

    fn tries<T>(&self, url: &str, mut attempt: impl FnMut() -> Result<T, Trouble>) -> anyhow::Result<T> {
        for again in 1.. {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Trouble::Again(_)) if again < TRIES_MAX => {
                    std::thread::sleep(Duration::from_millis(200 << again));
                }
                Err(Trouble::Again(why) | Trouble::Final(why)) => bail!("cannot fetch {url}: {why}"),
            }
        }
        unreachable!("tries end")
    }
}

fn odd(what: &str) -> Trouble {
    Trouble::Final(what.to_owned())
}

fn open(path: &Path, append: bool) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(append).write(true).truncate(!append).open(path)
}

/// N of `Content-Range: bytes A-B/N`.
fn total(answer: &Response<ureq::Body>) -> Option<u64> {
    let range = answer.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.rsplit_once('/')?.1.parse().ok()
}
