//! A model hub on loopback: lists one repository, serves ranges, and breaks off now and then.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;

/// Bytes of a body after which each second connection breaks.
const CUT_BYTES: usize = 300_000;

pub(crate) struct Hub {
    pub(crate) url: String,
    shared: Arc<Shared>,
}

struct Shared {
    folder: PathBuf,
    lies: AtomicBool,
    asked: AtomicUsize,
    cut: AtomicUsize,
}

impl Hub {
    /// Serves the files of `folder` as the repository muse/bard, for as long as the test's process lives.
    pub(crate) fn start(folder: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            lies: AtomicBool::new(false),
            asked: AtomicUsize::new(0),
            cut: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serving.answer(stream).ok(); // a client that leaves is its own business
            }
        });
        Self { url, shared }
    }

    /// From now on it tells another SHA-256 than the files have.
    pub(crate) fn lie(&self) {
        self.shared.lies.store(true, Ordering::Relaxed);
    }

    /// Bodies that were broken off.
    pub(crate) fn cut(&self) -> usize {
        self.shared.cut.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// One request, one answer, and the connection's end.
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut from = None;
        for line in lines {
            let line = line?.to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(range) = line.strip_prefix("range: bytes=") {
                from = range.split('-').next().and_then(|start| start.parse::<usize>().ok());
            }
        }
        if path == "/api/models/muse/bard/tree/main?recursive=true" {
            return write(&mut stream, "200 OK", "", self.listing().as_bytes());
        }
        let name = path.strip_prefix("/muse/bard/resolve/main/");
        let Some(bytes) = name.and_then(|name| fs::read(self.folder.join(name)).ok()) else {
            return write(&mut stream, "404 Not Found", "", b"");
        };
        let from = from.unwrap_or(0);
        if from >= bytes.len() {
            return write(&mut stream, "416 Range Not Satisfiable", "", b"");
        }
        let range = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
        let rest = &bytes[from..];
        if rest.len() > CUT_BYTES && self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            self.cut.fetch_add(1, Ordering::Relaxed);
            return head(&mut stream, "206 Partial Content", &range, rest.len())
                .and_then(|()| stream.write_all(&rest[..CUT_BYTES]));
        }
        write(&mut stream, "206 Partial Content", &range, rest)
    }

    fn listing(&self) -> String {
        let mut files = vec![json!({"type": "file", "path": "README.md", "size": 1, "oid": "x"})];
        for entry in fs::read_dir(&self.folder).expect("the folder").flatten() {
            let (name, size) =
                (entry.file_name().into_string().expect("UTF-8"), entry.metadata().expect("a file").len());
            let mut file = json!({"type": "file", "path": name, "size": size, "oid": "x"});
            if name.ends_with(".safetensors") && self.lies.load(Ordering::Relaxed) {
                file["lfs"] = json!({"oid": "0".repeat(64), "size": size, "pointerSize": 1});
            }
            files.push(file);
        }
        json!(files).to_string()
    }
}

fn write(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    head(stream, status, headers, body.len())?;
    stream.write_all(body)
}

fn head(stream: &mut TcpStream, status: &str, headers: &str, length: usize) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n")
}
