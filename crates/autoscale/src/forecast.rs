//! How many requests will come: a line through those that came since the last jump of their rate.

use std::collections::VecDeque;
use std::time::Duration;

/// The line is drawn through so much of the past at most.
const PAST_S_MAX: f64 = 600.0;

/// Windows that are remembered at most.
const WINDOWS_MAX: usize = 1200;

/// The last so many windows are compared with what the line through those before them said.
const JUMPS: [usize; 4] = [1, 2, 4, 8];

/// They are a jump when they are so many standard deviations away from it. By chance that is one window in a million.
const JUMP_SIGMAS: f64 = 5.0;

/// Each jump back doubles that, up to so many times, and half of it is gone after so long: what jumps to and fro all the
/// time is noise, of which the whole line is to be drawn.
const UNREST_MAX: f64 = 64.0;
const UNREST_HALF_LIFE_S: f64 = 300.0;

/// A line of less than so long has no slope.
const SLOPE_S_MIN: f64 = 60.0;

/// A slope counts from so many standard errors on, and the more wholly the more of them it is (the shrinkage of James and
/// Stein, 1961).
const SLOPE_SIGMAS: f64 = 2.0;

/// By so many standard errors the rate is taken to be higher than the line: nine times of ten it is not.
const UPPER_SIGMAS: f64 = 1.28;

#[derive(Clone, Copy, Debug)]
struct Seen {
    middle_s: f64,
    length_s: f64,
    arrivals: f64,
}

/// Remembers arrivals, and draws a line through them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Forecast {
    seen: VecDeque<Seen>,
    /// The last jump was upwards.
    jumped_up: Option<bool>,
    /// How much further than otherwise a jump has to go, less one.
    unrest: f64,
    /// Nothing has come for so long.
    idle: Duration,
}

/// Weighted least squares: `rate(t) = level + slope · (t − middle_s)`.
#[derive(Clone, Copy, Debug)]
struct Line {
    middle_s: f64,
    level: f64,
    slope: f64,
    /// Variance of the level, and of the slope.
    level_variance: f64,
    slope_variance: f64,
    /// Variance of a window's arrivals over their mean; at least 1.
    dispersion: f64,
}

/// What is to be expected.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Expected {
    /// Requests a second, at the upper end.
    pub(crate) rate_per_s: f64,
    pub(crate) dispersion: f64,
}

impl Forecast {
    /// A window has ended now.
    pub(crate) fn learn(&mut self, now: Duration, length: Duration, arrivals: u64) {
        let length_s = length.as_secs_f64();
        if length_s <= 0.0 {
            return;
        }
        self.idle = if arrivals == 0 { self.idle.saturating_add(length) } else { Duration::ZERO };
        let now_s = now.as_secs_f64();
        self.seen.push_back(Seen { middle_s: now_s - length_s / 2.0, length_s, arrivals: arrivals as f64 });
        let old = |seen: &Seen| seen.middle_s < now_s - PAST_S_MAX;
        while self.seen.len() > WINDOWS_MAX || self.seen.front().is_some_and(old) {
            self.seen.pop_front();
        }
        self.unrest *= libm::exp2(-length_s / UNREST_HALF_LIFE_S);
        let jumps = JUMPS.into_iter().find_map(|last| Some((last, self.jumped(last)?)));
        if let Some((last, up)) = jumps {
            self.seen.drain(..self.seen.len() - last);
            if self.jumped_up.is_some_and(|before| before != up) {
                self.unrest = (2.0 * self.unrest + 1.0).min(UNREST_MAX);
            }
            self.jumped_up = Some(up);
        }
    }

    /// Whether the last so many windows are no continuation of those before them, and that upwards. Square roots of counts
    /// have a variance of a quarter whatever their mean (Anscombe, Biometrika 35, 1948).
    fn jumped(&self, last: usize) -> Option<bool> {
        let before = self.seen.len().saturating_sub(last);
        let line = line(&self.seen.range(..before))?;
        let root = |count: f64| 2.0 * (count.max(0.0) + 0.375).sqrt();
        let (mut arrivals, mut expected, mut length_s) = (0.0, 0.0, 0.0);
        for seen in self.seen.range(before..) {
            arrivals += seen.arrivals;
            expected += line.at(seen.middle_s).max(0.0) * seen.length_s;
            length_s += seen.length_s;
        }
        let of_line = line.level_variance * length_s * length_s / expected.max(1.0);
        let sigmas = (root(arrivals) - root(expected)) / (line.dispersion + of_line).sqrt();
        (sigmas.abs() > JUMP_SIGMAS * (1.0 + self.unrest)).then_some(sigmas > 0.0)
    }

    /// In `horizon` from the last window's end, if any was seen. A rate that falls is not continued: that fewer will come is
    /// believed when they have.
    pub(crate) fn expected(&self, horizon: Duration) -> Option<Expected> {
        let line = line(&self.seen.iter())?;
        let last = self.seen.back()?;
        let end_s = last.middle_s + last.length_s / 2.0;
        let ahead = if line.slope > 0.0 { horizon.as_secs_f64() } else { 0.0 };
        let at = end_s + ahead;
        let distance = at - line.middle_s;
        let slope_variance = if line.slope == 0.0 { 0.0 } else { line.slope_variance };
        let error = (line.level_variance + slope_variance * distance * distance).sqrt();
        let rate_per_s = (line.at(at) + UPPER_SIGMAS * error).max(0.0);
        Some(Expected { rate_per_s, dispersion: line.dispersion })
    }

    /// Nothing has come for so long.
    pub(crate) fn idle(&self) -> Duration {
        self.idle
    }
}

impl Line {
    fn at(&self, time_s: f64) -> f64 {
        self.level + self.slope * (time_s - self.middle_s)
    }
}

/// Through windows, each of the weight of its length; without those whose slope might as well be none.
fn line<'a>(seen: &(impl Iterator<Item = &'a Seen> + Clone)) -> Option<Line> {
    let sum = |of: &dyn Fn(&Seen) -> f64| seen.clone().map(of).sum::<f64>();
    let length_s = sum(&|seen| seen.length_s);
    if length_s <= 0.0 {
        return None;
    }
    let level = sum(&|seen| seen.arrivals) / length_s;
    let middle_s = sum(&|seen| seen.middle_s * seen.length_s) / length_s;
    let spread = sum(&|seen| seen.length_s * (seen.middle_s - middle_s).powi(2));
    let mut line =
        Line { middle_s, level, slope: 0.0, level_variance: 0.0, slope_variance: 0.0, dispersion: 1.0 };
    let poisson = level.max(1.0 / length_s);
    if length_s >= SLOPE_S_MIN && spread > 0.0 {
        line.slope = sum(&|seen| seen.arrivals * (seen.middle_s - middle_s)) / spread;
    }
    let windows = seen.clone().count() as f64;
    if windows > 8.0 {
        // Pearson's chi-square over its degrees of freedom.
        let residual = |seen: &Seen| {
            let expected = (line.at(seen.middle_s) * seen.length_s).max(0.5);
            (seen.arrivals - expected).powi(2) / expected
        };
        line.dispersion = (sum(&residual) / (windows - 2.0)).max(1.0);
    }
    line.level_variance = line.dispersion * poisson / length_s;
    line.slope_variance = line.dispersion * poisson / spread.max(f64::MIN_POSITIVE);
    let doubt =
        SLOPE_SIGMAS * SLOPE_SIGMAS * line.slope_variance / (line.slope * line.slope).max(f64::MIN_POSITIVE);
    line.slope *= (1.0 - doubt).max(0.0);
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(5);

    /// As many arrivals as the rate says, in windows of five seconds.
    fn fed(rates: impl IntoIterator<Item = f64>) -> Forecast {
        let mut forecast = Forecast::default();
        for (number, rate) in rates.into_iter().enumerate() {
            forecast.learn(WINDOW * (number as u32 + 1), WINDOW, (rate * 5.0).round() as u64);
        }
        forecast
    }

    fn rate(forecast: &Forecast, horizon_s: u64) -> f64 {
        forecast.expected(Duration::from_secs(horizon_s)).unwrap().rate_per_s
    }

    #[test]
    fn a_steady_rate_is_expected_with_what_it_may_be_by_chance() {
        let forecast = fed([20.0; 120]);
        let upper = 20.0 + UPPER_SIGMAS * (20.0_f64 / 600.0).sqrt();
        assert!((rate(&forecast, 60) - upper).abs() < 1e-6, "{}", rate(&forecast, 60));
        assert!(fed([]).expected(WINDOW).is_none());
    }

    #[test]
    fn a_ramp_is_continued_and_a_fall_is_not() {
        let up = fed((0..120).map(|window| 20.0 + f64::from(window) * 0.2));
        assert!(
            (44.0..50.0).contains(&rate(&up, 10)) && (45.9..51.0).contains(&rate(&up, 60)),
            "{}",
            rate(&up, 60)
        );
        let down = fed((0..120).map(|window| 44.0 - f64::from(window) * 0.2));
        assert!((20.0..22.0).contains(&rate(&down, 60)), "{}", rate(&down, 60));
    }

    #[test]
    fn a_jump_is_seen_in_the_window_in_which_it_falls() {
        let mut forecast = fed([20.0; 120]);
        forecast.learn(WINDOW * 121, WINDOW, 400);
        assert!((80.0..90.0).contains(&rate(&forecast, 60)), "{}", rate(&forecast, 60));
        let mut forecast = fed([20.0; 120]);
        forecast.learn(WINDOW * 121, WINDOW, 0);
        assert!(rate(&forecast, 60) < 1.0);
        assert_eq!(forecast.idle(), WINDOW);
    }

    #[test]
    fn arrivals_in_bursts_make_it_careful() {
        let forecast = fed((0..120).map(|window| if window % 4 == 0 { 80.0 } else { 0.0 }));
        let expected = forecast.expected(WINDOW).unwrap();
        assert!(expected.dispersion > 100.0 && expected.rate_per_s > 22.0, "{expected:?}");
    }
}
