//! Requests that are not tried again for a while, because groups were lost on them.

use std::collections::BTreeMap;
use std::time::Duration;

/// How long a request is refused.
pub const BAN_S: Duration = Duration::from_secs(60);

/// Requests that are refused at once; with more, the one that has been refused longest is forgotten.
pub const BANS_MAX: usize = 1_024;

/// A request, by a digest of everything that a group sees of it.
pub type Digest = [u8; 32];

/// Time is the router's, from any beginning.
#[derive(Debug, Default)]
pub struct Bans {
    /// When each ends.
    until: BTreeMap<Digest, Duration>,
}

impl Bans {
    /// Refuses a request from now on.
    pub fn ban(&mut self, digest: Digest, now: Duration) {
        self.forget(now);
        if self.until.len() >= BANS_MAX && !self.until.contains_key(&digest) {
            let first = self.until.iter().min_by_key(|(_, until)| **until).map(|(digest, _)| *digest);
            first.map(|first| self.until.remove(&first));
        }
        self.until.insert(digest, now + BAN_S);
    }

    /// Whether a request is refused. `digest` is worked out only if any is.
    pub fn refuses(&mut self, digest: impl FnOnce() -> Digest, now: Duration) -> bool {
        self.forget(now);
        !self.until.is_empty() && self.until.contains_key(&digest())
    }

    /// Requests that are refused.
    pub fn count(&mut self, now: Duration) -> usize {
        self.forget(now);
        self.until.len()
    }

    fn forget(&mut self, now: Duration) {
        self.until.retain(|_, until| *until > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ban_ends() {
        let mut bans = Bans::default();
        let second = Duration::from_secs(1);
        assert!(!bans.refuses(|| unreachable!("nobody is banned"), second));
        bans.ban([7; 32], second);
        assert!(bans.refuses(|| [7; 32], BAN_S));
        assert!(!bans.refuses(|| [8; 32], BAN_S));
        assert_eq!((bans.count(BAN_S), bans.count(BAN_S + second)), (1, 0));
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut bans = Bans::default();
        let digest = |number: usize| std::array::from_fn(|at| (number >> (8 * (at % 8))) as u8);
        for number in 0..=BANS_MAX {
            bans.ban(digest(number), Duration::from_millis(number as u64));
        }
        let now = Duration::from_secs(2);
        assert_eq!(bans.count(now), BANS_MAX);
        assert!(!bans.refuses(|| digest(0), now) && bans.refuses(|| digest(1), now));
        assert!(bans.refuses(|| digest(BANS_MAX), now));
    }
}
