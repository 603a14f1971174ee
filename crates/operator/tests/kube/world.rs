//! Where a case is played: an API server, an etcd, nodes, a kubelet, and an operator.

use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_apiserver::{ApiServer, Controllers};
use galerne_coord::{Coord, EtcdAccess};
use galerne_operator::api::{GalerneCluster, crd_yaml};
use galerne_operator::names;
use galerne_operator::run::{OperatorError, Options, run};
use galerne_tls::ClusterFiles;
use galerne_types::RouterRecord;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::kubelet::{Containers, Kubelet};
use crate::link::Link;
use crate::processes::{Etcd, Processes};
use crate::real;

/// Pause between two looks at something that is waited for.
pub(crate) const LOOK: Duration = Duration::from_millis(20);
/// So long something may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Its name is unique, because a real cluster is shared by all cases.
const CLUSTER: &str = "demo";

/// What the operator shows, and whom it believes.
#[derive(Clone, Default)]
pub(crate) struct Trust {
    pub(crate) etcd: EtcdAccess,
    pub(crate) cluster: Option<ClusterFiles>,
}

/// An operator that runs, and what stops it.
type Running = (CancellationToken, JoinHandle<Result<(), OperatorError>>);

/// Where a case is played.
pub(crate) struct World {
    pub(crate) client: Client,
    /// What the operator asks with: in a real cluster it has the chart's rights alone.
    operates: Client,
    pub(crate) namespace: String,
    pub(crate) coord: Coord,
    pub(crate) nodes: [String; 2],
    /// The API server, if it is ours.
    pub(crate) ours: Option<ApiServer>,
    etcd: String,
    pub(crate) trust: std::sync::Mutex<Trust>,
    operator: std::sync::Mutex<Option<Running>>,
    /// Where the operator that was started last tells its numbers.
    admin: std::sync::Mutex<String>,
    _controllers: Option<Controllers>,
    pub(crate) kubelet: Kubelet,
    /// The way to etcd, where that is ours.
    pub(crate) link: Option<Link>,
}

impl World {
    /// One in which ranks are played, and etcd is the embedded store.
    pub(crate) async fn played(case: &str) -> Self {
        let store = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let link = Link::to(store.local_addr().expect("an address").to_string()).await;
        tokio::spawn(galerne_coord::embedded::serve(store, std::future::pending()));
        let etcd = format!("http://{}", link.address);
        let world = Self::new(case, etcd, Trust::default(), Containers::Played).await;
        Self { link: Some(link), ..world }
    }

    /// One in which containers are processes, which meet in `etcd`.
    pub(crate) async fn real(case: &str, etcd: &Etcd, processes: Processes) -> Self {
        Self::new(case, etcd.endpoint.clone(), Trust::default(), Containers::Real(processes)).await
    }

    /// The same under TLS.
    pub(crate) async fn secured(case: &str, etcd: &Etcd, trust: Trust, processes: Processes) -> Self {
        Self::new(case, etcd.endpoint.clone(), trust, Containers::Real(processes)).await
    }

    async fn new(case: &str, etcd: String, trust: Trust, containers: Containers) -> Self {
        let namespace = real::unique(case);
        let (client, operates, ours) = if std::env::var_os("KUBECONFIG").is_some() {
            let client = Client::try_default().await.expect("the cluster that KUBECONFIG names");
            define(&client).await;
            real::prepare(&client, &namespace, matches!(containers, Containers::Played)).await;
            (client, real::operator(&namespace).await, None)
        } else {
            let ours = ApiServer::start().await.expect("an API server");
            let client = Client::try_from(Config::new(ours.url().parse().expect("a URL"))).expect("a client");
            define(&client).await;
            (client.clone(), client, Some(ours))
        };
        let controllers = ours.as_ref().map(|ours| Controllers::start(ours.store.clone()));
        let (endpoints, name) = ([etcd.clone()], names::in_etcd(&namespace, CLUSTER));
        let coord = connect(&trust.etcd, &endpoints, &name).await;
        let nodes = ["a", "b"].map(|letter| format!("{namespace}-{letter}"));
        for node in &nodes {
            add_node(&client, node).await;
        }
        let kubelet = Kubelet::start(client.clone(), &namespace, nodes.to_vec(), coord.clone(), containers);
        let operator = std::sync::Mutex::new(None);
        let world = Self {
            client,
            operates,
            namespace,
            coord,
            nodes,
            ours,
            etcd,
            trust: std::sync::Mutex::new(trust),
            operator,
            admin: std::sync::Mutex::default(),
            _controllers: controllers,
            kubelet,
            link: None,
        };
        world.start_operator("one");
        world
    }

    /// Starts an operator for this namespace.
    pub(crate) fn start_operator(&self, identity: &str) {
        let admin = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        admin.set_nonblocking(true).expect("a listener");
        *self.admin.lock().expect("no panic") = admin.local_addr().expect("an address").to_string();
        let trust = self.trust.lock().expect("no panic").clone();
        let options = Options {
            namespaces: vec![self.namespace.clone()],
            lease_namespace: self.namespace.clone(),
            identity: identity.into(),
            image: "galerne:test".into(),
            etcd: trust.etcd,
            cluster_tls: trust.cluster,
            admin: Some(TcpListener::from_std(admin).expect("a listener")),
        };
        let stop = CancellationToken::new();
        let running = tokio::spawn(run(self.operates.clone(), options, stop.clone()));
        *self.operator.lock().expect("no panic") = Some((stop, running));
    }

    /// What the operator tells other autoscalers of the cluster: a status, and a body.
    pub(crate) async fn number(&self) -> (String, Value) {
        let (status, body) = self.ask_operator(&format!("/autoscale/{}/{CLUSTER}", self.namespace)).await;
        (status, serde_json::from_str(&body).expect("JSON"))
    }

    /// What the operator has written since it began.
    pub(crate) async fn writes(&self) -> u64 {
        self.counted("galerne_operator_writes_total{").await
    }

    /// The sum of the operator's metrics that begin so.
    pub(crate) async fn counted(&self, metric: &str) -> u64 {
        let (_, metrics) = self.ask_operator("/metrics").await;
        let lines = metrics.lines().filter(|line| line.starts_with(metric));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
    }

    /// A status and a body of its admin face.
    async fn ask_operator(&self, path: &str) -> (String, String) {
        let admin = self.admin.lock().expect("no panic").clone();
        let mut stream = tokio::net::TcpStream::connect(admin).await.expect("an operator");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request that is taken");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.split(' ').nth(1).unwrap_or_default().to_owned(), body.to_owned())
    }

    /// A router that is played: it tells what is sent here.
    pub(crate) fn play_router(&self) -> watch::Sender<RouterRecord> {
        let (counts, counted) = watch::channel(RouterRecord::default());
        let coord = self.coord.clone();
        tokio::spawn(async move { coord.tell("played", counted).await });
        counts
    }

    /// Stops the operator that was started last.
    pub(crate) async fn stop_operator(&self) {
        let operator = self.operator.lock().expect("no panic").take();
        if let Some((stop, running)) = operator {
            stop.cancel();
            running.await.expect("no panic").expect("an operator that ends well");
        }
    }

    pub(crate) async fn end(self) {
        self.stop_operator().await;
        if self.ours.is_none() {
            real::end(&self.client, &self.namespace, &self.nodes).await;
        }
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A spec that can be: two groups of one rank, which get no trial, because nobody asks played ranks.
    pub(crate) fn spec(&self) -> Value {
        json!({
            "model": { "name": "bard", "path": "bard-1m" },
            "tensorParallel": 1,
            "groups": { "min": 0, "max": 4, "replicas": 2 },
            "router": { "noAuth": true },
            "etcd": { "endpoints": [self.etcd] },
            "storage": { "claim": "models" },
            "drainSeconds": 1,
            "update": { "canary": { "enabled": false } },
        })
    }

    pub(crate) async fn create(&self, spec: Value) -> GalerneCluster {
        let cluster = json!({
            "apiVersion": "galerne.dev/v1alpha1", "kind": "GalerneCluster",
            "metadata": { "name": CLUSTER }, "spec": spec,
        });
        let cluster = serde_json::from_value(cluster).expect("a cluster");
        self.api::<GalerneCluster>()
            .create(&PostParams::default(), &cluster)
            .await
            .expect("a cluster that is taken")
    }

    /// Changes the spec.
    pub(crate) async fn patch(&self, spec: Value) {
        let patch = Patch::Merge(json!({ "spec": spec }));
        let clusters = self.api::<GalerneCluster>();
        clusters.patch(CLUSTER, &PatchParams::default(), &patch).await.expect("a spec that is taken");
    }

    pub(crate) async fn cluster(&self) -> GalerneCluster {
        self.api::<GalerneCluster>().get(CLUSTER).await.expect("the cluster")
    }

    /// The cluster, once it `is` so.
    pub(crate) async fn until(&self, what: &str, is: impl Fn(&GalerneCluster) -> bool) -> GalerneCluster {
        let mut cluster = self.cluster().await;
        let until = Instant::now() + PATIENCE;
        while !is(&cluster) {
            assert!(Instant::now() < until, "not {what}: {:#?}", cluster.status);
            tokio::time::sleep(LOOK).await;
            cluster = self.cluster().await;
        }
        cluster
    }

    /// Until the cluster has settled with `groups` that serve, all of its version.
    pub(crate) async fn settled(&self, groups: u32) -> GalerneCluster {
        let settled = |cluster: &GalerneCluster| {
            let status = cluster.status.clone().unwrap_or_default();
            let current = status.observed_generation == cluster.metadata.generation;
            let counts =
                [status.groups_total, status.groups_wanted, status.groups_ready, status.groups_updated];
            current && counts == [groups; 4]
        };
        self.until(&format!("settled with {groups} groups"), settled).await
    }

    /// Waits until `is` of what `look` finds.
    pub(crate) async fn eventually<T>(&self, what: &str, look: impl AsyncFn() -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look().await {
                return found;
            }
            let clusters = self.api::<GalerneCluster>().list(&ListParams::default()).await;
            assert!(Instant::now() < until, "not {what}: {clusters:#?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Names of the groups' StatefulSets.
    pub(crate) async fn sets(&self) -> Vec<String> {
        let sets = self.api::<StatefulSet>().list(&ListParams::default()).await.expect("StatefulSets");
        sets.iter().map(ResourceExt::name_any).collect()
    }

    pub(crate) async fn pods(&self) -> Vec<Pod> {
        self.api::<Pod>()
            .list(&ListParams::default().labels("galerne.dev/part=group"))
            .await
            .expect("pods")
            .items
    }
}

/// A store that was started a moment ago.
async fn connect(access: &EtcdAccess, endpoints: &[String], name: &str) -> Coord {
    loop {
        if let Ok(coord) = Coord::connect_as(access, endpoints, name, Duration::from_secs(5)).await {
            return coord;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Says what a GalerneCluster is.
async fn define(client: &Client) {
    let definition: CustomResourceDefinition = serde_saphyr::from_str(&crd_yaml()).expect("a definition");
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let params = PatchParams::apply("test").force();
    definitions
        .patch(&definition.name_any(), &params, &Patch::Apply(&definition))
        .await
        .expect("the definition");
}

async fn add_node(client: &Client, name: &str) {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } });
    let node = serde_json::from_value(node).expect("a node");
    nodes.create(&PostParams::default(), &node).await.expect("a node that is taken");
    let ready = json!({ "status": {
        "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "" }],
        "allocatable": { "cpu": "8", "x.dev/gpu": "4" },
    } });
    nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(ready)).await.expect("a node's status");
}

/// The store of an API server of ours, for what only it can tell.
pub(crate) fn store(world: &World) -> Option<Arc<galerne_apiserver::Store>> {
    world.ours.as_ref().map(|ours| ours.store.clone())
}
