//! A client that costs little: plain HTTP/1.1 over kept connections, all on one thread. With a thread each, a router on the
//! same machine would pay for waking them.

use std::cell::Cell;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

/// One kind of request, over several connections.
pub(crate) struct Load {
    pub(crate) connections: usize,
    pub(crate) tokens: u32,
    pub(crate) stream: bool,
}

/// Runs a client to its end, on this thread.
pub(crate) fn block_on<T>(client: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, client)
}

impl Load {
    /// Sends `requests` of them; for each, the time to the first byte of its body and to the last.
    pub(crate) fn run(&self, http: &str, requests: usize) -> Vec<(Duration, Duration)> {
        let next = Cell::new(0);
        let connection = || async {
            let mut connection = Connection::open(http).await;
            let mut times = Vec::new();
            loop {
                let number = next.replace(next.get() + 1);
                if number >= requests {
                    return times;
                }
                times.push(connection.ask(&self.body(number)).await);
            }
        };
        let connections = (0..self.connections).map(|_| connection());
        block_on(futures_util::future::join_all(connections)).concat()
    }

    /// The body of a request, which has its number as its seed.
    pub(crate) fn body(&self, number: usize) -> String {
        let Self { tokens, stream, .. } = self;
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"Request {number}: why does the wind blow from the north \
             in this valley, and why does it blow for three days?\"}}],\"max_tokens\":{tokens},\"ignore_eos\":true,\
             \"seed\":{number},\"stream\":{stream}}}"
        )
    }
}

/// One connection, which is kept.
pub(crate) struct Connection {
    host: String,
    reader: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) async fn open(http: &str) -> Self {
        let host = http.trim_start_matches("http://").to_owned();
        let stream = TcpStream::connect(&host).await.expect("a router that listens");
        stream.set_nodelay(true).expect("a socket");
        Self { host, reader: BufReader::with_capacity(64 << 10, stream) }
    }

    async fn send(&mut self, body: &str) {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        self.reader.get_mut().write_all(&[head.as_bytes(), body.as_bytes()].concat()).await.expect("sent");
    }

    /// Sends a request and reads its answer; the time to the first byte of its body and to the last.
    pub(crate) async fn ask(&mut self, body: &str) -> (Duration, Duration) {
        let asked = Instant::now();
        self.send(body).await;
        let length = self.head().await;
        self.reader.fill_buf().await.expect("a body");
        let first = asked.elapsed();
        match length {
            Some(length) => self.skip(length).await,
            None => while self.chunk().await > 0 {},
        }
        (first, asked.elapsed())
    }

    /// Reads a head; the length of the body, or `None` if it comes in chunks.
    async fn head(&mut self) -> Option<u64> {
        let status = self.line().await;
        assert!(status.contains(" 200 "), "{status}");
        let mut length = None;
        loop {
            let line = self.line().await.to_lowercase();
            if line.is_empty() {
                return length;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(value.trim().parse().expect("a length"));
            }
        }
    }

    async fn chunk(&mut self) -> u64 {
        let size = u64::from_str_radix(&self.line().await, 16).expect("a chunk's size");
        self.skip(size + 2).await;
        size
    }

    async fn skip(&mut self, bytes: u64) {
        let mut body = (&mut self.reader).take(bytes);
        tokio::io::copy_buf(&mut body, &mut tokio::io::sink()).await.expect("a body");
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).await.expect("a line");
        line.trim_end().to_owned()
    }
}

/// Streams that have begun and are not read any further.
pub(crate) struct Open(#[expect(dead_code, reason = "held open")] TcpStream);

/// Streams that are opened together: fewer than a leader takes in at once.
const WAVE: usize = 200;

/// Opens `count` streams, each with its first event read.
pub(crate) async fn open(http: &str, count: usize) -> Vec<Open> {
    let load = Load { connections: 0, tokens: 400, stream: true };
    let mut open = Vec::with_capacity(count);
    while open.len() < count {
        let wave = open.len()..count.min(open.len() + WAVE);
        let begun = wave.map(|number| {
            let body = load.body(number);
            async move {
                let mut connection = Connection::open(http).await;
                connection.send(&body).await;
                connection.head().await;
                connection.chunk().await;
                Open(connection.reader.into_inner())
            }
        });
        open.extend(futures_util::future::join_all(begun).await);
    }
    open
}
