//! When requests come.

use std::fmt;
use std::str::FromStr;

use crate::dice::Dice;
use crate::error::WorkloadError;

/// The law of the time between two requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// Always the same.
    Constant,
    /// Exponential: requests that know nothing of each other.
    Poisson,
    /// Gamma of this shape: below 1 they come in bursts, 1 is Poisson, and the larger the more regular.
    Gamma(f64),
}

impl Arrivals {
    /// The time to the next request, in units of its mean.
    pub(crate) fn gap(self, dice: &mut Dice) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Poisson => dice.exponential(),
            Self::Gamma(shape) => dice.gamma(shape) / shape,
        }
    }
}

/// `constant`, `poisson`, `gamma:0.5`.
impl FromStr for Arrivals {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let wrong = || WorkloadError::Arrivals(text.to_owned());
        match text.split_once(':') {
            None if text == "constant" => Ok(Self::Constant),
            None if text == "poisson" => Ok(Self::Poisson),
            Some(("gamma", shape)) => {
                let shape: f64 = shape.parse().map_err(|_| wrong())?;
                if (0.01..=100.0).contains(&shape) { Ok(Self::Gamma(shape)) } else { Err(wrong()) }
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant => write!(f, "constant"),
            Self::Poisson => write!(f, "poisson"),
            Self::Gamma(shape) => write!(f, "gamma:{shape}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_survives_its_text() {
        for arrivals in [Arrivals::Constant, Arrivals::Poisson, Arrivals::Gamma(0.5)] {
            assert_eq!(arrivals.to_string().parse(), Ok(arrivals));
        }
        for wrong in ["", "uniform", "gamma", "gamma:x", "gamma:0", "gamma:NaN", "poisson:1"] {
            assert!(wrong.parse::<Arrivals>().is_err(), "{wrong}");
        }
    }
}
