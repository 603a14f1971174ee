//! A server that says what a test wants, byte by byte.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What is done with a request.
#[derive(Clone)]
pub(crate) enum Act {
    /// These bytes are sent.
    Say(String),
    /// These bytes are sent, then the connection is closed.
    Cut(String),
    /// Nothing, for ever.
    Hang,
}

/// What it has seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) connections: usize,
    /// Head and body of each request.
    pub(crate) requests: Vec<(String, serde_json::Value)>,
}

pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) seen: Arc<Mutex<Seen>>,
}

impl Server {
    /// Does with the n-th request what the n-th of `acts` says; the last of them for all others.
    pub(crate) async fn start(acts: Vec<Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let serves = seen.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                serves.lock().unwrap().connections += 1;
                tokio::spawn(serve(stream, acts.clone(), serves.clone()));
            }
        });
        Self { url, seen }
    }
}

async fn serve(stream: TcpStream, acts: Vec<Act>, seen: Arc<Mutex<Seen>>) {
    let mut stream = BufReader::new(stream);
    while let Some((head, body)) = request(&mut stream).await {
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.requests.push((head, body));
            seen.requests.len() - 1
        };
        match &acts[number.min(acts.len() - 1)] {
            Act::Say(bytes) => stream.write_all(bytes.as_bytes()).await.unwrap(),
            Act::Cut(bytes) => {
                stream.write_all(bytes.as_bytes()).await.unwrap();
                return;
            }
            Act::Hang => std::future::pending().await,
        }
    }
}

async fn request(stream: &mut BufReader<TcpStream>) -> Option<(String, serde_json::Value)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    Some((head, serde_json::from_slice(&body).unwrap()))
}

/// An answer that is not streamed.
pub(crate) fn plain(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// The beginning of a stream: the given events, each in a chunk.
pub(crate) fn events(events: &[&str]) -> String {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = |event: &&str| format!("{:x}\r\ndata: {event}\n\n\r\n", event.len() + 8);
    head.to_owned() + &events.iter().map(chunk).collect::<String>()
}

/// A whole stream of three tokens, which cost 7 and 3.
pub(crate) fn stream() -> String {
    let token = "{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}";
    let first = "{\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}";
    let usage =
        "{\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3,\"total_tokens\":10}}";
    events(&[first, token, token, token, usage, "[DONE]"]) + "0\r\n\r\n"
}
