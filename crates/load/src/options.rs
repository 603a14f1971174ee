//! What is to be run, against whom.

use std::path::PathBuf;
use std::time::Duration;

use galerne_workload::{Rules, TokenIds, Workload};
use hyper::Uri;

use crate::error::LoadError;

/// A run.
pub struct Options {
    /// Whom to ask.
    pub target: TargetOptions,
    /// What, and when.
    pub workload: Workload,
    /// How requests follow each other.
    pub mode: Mode,
    /// Requests at most.
    pub requests_max: usize,
    /// No request is sent from this time on.
    pub duration: Duration,
    /// What counts.
    pub rules: Rules,
    /// What connections and requests may take.
    pub limits: Limits,
}

/// How requests follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Each is sent when it is due.
    Open {
        /// Requests open at once: beyond it one waits, which shows in its latency and in the send lag.
        in_flight_max: usize,
    },
    /// Each is sent when another one has ended.
    Closed {
        /// Requests open at once.
        concurrency: usize,
    },
}

/// Whom to ask, and how.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Where, and in which protocol.
    pub endpoint: Endpoint,
    /// Model to ask for; without it the server chooses.
    pub model: Option<String>,
    /// Shown with every request.
    pub api_key: Option<String>,
    /// Authority of the server's certificate, and a certificate of one's own.
    pub tls: Option<(PathBuf, Option<(PathBuf, PathBuf)>)>,
    /// 0 is greedy.
    pub temperature: f64,
    /// Answers go on past the model's end-of-sequence token, so that they are as long as was asked.
    pub ignore_eos: bool,
    /// What made-up prompts consist of where they are sent as token ids.
    pub token_ids: TokenIds,
}

/// What connections and requests may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time for a connection, TLS included.
    pub connect_s_max: Duration,
    /// Time for a request, from when its sending begins to its end.
    pub request_s_max: Duration,
    /// Connections of gRPC, over which requests take turns; over HTTP each open request has its own.
    pub grpc_connections: usize,
}

/// Which of an endpoint's APIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`: the prompt is one message of text.
    Chat,
    /// `/v1/completions`: the prompt is a list of token ids, unless a trace has text.
    Completions,
    /// `galerne.v1.Galerne/Generate`: the same.
    Grpc,
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or IP address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Path of HTTP requests.
    pub path: String,
    /// Whether it speaks TLS.
    pub secure: bool,
    /// Which API.
    pub api: Api,
}

impl Endpoint {
    /// Of `http://HOST:PORT[/PATH]`, `https://…`, `grpc://HOST:PORT` or `grpcs://…`; HTTP's path is `/v1` unless it is
    /// given. `http_api` is spoken over HTTP.
    ///
    /// # Errors
    /// What is no such address.
    pub fn parse(url: &str, http_api: Api) -> Result<Self, LoadError> {
        let wrong = || LoadError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(wrong)?.to_owned();
        let (api, secure, port) = match uri.scheme_str() {
            Some("http") => (http_api, false, 80),
            Some("https") => (http_api, true, 443),
            Some("grpc") => (Api::Grpc, false, 8001),
            Some("grpcs") => (Api::Grpc, true, 8001),
            _ => return Err(wrong()),
        };
        let base = match uri.path().trim_end_matches('/') {
            "" => "/v1",
            path => path,
        };
        let path = match api {
            Api::Chat => format!("{base}/chat/completions"),
            Api::Completions => format!("{base}/completions"),
            Api::Grpc => String::new(),
        };
        Ok(Self { host, port: uri.port_u16().unwrap_or(port), path, secure, api })
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// As a person would write it.
impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = match (self.api, self.secure) {
            (Api::Grpc, false) => "grpc",
            (Api::Grpc, true) => "grpcs",
            (_, false) => "http",
            (_, true) => "https",
        };
        write!(f, "{scheme}://{}{}", self.address(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_tell_the_protocol() {
        for (url, api, shown) in [
            ("http://127.0.0.1:8000", Api::Chat, "http://127.0.0.1:8000/v1/chat/completions"),
            ("http://host:8000/v1/", Api::Completions, "http://host:8000/v1/completions"),
            (
                "https://api.example.com/openai/v1",
                Api::Chat,
                "https://api.example.com:443/openai/v1/chat/completions",
            ),
            ("grpc://[::1]:9000", Api::Chat, "grpc://[::1]:9000"),
            ("grpcs://router", Api::Chat, "grpcs://router:8001"),
        ] {
            assert_eq!(Endpoint::parse(url, api).unwrap().to_string(), shown);
        }
        for wrong in ["", "127.0.0.1:8000", "ftp://host", "http://", "/v1"] {
            assert!(Endpoint::parse(wrong, Api::Chat).is_err(), "{wrong}");
        }
    }
}
