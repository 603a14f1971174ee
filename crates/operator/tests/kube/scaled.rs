//! The number of groups follows the load: from none to one for a request that waits, to two for a burst, and back to none.

use std::time::Duration;

use galerne_operator::api::GalerneCluster;
use serde_json::json;

use crate::processes::{Etcd, Processes, root};
use crate::streams::{Streams, answer};
use crate::world::World;

/// So long it may take.
const TIMEOUT: Duration = Duration::from_secs(280);
/// Clients of a burst: three times as many as a group takes at once.
const CLIENTS: u32 = 12;
/// Answers that are waited for while something happens.
const BREATH: usize = 4;
/// Between two requests of a client that is in no hurry.
const PAUSE: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_load_makes_groups_come_and_go() {
    let (etcd, processes) = (Etcd::start(), Processes::new());
    let world = World::real("load_makes_groups_come_and_go", &etcd, processes.clone()).await;
    tokio::time::timeout(TIMEOUT, play(&world, &processes)).await.expect("it ends in time");
    world.end().await;
}

async fn play(world: &World, processes: &Processes) {
    let mut spec = world.spec();
    spec["storage"] = json!({ "hostPath": root().join("tests/golden").display().to_string() });
    spec["workerArgs"] = json!(["--threads=1", "--sequences-max=4"]);
    spec["groups"] = json!({ "min": 0, "max": 2, "idleSeconds": 10 });
    // No machine keeps it, so a quarter more than what one request alone gets is aimed at, however fast the machine is.
    spec["sla"] = json!({ "ttft": { "percentile": 95, "ms": 1 } });
    world.create(spec).await;
    world.until("asleep", |cluster| groups(cluster) == (0, 0, Some(0))).await;
    let router = world.eventually("a router", async || processes.router()).await;
    world
        .until("routed", |cluster| cluster.status.as_ref().is_some_and(|status| status.routers_ready == 1))
        .await;

    let expected = answer(&router, 0).await;
    world.until("awake", |cluster| groups(cluster) == (1, 1, Some(1))).await;

    let mut burst = Streams::start(&router, CLIENTS).await;
    world.until("two groups for a burst", |cluster| groups(cluster) == (2, 2, Some(2))).await;
    burst.more(BREATH).await;
    drop(burst);

    let mut calm = Streams::calm(&router, PAUSE).await;
    let one = world.until("one group again", |cluster| groups(cluster) == (1, 1, Some(1))).await;
    calm.more(1).await;
    let said = one.status.and_then(|status| status.autoscale).expect("a decision").message;
    assert!(said.starts_with("1 group") && said.contains("TTFT p95"), "{said}");
    drop(calm);

    world.until("asleep again", |cluster| groups(cluster) == (0, 0, Some(0))).await;
    assert_eq!(answer(&router, 0).await, expected, "whoever wakes it gets the same tokens");
}

/// Groups that there are, that serve, and that are called for.
fn groups(cluster: &GalerneCluster) -> (u32, u32, Option<u32>) {
    let status = cluster.status.clone().unwrap_or_default();
    (status.groups_total, status.groups_ready, status.autoscale.map(|autoscale| autoscale.groups))
}
