//! How long prompts and answers are, of late.

use std::collections::VecDeque;
use std::time::Duration;

use crate::window::Moments;

/// What was seen so long ago counts half.
const HALF_LIFE_S: f64 = 600.0;

/// Fewer than so many tell too little of the longest.
const COUNT_MIN: f64 = 30.0;

/// The last so many windows are compared with those before them.
const JUMPS: [usize; 2] = [1, 4];

/// Their mean is another one when it is so many standard deviations away: then only they count.
const JUMP_SIGMAS: f64 = 5.0;

/// Lengths in tokens, by their first two moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    /// Mean.
    pub mean: f64,
    /// Mean of the squares.
    pub squares: f64,
}

impl Lengths {
    /// All of them alike.
    pub fn fixed(tokens: f64) -> Self {
        Self { mean: tokens, squares: tokens * tokens }
    }

    /// Variance over the square of the mean.
    pub(crate) fn cv2(self) -> f64 {
        (self.squares / (self.mean * self.mean) - 1.0).max(0.0)
    }
}

/// Sums over lengths that may fade.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Sums {
    fn plus(self, moments: &Moments) -> Self {
        Self {
            count: self.count + moments.count as f64,
            sum: self.sum + moments.sum as f64,
            squares: self.squares + moments.squares as f64,
        }
    }

    /// `None` if there are too few.
    fn lengths(self) -> Option<Lengths> {
        let Self { count, sum, squares } = self;
        (count >= COUNT_MIN && sum > 0.0).then(|| Lengths { mean: sum / count, squares: squares / count })
    }
}

/// Learns lengths.
#[derive(Clone, Debug, Default)]
pub(crate) struct Learner {
    /// All, the older the less; without the last windows.
    older: Sums,
    /// The last windows.
    last: VecDeque<Moments>,
}

impl Learner {
    pub(crate) fn learn(&mut self, length: Duration, moments: Moments) {
        let kept = libm::exp2(-length.as_secs_f64() / HALF_LIFE_S);
        for sum in [&mut self.older.count, &mut self.older.sum, &mut self.older.squares] {
            *sum *= kept;
        }
        self.last.push_back(moments);
        if let Some(since) = JUMPS.into_iter().find(|last| self.jumped(*last)) {
            self.last.drain(..self.last.len() - since);
            self.older = Sums::default();
        }
        let most = JUMPS[JUMPS.len() - 1];
        while self.last.len() > most {
            if let Some(moments) = self.last.pop_front() {
                self.older = self.older.plus(&moments);
            }
        }
    }

    /// Whether the last so many windows have another mean than what was before.
    fn jumped(&self, last: usize) -> bool {
        let Some(split) = self.last.len().checked_sub(last) else { return false };
        let before = self.last.range(..split).fold(self.older, Sums::plus);
        let since = self.last.range(split..).fold(Sums::default(), Sums::plus);
        let (Some(before_s), Some(since_s)) = (before.lengths(), since.lengths()) else { return false };
        let variance = (before_s.squares - before_s.mean * before_s.mean).max(before_s.mean);
        let error = (variance / since.count + variance / before.count).sqrt();
        (since_s.mean - before_s.mean).abs() > JUMP_SIGMAS * error
    }

    /// `None` until enough were seen.
    pub(crate) fn lengths(&self) -> Option<Lengths> {
        self.last.iter().fold(self.older, Sums::plus).lengths()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(5);

    /// As many of each.
    fn of(tokens: [u32; 2], each: u32) -> Moments {
        let mut moments = Moments::default();
        (0..each).for_each(|_| tokens.into_iter().for_each(|tokens| moments.add(tokens)));
        moments
    }

    #[test]
    fn moments_are_those_of_what_was_seen_and_later_lengths_count_more() {
        let mut learner = Learner::default();
        learner.learn(WINDOW, Moments { count: 29, sum: 100, squares: 1000 });
        assert_eq!(learner.lengths(), None, "too few");
        let mut learner = Learner::default();
        learner.learn(WINDOW, of([1, 3], 100));
        assert_eq!(learner.lengths(), Some(Lengths { mean: 2.0, squares: 5.0 }));
        (0..8).for_each(|_| learner.learn(WINDOW, Moments::default()));
        let kept = learner.older.count;
        learner.learn(Duration::from_secs(600), Moments::default());
        assert!((learner.older.count - kept / 2.0).abs() < 1e-9);
    }

    #[test]
    fn what_changes_at_once_is_believed_at_once_and_noise_is_none() {
        let mut learner = Learner::default();
        (0..100).for_each(|_| learner.learn(WINDOW, of([100, 700], 50)));
        learner.learn(WINDOW, of([150, 700], 20));
        assert!(learner.lengths().unwrap().mean < 402.0);
        learner.learn(WINDOW, of([200, 1400], 50));
        assert_eq!(learner.lengths().unwrap().mean, 800.0);
    }
}
