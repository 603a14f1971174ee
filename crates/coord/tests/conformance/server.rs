//! The two kinds of stores under test.

use std::cell::{Cell, RefCell};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use etcd_client::Client;
use galerne_coord::{Coord, CoordError, embedded};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const START_DEADLINE: Duration = Duration::from_secs(20);

/// A running store on a port of its own; it ends with the test.
pub(crate) struct Server {
    pub(crate) endpoint: String,
    kind: Kind,
    clusters: Cell<u32>,
}

enum Kind {
    Embedded(RefCell<(CancellationToken, JoinHandle<Result<(), CoordError>>)>),
    Etcd { child: RefCell<Process>, data: TempDir, peer: String },
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    pub(crate) async fn embedded() -> Self {
        let endpoint = free_address();
        let running = RefCell::new(serve(&endpoint).await);
        Self { endpoint, kind: Kind::Embedded(running), clusters: Cell::new(0) }
    }

    pub(crate) async fn etcd() -> Self {
        let (endpoint, peer) = (free_address(), free_address());
        let data = TempDir::new().unwrap();
        let child = RefCell::new(spawn_etcd(&endpoint, &peer, data.path()));
        let server = Self { endpoint, kind: Kind::Etcd { child, data, peer }, clusters: Cell::new(0) };
        server.coord().await;
        server
    }

    /// Stops the store and starts it again on the same port. A real etcd comes back with its data, the
    /// embedded store without.
    pub(crate) async fn restart(&self) {
        match &self.kind {
            Kind::Embedded(running) => {
                let (stop, stopped) =
                    running.replace((CancellationToken::new(), tokio::spawn(async { Ok(()) })));
                stop.cancel();
                stopped.await.unwrap().unwrap();
                running.replace(serve(&self.endpoint).await);
            }
            Kind::Etcd { child, data, peer } => {
                let mut process = child.borrow_mut();
                process.0.kill().unwrap();
                process.0.wait().unwrap();
                *process = spawn_etcd(&self.endpoint, peer, data.path());
            }
        }
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect([&self.endpoint], None).await.unwrap()
    }

    /// A cluster of the case's own.
    pub(crate) async fn coord(&self) -> Coord {
        self.clusters.set(self.clusters.get() + 1);
        self.coord_of(&format!("c{}", self.clusters.get())).await
    }

    pub(crate) async fn coord_of(&self, cluster: &str) -> Coord {
        Coord::connect(std::slice::from_ref(&self.endpoint), cluster, START_DEADLINE).await.unwrap()
    }
}

async fn serve(endpoint: &str) -> (CancellationToken, JoinHandle<Result<(), CoordError>>) {
    let listener = TcpListener::bind(endpoint).await.unwrap();
    let stop = CancellationToken::new();
    (stop.clone(), tokio::spawn(async move { embedded::serve(listener, stop.cancelled()).await }))
}

fn spawn_etcd(endpoint: &str, peer: &str, data: &Path) -> Process {
    let mut command = Command::new(tool("etcd", "GALERNE_ETCD"));
    command
        .args(["--name=test", "--log-level=fatal", "--unsafe-no-fsync"])
        // Leases may then be as short as 1 s.
        .args(["--heartbeat-interval=20", "--election-timeout=200"])
        .arg(format!("--data-dir={}", data.display()))
        .args([
            format!("--listen-client-urls=http://{endpoint}"),
            format!("--advertise-client-urls=http://{endpoint}"),
        ])
        .args([
            format!("--listen-peer-urls=http://{peer}"),
            format!("--initial-advertise-peer-urls=http://{peer}"),
        ])
        .arg(format!("--initial-cluster=test=http://{peer}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    Process(command.spawn().unwrap_or_else(|error| {
        panic!("cannot start etcd ({error}): set GALERNE_ETCD to its path, or let `make test` fetch it")
    }))
}

/// A tool of etcd's: as the environment says, else from the workspace's cache, else from the PATH.
pub(crate) fn tool(name: &str, variable: &str) -> PathBuf {
    let cached = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/bin").join(name);
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None if cached.exists() => cached,
        None => name.into(),
    }
}

/// An address that nobody holds, and that the system gives to no outgoing connection while its server is away:
/// Linux takes those ports from 32768 on.
pub(crate) fn free_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 12_000 + (std::process::id().wrapping_mul(97).wrapping_add(step)) % 20_000;
        let address = format!("127.0.0.1:{port}");
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}
