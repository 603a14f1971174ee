//! Limits of the real thing: a queue that is full, files that may be open.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use crate::setup::{self, Cluster};

/// Begins a request; its answer's head is read when that is there.
fn begin(cluster: &Cluster) -> TcpStream {
    let body = r#"{"prompt": [5], "max_tokens": 1000, "ignore_eos": true, "stream": true}"#;
    let address = cluster.http.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).expect("a router");
    let head = format!("host: x\r\nconnection: close\r\ncontent-length: {}", body.len());
    write!(stream, "POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}").expect("sent");
    stream
}

#[test]
fn a_group_lets_so_many_requests_wait_and_tells_the_next_to_come_again() {
    let arguments = ["--rehearse", "step_ns=20000000,token_ns=0", "--sequences-max", "1"];
    let cluster = Cluster::up(&setup::bard(), &[&arguments[..], &["--waiting-requests-max", "1"]].concat());
    let mut runs = BufReader::new(begin(&cluster));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(runs.read_line(&mut line).expect("a line") > 0, "no stream");
    }
    // One of these waits, whichever came first; the others are refused while it does.
    let mut others: Vec<_> = (0..3).map(|_| begin(&cluster)).collect();
    let (told, refused) = std::sync::mpsc::channel();
    for stream in &others {
        let (told, mut stream) = (told.clone(), stream.try_clone().expect("a socket"));
        std::thread::spawn(move || {
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer); // the one that waits ends with this test
            let _ = told.send(answer);
        });
    }
    for _ in 0..2 {
        let answer = refused.recv_timeout(crate::process::PATIENCE).expect("a refusal");
        assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("retry-after: 1"), "{answer}");
        assert!(answer.contains("1 requests are waiting already"), "{answer}");
    }
    others.clear();
    drop(runs);

    let limits = std::fs::read_to_string(format!("/proc/{}/limits", cluster.process.pid())).expect("limits");
    let files = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line on files");
    let files: Vec<_> = files["Max open files".len()..].split_whitespace().collect();
    assert_eq!(files[0], files[1], "the soft limit is the hard one");
}
