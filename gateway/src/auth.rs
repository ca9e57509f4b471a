//! Who is calling. A key names one organization; without keys, a gateway that is bound to a
//! loopback address may be open to the machine it runs on, until the first key is made.
//!
//! Keys are looked up through a cache: fresh for 30 seconds, which bounds how long a revoked key
//! lives on, and used a little longer only while the database is away.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, header};
use sha2::{Digest, Sha256};
use storage::Db;
use storage::db::{Caller, Role};

use crate::error::{ApiError, ApiResult};
use crate::names::{PATIENCE, STALE_MAX};

/// Organization of open access.
pub const LOCAL_ORG: &str = "org-local";

const FRESH: Duration = Duration::from_secs(30);

/// Keys remembered; beyond it the cache starts over.
const KEYS_MAX: usize = 10_000;

/// Open access ends within a second of the first key, so it is asked for more often.
const OPEN_CHECK: Duration = Duration::from_millis(500);

/// Longest secret looked at; ours have 51 characters.
const SECRET_BYTES_MAX: usize = 512;

/// Authenticates requests.
#[derive(Debug)]
pub struct KeyRing {
    /// Hash of a secret to its holder and when the database said so.
    known: Mutex<HashMap<[u8; 32], (Caller, Instant)>>,
    open: OpenAccess,
}

#[derive(Debug)]
struct OpenAccess {
    /// Once false, for good.
    possible: AtomicBool,
    checked: Mutex<Option<Instant>>,
}

impl KeyRing {
    /// `open_access`: as the configuration says.
    pub fn new(open_access: bool) -> KeyRing {
        let open = OpenAccess { possible: AtomicBool::new(open_access), checked: Mutex::default() };
        KeyRing { known: Mutex::default(), open }
    }

    /// The caller of a request to `/v1`.
    pub async fn caller(
        &self,
        db: &Db,
        uri: &Uri,
        headers: &HeaderMap,
        cors_origins: &[String],
    ) -> ApiResult<Caller> {
        if self.is_open(db).await? {
            check_local(uri, headers, cors_origins)?;
            return Ok(local_caller());
        }
        self.holder(db, headers).await
    }

    /// Whether requests without a key are let in at the moment.
    pub async fn is_open(&self, db: &Db) -> ApiResult<bool> {
        if !self.open.possible.load(Ordering::Acquire) {
            return Ok(false);
        }
        let now = Instant::now();
        let checked = *lock(&self.open.checked);
        if checked.is_some_and(|at| now.duration_since(at) < OPEN_CHECK) {
            return Ok(true);
        }
        if db.within(PATIENCE, db.keys().any_ever()).await? {
            self.open.possible.store(false, Ordering::Release);
            return Ok(false);
        }
        *lock(&self.open.checked) = Some(now);
        Ok(true)
    }

    /// Holder of the key in `Authorization`.
    pub async fn holder(&self, db: &Db, headers: &HeaderMap) -> ApiResult<Caller> {
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Err(ApiError::no_key());
        };
        let secret = value.to_str().ok().and_then(bearer).ok_or_else(ApiError::no_key)?;
        if secret.len() > SECRET_BYTES_MAX {
            return Err(ApiError::wrong_key(secret));
        }
        let hash: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
        let now = Instant::now();
        let known = lock(&self.known).get(&hash).cloned();
        let age = known.as_ref().map(|(_, at)| now.duration_since(*at));
        if let Some((caller, _)) = &known
            && age.is_some_and(|age| age < FRESH)
        {
            return Ok(caller.clone());
        }
        let asked = db.within(PATIENCE, db.keys().authenticate(secret)).await;
        match (asked, known) {
            (Ok(Some(caller)), _) => {
                self.remember(hash, caller.clone(), now);
                Ok(caller)
            }
            (Ok(None), _) => {
                lock(&self.known).remove(&hash);
                Err(ApiError::wrong_key(secret))
            }
            (Err(error), Some((caller, _)))
                if error.is_unavailable() && age.is_some_and(|age| age < STALE_MAX) =>
            {
                tracing::debug!(%error, "a key is taken from the cache");
                Ok(caller)
            }
            (Err(error), _) => Err(error.into()),
        }
    }

    fn remember(&self, hash: [u8; 32], caller: Caller, now: Instant) {
        let mut known = lock(&self.known);
        if known.len() >= KEYS_MAX {
            known.clear();
        }
        known.insert(hash, (caller, now));
    }
}

/// Every change leaves the value whole, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The person at this machine.
fn local_caller() -> Caller {
    let key_id = "open-access".to_owned();
    Caller { org: LOCAL_ORG.to_owned(), role: Role::Operator, key_id }
}

/// The token of `Bearer <token>`; the scheme's case does not matter.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// Refuses what a web page or a proxy could send to a loopback address on another's behalf.
pub fn check_local(uri: &Uri, headers: &HeaderMap, cors_origins: &[String]) -> ApiResult<()> {
    let forwarded = |name: &header::HeaderName| {
        name == header::FORWARDED || name.as_str().starts_with("x-forwarded-")
    };
    if headers.keys().any(forwarded) {
        return Err(ApiError::forbidden(
            "Requests through a proxy need an API key; make one with 'loquetier keys create'.",
        ));
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| uri.authority().map(Authority::as_str));
    if !host.is_some_and(is_loopback) {
        return Err(ApiError::forbidden(
            "Without an API key only requests to a loopback host are allowed.",
        ));
    }
    for origin in headers.get_all(header::ORIGIN) {
        let allowed = origin.to_str().is_ok_and(|origin| {
            cors_origins.iter().any(|allowed| allowed == origin)
                || origin.split_once("://").is_some_and(|(_, host)| is_loopback(host))
        });
        if !allowed {
            return Err(ApiError::forbidden("Requests from this web origin need an API key."));
        }
    }
    Ok(())
}

/// `localhost`, 127.0.0.0/8 or ::1, with or without a port.
fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    if authority.as_str().contains('@') {
        return false;
    }
    let name = authority.host();
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The authenticated caller of a request.
#[derive(Clone, Debug)]
pub struct Authenticated(pub Caller);

impl<S: Sync> FromRequestParts<S> for Authenticated {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        // Every route under /v1 is authenticated before it is reached.
        parts.extensions.get::<Authenticated>().cloned().ok_or_else(ApiError::no_key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts() {
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:80"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "example.com",
            "localhost.example.com",
            "127.0.0.1.example.com",
            "127.0.0.1@example.com",
            "0.0.0.0",
            "10.0.0.1",
            "[::2]",
            "",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn only_bearer_tokens_count() {
        assert_eq!(bearer("Bearer sk-1"), Some("sk-1"));
        assert_eq!(bearer("bearer  sk-1 "), Some("sk-1"));
        for bad in ["Bearer", "Bearer ", "Basic abc", "sk-1", ""] {
            assert_eq!(bearer(bad), None, "{bad}");
        }
    }
}
