//! What only Redis can do to a queue: be away, lose everything, cut connections, be shared by
//! processes that die.

use std::sync::Arc;
use std::time::Duration;

use storage::Error;
use storage::queue::message::ToWorker;
use storage::queue::{
    Controlled, Delivered, Placed, Queue, QueueLimits, Received, RedisOptions, RedisQueue,
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::queue_rig::{
    cancel, fresh, is_empty, message, next, next_tokens, nudge, place, placed, presence, redis_url,
    request, until,
};
use crate::redis_server::Server;

const PROMPT: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_loses_everything_is_survived() {
    let Some(mut server) = Server::start().await else { return };
    let options = server.options();
    let (gateway, worker) = (server.queue(&options).await, server.queue(&options).await);
    let mut tokens = gateway.gateway_tokens("g").await.expect("opens");
    let mut inbox = worker.open_inbox(presence("w", "1")).await.expect("opens");
    assert_eq!(place(&gateway, "lost").await, Placed::Accepted);
    worker.publish("g", message(0)).await.expect("publishes");
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Message(message(0))));

    server.kill();
    let start = Instant::now();
    let errors = [
        gateway.place("w", request("away")).await.map(drop),
        gateway.control("w", cancel("away")).await.map(drop),
        gateway.workers().await.map(drop),
        worker.publish("g", message(1)).await.map(drop),
        worker.refresh(presence("w", "1")).await,
        worker.open_inbox(presence("other", "1")).await.map(drop),
    ];
    assert!(start.elapsed() < 6 * PROMPT, "every call ends in time");
    for error in errors {
        let error = error.expect_err("nobody answers");
        assert!(error.is_unavailable(), "{error}");
    }
    let receiving = tokio::spawn(async move { next(&mut inbox).await.map(|got| (got, inbox)) });
    server.start_again().await;

    until("worker and gateway are back", async || {
        let (workers, gateways) = (gateway.workers().await, worker.gateways().await);
        workers.is_ok_and(|all| all == [presence("w", "1")]) && gateways.is_ok_and(|g| g == ["g"])
    })
    .await;
    assert_eq!(worker.publish("g", message(2)).await.expect("works"), Delivered::Delivered);
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Lost), "told before what follows");
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Message(message(2))));
    assert_eq!(place(&gateway, "b").await, Placed::Accepted);
    let (first, mut inbox) = receiving.await.expect("ends").expect("is open");
    assert_eq!(Some(first), placed("b"), "what waited is lost, what came after is not");
    assert_eq!(place(&gateway, "c").await, Placed::Accepted);
    assert_eq!(next(&mut inbox).await, placed("c"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_lose_and_repeat_nothing() {
    const COUNT: u64 = 150;
    let Some(server) = Server::start().await else { return };
    let options = RedisOptions { call_limit: Duration::from_secs(5), ..server.options() };
    let options = RedisOptions { presence_expiry: Duration::from_secs(30), ..options };
    let (gateway, worker) = (server.queue(&options).await, server.queue(&options).await);
    let mut tokens = gateway.gateway_tokens("g").await.expect("opens");
    let mut inbox = worker.open_inbox(presence("w", "1")).await.expect("opens");

    let placing = tokio::spawn(async move {
        for number in 0..COUNT {
            assert_eq!(place(&gateway, &number.to_string()).await, Placed::Accepted);
            sleep(Duration::from_millis(2)).await;
        }
    });
    let answering = tokio::spawn(async move {
        for number in 0..COUNT {
            assert_eq!(next(&mut inbox).await, placed(&number.to_string()), "in order, once");
            let sent = worker.publish("g", message(number)).await.expect("publishes");
            assert_eq!(sent, Delivered::Delivered);
        }
        (worker, inbox)
    });
    let mut cuts = 0;
    let mut expected = 0;
    let mut cutting = interval(Duration::from_millis(7));
    cutting.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while expected < COUNT {
        tokio::select! {
            received = next_tokens(&mut tokens) => match received {
                Some(Received::Message(got)) if got.sequence == expected => expected += 1,
                // The answer to a publish was cut off, and the message sent again.
                Some(Received::Message(got)) if got.sequence < expected => {}
                other => panic!("after {expected} came {other:?}"),
            },
            _ = cutting.tick() => {
                let _: u64 = server.command(&["CLIENT", "KILL", "TYPE", "normal"]).await;
                cuts += 1;
            }
        }
    }
    placing.await.expect("ends");
    let (_worker, mut inbox) = answering.await.expect("ends");
    assert!(is_empty(&mut inbox).await);
    assert!(cuts > 20, "{cuts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_away_in_time() {
    let Some(server) = Server::start().await else { return };
    let options = server.options();
    let queue = server.queue(&options).await;
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    server.signal("STOP");
    let start = Instant::now();
    for _ in 0..2 {
        let error = queue.place("w", request("a")).await.expect_err("nobody answers");
        assert!(error.is_unavailable(), "{error}");
    }
    let strangers = RedisQueue::connect(&server.url(), options.clone()).await;
    assert!(strangers.expect_err("nobody answers").is_unavailable());
    assert!(start.elapsed() < 3 * PROMPT, "{:?}", start.elapsed());
    server.signal("CONT");
    until("the worker is back", async || {
        matches!(queue.place("w", request("b")).await, Ok(Placed::Accepted))
    })
    .await;
    // The first was sent before the time was up, so it may have arrived.
    let first = next(&mut inbox).await;
    if first == placed("a") {
        assert_eq!(next(&mut inbox).await, placed("b"));
    } else {
        assert_eq!(first, placed("b"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_inbox_stays_full_under_concurrency() {
    let Some(url) = redis_url() else { return };
    let limits = QueueLimits { inbox_requests: 10, ..QueueLimits::default() };
    let options = RedisOptions { limits, ..fresh() };
    let worker = RedisQueue::connect(&url, options.clone()).await.expect("connects");
    let mut inbox = worker.open_inbox(presence("w", "1")).await.expect("opens");
    let mut placing = tokio::task::JoinSet::new();
    for gateway in 0..4 {
        // The bound is the worker's, whatever a gateway was told.
        let options = RedisOptions { limits: QueueLimits::default(), ..options.clone() };
        let queue = RedisQueue::connect(&url, options).await.expect("connects");
        for number in 0..16 {
            let queue = queue.clone();
            placing.spawn(async move { place(&queue, &format!("{gateway}-{number}")).await });
        }
    }
    let outcomes = placing.join_all().await;
    let count = |outcome| outcomes.iter().filter(|&&got| got == outcome).count();
    assert_eq!((count(Placed::Accepted), count(Placed::Full)), (10, 54));
    for _ in 0..10 {
        assert!(matches!(next(&mut inbox).await, Some(ToWorker::Place(_))));
    }
    assert!(is_empty(&mut inbox).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_runs_out_with_a_process_that_dies() {
    let Some(server) = Server::start().await else { return };
    let options = server.options();
    let survivor = server.queue(&options).await;
    let process = tokio::runtime::Runtime::new().expect("a runtime");
    let (url, theirs) = (server.url(), options.clone());
    let opened = process.spawn(async move {
        let queue = RedisQueue::connect(&url, theirs).await.expect("connects");
        let inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
        let tokens = queue.gateway_tokens("g").await.expect("opens");
        (inbox, tokens)
    });
    let ends = opened.await.expect("opens");
    sleep(2 * options.presence_expiry).await;
    assert_eq!(survivor.workers().await.expect("reads").len(), 1, "kept while it lives");
    assert_eq!(place(&survivor, "a").await, Placed::Accepted);
    process.shutdown_background();
    drop(ends);
    assert_eq!(survivor.gateways().await.expect("reads"), ["g"], "nobody took it back");
    let start = Instant::now();
    until("both run out", async || {
        survivor.workers().await.expect("reads").is_empty()
            && survivor.gateways().await.expect("reads").is_empty()
    })
    .await;
    assert!(start.elapsed() < 2 * options.presence_expiry, "{:?}", start.elapsed());
    assert_eq!(place(&survivor, "b").await, Placed::Gone);
    assert_eq!(survivor.control("w", cancel("a")).await.expect("asks"), Controlled::Gone);
    assert_eq!(survivor.publish("g", message(0)).await.expect("asks"), Delivered::GatewayGone);
    // Its successor finds nothing of it, and all that is left ends by itself.
    let mut inbox = survivor.open_inbox(presence("w", "2")).await.expect("opens");
    assert!(is_empty(&mut inbox).await);
    let keys: Vec<String> = server.command(&["KEYS", "*"]).await;
    for key in keys.iter().filter(|key| !key.ends_with(":workers") && !key.ends_with(":gateways")) {
        let left: i64 = server.command(&["PTTL", key]).await;
        assert!(left > 0, "{key} stays for ever");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_worker_finds_its_inbox_and_a_stopped_gateway_is_told() {
    let Some(server) = Server::start().await else { return };
    let options = server.options();
    let (gateway, worker) = (server.queue(&options).await, server.queue(&options).await);
    let mut tokens = gateway.gateway_tokens("g").await.expect("opens");
    let mut inbox = worker.open_inbox(presence("w", "1")).await.expect("opens");
    assert_eq!(place(&gateway, "a").await, Placed::Accepted);
    assert_eq!(worker.publish("g", message(0)).await.expect("works"), Delivered::Delivered);
    // As if both had been stopped past their presence.
    let stem = &options.prefix;
    let keys = [format!("{stem}:worker:w"), format!("{stem}:gateway:g")];
    let gone: u64 = server.command(&["DEL", &keys[0], &keys[1]]).await;
    assert_eq!(gone, 2);
    until("both are back", async || {
        !gateway.workers().await.expect("reads").is_empty()
            && !gateway.gateways().await.expect("reads").is_empty()
    })
    .await;
    assert_eq!(next(&mut inbox).await, placed("a"));
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Lost));
    let silent = timeout(Duration::from_millis(100), tokens.recv()).await;
    assert!(silent.is_err(), "what came before is void: {silent:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_see_one_queue() {
    let Some(url) = redis_url() else { return };
    let options = fresh();
    let connect = async || RedisQueue::connect(&url, options.clone()).await.expect("connects");
    let (one, two): (Arc<dyn Queue>, Arc<dyn Queue>) =
        (Arc::new(connect().await), Arc::new(connect().await));
    let mut first = one.open_inbox(presence("w", "1")).await.expect("opens");
    let mut busier = presence("w", "1");
    busier.requests = 7;
    one.refresh(busier.clone()).await.expect("refreshes");
    assert_eq!(two.workers().await.expect("reads"), [busier]);
    place(&*two, "a").await;
    place(&*two, "b").await;
    assert_eq!(two.control("w", cancel("a")).await.expect("sends"), Controlled::Sent);
    two.nudge_job("j").await.expect("nudges");
    assert_eq!(next(&mut first).await, Some(nudge("j")));
    assert_eq!(next(&mut first).await, placed("b"));
    assert_eq!(first.try_recv(), None);

    // Another process takes both ids over; the first is told without waiting for a beat.
    let mut tokens = one.gateway_tokens("g").await.expect("opens");
    two.publish("g", message(0)).await.expect("publishes");
    place(&*two, "c").await;
    let start = Instant::now();
    let mut second = two.open_inbox(presence("w", "2")).await.expect("opens");
    let mut successor = two.gateway_tokens("g").await.expect("opens");
    assert_eq!(next(&mut first).await, None);
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Message(message(0))));
    assert_eq!(next_tokens(&mut tokens).await, None);
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    drop((first, tokens));
    sleep(Duration::from_millis(50)).await;
    place(&*one, "d").await;
    assert_eq!(next(&mut second).await, placed("d"), "an inbox begins empty");
    one.publish("g", message(1)).await.expect("publishes");
    assert_eq!(next_tokens(&mut successor).await, Some(Received::Message(message(1))));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable_and_a_bad_address_is_not() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let url = format!("redis+unix://{}/none", folder.path().display());
    let options = RedisOptions { call_limit: Duration::from_millis(200), ..fresh() };
    let away = RedisQueue::connect(&url, options.clone()).await.expect_err("nobody is there");
    assert!(matches!(away, Error::QueueAway(_)) && away.is_unavailable(), "{away}");
    let bad = RedisQueue::connect("http://localhost", options).await.expect_err("is no address");
    assert!(matches!(bad, Error::Queue(_)) && !bad.is_unavailable(), "{bad}");
}
