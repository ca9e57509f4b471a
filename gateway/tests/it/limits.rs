//! Limits of one organization.

use gateway::{GatewayConfig, RateLimits};
use serde_json::json;
use storage::db::Role;

use crate::site::Site;
use crate::worker::{self, Script};

#[tokio::test]
async fn one_organization_at_its_limit_does_not_hold_up_another() {
    let rate_limits = RateLimits { requests_per_minute: Some(2), tokens_per_minute: Some(1000) };
    let site = Site::with(GatewayConfig { rate_limits, ..GatewayConfig::default() }).await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let (a, b) = (site.key("org-a", Role::Member).await, site.key("org-b", Role::Member).await);
    let first = a.chat(json!({})).await;
    assert_eq!(first.status, 200);
    assert_eq!(first.header("x-ratelimit-limit-requests"), Some("2"));
    assert_eq!(first.header("x-ratelimit-remaining-requests"), Some("1"));
    assert!(first.header("x-ratelimit-reset-requests").unwrap().ends_with('s'));
    assert_eq!(first.header("x-ratelimit-limit-tokens"), Some("1000"));
    let second = a.chat(json!({"stream": true})).await;
    // 9 prompt and 4 completion tokens of the first.
    assert_eq!(second.header("x-ratelimit-remaining-tokens"), Some("987"));
    let third = a.chat(json!({})).await;
    assert_eq!(third.refusal(), (429, Some("rate_limit_exceeded".to_owned()), None));
    assert_eq!(third.json()["error"]["type"], "rate_limit_error");
    let secs: u64 = third.header("retry-after").unwrap().parse().unwrap();
    let ms: u64 = third.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((25..=30).contains(&secs) && (25_000..=30_001).contains(&ms), "{secs} {ms}");
    assert_eq!(a.get("/v1/models").await.status, 200);
    assert_eq!(b.chat(json!({})).await.status, 200);
}

#[tokio::test]
async fn without_limits_there_are_no_headers() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let reply = site.client().chat(json!({})).await;
    assert!(reply.headers.keys().all(|name| !name.as_str().starts_with("x-ratelimit")));
}
