//! Flags of logs and spans, which all commands share and rank processes inherit.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use galerne_telemetry::{Export, LogFormat, Options, Telemetry};

use crate::Command;

const LOG: &str = "GALERNE_LOG";
const LOG_FORMAT: &str = "GALERNE_LOG_FORMAT";
const OTLP_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const OTLP_CA: &str = "OTEL_EXPORTER_OTLP_CERTIFICATE";
const OTLP_CERT: &str = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
const OTLP_KEY: &str = "OTEL_EXPORTER_OTLP_CLIENT_KEY";
const TRACE_RATIO: &str = "GALERNE_TRACE_RATIO";

/// What a process tells of itself, and to whom.
#[derive(Args)]
pub(crate) struct TelemetryArgs {
    /// What to log to standard error: a level, or a filter such as `warn,galerne_worker=debug`.
    #[arg(long, global = true, env = LOG, default_value = "warn", value_name = "FILTER", value_parser = galerne_telemetry::filter)]
    log: String,
    /// How a line of the log looks.
    #[arg(long, global = true, env = LOG_FORMAT, default_value = "text", value_name = "FORMAT")]
    log_format: Format,
    /// OpenTelemetry collector that takes spans over gRPC, e.g. `http://127.0.0.1:4317` or `https://HOST:4317`; without
    /// it there are none. Headers for it, such as a key, stand in OTEL_EXPORTER_OTLP_HEADERS.
    #[arg(long, global = true, env = OTLP_ENDPOINT, value_name = "URL", value_parser = endpoint)]
    otlp_endpoint: Option<String>,
    /// Authority of the collector's certificate (PEM); by default those that the system trusts.
    #[arg(long, global = true, env = OTLP_CA, value_name = "FILE")]
    otlp_ca: Option<PathBuf>,
    /// Certificate to show to the collector (PEM), if it wants to see one.
    #[arg(long, global = true, env = OTLP_CERT, value_name = "FILE", requires = "otlp_key")]
    otlp_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, global = true, env = OTLP_KEY, value_name = "FILE", requires = "otlp_cert")]
    otlp_key: Option<PathBuf>,
    /// Share of requests to trace, from 0 to 1. A client's own `traceparent` decides for its request.
    #[arg(long, global = true, env = TRACE_RATIO, default_value_t = 0.01, value_name = "RATIO", value_parser = ratio)]
    trace_ratio: f64,
}

fn ratio(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a share is a number from 0 to 1".to_owned())
}

/// Empty is none, as OpenTelemetry's variables have it.
fn endpoint(text: &str) -> Result<String, String> {
    let url = text.is_empty() || text.starts_with("http://") || text.starts_with("https://");
    let says = "a collector is a URL, such as http://127.0.0.1:4317 or https://HOST:4317";
    if url { Ok(text.to_owned()) } else { Err(says.to_owned()) }
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Text,
    Json,
}

impl TelemetryArgs {
    /// Puts everything into the environment, which the rank processes inherit. To be called before any other thread
    /// runs.
    pub(crate) fn pass_on(&self) {
        let Self { log, log_format, otlp_endpoint, otlp_ca, otlp_cert, otlp_key, trace_ratio } = self;
        let format = match log_format {
            Format::Text => "text",
            Format::Json => "json",
        };
        let ratio = trace_ratio.to_string();
        let given = [(LOG, log.as_ref()), (LOG_FORMAT, OsStr::new(format)), (TRACE_RATIO, ratio.as_ref())];
        let endpoint = otlp_endpoint.as_deref().map(|endpoint| (OTLP_ENDPOINT, OsStr::new(endpoint)));
        let files = [(OTLP_CA, otlp_ca), (OTLP_CERT, otlp_cert), (OTLP_KEY, otlp_key)];
        let files = files.into_iter().filter_map(|(name, file)| Some((name, file.as_ref()?.as_os_str())));
        for (name, value) in given.into_iter().chain(endpoint).chain(files) {
            // SAFETY: no other thread runs yet.
            unsafe { std::env::set_var(name, value) };
        }
    }

    /// Starts the telemetry of a process that runs `command`, within its runtime.
    pub(crate) fn start(self, command: &Command) -> anyhow::Result<Telemetry> {
        let (service, instance) = match command {
            Command::Up(_) | Command::Router(_) => ("galerne-router", on_host()),
            Command::Worker(_) => ("galerne-worker", on_host()),
            Command::Rank(rank) => ("galerne-worker", rank.name()),
            _ => ("galerne-cli", on_host()),
        };
        let serves = service != "galerne-cli";
        let endpoint = self.otlp_endpoint.filter(|endpoint| serves && !endpoint.is_empty());
        let format = match self.log_format {
            Format::Text => LogFormat::Text,
            Format::Json => LogFormat::Json,
        };
        let (ca, identity) = (self.otlp_ca, self.otlp_cert.zip(self.otlp_key));
        let export = endpoint.map(|endpoint| Export { endpoint, ca, identity, ratio: self.trace_ratio });
        Ok(galerne_telemetry::start(Options { filter: self.log, format, export, service, instance })?)
    }
}

/// A name of this process among all of its kind.
fn on_host() -> String {
    let host = crate::args::host_name(std::net::Ipv4Addr::LOCALHOST.into());
    format!("{host}/{}", std::process::id())
}
