//! A greedy tenant beside a patient one, through real processes: what it does to the other's time to first token.
//!
//! `GALERNE_FAIRNESS_REQUESTS=400 cargo test --release --test e2e fairness -- --nocapture` takes longer and shows the
//! figures of `benches/results`.

use std::ops::RangeBounds;
use std::time::{Duration, Instant};

use galerne_wire::v1::GenerateRequest;
use galerne_wire::v1::galerne_client::GalerneClient;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::process;
use crate::setup::{self, Cluster};

/// How long a step takes: a rehearsal of a model, and everything else as it is.
const LAW: &str = "step_ns=10000000,token_ns=100000";

/// Mean time between two requests of the patient tenant, who thereby wants a quarter of what the group can do. The greedy
/// one asks ten times as often.
const INTERVAL: Duration = Duration::from_millis(200);
const GREED: u32 = 10;

/// Requests that count, if nobody says another number.
const REQUESTS: usize = 40;

/// The greedy tenant's requests that the group must hold before the patient one begins.
const BACKLOG: u64 = 100;

/// Connections of a tenant.
const CONNECTIONS: usize = 8;

/// Numbers without pattern, the same in every run.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    /// Requests of many sizes at irregular times, `interval` apart in the mean.
    fn next(&mut self, interval: Duration) -> (Duration, GenerateRequest) {
        let pause = Duration::from_micros(self.below(2 * interval.as_micros() as u64));
        let (prompt, answer) = (20 + self.below(160), 4 + self.below(28));
        (pause, setup::request(&vec![7; prompt as usize], answer as u32))
    }
}

/// Who asks.
#[derive(Clone)]
struct Tenant {
    channels: Vec<Channel>,
    key: String,
}

impl Tenant {
    fn new(cluster: &Cluster, key: String) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{}", cluster.grpc)).expect("an address");
        Self { channels: (0..CONNECTIONS).map(|_| endpoint.connect_lazy()).collect(), key }
    }

    /// Time to the first token, after the last one.
    async fn ask(self, number: usize, message: GenerateRequest) -> Result<Duration, Status> {
        let mut client = GalerneClient::new(self.channels[number % CONNECTIONS].clone());
        let mut request = Request::new(message);
        request.metadata_mut().insert("x-api-key", self.key.parse().expect("ASCII"));
        let asked = Instant::now();
        let mut stream = client.generate(request).await?.into_inner();
        let first = stream.message().await?.map(|_| asked.elapsed());
        while stream.message().await?.is_some() {}
        first.ok_or_else(|| Status::internal("no token"))
    }

    /// Asks as often as `noise` says; sorted times to the first token.
    async fn patiently(&self, requests: usize) -> Vec<Duration> {
        let (mut noise, mut asked) = (Noise(1), JoinSet::new());
        for number in 0..requests {
            let (pause, request) = noise.next(INTERVAL);
            tokio::time::sleep(pause).await;
            asked.spawn(self.clone().ask(number, request));
        }
        let mut times: Vec<_> =
            asked.join_all().await.into_iter().map(|time| time.expect("an answer")).collect();
        times.sort_unstable();
        times
    }

    /// Asks ten times as often, for answers ten times as long, for ever. What is refused is not asked again.
    async fn greedily(self) {
        let (mut noise, mut asked) = (Noise(2), JoinSet::new());
        for number in 0.. {
            let (pause, mut request) = noise.next(INTERVAL / GREED);
            request.max_tokens = request.max_tokens.map(|tokens| tokens * GREED);
            tokio::time::sleep(pause).await;
            asked.spawn(self.clone().ask(number, request));
            while asked.try_join_next().is_some() {}
        }
    }
}

fn new_key(file: &std::path::Path, tenant: &str) -> String {
    let made = setup::galerne()
        .args(["key", "new", "--tenant", tenant, "--file"])
        .arg(file)
        .output()
        .expect("a key");
    String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned()
}

/// Of sorted times.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    times[(times.len() * percent).div_ceil(100) - 1]
}

#[test]
fn a_greedy_tenant_does_not_make_another_wait() {
    let folder = tempfile::tempdir().expect("a folder");
    let keys = folder.path().join("keys.toml");
    let [patient, greedy] = ["patient", "greedy"].map(|tenant| new_key(&keys, tenant));
    let flags = ["--rehearse", LAW, "--sequences-max", "16", "--kv-blocks", "1024", "--no-prefix-cache"];
    let flags = [&flags[..], &["--api-keys", keys.to_str().expect("UTF-8")]].concat();
    let cluster = Cluster::up(&setup::demo_model(), &flags);
    let requests = std::env::var("GALERNE_FAIRNESS_REQUESTS").ok().and_then(|number| number.parse().ok());
    let requests = requests.unwrap_or(REQUESTS);
    let (alone, beside) = setup::block_on(async {
        let (patient, greedy) = (Tenant::new(&cluster, patient), Tenant::new(&cluster, greedy));
        // The greedy one holds all when the patient one comes, of whom nobody has heard before.
        let greed = tokio::spawn(greedy.greedily());
        until_waiting(&cluster, BACKLOG..).await;
        let beside = patient.patiently(requests).await;
        greed.abort();
        until_waiting(&cluster, ..1).await;
        let alone = patient.patiently(requests).await;
        (alone, beside)
    });
    for percent in [50, 90, 99, 100] {
        let [alone, beside] = [&alone, &beside].map(|times| percentile(times, percent));
        let ratio = beside.as_secs_f64() / alone.as_secs_f64();
        println!(
            "p{percent} of {requests}: {alone:.1?} alone, {beside:.1?} beside the greedy tenant: {ratio:.2} times"
        );
    }
    // Other tests run beside this one: the bound is wider than what a quiet machine shows, and far below what a queue in
    // order of arrival does.
    let (alone, beside) = (percentile(&alone, 90), percentile(&beside, 90));
    assert!(beside < 3 * alone, "{alone:?} alone, {beside:?} beside a greedy tenant");
}

/// Waits until so many requests wait at the group.
async fn until_waiting(cluster: &Cluster, wanted: impl RangeBounds<u64> + Send + 'static) {
    let admin = cluster.admin.clone();
    let waits = move || {
        let page = crate::traces::get(&admin, "/metrics");
        let line = page.lines().find(|line| line.starts_with("galerne_group_requests_waiting{"))?;
        wanted.contains(&line.rsplit(' ').next()?.parse().ok()?).then_some(())
    };
    let waited = tokio::task::spawn_blocking(move || process::eventually("requests wait", waits));
    waited.await.expect("no panic");
}
