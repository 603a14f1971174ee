//! A pod's ranks, played: they register, form, say that they serve, and end when they are drained.

use std::time::Duration;

use galerne_coord::{Coord, Registration};
use galerne_types::{
    Compute, Epoch, GroupId, Health, KvDtype, Loss, LossKind, ModelCard, RankId, RankRecord, RankState,
    Shards,
};

/// Pause before a registration is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// Plays the one rank of `pod` until its group is drained, and then waits to be ended.
pub(crate) async fn play(coord: Coord, pod: String, group: String, process: u32) {
    // A machine that stands still loses the lease before it is used: a process would be started again.
    let registration = loop {
        match coord.register(rank(&pod, &group, process)).await {
            Ok(registration) => break registration,
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    };
    tokio::select! {
        () = serve(&registration, &group, process) => {}
        _ = registration.drained() => {}
    }
    registration.close().await.ok();
    std::future::pending::<()>().await;
}

async fn serve(registration: &Registration, group: &str, process: u32) {
    loop {
        let Ok(formed) = registration.form().await else { return };
        registration.update(RankState::Ready, 1 << 20);
        let epoch = formed.epoch;
        if registration.declare(health(group, process, epoch)).await.is_ok() {
            registration.ended(epoch).await;
        }
        registration.leave(epoch, Loss { kind: LossKind::Failed, rank: None });
    }
}

fn address(process: u32) -> String {
    format!("127.0.0.1:{}", 20_000 + process)
}

fn rank(pod: &str, group: &str, process: u32) -> RankRecord {
    RankRecord {
        id: RankId(format!("{pod}/0")),
        group: GroupId(group.into()),
        host: pod.into(),
        index: 0,
        address: address(process),
        collective: address(process),
        pid: process,
        device: "played".into(),
        build: "test".into(),
        model: card(),
        state: RankState::Waiting,
        memory_bytes: 0,
        ranks_min: 1,
        left: Epoch::default(),
        loss: None,
    }
}

fn card() -> ModelCard {
    ModelCard {
        name: "bard".into(),
        digest: "digest".into(),
        context_tokens_max: 64,
        vocab: 512,
        shards: Shards::new(4, 1).expect("a cut"),
        quantize: None,
        compute: Compute::F32,
        kv: KvDtype::F32,
    }
}

fn health(group: &str, process: u32, epoch: Epoch) -> Health {
    Health {
        group: GroupId(group.into()),
        epoch,
        leader: address(process),
        model: card(),
        kv_blocks: 16,
        sequences_max: 4,
        step_tokens_max: 64,
        draining: false,
    }
}
