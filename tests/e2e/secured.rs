//! A cluster in which nothing is open: keys, certificates on every way, a login at etcd; and what its logs must not hold.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use galerne_tls::{Alpn, Client, ClientFiles};
use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_wire::v1::{FleetRequest, FleetResponse};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::authority::Authority;
use crate::process::{self, Process, eventually};
use crate::setup::{self, Cluster, Etcd};
use crate::traces::Receiver;

/// Must not be found in any log.
const PASSWORD: &str = "PlantedPassword0815";
const TOKEN: &str = "PlantedToken4711";

/// A certificate and its key.
type Pair = (PathBuf, PathBuf);

/// Who believes whom, and who may enter.
struct Files {
    /// Of etcd, of the faces and their clients, within the cluster, of the collector: they do not believe each other's.
    etcd: Authority,
    faces: Authority,
    cluster: Authority,
    collector: Authority,
    etcd_client: Pair,
    face: Pair,
    client: Pair,
    member: Pair,
    reporter: Pair,
    password: PathBuf,
    keys: PathBuf,
}

impl Files {
    fn new() -> Self {
        let authority = || Authority::new();
        let (etcd, faces, cluster, collector) = (authority(), authority(), authority(), authority());
        Self {
            etcd_client: etcd.issue(&["client"]),
            face: faces.issue(&["127.0.0.1"]),
            client: faces.issue(&["client"]),
            member: cluster.issue(&["galerne"]),
            reporter: collector.issue(&["reporter"]),
            password: etcd.file("password", &format!("{PASSWORD}\n")),
            keys: faces.file("keys.toml", ""),
            etcd,
            faces,
            cluster,
            collector,
        }
    }

    /// A new key of `tenant`, which the file of keys holds from now on.
    fn new_key(&self, tenant: &str) -> String {
        let mut command = setup::galerne();
        command.args(["key", "new", "--tenant", tenant, "--file"]).arg(&self.keys);
        let output = command.output().expect("galerne key");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    }

    fn etcd_flags(&self, command: &mut Command) {
        let (cert, key) = &self.etcd_client;
        command.arg("--etcd-ca").arg(self.etcd.ca()).arg("--etcd-cert").arg(cert).arg("--etcd-key").arg(key);
        command.args(["--etcd-user", "galerne", "--etcd-password-file"]).arg(&self.password);
    }

    fn cluster_flags(&self, command: &mut Command) {
        let (cert, key) = &self.member;
        command.arg("--cluster-ca").arg(self.cluster.ca());
        command.arg("--cluster-cert").arg(cert).arg("--cluster-key").arg(key);
    }

    fn collector_environment(&self, command: &mut Command, endpoint: &str) {
        let (cert, key) = &self.reporter;
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        command.env("OTEL_EXPORTER_OTLP_CERTIFICATE", self.collector.ca());
        command.env("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", cert).env("OTEL_EXPORTER_OTLP_CLIENT_KEY", key);
        command.env("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization=Bearer%20{TOKEN}"));
    }

    /// Every line of every private key.
    fn key_lines(&self) -> Vec<String> {
        let pairs = [&self.etcd_client, &self.face, &self.client, &self.member, &self.reporter];
        let text = |(_, key): &Pair| std::fs::read_to_string(key).expect("a key");
        let texts: Vec<_> = pairs.into_iter().map(text).collect();
        let lines = texts.iter().flat_map(|text| text.lines());
        lines.filter(|line| !line.starts_with("---")).map(str::to_owned).collect()
    }
}

/// An etcd that wants a certificate and a password.
fn guarded_etcd(files: &Files) -> Etcd {
    let (cert, key) = files.etcd.issue(&["127.0.0.1"]);
    let mut command = Command::new(Etcd::program());
    command.arg("--cert-file").arg(cert).arg("--key-file").arg(key).arg("--client-cert-auth");
    command.arg("--trusted-ca-file").arg(files.etcd.ca()).args(["--bcrypt-cost", "4"]);
    let etcd = Etcd::start_under_tls(command);
    let etcdctl = |arguments: &[&str]| etcdctl(files, &etcd, arguments);
    for user in ["root", "galerne"] {
        etcdctl(&["user", "add", &format!("{user}:{PASSWORD}")]);
    }
    etcdctl(&["role", "add", "galerne"]);
    etcdctl(&["role", "grant-permission", "galerne", "--prefix", "readwrite", "/galerne/"]);
    etcdctl(&["user", "grant-role", "galerne", "galerne"]);
    etcdctl(&["user", "grant-role", "root", "root"]);
    etcdctl(&["auth", "enable"]);
    etcd
}

fn etcdctl(files: &Files, etcd: &Etcd, arguments: &[&str]) -> String {
    let (cert, key) = &files.etcd_client;
    let mut command = Command::new(setup::cache("bin/etcdctl"));
    command.arg("--cacert").arg(files.etcd.ca()).arg("--cert").arg(cert).arg("--key").arg(key);
    let output = command.args(["--endpoints", &etcd.endpoint]).args(arguments).output().expect("etcdctl");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Two ranks and a router, each a process of its own.
struct Secured {
    worker: Process,
    router: Process,
    http: String,
    grpc: String,
    etcd: Etcd,
}

impl Secured {
    fn start(files: &Files, collector: &str) -> Self {
        let etcd = guarded_etcd(files);
        let start = |command: &str, arguments: &[&str]| {
            let mut process = setup::galerne();
            process.args([command, "--etcd", &etcd.endpoint, "--log", "trace", "--trace-ratio", "1"]);
            files.etcd_flags(&mut process);
            files.cluster_flags(&mut process);
            files.collector_environment(&mut process, collector);
            process.arg("--model").arg(setup::bard()).args(arguments);
            if command == "router" {
                let (cert, key) = &files.face;
                process.arg("--tls-cert").arg(cert).arg("--tls-key").arg(key);
                process.arg("--tls-client-ca").arg(files.faces.ca()).arg("--api-keys").arg(&files.keys);
            }
            Process::start(&mut process)
        };
        let worker = start("worker", &["--tp", "2", "--threads", "1"]);
        // Any address: with keys a router may be reached by everybody.
        let router = start("router", &["--http", "0.0.0.0:0", "--grpc", "0.0.0.0:0"]);
        let line = router.line_with("gRPC on ");
        let after = |words: &str| {
            let address = line.split_once(words).expect("an address").1.split_whitespace().next();
            address.expect("an address").replace("0.0.0.0", "127.0.0.1")
        };
        let (http, grpc) = (after("HTTP on "), after("gRPC on "));
        Self { worker, router, http, grpc, etcd }
    }

    /// The fleet, as who shows this certificate and this key is told.
    async fn fleet(
        &self,
        ca: &Path,
        shown: Option<&Pair>,
        key: Option<&str>,
    ) -> Result<FleetResponse, Status> {
        let files = ClientFiles { ca: ca.to_owned(), identity: shown.cloned(), name: None };
        let client = connect(&self.grpc, files).await.map_err(|error| Status::unavailable(error.to_string()));
        let mut request = Request::new(FleetRequest {});
        if let Some(key) = key {
            let value = format!("Bearer {key}").parse().expect("ASCII");
            request.metadata_mut().insert("authorization", value);
        }
        Ok(client?.fleet(request).await?.into_inner())
    }

    /// Whether the key is good, told over gRPC.
    fn knows(&self, files: &Files, key: Option<&str>) -> Result<FleetResponse, Code> {
        let fleet = self.fleet_blocking(&files.faces.ca(), Some(&files.client), key);
        fleet.map_err(|status| status.code())
    }

    fn fleet_blocking(
        &self,
        ca: &Path,
        shown: Option<&Pair>,
        key: Option<&str>,
    ) -> Result<FleetResponse, Status> {
        setup::block_on(self.fleet(ca, shown, key))
    }

    fn until_ready(&self, files: &Files, key: &str) -> FleetResponse {
        eventually("a group of two ranks", || {
            let fleet = self.knows(files, Some(key)).ok()?;
            fleet.groups.iter().any(|group| group.state == "ready").then_some(fleet)
        })
    }
}

async fn connect(grpc: &str, files: ClientFiles) -> Result<GalerneClient<Channel>, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{grpc}")).expect("an address");
    let dialer = Client::load(files, Alpn::H2).expect("certificates").dialer();
    endpoint.connect_with_connector(dialer).await.map(GalerneClient::new)
}

fn galerne_asks(cluster: &Secured, files: &Files, key: &str, arguments: &[&str]) -> String {
    let (cert, cert_key) = &files.client;
    let mut command = setup::galerne();
    command.args(arguments).args(["--grpc", &cluster.grpc]).env("GALERNE_API_KEY", key);
    command.arg("--tls-ca").arg(files.faces.ca()).arg("--tls-cert").arg(cert).arg("--tls-key").arg(cert_key);
    let output = command.output().expect("galerne");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn a_cluster_in_which_nothing_is_open_serves_those_who_may() {
    let files = Files::new();
    let (cert, key) = files.collector.issue(&["127.0.0.1"]);
    let mut command = setup::python("otlp_receiver.py");
    let (collector, endpoint) =
        Receiver::start_with(command.arg(cert).arg(key).arg(files.collector.ca()).arg(TOKEN));
    let api_key = files.new_key("acme");
    let cluster = Secured::start(&files, &endpoint);
    let fleet = cluster.until_ready(&files, &api_key);

    let (client_cert, client_key) = &files.client;
    let mut clients = setup::python("secured_client.py");
    clients.args([&cluster.http, "bard-1m"]).arg(files.faces.ca()).arg(client_cert).arg(client_key);
    let mut clients = Process::start(clients.env("GALERNE_API_KEY", &api_key));
    assert!(clients.exit_within(process::PATIENCE).success(), "{}", clients.output());
    assert!(galerne_asks(&cluster, &files, &api_key, &["status"]).contains("ready"));

    for wrong in [None, Some("galerne-0")] {
        assert_eq!(cluster.knows(&files, wrong).err(), Some(Code::Unauthenticated), "{wrong:?}");
    }
    let ca = files.faces.ca();
    for shown in [None, Some(&files.member), Some(&files.etcd_client)] {
        assert!(
            cluster.fleet_blocking(&ca, shown, Some(&api_key)).is_err(),
            "a certificate of the faces' is needed"
        );
    }
    // Ranks answer nobody but the cluster's members.
    for rank in &fleet.groups[0].ranks {
        let plain = format!("http://{}", rank.address);
        let open = setup::block_on(async {
            GalerneClient::connect(plain).await.map_err(drop)?.fleet(FleetRequest {}).await.map_err(
                |status| {
                    assert_ne!(status.code(), Code::Unimplemented, "it is spoken to in the open");
                },
            )
        });
        assert!(open.is_err());
    }
    eventually("spans of both parts over TLS", || {
        let spans = collector.spans();
        ["engine.run", "step", "POST /v1/completions"]
            .iter()
            .all(|name| spans.iter().any(|span| span["name"] == *name))
            .then_some(())
    });
    keys_come_and_go(&cluster, &files, &api_key);
    certificates_change(&cluster, &files);
    nothing_is_told(&cluster, &files, &[&api_key]);
}

fn keys_come_and_go(cluster: &Secured, files: &Files, first: &str) {
    let second = files.new_key("other");
    eventually("the new key is good", || cluster.knows(files, Some(&second)).ok());
    cluster.knows(files, Some(first)).expect("the first key is good still");
    let entries = std::fs::read_to_string(&files.keys).expect("the keys");
    let last = entries.rfind("[[key]]").expect("an entry");
    std::fs::write(&files.keys, &entries[..last]).expect("written");
    eventually("the key is forgotten", || cluster.knows(files, Some(&second)).err());
    cluster.knows(files, Some(first)).expect("the first key is good still");
    std::fs::write(&files.keys, "[[key]]\nsecret = 7").expect("written");
    cluster.router.line_with("the API keys that were read before hold on");
    cluster.knows(files, Some(first)).expect("the last good file holds");
    std::fs::write(&files.keys, &entries[..last]).expect("written");
    nothing_is_told(cluster, files, &[&second]);
}

/// The faces show a certificate of another authority, and want one of it to be shown; the ranks get new ones too, and
/// use them when the group forms anew.
fn certificates_change(cluster: &Secured, files: &Files) {
    let key = files.new_key("acme");
    let next = Authority::new();
    let (next_face, next_client) = (next.issue(&["127.0.0.1"]), next.issue(&["client"]));
    copy(&next_face, &files.face);
    std::fs::copy(next.ca(), files.faces.ca()).expect("copied");
    let fleet = eventually("the new certificate is shown", || {
        cluster.fleet_blocking(&next.ca(), Some(&next_client), Some(&key)).ok()
    });
    assert!(
        cluster.fleet_blocking(&next.ca(), Some(&files.client), Some(&key)).is_err(),
        "the old one is not taken"
    );
    copy(&next_client, &files.client);

    copy(&files.cluster.issue(&["galerne", "again"]), &files.member);
    let (epoch, pid) = (fleet.groups[0].epoch, fleet.groups[0].ranks[1].pid);
    process::send(pid, libc::SIGKILL);
    eventually("the group forms anew", || {
        let fleet = cluster.knows(files, Some(&key)).ok()?;
        fleet.groups.iter().any(|group| group.state == "ready" && group.epoch > epoch).then_some(())
    });
    assert!(galerne_asks(cluster, files, &key, &["status"]).contains("ready"));
}

fn copy(from: &Pair, to: &Pair) {
    if from != to {
        std::fs::copy(&from.0, &to.0).expect("copied");
        std::fs::copy(&from.1, &to.1).expect("copied");
    }
}

/// No secret stands in a log, at the level that tells everything.
fn nothing_is_told(cluster: &Secured, files: &Files, api_keys: &[&str]) {
    let mut secrets = files.key_lines();
    let user = format!("galerne:{PASSWORD}");
    let epoch = etcdctl(files, &cluster.etcd, &["--user", &user, "get", "/galerne/default/groups/g0/epoch"]);
    let epoch = epoch.split_once("\"secret\":\"").expect("the epoch's secret").1;
    secrets.push(epoch[..64].to_owned());
    secrets.extend([PASSWORD, TOKEN].into_iter().chain(api_keys.iter().copied()).map(str::to_owned));
    for (who, log) in [("worker", cluster.worker.output()), ("router", cluster.router.output())] {
        assert!(log.contains("TRACE"), "{who} logs everything");
        for secret in &secrets {
            let told = log.lines().find(|line| line.contains(secret));
            assert!(told.is_none(), "a secret in the log of the {who}: {told:?}");
        }
    }
}

#[test]
fn a_public_address_wants_keys_or_a_word() {
    let up = |arguments: &[&str]| {
        let mut command = setup::galerne();
        command.args(["up", "--rehearse", "step_ns=0", "--model"]).arg(setup::bard()).args(arguments);
        Process::start(&mut command)
    };
    let mut refused = up(&["--http", "0.0.0.0:0", "--grpc", "127.0.0.1:0"]);
    assert!(!refused.exit_within(Duration::from_secs(5)).success());
    let says = refused.output();
    assert!(
        says.contains("--http 0.0.0.0:") && says.contains("--api-keys") && says.contains("--no-auth"),
        "{says}"
    );
    let open = up(&["--http", "0.0.0.0:0", "--grpc", "127.0.0.1:0", "--no-auth"]);
    open.line_with("Ctrl-C ends everything");
}

/// `galerne up` shows its fleet and asks its question, though it holds neither a key nor a client's certificate.
#[test]
fn a_cluster_of_one_command_shows_its_fleet_under_tls() {
    let files = Files::new();
    let (cert, key) = &files.face;
    let _unknown = files.new_key("acme");
    let mut command = setup::galerne();
    command.args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--threads", "1", "--model"]);
    command.arg(setup::demo_model()).args(["--prompt", "Say hello."]);
    command
        .arg("--tls-cert")
        .arg(cert)
        .arg("--tls-key")
        .arg(key)
        .arg("--tls-client-ca")
        .arg(files.faces.ca());
    files.cluster_flags(&mut command);
    let up = Process::start(command.arg("--api-keys").arg(&files.keys));
    let line = up.line_with("Ctrl-C ends everything");
    assert!(line.contains("https://127.0.0.1:"), "{line}");
    let output = up.output();
    assert!(output.contains("RANK STATE") && output.contains("Hello"), "{output}");
    up.line_with("curl --cacert FILE --cert FILE --key FILE -H 'authorization: Bearer KEY' https://");

    let grpc = line.split_once("gRPC").expect("an address").1.split_whitespace().next().expect("an address");
    let (ours, theirs) = (files.faces.ca(), files.cluster.ca());
    let ca = |path: &Path| vec!["--tls-ca".to_owned(), path.display().to_string()];
    for (flags, says) in [
        (Vec::new(), "name the authority of its certificate with --tls-ca"),
        (ca(&theirs), "no authority in --tls-ca has made its certificate"),
        (ca(&ours), "with --tls-cert and --tls-key"),
    ] {
        let output =
            setup::galerne().args(["status", "--grpc", grpc]).args(&flags).output().expect("galerne");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains(says), "{flags:?}: {told}");
    }
}

#[test]
fn a_collector_that_is_not_believed_gets_nothing() {
    let files = Files::new();
    let (cert, key) = files.collector.issue(&["127.0.0.1"]);
    let mut command = setup::python("otlp_receiver.py");
    let (collector, endpoint) =
        Receiver::start_with(command.arg(cert).arg(key).arg(files.collector.ca()).arg(TOKEN));
    let ca = files.faces.ca().display().to_string();
    let flags = ["--threads", "1", "--trace-ratio", "1", "--otlp-endpoint", &endpoint, "--otlp-ca", &ca];
    let cluster = Cluster::up(&setup::bard(), &flags);
    assert_eq!(cluster.greedy(&[1, 40, 50], 5).expect("an answer").len(), 5);
    let line = cluster.process.line_with("the collector takes no spans");
    assert!(line.contains("invalid peer certificate"), "{line}");
    assert!(collector.spans().is_empty());
}
