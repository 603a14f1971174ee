//! What a request must keep to be good.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::WorkloadError;
use crate::outcome::Outcome;

/// Targets of a service level, each for one request; a request is good if it keeps all that are set (goodput as in
/// DistServe, OSDI 2024).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slo {
    /// From due to the first token.
    pub ttft: Option<Duration>,
    /// Time per output token after the first.
    pub tpot: Option<Duration>,
    /// From due to the end.
    pub e2e: Option<Duration>,
}

impl Slo {
    /// Whether a request kept all of it. One that failed did not.
    pub fn met(&self, outcome: &Outcome) -> bool {
        let Ok(answer) = &outcome.result else { return false };
        let within = |target: Option<Duration>, took| target.is_none_or(|target| took <= target);
        within(self.ttft, answer.first.saturating_sub(outcome.due))
            && within(self.tpot, answer.per_token().unwrap_or_default())
            && within(self.e2e, outcome.end.saturating_sub(outcome.due))
    }
}

/// `ttft=500ms,tpot=50ms,e2e=10s`.
impl FromStr for Slo {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let wrong = || WorkloadError::Slo(text.to_owned());
        let mut slo = Self::default();
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(wrong)?;
            let target = match name {
                "ttft" => &mut slo.ttft,
                "tpot" => &mut slo.tpot,
                "e2e" => &mut slo.e2e,
                _ => return Err(wrong()),
            };
            *target = Some(duration(value).ok_or_else(wrong)?);
        }
        Ok(slo)
    }
}

/// `500us`, `50ms`, `1.5s`: above zero, at most a day.
fn duration(text: &str) -> Option<Duration> {
    let (number, seconds) = match (text.strip_suffix("ms"), text.strip_suffix("us"), text.strip_suffix('s')) {
        (Some(number), _, _) => (number, 1e-3),
        (_, Some(number), _) => (number, 1e-6),
        (_, _, Some(number)) => (number, 1.0),
        _ => return None,
    };
    let seconds: f64 = number.parse::<f64>().ok()? * seconds;
    (seconds > 0.0 && seconds <= 86_400.0).then(|| Duration::from_secs_f64(seconds))
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let targets = [("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e)];
        let set = targets.into_iter().filter_map(|(name, target)| Some((name, target?)));
        for (place, (name, target)) in set.enumerate() {
            write!(f, "{}{name}={target:?}", if place > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Answer, ErrorKind, Failure};

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn targets_survive_their_text() {
        for text in ["ttft=500ms,tpot=50ms", "e2e=10s", "ttft=1.5s,tpot=2.5ms,e2e=90s"] {
            assert_eq!(text.parse::<Slo>().unwrap().to_string(), text);
        }
        assert_eq!(
            "tpot=500us".parse(),
            Ok(Slo { tpot: Some(Duration::from_micros(500)), ..Slo::default() })
        );
        for wrong in
            ["", "ttft", "ttft=5", "ttft=0ms", "ttft=-1s", "itl=5ms", "ttft=5ms;tpot=1ms", "e2e=9e9s"]
        {
            assert!(wrong.parse::<Slo>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_good_request_keeps_every_target_from_its_due_time_on() {
        // Due at 100, sent late at 300; first token at 500, last of 11 at 1000.
        let answer = Answer {
            first: ms(500),
            last: ms(1000),
            gaps_ns: vec![50_000_000; 10],
            prompt_tokens: None,
            output_tokens: 11,
        };
        let good = Outcome { due: ms(100), sent: ms(300), end: ms(1001), result: Ok(answer) };
        let met = |slo: &str, outcome: &Outcome| slo.parse::<Slo>().unwrap().met(outcome);
        assert!(met("ttft=400ms,tpot=50ms,e2e=901ms", &good));
        assert!(!met("ttft=399ms,tpot=50ms,e2e=901ms", &good));
        assert!(!met("ttft=400ms,tpot=49ms,e2e=901ms", &good));
        assert!(!met("ttft=400ms,tpot=50ms,e2e=900ms", &good));
        let failure = Failure { kind: ErrorKind::Refused, message: String::new() };
        assert!(!met("e2e=10s", &Outcome { result: Err(failure), ..good }));
    }
}
