//! One API key, and what is kept of it.

use std::fmt;

use galerne_types::hex;
use sha2::{Digest as _, Sha256};

/// Random bytes in a key: nobody guesses 256 bits, so one round of a fast hash protects them. Slow hashes are for
/// passwords, which people choose; here they would only let strangers make a router busy.
const RANDOM_BYTES: usize = 32;

/// What every key begins with, so that a scanner of leaked secrets knows one.
const PREFIX: &str = "galerne-";

/// A new API key. It is shown once, to whom it is made for; what is kept is its hash.
pub struct ApiKey(String);

/// SHA-256 of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digest(pub(crate) [u8; 32]);

impl ApiKey {
    /// A key that nobody has.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; RANDOM_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(format!("{PREFIX}{}", hex(&bytes))))
    }

    /// The key itself, to be handed to its owner and nowhere else.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What the key file says of it: SHA-256 in hexadecimal digits.
    pub fn sha256(&self) -> String {
        hex(&Digest::of(self.0.as_bytes()).0)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl Digest {
    pub(crate) fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        sha256(text).map(Self)
    }
}

/// Reads the 64 hexadecimal digits of a SHA-256.
pub(crate) fn sha256(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 2 * bytes.len() || !text.is_ascii() {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = [digits[0], digits[1]].map(|digit| char::from(digit).to_digit(16));
        *byte = u8::try_from(high? * 16 + low?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_long_random_and_never_written_by_debug() {
        let (one, other) = (ApiKey::random().unwrap(), ApiKey::random().unwrap());
        assert_ne!(one.reveal(), other.reveal());
        assert_eq!(one.reveal().len(), "galerne-".len() + 64);
        assert_eq!(format!("{one:?}"), "ApiKey(…)");
    }

    #[test]
    fn a_digest_is_sha256() {
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::parse(abc), Some(Digest::of(b"abc")));
        assert_eq!(Digest::parse(&abc.to_uppercase()), Some(Digest::of(b"abc")));
        for wrong in ["", "ba78", &abc[1..], &abc.replace('b', "g"), &format!("{abc}0"), &"é".repeat(32)] {
            assert_eq!(Digest::parse(wrong), None, "{wrong}");
        }
    }
}
