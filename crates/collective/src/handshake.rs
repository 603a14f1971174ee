//! How two ranks prove to each other that they know the epoch's secret: challenge and response by HMAC-SHA256
//! (RFC 2104), as a pure function of bytes.
//!
//! ```text
//! acceptor ── challenge: 32 random bytes ─────────────▶ dialer
//! acceptor ◀── hello: claim, nonce, HMAC ───────────── dialer
//! acceptor ── welcome: memory address, HMAC ──────────▶ dialer
//! ```
//!
//! All three have a fixed length. An HMAC covers everything said so far, and is checked before anything else
//! that came is looked at. This authenticates the peer; it does not encrypt what follows.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::config::Secret;
use crate::segment::{Address, Token};

/// Unpredictable and never repeated, so that no answer can be replayed.
pub(crate) type Nonce = [u8; 32];

const CLAIM_BYTES: usize = 24;
const MAC_BYTES: usize = 32;
const ADDRESS_BYTES: usize = 8;
/// Length of a hello.
pub(crate) const HELLO_BYTES: usize = CLAIM_BYTES + size_of::<Nonce>() + MAC_BYTES;
/// Length of a welcome.
pub(crate) const WELCOME_BYTES: usize = ADDRESS_BYTES + MAC_BYTES;

const SIGNED_HELLO_BYTES: usize = HELLO_BYTES - MAC_BYTES;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Silent while all is well: its end tells that the peer is gone, a notice why.
    Control,
    /// Messages between ranks of different hosts.
    Data,
}

/// What a dialer says of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) epoch: u64,
    pub(crate) from: u16,
    pub(crate) to: u16,
    pub(crate) purpose: Purpose,
    /// Where the dialer's segment is, should they share a host.
    pub(crate) memory: Address,
}

/// The dialer's answer to `challenge`.
pub(crate) fn hello(secret: &Secret, challenge: &Nonce, claim: &Claim, nonce: &Nonce) -> [u8; HELLO_BYTES] {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&claim.epoch.to_le_bytes());
    hello[8..10].copy_from_slice(&claim.from.to_le_bytes());
    hello[10..12].copy_from_slice(&claim.to.to_le_bytes());
    hello[12] = claim.purpose as u8;
    hello[16..CLAIM_BYTES].copy_from_slice(&encode_address(claim.memory));
    hello[CLAIM_BYTES..SIGNED_HELLO_BYTES].copy_from_slice(nonce);
    let mac = hello_mac(secret, challenge, &hello).finalize().into_bytes();
    hello[SIGNED_HELLO_BYTES..].copy_from_slice(&mac);
    hello
}

/// The claim in an authentic hello; `None` for anything else.
pub(crate) fn read_hello(secret: &Secret, challenge: &Nonce, hello: &[u8; HELLO_BYTES]) -> Option<Claim> {
    hello_mac(secret, challenge, hello).verify_slice(&hello[SIGNED_HELLO_BYTES..]).ok()?;
    let (epoch, rest) = hello.split_first_chunk()?;
    Some(Claim {
        epoch: u64::from_le_bytes(*epoch),
        from: u16::from_le_bytes([rest[0], rest[1]]),
        to: u16::from_le_bytes([rest[2], rest[3]]),
        purpose: [Purpose::Control, Purpose::Data].into_iter().find(|purpose| *purpose as u8 == rest[4])?,
        memory: decode_address(rest[8..].first_chunk()?),
    })
}

/// The acceptor's answer to an authentic hello.
pub(crate) fn welcome(
    secret: &Secret,
    challenge: &Nonce,
    hello: &[u8; HELLO_BYTES],
    memory: Address,
) -> [u8; WELCOME_BYTES] {
    let mut welcome = [0; WELCOME_BYTES];
    welcome[..ADDRESS_BYTES].copy_from_slice(&encode_address(memory));
    let mac = welcome_mac(secret, challenge, hello, &welcome).finalize().into_bytes();
    welcome[ADDRESS_BYTES..].copy_from_slice(&mac);
    welcome
}

/// The acceptor's segment from an authentic welcome; `None` for anything else.
pub(crate) fn read_welcome(
    secret: &Secret,
    challenge: &Nonce,
    hello: &[u8; HELLO_BYTES],
    welcome: &[u8; WELCOME_BYTES],
) -> Option<Address> {
    welcome_mac(secret, challenge, hello, welcome).verify_slice(&welcome[ADDRESS_BYTES..]).ok()?;
    welcome.first_chunk().map(decode_address)
}

/// What `rank` writes into its segment.
pub(crate) fn token(secret: &Secret, epoch: u64, rank: usize) -> Token {
    let mac = keyed(secret, b"galerne collective 1 memory");
    mac.chain_update(epoch.to_le_bytes())
        .chain_update((rank as u64).to_le_bytes())
        .finalize()
        .into_bytes()
        .into()
}

fn hello_mac(secret: &Secret, challenge: &Nonce, hello: &[u8; HELLO_BYTES]) -> Hmac<Sha256> {
    keyed(secret, b"galerne collective 1 hello")
        .chain_update(challenge)
        .chain_update(&hello[..SIGNED_HELLO_BYTES])
}

fn welcome_mac(
    secret: &Secret,
    challenge: &Nonce,
    hello: &[u8; HELLO_BYTES],
    welcome: &[u8; WELCOME_BYTES],
) -> Hmac<Sha256> {
    keyed(secret, b"galerne collective 1 welcome")
        .chain_update(challenge)
        .chain_update(hello)
        .chain_update(&welcome[..ADDRESS_BYTES])
}

/// `context` keeps an answer given in one place from being of use in another.
fn keyed(secret: &Secret, context: &[u8]) -> Hmac<Sha256> {
    // HMAC pads a short key with zeros to the block length; done here, the key cannot be of a wrong length.
    let mut key = [0; 64];
    key[..secret.0.len()].copy_from_slice(&secret.0);
    Hmac::new(&key.into()).chain_update(context)
}

fn encode_address(address: Address) -> [u8; ADDRESS_BYTES] {
    (u64::from(address.pid) << 32 | u64::from(address.descriptor)).to_le_bytes()
}

fn decode_address(bytes: &[u8; ADDRESS_BYTES]) -> Address {
    let both = u64::from_le_bytes(*bytes);
    Address { pid: (both >> 32) as u32, descriptor: both as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLAIM: Claim = Claim {
        epoch: 42,
        from: 3,
        to: 1,
        purpose: Purpose::Data,
        memory: Address { pid: 1234, descriptor: 56 },
    };

    #[test]
    fn both_sides_learn_what_the_other_said() {
        let secret = Secret([1; 32]);
        let hello = hello(&secret, &[2; 32], &CLAIM, &[3; 32]);
        assert_eq!(read_hello(&secret, &[2; 32], &hello), Some(CLAIM));
        let memory = Address { pid: 99, descriptor: 7 };
        let welcome = welcome(&secret, &[2; 32], &hello, memory);
        assert_eq!(read_welcome(&secret, &[2; 32], &hello, &welcome), Some(memory));
    }

    #[test]
    fn another_secret_a_replay_or_a_changed_bit_is_refused() {
        let secret = Secret([1; 32]);
        let hello = hello(&secret, &[2; 32], &CLAIM, &[3; 32]);
        assert_eq!(read_hello(&Secret([9; 32]), &[2; 32], &hello), None, "another secret");
        assert_eq!(read_hello(&secret, &[9; 32], &hello), None, "an answer to another challenge");
        let welcome = welcome(&secret, &[2; 32], &hello, CLAIM.memory);
        for bit in 0..HELLO_BYTES * 8 {
            let mut changed = hello;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read_hello(&secret, &[2; 32], &changed), None, "bit {bit} of the hello");
            assert_eq!(read_welcome(&secret, &[2; 32], &changed, &welcome), None, "bit {bit} of the hello");
        }
        for bit in 0..WELCOME_BYTES * 8 {
            let mut changed = welcome;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read_welcome(&secret, &[2; 32], &hello, &changed), None, "bit {bit} of the welcome");
        }
    }
}
