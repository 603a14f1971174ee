//! The deadline that a client sets for its call.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Sleep, sleep};
use tonic::{Request, Status};

use super::errors::deadline_exceeded;

/// When a call has to be over, its last message included, as `grpc-timeout` says.
pub(super) struct Deadline(Option<(Duration, Pin<Box<Sleep>>)>);

impl Deadline {
    /// A deadline that is not understood is none.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        let timeout = request.metadata().get("grpc-timeout").and_then(|value| parse(value.to_str().ok()?));
        Self(timeout.map(|after| (after, Box::pin(sleep(after)))))
    }

    /// Waits for some work, but no longer than there is time; dropping the work is what ends it.
    pub(super) async fn limit<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Status> {
        let Some((after, timer)) = &mut self.0 else { return Ok(work.await) };
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = timer => Err(deadline_exceeded(*after)),
        }
    }
}

/// At most eight digits and a unit, as gRPC's protocol over HTTP/2 defines.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_defines_them() {
        for (text, expected) in [
            ("3H", Some(Duration::from_secs(10_800))),
            ("2M", Some(Duration::from_secs(120))),
            ("1S", Some(Duration::from_secs(1))),
            ("20m", Some(Duration::from_millis(20))),
            ("30u", Some(Duration::from_micros(30))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("123456789n", None),
            ("1", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1s", None),
            ("1é", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}
