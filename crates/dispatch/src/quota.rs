//! What a tenant may use: requests a minute, tokens a minute, requests at once.
//!
//! Time comes in as an argument, the time since any fixed moment. A rate is a bucket that leaks: what is used fills
//! it, it drains steadily, and it holds one minute's worth. So a tenant may use a whole minute's allowance at once,
//! and then goes on at the steady rate.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use galerne_types::TenantId;

/// Nanoseconds of a minute: a bucket counts in units of 1 / this of a request or token, so that nothing is rounded.
const MINUTE_NS: u128 = 60_000_000_000;

/// When to try again after too many requests at once: nobody knows when one of them ends.
const AT_ONCE_RETRY: Duration = Duration::from_secs(1);

/// What one tenant may use; what is not set is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Requests in a minute.
    pub requests_per_minute: Option<NonZeroU64>,
    /// Tokens in a minute, of prompts and answers together.
    pub tokens_per_minute: Option<NonZeroU64>,
    /// Requests that run at once.
    pub requests_at_once: Option<NonZeroU32>,
}

/// Which limit a tenant has reached, and when it makes sense to try again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// Requests a minute.
    #[error("your limit of {limit} requests a minute is used up: send the request again in {} s", whole_s(*.retry_after))]
    Requests {
        /// Requests a minute.
        limit: u64,
        /// Time until there is room.
        retry_after: Duration,
    },
    /// Tokens a minute.
    #[error("your limit of {limit} tokens a minute has no room for this request: send it again in {} s", whole_s(*.retry_after))]
    Tokens {
        /// Tokens a minute.
        limit: u64,
        /// Time until there is room.
        retry_after: Duration,
    },
    /// More tokens than a minute has: it would never pass.
    #[error(
        "this request may take {tokens} tokens, more than your limit of {limit} a minute: shorten its prompt, lower \
         max_tokens, or ask for fewer answers"
    )]
    Never {
        /// Tokens a minute.
        limit: u64,
        /// Tokens that the request may take, as far as they have been counted.
        tokens: u64,
    },
    /// Requests at once.
    #[error(
        "your limit of {limit} requests at once is reached: send the request again when one of them has ended"
    )]
    AtOnce {
        /// Requests at once.
        limit: u32,
    },
}

impl Exceeded {
    /// Time until the same request may pass; longer than anything for one that never will.
    pub fn retry_after(&self) -> Duration {
        match self {
            Self::Requests { retry_after, .. } | Self::Tokens { retry_after, .. } => *retry_after,
            Self::AtOnce { .. } => AT_ONCE_RETRY,
            Self::Never { .. } => Duration::MAX,
        }
    }

    /// The same in whole seconds, rounded up: what is said to clients.
    pub fn retry_after_s(&self) -> u64 {
        whole_s(self.retry_after())
    }
}

/// A request that counts against its tenant until it is handed to [`Quotas::end`]. It cannot be copied.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an admission that is not handed back counts as a running request for ever"]
pub struct Admission {
    tenant: TenantId,
    /// Tokens that were charged ahead.
    reserved: u64,
}

/// How a tenant stands with its rates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests, if they are limited.
    pub requests: Option<Gauge>,
    /// Tokens, if they are limited.
    pub tokens: Option<Gauge>,
}

/// One rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauge {
    /// A minute's allowance.
    pub limit: u64,
    /// What may be used at once now.
    pub remaining: u64,
    /// Time until all of the allowance is there again.
    pub reset: Duration,
}

/// The accounts of all tenants that have a quota. Others are not counted.
#[derive(Debug, Default)]
pub struct Quotas {
    accounts: BTreeMap<TenantId, Account>,
}

#[derive(Debug, Default)]
struct Account {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    at_once: Option<NonZeroU32>,
    running: u32,
}

/// A leaking bucket.
#[derive(Debug)]
struct Bucket {
    per_minute: NonZeroU64,
    /// What fills it, in units of 1 / [`MINUTE_NS`]. May exceed what it holds: a debt, which is waited for.
    used: u128,
    /// When `used` was right.
    at: Duration,
}

impl Quotas {
    /// Accounts for these tenants and no others. Tenants that had one before keep what they have used, whatever they
    /// may use now.
    pub fn set(&mut self, quotas: &BTreeMap<TenantId, Quota>, now: Duration) {
        self.accounts.retain(|tenant, _| quotas.contains_key(tenant));
        for (tenant, quota) in quotas {
            let account = self.accounts.entry(*tenant).or_default();
            account.at_once = quota.requests_at_once;
            Bucket::set(&mut account.requests, quota.requests_per_minute, now);
            Bucket::set(&mut account.tokens, quota.tokens_per_minute, now);
        }
    }

    /// Counts one request.
    ///
    /// # Errors
    /// When the tenant has no room for one more; nothing is counted then.
    pub fn begin(&mut self, tenant: TenantId, now: Duration) -> Result<Admission, Exceeded> {
        let admission = Admission { tenant, reserved: 0 };
        let Some(account) = self.accounts.get_mut(&tenant) else { return Ok(admission) };
        if let Some(limit) = account.at_once.filter(|limit| account.running >= limit.get()) {
            return Err(Exceeded::AtOnce { limit: limit.get() });
        }
        if let Some(bucket) = &mut account.requests {
            let limit = bucket.per_minute.get();
            bucket.take(1, now).map_err(|retry_after| Exceeded::Requests { limit, retry_after })?;
        }
        account.running += 1;
        Ok(admission)
    }

    /// Charges `tokens` ahead, an estimate of what the request will use, or one part of it.
    ///
    /// # Errors
    /// When the tenant has no room for them, or can never have it for all parts together; nothing is charged then.
    pub fn reserve(&mut self, admission: &mut Admission, tokens: u64, now: Duration) -> Result<(), Exceeded> {
        let account = self.accounts.get_mut(&admission.tenant);
        let Some(bucket) = account.and_then(|account| account.tokens.as_mut()) else { return Ok(()) };
        let limit = bucket.per_minute.get();
        let all = admission.reserved.saturating_add(tokens);
        if all > limit {
            return Err(Exceeded::Never { limit, tokens: all });
        }
        bucket.take(tokens, now).map_err(|retry_after| Exceeded::Tokens { limit, retry_after })?;
        admission.reserved += tokens;
        Ok(())
    }

    /// Ends a request that has used `tokens`: what was charged ahead is replaced by that. It may be more, and then
    /// later requests wait for it.
    #[expect(clippy::needless_pass_by_value, reason = "an admission is used up")]
    pub fn end(&mut self, admission: Admission, tokens: u64, now: Duration) {
        let Admission { tenant, reserved } = admission;
        let Some(account) = self.accounts.get_mut(&tenant) else { return };
        account.running = account.running.saturating_sub(1);
        if let Some(bucket) = &mut account.tokens {
            bucket.drain(now);
            bucket.used += u128::from(tokens) * MINUTE_NS;
            bucket.used = bucket.used.saturating_sub(u128::from(reserved) * MINUTE_NS);
        }
    }

    /// How a tenant stands.
    pub fn standing(&mut self, tenant: TenantId, now: Duration) -> Standing {
        let Some(account) = self.accounts.get_mut(&tenant) else { return Standing::default() };
        let gauge = |bucket: &mut Option<Bucket>| bucket.as_mut().map(|bucket| bucket.gauge(now));
        Standing { requests: gauge(&mut account.requests), tokens: gauge(&mut account.tokens) }
    }
}

impl Bucket {
    fn set(bucket: &mut Option<Self>, per_minute: Option<NonZeroU64>, now: Duration) {
        match (bucket.as_mut(), per_minute) {
            (Some(bucket), Some(per_minute)) => {
                bucket.drain(now);
                bucket.per_minute = per_minute;
            }
            (None, Some(per_minute)) => *bucket = Some(Self { per_minute, used: 0, at: now }),
            (_, None) => *bucket = None,
        }
    }

    fn drain(&mut self, now: Duration) {
        let drained = u128::from(self.per_minute.get()) * now.saturating_sub(self.at).as_nanos();
        self.used = self.used.saturating_sub(drained);
        self.at = self.at.max(now);
    }

    /// Uses `count`, or says how long to wait for it.
    fn take(&mut self, count: u64, now: Duration) -> Result<(), Duration> {
        self.drain(now);
        let (wanted, holds) = (self.used + u128::from(count) * MINUTE_NS, self.holds());
        if wanted > holds {
            return Err(self.time_to_drain(wanted - holds));
        }
        self.used = wanted;
        Ok(())
    }

    fn gauge(&mut self, now: Duration) -> Gauge {
        self.drain(now);
        let remaining = self.holds().saturating_sub(self.used) / MINUTE_NS;
        Gauge {
            limit: self.per_minute.get(),
            remaining: u64::try_from(remaining).unwrap_or(u64::MAX),
            reset: self.time_to_drain(self.used),
        }
    }

    fn holds(&self) -> u128 {
        u128::from(self.per_minute.get()) * MINUTE_NS
    }

    fn time_to_drain(&self, units: u128) -> Duration {
        let ns = units.div_ceil(self.per_minute.get().into());
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

fn whole_s(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}
