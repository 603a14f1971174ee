//! What one face's connections may take.

use std::time::Duration;

use galerne_types::limits::HTTP_BODY_BYTES_MAX;

/// The limits of each face's connections; each is a flag of the router, with its unit last in the name.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Connections at once.
    pub connections_max: usize,
    /// Connections at once from one address.
    pub connections_per_peer_max: usize,
    /// Time for a request's line and headers, from their first byte; for the first request, from the connection on.
    pub header_s_max: Duration,
    /// Bytes of a request's line and headers together.
    pub header_bytes_max: usize,
    /// Headers of one request.
    pub headers_max: usize,
    /// Bytes of a request's path and query.
    pub target_bytes_max: usize,
    /// Time that a connection may stay open without a request.
    pub idle_s_max: Duration,
    /// Bytes of one request's body.
    pub body_bytes_max: usize,
    /// Time for a request's whole body.
    pub body_s_max: Duration,
    /// Time between two bytes of a body.
    pub body_idle_s_max: Duration,
    /// Time for which a reader may take nothing of what waits for it.
    pub write_stall_s_max: Duration,
    /// Bytes that the system may hold for a reader that is slow.
    pub send_buffer_bytes: usize,
    /// Requests at once on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// Time between two pings on an HTTP/2 connection; one that answers none for as long is closed.
    pub ping_s: Duration,
}

impl ServerLimits {
    /// The limits that hold unless flags say otherwise.
    pub const DEFAULT: Self = Self {
        connections_max: 16_384,
        connections_per_peer_max: 12_288, // one address alone, a proxy or a flood, leaves room for others
        header_s_max: Duration::from_secs(10),
        header_bytes_max: 16 << 10,
        headers_max: 100,
        target_bytes_max: 4 << 10,
        idle_s_max: Duration::from_secs(120),
        body_bytes_max: HTTP_BODY_BYTES_MAX,
        body_s_max: Duration::from_secs(60),
        body_idle_s_max: Duration::from_secs(10),
        write_stall_s_max: Duration::from_secs(30),
        send_buffer_bytes: 128 << 10,
        streams_per_connection_max: 4_096,
        ping_s: Duration::from_secs(20),
    };
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
