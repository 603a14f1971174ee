//! Flags for what connections and requests may take of a router.

use std::time::Duration;

use clap::Args;
use galerne_router::{RequestLimits, ServerLimits};

const DEFAULT: ServerLimits = ServerLimits::DEFAULT;

/// Limits of each face's connections, and of requests.
#[derive(Args, Clone)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Connections at once on each face; one more is answered 503.
    #[arg(long, default_value_t = DEFAULT.connections_max, value_name = "COUNT", value_parser = count)]
    connections_max: usize,
    /// Connections at once from one address on each face; one more is answered 429.
    #[arg(long, default_value_t = DEFAULT.connections_per_peer_max, value_name = "COUNT", value_parser = count)]
    connections_per_peer_max: usize,
    /// Time for a request's line and headers.
    #[arg(long, default_value_t = seconds_of(DEFAULT.header_s_max), value_name = "SECONDS", value_parser = seconds)]
    header_s_max: f64,
    /// Bytes of a request's line and headers together.
    #[arg(long, default_value_t = DEFAULT.header_bytes_max, value_name = "BYTES", value_parser = header_bytes)]
    header_bytes_max: usize,
    /// Headers of one request.
    #[arg(long, default_value_t = DEFAULT.headers_max, value_name = "COUNT", value_parser = count)]
    headers_max: usize,
    /// Bytes of a request's path and query.
    #[arg(long, default_value_t = DEFAULT.target_bytes_max, value_name = "BYTES", value_parser = count)]
    target_bytes_max: usize,
    /// Time that a connection may stay open without a request.
    #[arg(long, default_value_t = seconds_of(DEFAULT.idle_s_max), value_name = "SECONDS", value_parser = seconds)]
    idle_s_max: f64,
    /// Bytes of one request: an HTTP body or a gRPC message.
    #[arg(long, default_value_t = DEFAULT.body_bytes_max, value_name = "BYTES", value_parser = count)]
    body_bytes_max: usize,
    /// Time for a request's whole body.
    #[arg(long, default_value_t = seconds_of(DEFAULT.body_s_max), value_name = "SECONDS", value_parser = seconds)]
    body_s_max: f64,
    /// Time between two bytes of a body.
    #[arg(long, default_value_t = seconds_of(DEFAULT.body_idle_s_max), value_name = "SECONDS", value_parser = seconds)]
    body_idle_s_max: f64,
    /// Time for which a reader may take nothing of its answer before it is cut.
    #[arg(long, default_value_t = seconds_of(DEFAULT.write_stall_s_max), value_name = "SECONDS", value_parser = seconds)]
    write_stall_s_max: f64,
    /// Bytes that the system may hold for a reader that is slow.
    #[arg(long, default_value_t = DEFAULT.send_buffer_bytes, value_name = "BYTES", value_parser = count)]
    send_buffer_bytes: usize,
    /// Requests at once on one gRPC connection.
    #[arg(long, default_value_t = DEFAULT.streams_per_connection_max, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    streams_per_connection_max: u32,
    /// Time between two pings on a gRPC connection; one that answers none for as long is closed.
    #[arg(long, default_value_t = seconds_of(DEFAULT.ping_s), value_name = "SECONDS", value_parser = seconds)]
    ping_s: f64,
    /// Requests that the router works on at once; one more is answered 429.
    #[arg(long, default_value_t = RequestLimits::DEFAULT.requests_max, value_name = "COUNT", value_parser = count)]
    requests_max: usize,
}

impl LimitArgs {
    /// Of connections.
    pub(crate) fn connections(&self) -> ServerLimits {
        ServerLimits {
            connections_max: self.connections_max,
            connections_per_peer_max: self.connections_per_peer_max,
            header_s_max: Duration::from_secs_f64(self.header_s_max),
            header_bytes_max: self.header_bytes_max,
            headers_max: self.headers_max,
            target_bytes_max: self.target_bytes_max,
            idle_s_max: Duration::from_secs_f64(self.idle_s_max),
            body_bytes_max: self.body_bytes_max,
            body_s_max: Duration::from_secs_f64(self.body_s_max),
            body_idle_s_max: Duration::from_secs_f64(self.body_idle_s_max),
            write_stall_s_max: Duration::from_secs_f64(self.write_stall_s_max),
            send_buffer_bytes: self.send_buffer_bytes,
            streams_per_connection_max: self.streams_per_connection_max,
            ping_s: Duration::from_secs_f64(self.ping_s),
        }
    }

    /// Of requests.
    pub(crate) fn requests(&self) -> RequestLimits {
        RequestLimits { requests_max: self.requests_max }
    }
}

/// The longest time that a limit may be: a day.
const SECONDS_MAX: f64 = 86_400.0;

/// The most of anything that is counted here.
const COUNT_MAX: usize = 1 << 30;

fn seconds_of(time: Duration) -> f64 {
    time.as_secs_f64()
}

fn seconds(text: &str) -> Result<f64, String> {
    let time = text.parse().ok().filter(|time| (0.001..=SECONDS_MAX).contains(time));
    time.ok_or_else(|| format!("a time is a number of seconds from 0.001 to {SECONDS_MAX}"))
}

fn count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=COUNT_MAX).contains(count));
    count.ok_or_else(|| format!("a limit is a whole number from 1 to {COUNT_MAX}"))
}

fn header_bytes(text: &str) -> Result<usize, String> {
    let bytes = count(text)?;
    let fits = (1 << 10..=1 << 20).contains(&bytes);
    fits.then_some(bytes).ok_or_else(|| "headers may have from 1024 to 1048576 bytes".to_owned())
}
