//! Hostile bytes at both faces of a router, behind which a leader plays a script; the engine is the workspace's.

#[path = "../../../../tests/fuzz/engine/mod.rs"]
mod engine;
mod http;
#[path = "../faces/leader.rs"]
#[allow(dead_code, reason = "the tests of the faces use the rest")]
mod leader;
mod messages;
#[path = "../faces/stage.rs"]
#[allow(dead_code, reason = "the tests of the faces use the rest")]
mod stage;

use galerne_wire::v1::FinishReason;
use tokio::runtime::Runtime;

use leader::{Leader, tokens};
use stage::{Stage, ids};

#[global_allocator]
static MEMORY: engine::meter::Counting = engine::meter::Counting;

/// A router with a leader that answers every request with a few tokens.
fn stage() -> (Runtime, Leader, Stage) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (leader, stage) = runtime.block_on(async {
        let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
        let stage = Stage::with(&[&leader]).await;
        (leader, stage)
    });
    (runtime, leader, stage)
}
