//! What many clusters cost the operator: `cargo run --release -p galerne-operator --example scale -- 1000 8`.
//!
//! The API server and the store are this process, the operator is another one of the same program. Pods are there and run; ranks are not played, so
//! groups begin and never serve.

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use galerne_apiserver::ApiServer;
use galerne_operator::api::{GalerneCluster, crd_yaml};
use galerne_operator::run::{Options, run};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Config};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Nothing is written and little is done for so long: the operator has settled.
const QUIET: Duration = Duration::from_secs(4);
/// Little, as a share of a core.
const LITTLE: f64 = 0.05;
/// So long it is watched while nothing happens.
const IDLE: Duration = Duration::from_secs(30);
/// What this program is told when it is the operator.
const OPERATES: &str = "operate";
/// Clock ticks of a second in /proc.
const TICKS: f64 = 100.0;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [operates] if operates == OPERATES => operate().await,
        [clusters, groups] => {
            measure(clusters.parse().expect("a number"), groups.parse().expect("a number")).await;
        }
        _ => panic!("name the clusters, and the groups of each"),
    }
}

/// The other process: an operator as `galerne operator` runs it, until it is told to end.
async fn operate() {
    let client = Client::try_default().await.expect("the cluster that KUBECONFIG names");
    let options = Options {
        namespaces: Vec::new(),
        lease_namespace: "scale".into(),
        identity: "scale".into(),
        image: "galerne:scale".into(),
        etcd: galerne_coord::EtcdAccess::default(),
        cluster_tls: None,
        admin: None,
    };
    let stop = CancellationToken::new();
    let mut told = signal(SignalKind::terminate()).expect("a signal");
    let stopped = stop.clone();
    tokio::spawn(async move {
        told.recv().await;
        stopped.cancel();
    });
    run(client, options, stop).await.expect("the lease");
}

async fn measure(clusters: usize, groups: usize) {
    let server = ApiServer::start().await.expect("an API server");
    let store = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let etcd = format!("http://{}", store.local_addr().expect("an address"));
    tokio::spawn(galerne_coord::embedded::serve(store, std::future::pending()));
    let client = Client::try_from(Config::new(server.url().parse().expect("a URL"))).expect("a client");
    fill(&client, &etcd, clusters, groups).await;

    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("config");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{ "name": "x", "cluster": { "server": server.url() } }],
        "users": [{ "name": "x", "user": {} }],
        "contexts": [{ "name": "x", "context": { "cluster": "x", "user": "x", "namespace": "scale" } }],
    });
    std::fs::write(&kubeconfig, config.to_string()).expect("a file");
    let start = || Operator::start(&kubeconfig);

    let (began, mut operator) = (Instant::now(), start());
    until(|| server.store.all("apps/statefulsets").len() == clusters * groups).await;
    println!("made: {} groups in {:.1} s", clusters * groups, began.elapsed().as_secs_f64());
    pods(&client, &server).await;
    settle(&server, &operator, "settled").await;
    let (counts, cpu) = (server.store.counts(), operator.cpu_s());
    tokio::time::sleep(IDLE).await;
    let (after, share) = (server.store.counts(), (operator.cpu_s() - cpu) / IDLE.as_secs_f64());
    let (writes, reads) = (after.writes - counts.writes, after.reads - counts.reads);
    println!(
        "idle: {writes} writes and {reads} reads in {IDLE:?}, {:.2}% of a core, {} MB",
        share * 100.0,
        operator.rss_mb()
    );

    operator.stop();
    let before = server.store.counts();
    let began = Instant::now();
    let operator = start();
    settle(&server, &operator, "a full resync").await;
    let after = server.store.counts();
    let spent = (began.elapsed() - QUIET).as_secs_f64();
    println!(
        "a full resync: {spent:.1} s, {} writes, {:.1} s of a core",
        after.writes - before.writes,
        operator.cpu_s()
    );
}

/// Makes the definition and the clusters.
async fn fill(client: &Client, etcd: &str, clusters: usize, groups: usize) {
    let definition: CustomResourceDefinition = serde_saphyr::from_str(&crd_yaml()).expect("a definition");
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let params = PatchParams::apply("scale").force();
    definitions
        .patch("galerneclusters.galerne.dev", &params, &Patch::Apply(&definition))
        .await
        .expect("the definition");
    let api: Api<GalerneCluster> = Api::namespaced(client.clone(), "scale");
    for number in 0..clusters {
        let spec = json!({
            "model": { "name": "m", "path": "m" }, "groups": { "min": 0, "max": groups, "replicas": groups },
            "router": { "noAuth": true }, "etcd": { "endpoints": [etcd] }, "storage": { "hostPath": "/models" },
        });
        let metadata = json!({ "name": format!("c{number}") });
        let cluster = json!({ "apiVersion": "galerne.dev/v1alpha1", "kind": "GalerneCluster", "metadata": metadata, "spec": spec });
        api.create(&PostParams::default(), &serde_json::from_value(cluster).expect("a cluster"))
            .await
            .expect("a cluster");
    }
}

/// Every StatefulSet gets the pod that it would have.
async fn pods(client: &Client, server: &ApiServer) {
    let api: Api<Pod> = Api::namespaced(client.clone(), "scale");
    for set in server.store.all("apps/statefulsets") {
        let name = format!("{}-0", set["metadata"]["name"].as_str().unwrap_or_default());
        let template = &set["spec"]["template"];
        let metadata = json!({ "name": name, "labels": template["metadata"]["labels"] });
        let pod =
            json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"] });
        api.create(&PostParams::default(), &serde_json::from_value(pod).expect("a pod"))
            .await
            .expect("a pod");
        let running = Patch::Merge(json!({ "status": { "phase": "Running" } }));
        api.patch_status(&name, &PatchParams::default(), &running).await.expect("a pod");
    }
}

async fn until(is: impl Fn() -> bool) {
    while !is() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Until the operator has written nothing and done little for a while.
async fn settle(server: &ApiServer, operator: &Operator, what: &str) {
    let (mut seen, mut since) = ((server.store.counts(), operator.cpu_s()), Instant::now());
    while since.elapsed() < QUIET {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = (server.store.counts(), operator.cpu_s());
        // A tick of the clock is no work.
        if now.0 != seen.0 || now.1 - seen.1 > LITTLE * since.elapsed().as_secs_f64() + 2.0 / TICKS {
            (seen, since) = (now, Instant::now());
        }
    }
    println!("{what}: {} MB", operator.rss_mb());
}

/// An operator in a process of its own.
struct Operator(Child);

impl Operator {
    fn start(kubeconfig: &std::path::Path) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        Self(command.arg(OPERATES).env("KUBECONFIG", kubeconfig).spawn().expect("this program"))
    }

    fn stop(&mut self) {
        // It ends at once, and the lease with it, when it is told to.
        let pid = rustix::process::Pid::from_raw(self.0.id().cast_signed()).expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a process");
        self.0.wait().expect("a process");
    }

    fn cpu_s(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks =
            |place: usize| fields.get(place).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / TICKS
    }

    fn rss_mb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) / 1024
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // It may have been stopped already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
