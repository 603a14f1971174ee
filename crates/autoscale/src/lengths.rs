//! How long prompts and answers are, of late.

use std::time::Duration;

use crate::window::Moments;

/// What was seen so long ago counts half.
const HALF_LIFE_S: f64 = 600.0;

/// Fewer than so many tell too little of the longest.
const COUNT_MIN: f64 = 30.0;

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

/// Learns lengths.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Learner {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Learner {
    pub(crate) fn learn(&mut self, length: Duration, moments: Moments) {
        let kept = libm::exp2(-length.as_secs_f64() / HALF_LIFE_S);
        self.count = self.count * kept + moments.count as f64;
        self.sum = self.sum * kept + moments.sum as f64;
        self.squares = self.squares * kept + moments.squares as f64;
    }

    /// `None` until enough were seen.
    pub(crate) fn lengths(&self) -> Option<Lengths> {
        (self.count >= COUNT_MIN && self.sum > 0.0)
            .then(|| Lengths { mean: self.sum / self.count, squares: self.squares / self.count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_what_was_seen_and_later_lengths_count_more() {
        let of = |tokens: [u32; 2]| {
            let mut moments = Moments::default();
            (0..100).for_each(|_| tokens.into_iter().for_each(|tokens| moments.add(tokens)));
            moments
        };
        let mut learner = Learner::default();
        let few = Moments { count: 29, sum: 100, squares: 1000 };
        learner.learn(Duration::from_secs(5), few);
        assert_eq!(learner.lengths(), None);
        let mut learner = Learner::default();
        learner.learn(Duration::from_secs(5), of([1, 3]));
        assert_eq!(learner.lengths(), Some(Lengths { mean: 2.0, squares: 5.0 }));
        learner.learn(Duration::from_secs(600), of([8, 8]));
        assert!((learner.lengths().unwrap().mean - 6.0).abs() < 1e-9, "two thirds are of late");
    }
}
