//! What a caller is told of its quota, in the headers that OpenAI uses.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use galerne_dispatch::{Gauge, Standing};

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];

const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Puts a tenant's standing into a response's headers.
pub(super) fn insert(headers: &mut HeaderMap, standing: Standing) {
    for (gauge, [limit, remaining, reset]) in [(standing.requests, REQUESTS), (standing.tokens, TOKENS)] {
        let Some(gauge) = gauge else { continue };
        let Gauge { limit: allowed, remaining: left, reset: full_again } = gauge;
        headers.insert(limit, HeaderValue::from(allowed));
        headers.insert(remaining, HeaderValue::from(left));
        if let Ok(value) = HeaderValue::try_from(duration(full_again)) {
            headers.insert(reset, value);
        }
    }
}

/// A time as OpenAI writes it: `0s`, `250ms`, `1.5s`, `6m0s`; rounded up to a millisecond.
fn duration(time: Duration) -> String {
    let ms = time.as_nanos().div_ceil(1_000_000);
    let (minutes, seconds, ms) = (ms / 60_000, ms % 60_000 / 1000, ms % 1000);
    let fraction = if ms == 0 { String::new() } else { format!(".{ms:03}").trim_end_matches('0').to_owned() };
    match (minutes, seconds) {
        (0, 0) if ms > 0 => format!("{ms}ms"),
        (0, _) => format!("{seconds}{fraction}s"),
        _ => format!("{minutes}m{seconds}{fraction}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_writes_them() {
        for (us, text) in [
            (0, "0s"),
            (1, "1ms"),
            (249_500, "250ms"),
            (1_500_000, "1.5s"),
            (59_999_999, "1m0s"),
            (360_000_000, "6m0s"),
            (61_020_000, "1m1.02s"),
        ] {
            assert_eq!(duration(Duration::from_micros(us)), text);
        }
    }
}
