//! Which rank is much slower than the others.

use std::time::Duration;

/// So much work is compared: a single slow step says nothing.
const COMPARED: Duration = Duration::from_secs(2);

/// So many times what the others take is too much.
const TIMES: u32 = 10;

/// What each rank of an epoch has computed lately.
#[derive(Debug)]
pub(crate) struct Paces {
    /// By rank.
    busy: Vec<Duration>,
    wall: Duration,
}

impl Paces {
    pub(crate) fn new(ranks: usize) -> Self {
        Self { busy: vec![Duration::ZERO; ranks], wall: Duration::ZERO }
    }

    /// A rank has computed for so long.
    pub(crate) fn computed(&mut self, rank: usize, busy: Duration) {
        if let Some(sum) = self.busy.get_mut(rank) {
            *sum += busy;
        }
    }

    /// A step is over, which took so long. Names the rank that all others wait for, if it takes ten times as long as
    /// they do, and most of the time.
    pub(crate) fn step(&mut self, wall: Duration) -> Option<usize> {
        self.wall += wall;
        if self.wall < COMPARED {
            return None;
        }
        let wall = std::mem::take(&mut self.wall);
        let mut order: Vec<usize> = (0..self.busy.len()).collect();
        order.sort_by_key(|&rank| self.busy[rank]);
        let slow = order.pop()?;
        let typical = self.busy[*order.get(order.len() / 2)?];
        let is_slow = self.busy[slow] > typical * TIMES && self.busy[slow] > wall / 2;
        self.busy.fill(Duration::ZERO);
        is_slow.then_some(slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of ranks that compute for so many milliseconds of each of 20 steps of 200 ms.
    fn judged(ms: &[u64]) -> Option<usize> {
        let mut paces = Paces::new(ms.len());
        (0..20).find_map(|_| {
            for (rank, &ms) in ms.iter().enumerate() {
                paces.computed(rank, Duration::from_millis(ms));
            }
            paces.step(Duration::from_millis(200))
        })
    }

    #[test]
    fn the_rank_that_all_wait_for_is_named() {
        assert_eq!(judged(&[10, 180, 12, 9]), Some(1));
        assert_eq!(judged(&[180, 15]), Some(0));
    }

    #[test]
    fn ranks_that_differ_as_ranks_do_are_left_alone() {
        assert_eq!(judged(&[180, 170]), None);
        assert_eq!(judged(&[190, 40, 60]), None);
        assert_eq!(judged(&[2, 40]), None, "most of the time goes elsewhere");
        assert_eq!(judged(&[200]), None, "it has no fellows");
    }

    #[test]
    fn one_slow_step_says_nothing() {
        let mut paces = Paces::new(2);
        paces.computed(1, Duration::from_secs(1));
        assert_eq!(paces.step(Duration::from_secs(1)), None);
    }
}
