//! Whether the other ranks of an epoch live, as long as they do not hear each other by its streams of steps: while they load,
//! and while they meet.

use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use galerne_tls::Way;
use galerne_types::EpochRecord;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::error::EpochError;
use super::followers::{BEAT_INTERVAL, QUIET_BEATS_MAX};
use crate::grpc;

/// A connection that does not stand by then is dialled anew: a frame of it was lost.
const DIAL_TIMEOUT: Duration = Duration::from_millis(300);

/// Asks all other members again and again whether they live; returns when one of them has not answered for too long.
pub(crate) async fn silence(record: &EpochRecord, own: usize, way: &Way) -> EpochError {
    let others = record.members.iter().enumerate().filter(|(rank, _)| *rank != own);
    let mut silent: FuturesUnordered<_> =
        others.map(|(rank, member)| silent(rank, &member.address, way)).collect();
    match silent.next().await {
        Some(error) => error,
        None => std::future::pending().await,
    }
}

/// Returns when that rank has not answered for too long, in intervals of our own.
async fn silent(rank: usize, address: &str, way: &Way) -> EpochError {
    let mut ticks = interval(BEAT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut answer = std::pin::pin!(ask(None, address, way));
    let mut quiet = 0;
    while quiet <= QUIET_BEATS_MAX {
        tokio::select! {
            client = &mut answer => {
                if client.is_some() {
                    quiet = 0;
                }
                answer.set(ask(client, address, way));
            }
            _ = ticks.tick() => quiet += 1,
        }
    }
    EpochError::Silent { rank, silence: BEAT_INTERVAL * QUIET_BEATS_MAX as u32 }
}

/// Asks once, after a pause; returns the client if there was an answer.
async fn ask(
    client: Option<HealthClient<Channel>>,
    address: &str,
    way: &Way,
) -> Option<HealthClient<Channel>> {
    sleep(BEAT_INTERVAL).await;
    let mut client = match client {
        Some(client) => client,
        None => HealthClient::new(timeout(DIAL_TIMEOUT, grpc::connect(address, way)).await.ok()?.ok()?),
    };
    client.check(HealthCheckRequest::default()).await.ok()?;
    Some(client)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use galerne_types::{GroupId, Member, RankId, Shards};
    use tokio::io::{DuplexStream, copy_bidirectional, duplex};
    use tokio::sync::mpsc;
    use tokio::time::Instant;
    use tokio_stream::wrappers::UnboundedReceiverStream;
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// An epoch of two, a way to the other rank, which answers until its machine is cancelled and then stands still.
    fn epoch() -> (EpochRecord, Way, CancellationToken) {
        let shards = Shards::new(2, 2).unwrap();
        let member = |rank: usize| Member {
            id: RankId(format!("h{rank}/0")),
            host: format!("h{rank}"),
            address: format!("10.0.0.{rank}:1"),
            collective: String::new(),
            pid: 1,
            shards: shards.of_rank(rank),
        };
        let members = vec![member(0), member(1)];
        let machine = CancellationToken::new();
        let (connections, taken) = mpsc::unbounded_channel::<std::io::Result<DuplexStream>>();
        let (_reporter, health) = tonic_health::server::health_reporter();
        let server = grpc::server().add_service(health);
        tokio::spawn(server.serve_with_incoming(UnboundedReceiverStream::new(taken)));
        let stands_still = machine.clone();
        let dial = move |_| -> galerne_tls::Dialling {
            let ((near, mut far), (mut here, there)) = (duplex(1 << 16), duplex(1 << 16));
            connections.send(Ok(there)).unwrap();
            let stands_still = stands_still.clone();
            tokio::spawn(async move {
                tokio::select! {
                    biased;
                    () = stands_still.cancelled() => std::future::pending().await,
                    _ = copy_bidirectional(&mut far, &mut here) => {}
                }
            });
            Box::pin(async move { Ok(near) })
        };
        let record = EpochRecord::new(GroupId("g".into()), shards, members, String::new());
        (record, Way::By(Arc::new(dial)), machine)
    }

    #[tokio::test(start_paused = true)]
    async fn who_answers_is_not_silent_and_who_stops_is_within_a_second() {
        let (record, way, machine) = epoch();
        let mut silence = std::pin::pin!(silence(&record, 0, &way));
        assert!(timeout(Duration::from_secs(20), &mut silence).await.is_err(), "it answers");
        machine.cancel();
        let stopped = Instant::now();
        let error = silence.await;
        assert!(matches!(error, EpochError::Silent { rank: 1, .. }), "{error}");
        assert!(stopped.elapsed() < Duration::from_secs(1), "{:?}", stopped.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn who_never_answers_is_silent_within_a_second() {
        let (record, way, machine) = epoch();
        machine.cancel();
        let began = Instant::now();
        let error = silence(&record, 1, &way).await;
        assert!(matches!(error, EpochError::Silent { rank: 0, .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_group_of_one_has_nobody_to_ask() {
        let (mut record, way, _machine) = epoch();
        record.members.truncate(1);
        assert!(timeout(Duration::from_secs(20), silence(&record, 0, &way)).await.is_err());
    }
}
