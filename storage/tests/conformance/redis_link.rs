//! The shared connection to Redis while many calls wait for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use loquetier_tests::proxy::{Fate, Filter, Proxy, Upstream, Way};
use storage::queue::{Queue, RedisOptions, RedisQueue};
use tokio::time::{Instant, sleep};

/// Between two calls.
const PACE: Duration = Duration::from_millis(5);
/// Calls come far faster than a connection is made.
const CONNECTS_IN: Duration = Duration::from_millis(60);
const CALL_LIMIT: Duration = Duration::from_millis(400);

/// A server at which connections begin slowly.
struct Slow;

impl Filter for Slow {
    fn asked(&self, _connection: u64, piece: &[u8]) -> Fate {
        if piece.windows(7).any(|word| word == b"SETINFO") {
            std::thread::sleep(CONNECTS_IN);
        }
        Fate::Pass
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_that_queue_do_not_keep_each_other_from_connecting() {
    let Ok(url) = std::env::var("LOQUETIER_TEST_REDIS_URL") else { return };
    let upstream = match url.strip_prefix("redis+unix://") {
        Some(path) => Upstream::Unix(PathBuf::from(path)),
        None => Upstream::from(url.trim_start_matches("redis://")),
    };
    let proxy = Proxy::filtered(upstream, Arc::new(Slow)).await;
    let options = RedisOptions { call_limit: CALL_LIMIT, ..RedisOptions::default() };
    let through = format!("redis://{}", proxy.address);
    let queue = RedisQueue::connect(&through, options).await.expect("connects");
    proxy.set(Way::Silent);
    proxy.cut();
    let calls = |length: Duration| {
        let queue = queue.clone();
        async move {
            let (start, mut calls) = (Instant::now(), Vec::new());
            while start.elapsed() < length {
                let queue = queue.clone();
                calls.push(tokio::spawn(async move { queue.gateways().await.is_ok() }));
                sleep(PACE).await;
            }
            let mut answered = 0;
            for call in calls {
                answered += usize::from(call.await.expect("ends"));
            }
            answered
        }
    };
    assert_eq!(calls(CALL_LIMIT * 2).await, 0, "nobody answers");
    // While calls go on to come, a server that is back is soon found.
    let coming = tokio::spawn(calls(CALL_LIMIT * 5));
    sleep(CALL_LIMIT).await;
    proxy.set(Way::Open);
    let answered = coming.await.expect("ends");
    assert!(answered > 20, "{answered} calls were answered");
}
