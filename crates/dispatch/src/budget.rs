//! How many requests may be sent again: retries must not become the load that keeps a fleet down.

use std::collections::VecDeque;
use std::time::Duration;

/// Retries for each hundred requests: of what a leader refused, or could not be told. What a leader had accepted and lost is no
/// retry: nobody asked twice, and it comes once for each time that it was lost.
pub const RETRIES_PERCENT_MAX: u32 = 10;

/// Retries in a second that are let through however few requests there are: a tenth of a handful is none, and the first request
/// that meets a dead leader should find another one. Ten a second are nothing to a group, as Finagle and Linkerd have it, too.
pub const RETRIES_PER_S_MIN: u32 = 10;

/// What is looked back upon, in seconds.
pub const RETRY_WINDOW_S: u32 = 10;

/// Counts requests and retries of the last [`RETRY_WINDOW_S`]. Time is the router's, from any beginning, and does not go
/// back.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// Second, requests and retries of it; the oldest first.
    seconds: VecDeque<(u64, u32, u32)>,
}

impl RetryBudget {
    /// Counts a request.
    pub fn request(&mut self, now: Duration) {
        self.second(now).1 += 1;
    }

    /// Counts a retry, if there is one left.
    pub fn retry(&mut self, now: Duration) -> bool {
        self.second(now);
        let (requests, retries) = self
            .seconds
            .iter()
            .fold((0, 0), |(requests, retries), second| (requests + second.1, retries + second.2));
        let most = RETRIES_PER_S_MIN * RETRY_WINDOW_S
            + requests / 100 * RETRIES_PERCENT_MAX
            + requests % 100 * RETRIES_PERCENT_MAX / 100;
        let left = retries < most;
        self.second(now).2 += u32::from(left);
        left
    }

    /// The second that `now` is in, after those that are too old have been forgotten.
    fn second(&mut self, now: Duration) -> &mut (u64, u32, u32) {
        let now = now.as_secs();
        while self.seconds.front().is_some_and(|(second, _, _)| second + u64::from(RETRY_WINDOW_S) <= now) {
            self.seconds.pop_front();
        }
        if self.seconds.back().is_none_or(|(second, _, _)| *second < now) {
            self.seconds.push_back((now, 0, 0));
        }
        self.seconds.back_mut().expect("one was put there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: u32 = RETRIES_PER_S_MIN * RETRY_WINDOW_S;

    fn granted(budget: &mut RetryBudget, now: Duration) -> u32 {
        (0..).take_while(|_| budget.retry(now)).count() as u32
    }

    #[test]
    fn a_tenth_of_the_requests_and_a_floor_are_sent_again() {
        let mut budget = RetryBudget::default();
        let at = |ms| Duration::from_millis(ms);
        assert_eq!(granted(&mut budget, at(100)), FLOOR);
        (0..1000).for_each(|_| budget.request(at(1500)));
        assert_eq!(granted(&mut budget, at(1500)), 100);
        assert!(!budget.retry(at(9_750)));
        assert_eq!(granted(&mut budget, at(10_000)), FLOOR, "100 retries and 1000 requests are remembered");
        assert_eq!(granted(&mut budget, at(60_000)), FLOOR, "nothing is");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut budget = RetryBudget::default();
        for second in 0..1000 {
            budget.request(Duration::from_secs(second));
            budget.retry(Duration::from_secs(second));
            assert!(budget.seconds.len() <= RETRY_WINDOW_S as usize);
        }
    }
}
