//! What a step costs, fitted to those that were run.

use std::time::Duration;

use crate::window::Steps;

/// What was seen so long ago counts half: a fit needs light and heavy hours, and a device does not change.
const HALF_LIFE_S: f64 = 4.0 * 3600.0;

/// By which part of itself each diagonal entry of the normal equations is raised (ridge regression: Hoerl and Kennard,
/// Technometrics 12, 1970): where all windows resemble each other, cost is shared out between the parts instead of being
/// torn apart.
const RIDGE: f64 = 1e-6;

/// Seconds that the parts of a step take: the law of `galerne_sched::Cost`, without the head.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCost {
    /// Any step.
    pub step_s: f64,
    /// Each token.
    pub token_s: f64,
    /// Each key that a token attends to.
    pub key_s: f64,
}

/// Least squares over windows of steps, `busy = count · step_s + tokens · token_s + keys · key_s`, none of them negative. A
/// window's weight is one over its steps, because the error of a sum grows with what is summed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fit {
    normal: [[f64; 3]; 3],
    right: [f64; 3],
}

impl Fit {
    /// A while has passed: what was learned fades.
    pub(crate) fn fade(&mut self, length: Duration) {
        let kept = libm::exp2(-length.as_secs_f64() / HALF_LIFE_S);
        self.normal.iter_mut().flatten().chain(&mut self.right).for_each(|entry| *entry *= kept);
    }

    pub(crate) fn learn(&mut self, steps: Steps) {
        if steps.count == 0 {
            return;
        }
        let parts = [steps.count as f64, steps.tokens as f64, steps.keys as f64];
        let (weight, busy) = (1.0 / parts[0], steps.busy.as_secs_f64());
        for (row, part) in parts.iter().enumerate() {
            for (column, other) in parts.iter().enumerate() {
                self.normal[row][column] += weight * part * other;
            }
            self.right[row] += weight * part * busy;
        }
    }

    /// `None` until a step was seen that took time.
    pub(crate) fn cost(&self) -> Option<StepCost> {
        let mut used = [true; 3];
        loop {
            let solved = self.solve(used);
            let negative = (0..3).filter(|part| solved[*part] < 0.0);
            // The most negative one in units of what it adds to a step is left out, and the others take its share.
            let worst = negative.min_by(|a, b| self.size(*a, solved).total_cmp(&self.size(*b, solved)));
            let Some(worst) = worst else {
                let [step_s, token_s, key_s] = solved;
                return (step_s + token_s + key_s > 0.0).then_some(StepCost { step_s, token_s, key_s });
            };
            used[worst] = false;
        }
    }

    fn size(&self, part: usize, solved: [f64; 3]) -> f64 {
        solved[part] * self.normal[part][part].sqrt()
    }

    /// The normal equations of those parts that are used, by elimination; the others are 0. Scaled to a unit diagonal.
    fn solve(&self, used: [bool; 3]) -> [f64; 3] {
        let parts: Vec<usize> =
            (0..3).filter(|part| used[*part] && self.normal[*part][*part] > 0.0).collect();
        let scale = |part: usize| self.normal[part][part].sqrt();
        let mut rows: Vec<Vec<f64>> = parts
            .iter()
            .map(|row| {
                let entry = |column: &usize| {
                    let ridge = if row == column { RIDGE } else { 0.0 };
                    self.normal[*row][*column] / (scale(*row) * scale(*column)) + ridge
                };
                parts.iter().map(entry).chain([self.right[*row] / scale(*row)]).collect()
            })
            .collect();
        let count = parts.len();
        for pivot in 0..count {
            let (above, below) = rows.split_at_mut(pivot + 1);
            for row in below {
                let factor = row[pivot] / above[pivot][pivot];
                (pivot..=count).for_each(|column| row[column] -= factor * above[pivot][column]);
            }
        }
        let mut solved = [0.0; 3];
        for row in (0..count).rev() {
            let known: f64 = (row + 1..count)
                .map(|column| rows[row][column] * solved[parts[column]] * scale(parts[column]))
                .sum();
            solved[parts[row]] = (rows[row][count] - known) / rows[row][row] / scale(parts[row]);
        }
        solved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(cost: StepCost, count: u64, tokens: u64, keys: u64) -> Steps {
        let StepCost { step_s, token_s, key_s } = cost;
        let busy = count as f64 * step_s + tokens as f64 * token_s + keys as f64 * key_s;
        Steps { count, tokens, keys, busy: Duration::from_secs_f64(busy) }
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 0.02 * expected, "{found} instead of {expected}");
    }

    #[test]
    fn the_law_of_the_steps_is_found() {
        let cost = StepCost { step_s: 0.025, token_s: 150e-6, key_s: 50e-9 };
        let mut fit = Fit::default();
        assert_eq!(fit.cost(), None);
        for window in 0..40 {
            let (tokens, keys) = (2000 + 700 * (window % 7), 900_000 + 400_000 * (window % 5));
            fit.learn(steps(cost, 60 + window, tokens, keys));
            fit.fade(Duration::from_secs(5));
        }
        let found = fit.cost().unwrap();
        close(found.step_s, cost.step_s);
        close(found.token_s, cost.token_s);
        close(found.key_s, cost.key_s);
    }

    #[test]
    fn what_nobody_counts_or_would_be_negative_is_no_part_of_it() {
        let cost = StepCost { step_s: 0.01, token_s: 1e-4, key_s: 0.0 };
        let mut fit = Fit::default();
        (1..20).for_each(|window| fit.learn(steps(cost, 50, 100 * window, 0)));
        let found = fit.cost().unwrap();
        close(found.token_s, cost.token_s);
        assert_eq!(found.key_s, 0.0);
        let mut fit = Fit::default();
        (1..20).for_each(|window| {
            fit.learn(Steps { keys: 1000 * (40 - window), ..steps(cost, 50, 100 * window, 0) });
        });
        let found = fit.cost().unwrap();
        assert!(found.step_s >= 0.0 && found.token_s >= 0.0 && found.key_s >= 0.0, "{found:?}");
    }

    #[test]
    fn windows_that_are_all_alike_are_explained_all_the_same() {
        let cost = StepCost { step_s: 0.02, token_s: 1e-4, key_s: 1e-8 };
        let mut fit = Fit::default();
        (0..20).for_each(|_| fit.learn(steps(cost, 50, 3000, 100_000)));
        let StepCost { step_s, token_s, key_s } = fit.cost().unwrap();
        close(step_s * 50.0 + token_s * 3000.0 + key_s * 100_000.0, 50.0 * 0.02 + 0.3 + 0.001);
    }
}
