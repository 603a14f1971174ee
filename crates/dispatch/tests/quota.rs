//! Quotas in virtual time.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use galerne_dispatch::{Exceeded, Gauge, Quota, Quotas};
use galerne_types::TenantId;
use proptest::prelude::*;

const TENANT: TenantId = TenantId(1);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn quotas(requests: u64, tokens: u64, at_once: u32) -> Quotas {
    let quota = Quota {
        requests_per_minute: NonZeroU64::new(requests),
        tokens_per_minute: NonZeroU64::new(tokens),
        requests_at_once: NonZeroU32::new(at_once),
    };
    let mut quotas = Quotas::default();
    quotas.set(&BTreeMap::from([(TENANT, quota)]), s(0));
    quotas
}

#[test]
fn requests_a_minute_come_back_steadily() {
    let mut quotas = quotas(6, 0, 0);
    for _ in 0..6 {
        let admission = quotas.begin(TENANT, s(0)).unwrap();
        quotas.end(admission, 0, s(0));
    }
    let full = quotas.begin(TENANT, s(0)).unwrap_err();
    assert_eq!(full, Exceeded::Requests { limit: 6, retry_after: s(10) });
    assert_eq!(
        full.to_string(),
        "your limit of 6 requests a minute is used up: send the request again in 10 s"
    );
    let almost = s(10) - Duration::from_nanos(1);
    assert_eq!(quotas.begin(TENANT, almost).unwrap_err().retry_after(), Duration::from_nanos(1));
    let admission = quotas.begin(TENANT, s(10)).unwrap();
    quotas.end(admission, 0, s(10));
    let requests = quotas.standing(TENANT, s(40)).requests.unwrap();
    assert_eq!(requests, Gauge { limit: 6, remaining: 3, reset: s(30) });
    assert_eq!(
        quotas.standing(TENANT, s(3600)).requests.unwrap().remaining,
        6,
        "no more than a minute's worth"
    );
}

#[test]
fn tokens_are_charged_ahead_and_settled_at_the_end() {
    let mut quotas = quotas(0, 600, 0);
    let mut admission = quotas.begin(TENANT, s(0)).unwrap();
    quotas.reserve(&mut admission, 500, s(0)).unwrap();
    assert_eq!(
        quotas.standing(TENANT, s(0)).tokens.unwrap(),
        Gauge { limit: 600, remaining: 100, reset: s(50) }
    );
    let mut other = quotas.begin(TENANT, s(0)).unwrap();
    let refused = quotas.reserve(&mut other, 200, s(0)).unwrap_err();
    assert_eq!(refused, Exceeded::Tokens { limit: 600, retry_after: s(10) });
    quotas.end(other, 0, s(0));
    quotas.end(admission, 50, s(0));
    assert_eq!(quotas.standing(TENANT, s(0)).tokens.unwrap().remaining, 550, "only what was used is charged");
}

#[test]
fn more_than_was_estimated_is_a_debt() {
    let mut quotas = quotas(0, 60, 0);
    let mut admission = quotas.begin(TENANT, s(0)).unwrap();
    quotas.reserve(&mut admission, 10, s(0)).unwrap();
    quotas.end(admission, 180, s(0));
    assert_eq!(
        quotas.standing(TENANT, s(0)).tokens.unwrap(),
        Gauge { limit: 60, remaining: 0, reset: s(180) }
    );
    let mut next = quotas.begin(TENANT, s(100)).unwrap();
    assert_eq!(quotas.reserve(&mut next, 1, s(100)).unwrap_err().retry_after(), s(21));
    quotas.reserve(&mut next, 1, s(121)).unwrap();
    quotas.end(next, 1, s(121));
}

#[test]
fn a_request_larger_than_a_minute_is_told_that_it_never_passes() {
    let mut quotas = quotas(0, 100, 0);
    let mut large = quotas.begin(TENANT, s(0)).unwrap();
    let refused = quotas.reserve(&mut large, 101, s(0)).unwrap_err();
    assert_eq!(refused, Exceeded::Never { limit: 100, tokens: 101 });
    assert!(refused.to_string().contains("may take 101 tokens, more than your limit of 100 a minute"));
    quotas.end(large, 0, s(0));
    // Neither does one whose parts are larger together.
    let mut parts = quotas.begin(TENANT, s(0)).unwrap();
    quotas.reserve(&mut parts, 60, s(0)).unwrap();
    assert_eq!(
        quotas.reserve(&mut parts, 50, s(0)).unwrap_err(),
        Exceeded::Never { limit: 100, tokens: 110 }
    );
    quotas.end(parts, 0, s(0));
    assert_eq!(quotas.standing(TENANT, s(0)).tokens.unwrap().remaining, 100);
}

#[test]
fn requests_at_once_are_counted_until_they_end() {
    let mut quotas = quotas(0, 0, 2);
    let (first, second) = (quotas.begin(TENANT, s(0)).unwrap(), quotas.begin(TENANT, s(0)).unwrap());
    let refused = quotas.begin(TENANT, s(0)).unwrap_err();
    assert_eq!((&refused, refused.retry_after()), (&Exceeded::AtOnce { limit: 2 }, s(1)));
    quotas.end(first, 9, s(0));
    let third = quotas.begin(TENANT, s(0)).unwrap();
    quotas.end(second, 0, s(0));
    quotas.end(third, 0, s(0));
}

#[test]
fn tenants_without_a_quota_are_not_counted_and_not_touched_by_others() {
    let mut quotas = quotas(1, 1, 1);
    let busy = quotas.begin(TENANT, s(0)).unwrap();
    for _ in 0..100 {
        let mut free = quotas.begin(TenantId(2), s(0)).unwrap();
        quotas.reserve(&mut free, 1 << 40, s(0)).unwrap();
        let _runs_on = free;
    }
    quotas.end(busy, 0, s(0));
    assert_eq!(quotas.standing(TenantId(2), s(0)), galerne_dispatch::Standing::default());
}

#[test]
fn new_limits_keep_what_was_used() {
    let mut quotas = quotas(10, 0, 0);
    for _ in 0..4 {
        let admission = quotas.begin(TENANT, s(0)).unwrap();
        quotas.end(admission, 0, s(0));
    }
    let running = quotas.begin(TENANT, s(0)).unwrap();
    let quota = Quota { requests_per_minute: NonZeroU64::new(5), ..Quota::default() };
    quotas.set(&BTreeMap::from([(TENANT, quota)]), s(0));
    assert_eq!(
        quotas.standing(TENANT, s(0)).requests.unwrap(),
        Gauge { limit: 5, remaining: 0, reset: s(60) }
    );
    quotas.set(&BTreeMap::new(), s(0));
    quotas.end(running, 1, s(0)); // its account is gone, which is no trouble
    let _free = quotas.begin(TENANT, s(0)).unwrap();
}

proptest! {
    /// Whatever is asked when: in any span of time no more passes than a minute's worth and the rate times the span.
    #[test]
    fn no_span_of_time_exceeds_the_rate(
        limit in 1_u64..50,
        asks in proptest::collection::vec((0_u64..5_000, 1_u64..20), 1..60),
    ) {
        let mut quotas = quotas(0, limit, 0);
        let (mut now_ms, mut passed) = (0, Vec::new());
        for (pause_ms, tokens) in asks {
            now_ms += pause_ms;
            let now = Duration::from_millis(now_ms);
            let mut admission = quotas.begin(TENANT, now).unwrap();
            let passes = quotas.reserve(&mut admission, tokens, now).is_ok();
            quotas.end(admission, if passes { tokens } else { 0 }, now);
            if passes {
                passed.push((now_ms, tokens));
            }
        }
        for (at, (from_ms, _)) in passed.iter().enumerate() {
            let mut sum = 0;
            for (until_ms, tokens) in &passed[at..] {
                sum += tokens;
                prop_assert!(sum * 60_000 <= limit * 60_000 + limit * (until_ms - from_ms));
            }
        }
    }
}
