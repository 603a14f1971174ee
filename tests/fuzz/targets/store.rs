//! Requests to the embedded store, which speaks etcd's API.

use std::time::Duration;

use galerne_coord::embedded;
use tokio::net::TcpListener;
use tonic::transport::Endpoint;

use crate::engine::{Target, alone, fuzz, grpc, mutate};

const METHODS: [&str; 14] = [
    "/etcdserverpb.KV/Range",
    "/etcdserverpb.KV/Put",
    "/etcdserverpb.KV/DeleteRange",
    "/etcdserverpb.KV/Txn",
    "/etcdserverpb.KV/Compact",
    "/etcdserverpb.KV/RangeStream",
    "/etcdserverpb.Lease/LeaseGrant",
    "/etcdserverpb.Lease/LeaseRevoke",
    "/etcdserverpb.Lease/LeaseKeepAlive",
    "/etcdserverpb.Lease/LeaseTimeToLive",
    "/etcdserverpb.Lease/LeaseLeases",
    "/etcdserverpb.Watch/Watch",
    "/etcdserverpb.Maintenance/Status",
    "/etcdserverpb.Maintenance/Snapshot",
];

/// Messages of each method, after the number of the method.
const MESSAGES: [(u8, &[u8]); 17] = [
    (0, b"\x0a\x01k\x12\x01l\x18\x05\x20\x01\x28\x02\x30\x01"),
    (0, b"\x0a\x01\0\x12\x01\0\x50\x01\x58\x02\x60\x01\x68\x03"),
    (1, b"\x0a\x01k\x12\x01v\x20\x01"),
    (1, b"\x0a\x02k2\x12\x05value\x18\x07"),
    (2, b"\x0a\x01k\x12\x01\0\x18\x01"),
    (3, b"\x0a\x0b\x08\0\x10\x01\x1a\x01k\x30\x05\x12\x08\x12\x06\x0a\x01k\x12\x01w\x1a\x07\x0a\x05\x0a\x01k\x18\x01"),
    (3, b"\x0a\x0a\x08\x02\x10\x03\x1a\x01k\x3a\x01v\x12\x07\x1a\x05\x0a\x01k\x18\x01"),
    (4, b"\x08\x03\x10\x01"),
    (5, b"\x0a\x01k"),
    (6, b"\x08\x05\x10\x07"),
    (7, b"\x08\x07"),
    (8, b"\x08\x07"),
    (9, b"\x08\x07\x10\x01"),
    (10, b""),
    (11, b"\x0a\x0d\x0a\x01k\x12\x01\0\x18\x01\x30\x01\x2a\x01\x01"),
    (11, b"\x12\x02\x08\x01"),
    (12, b""),
];

#[test]
fn store() {
    let alone = alone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let channel = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(embedded::serve(listener, std::future::pending()));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        endpoint.connect().await.expect("a store")
    });
    let target = Target {
        name: "store",
        seeds: MESSAGES.iter().map(|(method, message)| [&[*method][..], message].concat()).collect(),
        words: &[
            "\n\u{1}k",
            "\u{12}\u{1}\u{0}",
            "\u{8}\u{7}",
            "\u{18}\u{1}",
            "\u{12}\u{8}",
            "\u{1a}\u{7}",
            "\u{7f}",
        ],
        change: |seed, input, other, words| {
            let Some((method, message)) = input.split_first() else { return vec![seed.next() as u8] };
            let method = if seed.one_in(12) { seed.next() as u8 } else { *method };
            let message = mutate::bytes(seed, message, other.get(1..).unwrap_or_default(), words);
            [&[method][..], &message].concat()
        },
        runs: 4_000,
        // The store keeps what it is told, up to its limit.
        memory_bytes: (4 << 20, 200),
        cpu: (Duration::from_millis(500), Duration::from_micros(20)),
        secret: None,
    };
    fuzz(&alone, &target, |input| {
        let Some((method, message)) = input.split_first() else { return Ok(()) };
        let method = METHODS[usize::from(*method) % METHODS.len()];
        let call = grpc::call(&channel, method, message);
        runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), call).await.expect("an answer") })
    });
}
