//! What was decided, and why, for a person who signs the service level and for other autoscalers.

use std::fmt;
use std::time::Duration;

use crate::law::Prediction;
use crate::sla::Sla;

/// Names of what [`Decision::metrics`] tells, in its order.
pub const METRICS: [&str; 6] = [
    "galerne_autoscale_groups",
    "galerne_autoscale_groups_needed",
    "galerne_autoscale_sla_share",
    "galerne_autoscale_ttft_seconds",
    "galerne_autoscale_tpot_seconds",
    "galerne_autoscale_requests_per_second",
];

/// How many groups there should be. [`Display`](fmt::Display) says it in a sentence.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// So many should serve or be starting. Where there are more, the rest is to be drained; none is to be killed.
    pub groups: u32,
    /// So many are needed for what is expected, whatever is allowed or kept.
    pub needed: u32,
    /// Why `groups`.
    pub why: Why,
    /// What is promised.
    pub sla: Sla,
    /// Requests a second that are expected at most, those included that have to be made up for.
    pub rate_per_s: f64,
    /// Within which time: until a group that is started now serves.
    pub horizon: Duration,
    /// What `groups` would make of it; `None` if too little is known to tell.
    pub chosen: Option<Prediction>,
    /// What one group fewer would.
    pub fewer: Option<Prediction>,
}

/// The reason for a number of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The fewest that hold the service level.
    Fewest,
    /// The fewest that hold it and work off the requests that wait.
    Backlog {
        /// How many.
        waiting: u64,
    },
    /// No number of groups holds it: it asks for more than one request alone would get. So many come close.
    OutOfReach,
    /// More are needed than there may be.
    AtMost,
    /// Fewer would do, and there may be no fewer.
    AtLeast,
    /// Fewer would do, and have not for long enough.
    Held {
        /// How many would do.
        would_do: u32,
    },
    /// Fewer would do, and the fleet has changed its direction often enough within the hour.
    Steadied {
        /// How many would do.
        would_do: u32,
    },
    /// Nobody has asked for anything for a while.
    Idle,
    /// Nobody serves, and requests have come.
    Waking,
    /// No request has been served yet, so nothing is known of what one costs.
    Unknown,
}

impl Why {
    /// In a word, as events and metrics say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fewest => "Fewest",
            Self::Backlog { .. } => "Backlog",
            Self::OutOfReach => "OutOfReach",
            Self::AtMost => "AtMost",
            Self::AtLeast => "AtLeast",
            Self::Held { .. } => "Held",
            Self::Steadied { .. } => "Steadied",
            Self::Idle => "Idle",
            Self::Waking => "Waking",
            Self::Unknown => "Unknown",
        }
    }
}

impl Decision {
    /// Values under the names of [`METRICS`], for autoscalers that take metrics from outside. Scale by
    /// `galerne_autoscale_groups` with a target of 1 a replica; the rest explains it. What is not known is not there, and
    /// what would be infinite neither.
    pub fn metrics(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let of = |value: fn(&Prediction) -> f64| self.chosen.as_ref().map(value);
        let values = [
            Some(f64::from(self.groups)),
            Some(f64::from(self.needed)),
            of(|prediction| prediction.share),
            of(|prediction| prediction.ttft_s),
            of(|prediction| prediction.tpot_s),
            Some(self.rate_per_s),
        ];
        let known = METRICS.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?)));
        known.filter(|(_, value)| value.is_finite())
    }

    fn expectation(&self) -> String {
        format!("{:.1} requests/s within {} s", self.rate_per_s, self.horizon.as_secs())
    }

    /// `TTFT p95 0.41 s of 1.00 s, TPOT p95 71.3 ms of 80.0 ms`.
    fn told(&self, prediction: &Prediction) -> String {
        let targets =
            [("TTFT", self.sla.ttft, prediction.ttft_s), ("TPOT", self.sla.tpot, prediction.tpot_s)];
        let told = targets.into_iter().filter_map(|(name, target, seconds)| {
            let target = target?;
            let within = Seconds(target.within.as_secs_f64());
            Some(format!("{name} p{} {} of {within}", target.percent, Seconds(seconds)))
        });
        let told: Vec<String> = told.collect();
        if told.is_empty() { "nothing is promised".to_owned() } else { told.join(", ") }
    }
}

/// `0.41 s`, `71.3 ms`, or `without end`.
struct Seconds(f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            seconds if seconds.is_infinite() => write!(f, "without end"),
            seconds if seconds < 0.1 => write!(f, "{:.1} ms", seconds * 1e3),
            seconds => write!(f, "{seconds:.2} s"),
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = Counted(self.groups);
        match self.why {
            Why::Fewest => write!(f, "{groups} for {}", self.expectation()),
            Why::Backlog { waiting } => {
                write!(f, "{groups} for {}, {waiting} that wait included", self.expectation())
            }
            Why::OutOfReach => {
                write!(f, "{groups} for {}, though no number would hold what is promised", self.expectation())
            }
            Why::AtMost => write!(
                f,
                "{groups}, the most that there may be; {} would need {}",
                self.expectation(),
                self.needed
            ),
            Why::AtLeast => write!(f, "{groups}, the fewest that there may be, for {}", self.expectation()),
            Why::Held { would_do } => write!(
                f,
                "{groups}; {would_do} would do for {}, but that has to last for a while",
                self.expectation()
            ),
            Why::Steadied { would_do } => write!(
                f,
                "{groups}; {would_do} would do for {}, but the fleet has turned often enough within the hour",
                self.expectation()
            ),
            Why::Idle => write!(f, "{groups}: nobody has asked for anything for a while"),
            Why::Waking => write!(f, "{groups}: requests have come, and nobody serves"),
            Why::Unknown => {
                write!(f, "{groups}: no answer has been served yet, so nothing is known of the cost")
            }
        }?;
        if let Some(chosen) = &self.chosen {
            write!(f, ": {}", self.told(chosen))?;
        }
        match &self.fewer {
            Some(fewer) if fewer.groups > 0 => write!(f, "; with {}: {}", fewer.groups, self.told(fewer)),
            _ => Ok(()),
        }
    }
}

/// `1 group`, `2 groups`.
struct Counted(u32);

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} group{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}
