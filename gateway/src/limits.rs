//! Limits of one organization: requests and tokens per minute, as two token buckets. Over the
//! limit is the caller's own 429; a saturated service is a 503 and decided elsewhere.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue};

use crate::config::RateLimits;
use crate::error::{ApiError, ApiResult};

/// Organizations remembered; one that is forgotten starts with full buckets, as one that has been
/// quiet for a minute does anyway.
const ORGS_MAX: usize = 10_000;

/// Fills evenly to `per_minute`; may be overdrawn by what was not known beforehand.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_minute: u32,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_minute: u32, now: Instant) -> Bucket {
        Bucket { per_minute, left: f64::from(per_minute), at: now }
    }

    fn refill(&mut self, now: Instant) {
        let most = f64::from(self.per_minute);
        let gained = now.duration_since(self.at).as_secs_f64() * most / 60.0;
        self.left = (self.left + gained).min(most);
        self.at = now;
    }

    /// Until so much is left.
    fn wait_for(&self, amount: f64) -> Duration {
        let lacking = (amount - self.left).max(0.0);
        Duration::from_secs_f64(lacking * 60.0 / f64::from(self.per_minute.max(1)))
    }

    fn standing(&self) -> Standing {
        Standing {
            limit: self.per_minute,
            remaining: self.left.max(0.0) as u32,
            reset: self.wait_for(f64::from(self.per_minute)),
        }
    }
}

/// One bucket as headers show it.
#[derive(Clone, Copy, Debug)]
struct Standing {
    limit: u32,
    remaining: u32,
    reset: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// What `x-ratelimit-*` says after a request was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Standings {
    requests: Option<Standing>,
    tokens: Option<Standing>,
}

impl Standings {
    /// Adds the headers; none where nothing is limited.
    pub fn write(&self, headers: &mut HeaderMap) {
        let rows = [("requests", self.requests), ("tokens", self.tokens)];
        for (what, standing) in rows {
            let Some(standing) = standing else { continue };
            let values = [
                ("limit", standing.limit.to_string()),
                ("remaining", standing.remaining.to_string()),
                ("reset", go_duration(standing.reset)),
            ];
            for (part, value) in values {
                let name = format!("x-ratelimit-{part}-{what}");
                let name = axum::http::HeaderName::try_from(name);
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

/// The buckets of all organizations.
#[derive(Debug)]
pub struct Limiter {
    limits: RateLimits,
    orgs: Mutex<HashMap<String, Buckets>>,
}

impl Limiter {
    /// With every bucket full.
    pub fn new(limits: RateLimits) -> Limiter {
        Limiter { limits, orgs: Mutex::default() }
    }

    /// Counts one inference request, or refuses it.
    pub fn admit(&self, org: &str) -> ApiResult<Standings> {
        let admit = |buckets: &mut Buckets| {
            let one = buckets.requests.map_or(Duration::ZERO, |bucket| bucket.wait_for(1.0));
            let any = buckets.tokens.map_or(Duration::ZERO, |bucket| bucket.wait_for(1.0));
            let wait = one.max(any);
            if !wait.is_zero() {
                let what = if one >= any { "requests" } else { "tokens" };
                let message = format!(
                    "Rate limit reached for {what} per minute. Try again in {}.",
                    go_duration(wait)
                );
                return Err(ApiError::rate_limited(message, wait.as_millis() as u64 + 1));
            }
            if let Some(bucket) = &mut buckets.requests {
                bucket.left -= 1.0;
            }
            Ok(Standings {
                requests: buckets.requests.map(|bucket| bucket.standing()),
                tokens: buckets.tokens.map(|bucket| bucket.standing()),
            })
        };
        self.with(org, admit).unwrap_or_else(|| Ok(Standings::default()))
    }

    /// Takes the tokens a request has used; may overdraw.
    pub fn charge(&self, org: &str, tokens: u64) {
        self.with(org, |buckets| {
            if let Some(bucket) = &mut buckets.tokens {
                bucket.left -= tokens as f64;
            }
        });
    }

    /// None where nothing is limited.
    fn with<T>(&self, org: &str, use_buckets: impl FnOnce(&mut Buckets) -> T) -> Option<T> {
        let RateLimits { requests_per_minute, tokens_per_minute } = self.limits;
        if requests_per_minute.is_none() && tokens_per_minute.is_none() {
            return None;
        }
        let now = Instant::now();
        let mut orgs = self.orgs.lock().unwrap_or_else(PoisonError::into_inner);
        if orgs.len() >= ORGS_MAX && !orgs.contains_key(org) {
            orgs.clear();
        }
        let buckets = orgs.entry(org.to_owned()).or_insert_with(|| Buckets {
            requests: requests_per_minute.map(|n| Bucket::full(n, now)),
            tokens: tokens_per_minute.map(|n| Bucket::full(n, now)),
        });
        for bucket in buckets.requests.iter_mut().chain(&mut buckets.tokens) {
            bucket.refill(now);
        }
        Some(use_buckets(buckets))
    }
}

/// As Go writes durations: `12ms`, `1.5s`, `6m0s`.
fn go_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let secs = |ms: u128| {
        let text = format!("{}.{:03}", ms / 1000, ms % 1000);
        format!("{}s", text.trim_end_matches('0').trim_end_matches('.'))
    };
    match ms / 60_000 {
        0 => secs(ms),
        minutes => format!("{minutes}m{}", secs(ms % 60_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_writes_them() {
        for (ms, text) in [(12, "12ms"), (1500, "1.5s"), (360_000, "6m0s"), (61_250, "1m1.25s")] {
            assert_eq!(go_duration(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn each_organization_has_its_own_buckets() {
        let limits = RateLimits { requests_per_minute: Some(2), tokens_per_minute: Some(100) };
        let limiter = Limiter::new(limits);
        assert!(limiter.admit("a").is_ok());
        let standing = limiter.admit("a").unwrap();
        assert_eq!(standing.requests.unwrap().remaining, 0);
        let refused = limiter.admit("a").unwrap_err();
        assert_eq!(refused.reply().error.code, Some("rate_limit_exceeded"));
        limiter.admit("b").unwrap();
        limiter.charge("b", 250);
        assert!(limiter.admit("b").unwrap_err().reply().error.message.contains("tokens"));
    }

    #[test]
    fn nothing_is_limited_by_default() {
        let limiter = Limiter::new(RateLimits::default());
        let mut headers = HeaderMap::new();
        for _ in 0..1000 {
            limiter.admit("a").unwrap().write(&mut headers);
        }
        assert!(headers.is_empty());
    }
}
