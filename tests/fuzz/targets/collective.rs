//! What a stranger, and what a rank that was taken over, can send to a rank that meets its group.
//!
//! The other side is written here once more, after the description in `collective::handshake`.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use galerne_collective::{
    AbortHandle, Collective, CollectiveError, Config, CpuCollective, Peer, connect, listen,
};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::engine::{Outcome, Target, alone, fuzz, mutate};

const SECRET: [u8; 32] = [7; 32];
const EPOCH: u64 = 42;
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the other side looks whether the rank is still there.
const GLANCE: Duration = Duration::from_millis(10);

/// What the input is.
enum Part {
    /// All that a connection says.
    Connection,
    /// A claim, authentic.
    Claim,
    /// Where this rank's memory is, authentic; both ranks share a host.
    Memory,
    /// What follows on the connection for messages.
    Messages,
    /// What follows on the connection for notices.
    Notices,
}

const PARTS: [Part; 5] = [Part::Connection, Part::Claim, Part::Memory, Part::Messages, Part::Notices];

fn claim(purpose: u8, memory: u64) -> [u8; 24] {
    let mut claim = [0; 24];
    claim[..8].copy_from_slice(&EPOCH.to_le_bytes());
    claim[8..10].copy_from_slice(&1_u16.to_le_bytes());
    claim[12] = purpose;
    claim[16..].copy_from_slice(&memory.to_le_bytes());
    claim
}

/// Answers the challenge of whoever listens at `address`, and waits for its welcome; `None` if that does not come.
fn dial(address: SocketAddr, claim: &[u8; 24], over: &AtomicBool) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(GLANCE)).ok()?;
    let mut challenge = [0; 32];
    read(&mut stream, &mut challenge, over)?;
    let signed = [&claim[..], &[9; 32]].concat();
    let mut key = [0; 64];
    key[..32].copy_from_slice(&SECRET);
    let mac = Hmac::<Sha256>::new(&key.into()).chain_update("galerne collective 1 hello");
    let mac = mac.chain_update(challenge).chain_update(&signed).finalize().into_bytes();
    stream.write_all(&[&signed[..], &mac].concat()).ok()?;
    read(&mut stream, &mut [0; 40], over)?;
    Some(stream)
}

/// Fills `bytes`, unless the rank is gone: then nobody answers any more.
fn read(stream: &mut TcpStream, bytes: &mut [u8], over: &AtomicBool) -> Option<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return None,
            Ok(read) => filled += read,
            Err(error) if error.kind() != ErrorKind::WouldBlock => return None,
            Err(_) if over.load(Ordering::SeqCst) => return None,
            Err(_) => {}
        }
    }
    Some(())
}

/// Plays rank 1 against rank 0 at `address`; everything is closed at the end.
fn play(address: SocketAddr, part: &Part, input: &[u8], over: &AtomicBool) {
    let send = |stream: &mut Option<TcpStream>, bytes: &[u8]| {
        if let Some(stream) = stream {
            let _ = stream.write_all(bytes); // the rank may have hung up
        }
    };
    if let Part::Connection = part {
        let mut stranger = TcpStream::connect(address).ok();
        send(&mut stranger, input);
    }
    let memory = input.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if let Part::Claim = part {
        let mut claim = claim(0, 0);
        claim.iter_mut().zip(input).for_each(|(byte, new)| *byte ^= new);
        drop(dial(address, &claim, over));
    }
    let mut control = dial(address, &claim(0, memory), over);
    let mut data = if let Part::Memory = part { None } else { dial(address, &claim(1, memory), over) };
    match part {
        Part::Messages => send(&mut data, input),
        Part::Notices => send(&mut control, input),
        Part::Connection | Part::Claim | Part::Memory => {}
    }
}

/// Rank 0: makes one call of each kind, as long as they go.
fn calls(mut rank: CpuCollective) -> Result<(), CollectiveError> {
    let mut out = [0.0; 3];
    rank.all_reduce(&[1.0, 2.0, 3.0], &mut out)?;
    let mut gathered = [0.0; 5];
    rank.all_gather(&[1.0, 2.0], &[2, 3], &mut gathered)?;
    rank.broadcast(1, &mut [0; 9])?;
    rank.gather(0, &[1.0, 2.0], &[2, 3], &mut gathered)?;
    rank.barrier()
}

/// The messages of rank 1 for the first calls.
fn messages() -> Vec<u8> {
    let message = |sequence: u64, bytes: u64, operation: u8, root: u16, payload: &[f32]| {
        let mut out = [&sequence.to_le_bytes()[..], &bytes.to_le_bytes(), &[operation, 0]].concat();
        out.extend(root.to_le_bytes());
        out.extend([0; 4]);
        out.extend(payload.iter().flat_map(|number| number.to_le_bytes()));
        out
    };
    [message(1, 12, 1, 0, &[4.0, 5.0, 6.0]), message(2, 20, 2, 0, &[7.0, 8.0, 9.0])].concat()
}

#[test]
fn collective() {
    let alone = alone();
    let number = |part: u8, content: &[u8]| [&[part][..], content].concat();
    let memory = u64::from(std::process::id()) << 32 | 5;
    let target = Target {
        name: "collective",
        seeds: vec![
            number(0, &[0; 88]),
            number(0, b"GET / HTTP/1.1\r\n\r\n"),
            number(1, &[0; 24]),
            number(2, &memory.to_le_bytes()),
            number(3, &messages()),
            number(4, &[0, 1, 0, 0, 0, 0, 0, 0]),
            number(4, &[3, 0, 1, 0, 1, 1, 0, 0]),
        ],
        words: &["\u{1}\u{0}", "\u{0}\u{0}\u{0}\u{0}"],
        change: |seed, input, other, words| {
            let Some((part, rest)) = input.split_first() else { return vec![0] };
            [&[*part][..], &mutate::bytes(seed, rest, other, words)].concat()
        },
        runs: 400,
        memory_bytes: (8 << 20, 16),
        cpu: (Duration::from_secs(2), Duration::from_micros(20)),
        secret: None,
    };
    fuzz(&alone, &target, |input| -> Outcome {
        let listener = listen(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("a port");
        let address = listener.address();
        let Some((part, input)) = input.split_first() else { return Ok(()) };
        let part = &PARTS[usize::from(*part) % PARTS.len()];
        let host = |rank: usize| if let Part::Memory = part { "a".to_owned() } else { format!("h{rank}") };
        let peer = |rank| Peer { host: host(rank), address, leaves: rank..rank + 1 };
        let config = Config {
            rank: 0,
            leaves: 2,
            peers: vec![peer(0), peer(1)],
            secret: SECRET.into(),
            epoch: EPOCH,
            threads: 1,
            meet_timeout: PATIENCE,
            timeout: PATIENCE,
        };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| play(address, part, input, &over));
            let outcome = connect(&config, &listener, &AbortHandle::new()).and_then(calls);
            over.store(true, Ordering::SeqCst);
            outcome.map_err(|error| error.to_string())
        })
    });
}
