//! Whether a request is the reason that groups are lost.

use std::collections::VecDeque;
use std::time::Duration;

/// Tokens of one group after which a request is innocent of its end, and of those before it.
pub const INNOCENT_TOKENS: usize = 4;

/// What a loss behind a token or a few counts, where one before any counts 1: it is seen again with the next ones, if the request is the
/// reason, and happens by chance to whoever was just sent on.
const BEHIND_TOKENS: f32 = 0.2;

/// Suspicion from which on a request is taken for the reason: two groups were lost while they worked on it, the second of them
/// on no other that was suspected as much, and the first on few.
const SUSPICION_MAX: f32 = 1.25;

/// The same where groups were lost lately that did not work on it: then any request may have been there by chance.
const SUSPICION_ELSEWHERE_MAX: f32 = 4.0;

/// How long before a request's first loss the others are lately.
const LATELY_S: Duration = Duration::from_secs(60);

/// Turns in which those are tried that are suspected together: up to so many are each tried alone.
const TURNS_MAX: u32 = 8;

/// Losses that are remembered.
const LOSSES_MAX: usize = 64;

/// When groups were lost, whatever they worked on. Time is the router's, from any beginning.
#[derive(Debug, Default)]
pub struct Losses(VecDeque<Duration>);

impl Losses {
    /// An incarnation of a group was lost.
    pub fn count(&mut self, now: Duration) {
        if self.0.len() == LOSSES_MAX {
            self.0.pop_front();
        }
        self.0.push_back(now);
    }

    fn since(&self, from: Duration) -> usize {
        self.0.iter().filter(|at| **at >= from).count()
    }
}

/// What is held against a request, since it last had [`INNOCENT_TOKENS`] of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Suspicion {
    /// Groups that were lost while they worked on it.
    deaths: u32,
    /// Each of k that a group worked on when it was lost is suspected by a k-th.
    weight: f32,
    /// k, the last time.
    company: u32,
    /// When the first of these groups was lost.
    since: Duration,
}

impl Suspicion {
    /// A group was lost that worked on the request and had given it so many tokens. `company`: how many it worked on that had had
    /// few of it and had as many [`deaths`](Self::deaths) or more, this one included.
    pub fn lost(&mut self, tokens: usize, company: usize, now: Duration) {
        if tokens >= INNOCENT_TOKENS {
            *self = Self::default();
            return;
        }
        if self.deaths == 0 {
            self.since = now;
        }
        self.company = company.max(1) as u32;
        self.deaths += 1;
        let counts = if tokens == 0 { 1.0 } else { BEHIND_TOKENS };
        self.weight += counts / self.company as f32;
    }

    /// Groups that were lost on it in a row.
    pub fn deaths(&self) -> u32 {
        self.deaths
    }

    /// Whether it is taken for the reason; `losses` are those of all groups.
    pub fn convicts(&self, losses: &Losses) -> bool {
        let always = losses.since(self.since.saturating_sub(LATELY_S)) == self.deaths as usize;
        self.weight >= if always { SUSPICION_MAX } else { SUSPICION_ELSEWHERE_MAX }
    }

    /// How many such requests may be tried at once; any number of those that nothing is held against.
    pub fn at_once(&self) -> Option<u32> {
        (self.deaths > 0).then(|| self.company.div_ceil(TURNS_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A request on which groups were lost, a second apart, in this company and after so many tokens.
    fn losing(losses: &mut Losses, deaths: &[(usize, usize)]) -> Suspicion {
        let mut suspicion = Suspicion::default();
        for (at, &(tokens, company)) in deaths.iter().enumerate() {
            let now = 100 * SECOND + SECOND * at as u32;
            losses.count(now);
            suspicion.lost(tokens, company, now);
        }
        suspicion
    }

    #[test]
    fn two_groups_are_enough_if_neither_gave_it_a_token_and_few_were_there() {
        for (deaths, convicted) in [
            (&[(0, 1)][..], false),
            (&[(0, 1), (0, 1)], true),
            (&[(0, 4), (0, 1)], true),
            (&[(0, 7), (0, 1)], false),
            (&[(0, 7), (0, 1), (0, 1)], true),
            (&[(0, 2), (0, 2)], false),
            (&[(0, 1), (INNOCENT_TOKENS - 1, 1)], false),
            (&[(1, 1); 6], false),
            (&[(1, 1); 7], true),
            (&[(0, 1), (INNOCENT_TOKENS, 1)], false),
            (&[(0, 1), (INNOCENT_TOKENS, 1), (0, 1)], false),
            (&[(0, 200), (0, 25), (0, 4), (0, 1)], true),
        ] {
            let mut losses = Losses::default();
            assert_eq!(losing(&mut losses, deaths).convicts(&losses), convicted, "{deaths:?}");
        }
    }

    #[test]
    fn where_groups_are_lost_without_it_too_it_takes_more_to_be_sure() {
        for (elsewhere_s, deaths) in [(50, 4), (30, 2), (101, 4)] {
            let mut losses = Losses::default();
            losses.count(SECOND * elsewhere_s);
            let convicted =
                |losses: &mut Losses, deaths| losing(losses, &vec![(0, 1); deaths]).convicts(losses);
            assert!(!convicted(&mut losses, deaths - 1), "{elsewhere_s}");
            let mut losses = Losses::default();
            losses.count(SECOND * elsewhere_s);
            assert!(convicted(&mut losses, deaths), "{elsewhere_s}");
        }
    }

    #[test]
    fn a_leader_that_was_merely_out_of_reach_is_no_group_that_was_lost() {
        let mut losses = Losses::default();
        let mut suspicion = losing(&mut losses, &[(0, 1)]);
        suspicion.lost(0, 1, 102 * SECOND);
        assert!(!suspicion.convicts(&losses));
    }

    #[test]
    fn suspects_are_tried_in_few_turns() {
        assert_eq!(Suspicion::default().at_once(), None);
        for (company, at_once) in [(1, 1), (8, 1), (9, 2), (200, 25)] {
            assert_eq!(losing(&mut Losses::default(), &[(0, company)]).at_once(), Some(at_once));
        }
    }

    #[test]
    fn what_is_remembered_of_losses_is_bounded() {
        let mut losses = Losses::default();
        (0..1000).for_each(|at| losses.count(SECOND * at));
        assert_eq!(losses.since(Duration::ZERO), LOSSES_MAX);
    }
}
