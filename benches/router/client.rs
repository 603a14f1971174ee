//! A client that costs little: plain HTTP/1.1 over kept connections, one thread each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// One kind of request, over several connections.
pub(crate) struct Load {
    pub(crate) connections: usize,
    pub(crate) tokens: u32,
    pub(crate) stream: bool,
}

impl Load {
    /// Sends `requests` of them; for each, the time to the first byte of its body and to the last.
    pub(crate) fn run(&self, http: &str, requests: usize) -> Vec<(Duration, Duration)> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let connection = || {
                let mut connection = Connection::open(http);
                let mut times = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        return times;
                    }
                    times.push(connection.ask(&self.body(number)));
                }
            };
            let threads: Vec<_> = (0..self.connections).map(|_| scope.spawn(connection)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("a connection that works")).collect()
        })
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
    pub(crate) fn open(http: &str) -> Self {
        let host = http.trim_start_matches("http://").to_owned();
        let stream = TcpStream::connect(&host).expect("a router that listens");
        stream.set_nodelay(true).expect("a socket");
        Self { host, reader: BufReader::with_capacity(64 << 10, stream) }
    }

    fn send(&mut self, body: &str) {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        self.reader.get_mut().write_all(&[head.as_bytes(), body.as_bytes()].concat()).expect("sent");
    }

    /// Sends a request and reads its answer; the time to the first byte of its body and to the last.
    pub(crate) fn ask(&mut self, body: &str) -> (Duration, Duration) {
        let asked = Instant::now();
        self.send(body);
        let length = self.head();
        self.reader.fill_buf().expect("a body");
        let first = asked.elapsed();
        match length {
            Some(length) => {
                std::io::copy(&mut self.reader.by_ref().take(length), &mut std::io::sink()).expect("a body");
            }
            None => while self.chunk() > 0 {},
        }
        (first, asked.elapsed())
    }

    /// Reads a head; the length of the body, or `None` if it comes in chunks.
    fn head(&mut self) -> Option<u64> {
        let status = self.line();
        assert!(status.contains(" 200 "), "{status}");
        let mut length = None;
        loop {
            let line = self.line().to_lowercase();
            if line.is_empty() {
                return length;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(value.trim().parse().expect("a length"));
            }
        }
    }

    fn chunk(&mut self) -> u64 {
        let size = u64::from_str_radix(&self.line(), 16).expect("a chunk's size");
        std::io::copy(&mut self.reader.by_ref().take(size + 2), &mut std::io::sink()).expect("a chunk");
        size
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }
}

/// Streams that have begun and are not read any further.
pub(crate) struct Open(#[expect(dead_code, reason = "held open")] TcpStream);

/// Streams that are opened together: fewer than a leader takes in at once.
const WAVE: usize = 200;

/// Opens `count` streams, each with its first event read.
pub(crate) fn open(http: &str, count: usize) -> Vec<Open> {
    let load = Load { connections: 0, tokens: 400, stream: true };
    let mut open = Vec::with_capacity(count);
    while open.len() < count {
        let wave = open.len()..count.min(open.len() + WAVE);
        let mut asked: Vec<_> = wave.clone().map(|_| Connection::open(http)).collect();
        for (number, connection) in wave.zip(&mut asked) {
            connection.send(&load.body(number));
        }
        open.extend(asked.into_iter().map(|mut connection| {
            connection.head();
            connection.chunk();
            Open(connection.reader.into_inner())
        }));
    }
    open
}
