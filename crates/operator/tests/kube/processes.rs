//! Containers as processes of this machine: the galerne binary with the container's arguments, on loopback.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Volume};
use kube::{Api, ResourceExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::authority::Authority;
use crate::kubelet;

/// A container that has ended is started again after so long.
const RESTART_PAUSE: Duration = Duration::from_millis(300);
/// Pause between two questions whether a router is ready.
const PROBE_PERIOD: Duration = Duration::from_millis(50);

/// Where processes come from, and where routers among them listen.
#[derive(Clone)]
pub(crate) struct Processes {
    binary: PathBuf,
    /// gRPC addresses of routers, by their pods.
    routers: Arc<Mutex<BTreeMap<String, String>>>,
    /// Folders that stand for secrets, by the secrets' names.
    pub(crate) secrets: BTreeMap<String, PathBuf>,
}

impl Processes {
    pub(crate) fn new() -> Self {
        let test = std::env::current_exe().expect("this test's path");
        let binary = test.ancestors().nth(2).expect("target/release").join("galerne");
        assert!(binary.exists(), "{} is missing: run `make build` first", binary.display());
        Self { binary, routers: Arc::default(), secrets: BTreeMap::new() }
    }

    /// Where one of the routers listens, once there is one.
    pub(crate) fn router(&self) -> Option<String> {
        self.routers.lock().expect("no panic").values().next().cloned()
    }

    /// Runs a pod's container again and again, and says when it is ready; its process ends with SIGTERM when this is dropped.
    pub(crate) async fn run(&self, pods: &Api<Pod>, pod: &Pod) {
        let container =
            pod.spec.as_ref().and_then(|spec| spec.containers.first().cloned()).unwrap_or_default();
        let router = container.name == "router";
        let (http, grpc) = (free_port(), free_port());
        let arguments = self.arguments(pod, &container, &http, &grpc);
        let _listed = router.then(|| Listed::new(self, pod.name_any(), grpc));
        if container.name == "preload" {
            let done = self.start(&arguments).0.wait().await.expect("an end").success();
            let phase = if done { "Succeeded" } else { "Failed" };
            return kubelet::tell(pods, pod, serde_json::json!({ "phase": phase })).await;
        }
        loop {
            let mut process = self.start(&arguments);
            if let Some(path) = ready_path(&container) {
                until_ready(&http, path).await;
            }
            kubelet::ready(pods, pod).await;
            process.0.wait().await.ok();
            tokio::time::sleep(RESTART_PAUSE).await;
        }
    }
}

impl Processes {
    fn start(&self, arguments: &[String]) -> Process {
        let mut command = Command::new(&self.binary);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).env("GALERNE_LOG", "error");
        Process(command.spawn().expect("a process"))
    }

    /// The container's arguments, as they are on this machine: its volumes are folders, and all pods share its addresses.
    fn arguments(&self, pod: &Pod, container: &Container, http: &str, grpc: &str) -> Vec<String> {
        let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.clone()).unwrap_or_default();
        let folder = |volume: &Volume| {
            let secret = volume.secret.as_ref().and_then(|secret| secret.secret_name.as_ref());
            let folder = secret.map(|name| self.secrets[name].display().to_string());
            folder.or_else(|| Some(volume.host_path.as_ref()?.path.clone()))
        };
        let mounts = container.volume_mounts.iter().flatten().filter_map(|mount| {
            let volume = volumes.iter().find(|volume| volume.name == mount.name)?;
            Some((mount.mount_path.clone(), folder(volume)?))
        });
        let mounts: Vec<(String, String)> = mounts.collect();
        let local = |argument: &String| {
            let argument = argument.replace("$(POD_NAME)", &pod.name_any()).replace("$(POD_IP)", "127.0.0.1");
            match argument.split_once('=').map_or(argument.as_str(), |(name, _)| name) {
                "--http" => format!("--http={http}"),
                "--grpc" => format!("--grpc={grpc}"),
                "--admin" => "--admin=off".to_owned(),
                _ => mounts
                    .iter()
                    .fold(argument, |argument, (inside, outside)| argument.replace(inside, outside)),
            }
        };
        container.args.iter().flatten().map(local).collect()
    }
}

/// A process that is asked to end when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(pid) = self.0.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
            // It has ended already, or it will.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

/// A router that can be called.
struct Listed<'a>(&'a Processes, String);

impl<'a> Listed<'a> {
    fn new(processes: &'a Processes, pod: String, grpc: String) -> Self {
        processes.routers.lock().expect("no panic").insert(pod.clone(), grpc);
        Self(processes, pod)
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.routers.lock().expect("no panic").remove(&self.1);
    }
}

/// Where the container is asked whether it is ready, if it is.
fn ready_path(container: &Container) -> Option<&str> {
    container.readiness_probe.as_ref()?.http_get.as_ref()?.path.as_deref()
}

async fn until_ready(http: &str, path: &str) {
    while !probe(http, path).await.unwrap_or(false) {
        tokio::time::sleep(PROBE_PERIOD).await;
    }
}

/// Whether `path` says so.
async fn probe(http: &str, path: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(http).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: probe\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.starts_with("HTTP/1.1 200"))
}

/// An address that was free a moment ago.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").to_string()
}

/// A real etcd, with its data in a temporary folder.
pub(crate) struct Etcd {
    pub(crate) endpoint: String,
    _process: Process,
    _data: tempfile::TempDir,
}

impl Etcd {
    pub(crate) fn start() -> Self {
        Self::start_with("http", &[])
    }

    /// One that shows a certificate of `authority` and wants to see one.
    pub(crate) fn start_under_tls(authority: &Authority) -> Self {
        let (cert, key) = authority.issue(&["127.0.0.1"]);
        let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
        let ca = file("trusted-ca-file", &authority.ca());
        Self::start_with(
            "https",
            &[file("cert-file", &cert), file("key-file", &key), ca, "--client-cert-auth".into()],
        )
    }

    fn start_with(scheme: &str, flags: &[String]) -> Self {
        let program = root().join(".cache/bin/etcd");
        assert!(program.exists(), "{} is missing: run `make test`, which fetches it", program.display());
        let data = tempfile::tempdir().expect("a folder");
        let (client, peer) = (format!("{scheme}://{}", free_port()), format!("http://{}", free_port()));
        let mut command = Command::new(program);
        command
            .args(["--name", "test", "--unsafe-no-fsync", "--log-level", "error", "--data-dir"])
            .arg(data.path());
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("test={peer}")]).args(flags);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a process");
        Self { endpoint: client, _process: Process(process), _data: data }
    }
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}
