//! What a person who types `etcdctl` sees.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::rc::Rc;

use crate::kv::put;
use crate::server::{Server, tool};

pub(crate) async fn a_curious_person_looks_around(server: Rc<Server>) {
    let endpoint = server.endpoint.clone();
    let start = put(&mut server.client().await, "before", "").await + 1;
    // The embedded store runs on this thread.
    tokio::task::spawn_blocking(move || look_around(&endpoint, start)).await.unwrap();
}

fn look_around(endpoint: &str, start: i64) {
    let etcdctl = |args: &[&str]| {
        let output = Command::new(tool("etcdctl", "GALERNE_ETCDCTL"))
            .arg(format!("--endpoints={endpoint}"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("etcdctl should start: `make test` fetches it");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(output.stderr));
        text(output.stdout)
    };
    assert_eq!(etcdctl(&["put", "look/a", "1"]), "OK\n");
    assert_eq!(etcdctl(&["put", "--prev-kv", "look/a", "2"]), "OK\nlook/a\n1\n");
    assert_eq!(etcdctl(&["put", "look/b", "3"]), "OK\n");
    assert_eq!(etcdctl(&["get", "--prefix", "look/"]), "look/a\n2\nlook/b\n3\n");
    assert_eq!(etcdctl(&["get", "--prefix", "--keys-only", "--limit=1", "look/"]), "look/a\n\n");
    let granted = etcdctl(&["lease", "grant", "60"]);
    let lease = granted.split_whitespace().nth(1).unwrap();
    assert_eq!(etcdctl(&["put", &format!("--lease={lease}"), "look/c", "4"]), "OK\n");
    let left = etcdctl(&["lease", "timetolive", "--keys", lease]);
    assert!(left.contains("granted with TTL(60s)") && left.contains("look/c"), "{left}");
    assert!(etcdctl(&["lease", "keep-alive", "--once", lease]).contains("keepalived with TTL(60)"));
    assert!(etcdctl(&["lease", "revoke", lease]).contains("revoked"));
    assert_eq!(etcdctl(&["get", "look/c"]), "");
    assert_eq!(etcdctl(&["del", "look/b"]), "1\n");
    assert!(etcdctl(&["endpoint", "status"]).contains("3.5."));
    assert_eq!(
        watched(endpoint, start, 9),
        ["PUT", "look/a", "1", "PUT", "look/a", "2", "PUT", "look/b", "3"]
    );
}

/// The first lines of a watch of all that has happened below `look/` since revision `start`.
fn watched(endpoint: &str, start: i64, lines: usize) -> Vec<String> {
    let mut watch = Command::new(tool("etcdctl", "GALERNE_ETCDCTL"))
        .arg(format!("--endpoints={endpoint}"))
        .args(["watch", "--prefix", &format!("--rev={start}"), "look/"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let seen =
        BufReader::new(watch.stdout.take().unwrap()).lines().take(lines).collect::<Result<_, _>>().unwrap();
    watch.kill().unwrap();
    watch.wait().unwrap();
    seen
}
