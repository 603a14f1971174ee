//! How long prompts and answers are.

use std::fmt;
use std::str::FromStr;

use crate::dice::Dice;
use crate::error::WorkloadError;

/// Tokens of one prompt or answer.
pub const LENGTH_TOKENS_MAX: u32 = 1 << 20;

/// A law of lengths, in tokens. What is drawn is at least 1, and at most the law's own `max`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Always the same.
    Fixed(u32),
    /// Each of these as likely as the others.
    Uniform {
        /// The shortest.
        min: u32,
        /// The longest.
        max: u32,
    },
    /// Normal, cut off.
    Normal {
        /// Of the law before it is cut off.
        mean: f64,
        /// Standard deviation.
        sd: f64,
        /// What is longer is as long as this.
        max: u32,
    },
    /// The exponential of a normal law: most are short, some are very long, as with people.
    Lognormal {
        /// Half are shorter.
        median: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
        /// What is longer is as long as this.
        max: u32,
    },
}

impl Length {
    pub(crate) fn draw(self, dice: &mut Dice) -> u32 {
        let within = |tokens: f64, max: u32| tokens.round().clamp(1.0, f64::from(max)) as u32;
        match self {
            Self::Fixed(tokens) => tokens,
            Self::Uniform { min, max } => min + dice.below(u64::from(max - min) + 1) as u32,
            Self::Normal { mean, sd, max } => within(mean + sd * dice.normal(), max),
            Self::Lognormal { median, sigma, max } => within(median * libm::exp(sigma * dice.normal()), max),
        }
    }
}

/// `256`, `100-400`, `normal:mean=256,sd=64`, `lognormal:median=256,sigma=0.8,max=2048`.
impl FromStr for Length {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        parse(text).ok_or_else(|| WorkloadError::Length(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Length> {
    if let Some((law, values)) = text.split_once(':') {
        let (center, spread) = match law {
            "normal" => ("mean", "sd"),
            "lognormal" => ("median", "sigma"),
            _ => return None,
        };
        let (mut middle, mut width, mut max) = (None, None, LENGTH_TOKENS_MAX);
        for part in values.split(',') {
            let (name, value) = part.split_once('=')?;
            match name {
                "max" => max = tokens(value)?,
                name if name == center => middle = Some(positive(value)?),
                name if name == spread => width = Some(positive(value)?),
                _ => return None,
            }
        }
        return Some(match law {
            "normal" => Length::Normal { mean: middle?, sd: width?, max },
            _ => Length::Lognormal { median: middle?, sigma: width?, max },
        });
    }
    match text.split_once('-') {
        None => tokens(text).map(Length::Fixed),
        Some((min, max)) => {
            let (min, max) = (tokens(min)?, tokens(max)?);
            (min <= max).then_some(Length::Uniform { min, max })
        }
    }
}

fn tokens(text: &str) -> Option<u32> {
    text.parse().ok().filter(|tokens| (1..=LENGTH_TOKENS_MAX).contains(tokens))
}

fn positive(text: &str) -> Option<f64> {
    text.parse().ok().filter(|value| (0.0..=f64::from(LENGTH_TOKENS_MAX)).contains(value))
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let max = match *self {
            Self::Fixed(tokens) => return write!(f, "{tokens}"),
            Self::Uniform { min, max } => return write!(f, "{min}-{max}"),
            Self::Normal { mean, sd, max } => {
                write!(f, "normal:mean={mean},sd={sd}")?;
                max
            }
            Self::Lognormal { median, sigma, max } => {
                write!(f, "lognormal:median={median},sigma={sigma}")?;
                max
            }
        };
        if max < LENGTH_TOKENS_MAX { write!(f, ",max={max}") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::Purpose;

    #[test]
    fn a_law_survives_its_text() {
        for text in ["7", "3-9", "normal:mean=200,sd=50.5", "lognormal:median=200,sigma=0.8,max=2048"] {
            assert_eq!(text.parse::<Length>().unwrap().to_string(), text);
        }
        for wrong in ["", "0", "9-3", "-", "normal:200", "normal:mean=1", "normal:mean=1,sigma=1"] {
            assert!(wrong.parse::<Length>().is_err(), "{wrong}");
        }
        for wrong in ["lognormal:median=NaN,sigma=1", "normal:mean=-1,sd=1", "2000000", "zipf:a=1"] {
            assert!(wrong.parse::<Length>().is_err(), "{wrong}");
        }
    }

    fn drawn(text: &str) -> Vec<u32> {
        let law: Length = text.parse().unwrap();
        let mut lengths: Vec<u32> =
            (0..10_001).map(|number| law.draw(&mut Dice::new(1, Purpose::Length, number))).collect();
        lengths.sort_unstable();
        lengths
    }

    #[test]
    fn lengths_lie_as_the_law_says() {
        assert_eq!(drawn("7").first(), drawn("7").last());
        let uniform = drawn("3-9");
        assert_eq!((uniform[0], uniform[5_000], uniform[10_000]), (3, 6, 9));
        let normal = drawn("normal:mean=200,sd=50");
        assert!(normal[5_000].abs_diff(200) <= 2, "median {}", normal[5_000]);
        assert!(normal[8_413].abs_diff(250) <= 3, "one deviation above: {}", normal[8_413]);
        let cut = drawn("normal:mean=5,sd=50,max=20");
        assert_eq!((cut[0], cut[10_000]), (1, 20));
        let lognormal = drawn("lognormal:median=200,sigma=0.8");
        assert!(lognormal[5_000].abs_diff(200) <= 4, "median {}", lognormal[5_000]);
        assert!(lognormal[8_413].abs_diff(445) <= 12, "200 · e^0.8 = 445: {}", lognormal[8_413]);
    }
}
