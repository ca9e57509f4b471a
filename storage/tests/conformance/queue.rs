//! The queue in one process and over Redis: bounds, control past requests, presence by life.
//! Over Redis when `LOQUETIER_TEST_REDIS_URL` names a server (`tests/redis.sh start DIR` prints
//! one).

use std::sync::Arc;
use std::time::Duration;

use storage::queue::message::{Request, ToWorker};
use storage::queue::{Controlled, Delivered, Placed, QueueLimits, Received};

use crate::queue_rig::{
    Side, cancel, is_empty, message, next, next_tokens, nudge, on_both_queues, place, placed,
    presence, request, small, until,
};

on_both_queues!(
    an_inbox_is_bounded_and_in_order,
    control_passes_requests_and_is_never_lost,
    a_waiting_control_ends_with_the_worker,
    a_waiting_receiver_wakes,
    every_control_message_arrives_as_sent,
    a_closed_inbox_is_gone_at_once,
    presence_lasts_as_long_as_the_inbox,
    token_messages_are_bounded,
    a_publish_that_waits_ends_with_the_gateway,
    every_request_and_cancel_arrives_once_under_load,
);

async fn an_inbox_is_bounded_and_in_order(side: Side) {
    let queue = side.queue(small()).await;
    assert_eq!(place(&*queue, "a").await, Placed::Gone);
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    assert_eq!(place(&*queue, "a").await, Placed::Accepted);
    assert_eq!(place(&*queue, "b").await, Placed::Accepted);
    assert_eq!(place(&*queue, "c").await, Placed::Full);
    assert_eq!(next(&mut inbox).await, placed("a"));
    assert_eq!(place(&*queue, "c").await, Placed::Accepted);
    assert_eq!(next(&mut inbox).await, placed("b"));
    assert_eq!(next(&mut inbox).await, placed("c"));
    assert!(is_empty(&mut inbox).await);
    drop(inbox);
    until("the worker goes", async || place(&*queue, "d").await == Placed::Gone).await;
    assert_eq!(queue.control("w", cancel("a")).await.expect("sends"), Controlled::Gone);
}

async fn control_passes_requests_and_is_never_lost(side: Side) {
    let queue = side.queue(small()).await;
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    place(&*queue, "a").await;
    place(&*queue, "b").await;
    // The inbox is full of requests; control gets in, once per message.
    queue.control("w", cancel("x")).await.expect("sends");
    queue.control("w", cancel("x")).await.expect("sends");
    queue.nudge_job("j").await.expect("nudges");
    queue.nudge_job("j").await.expect("nudges");
    // A third distinct one waits for room, and is not lost.
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.control("w", cancel("y")).await.expect("sends") }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(!waiting.is_finished());
    assert_eq!(next(&mut inbox).await, Some(cancel("x")));
    assert_eq!(waiting.await.expect("ends"), Controlled::Sent);
    assert_eq!(next(&mut inbox).await, Some(nudge("j")));
    assert_eq!(next(&mut inbox).await, Some(cancel("y")));
    // What still waits is cancelled where it is.
    queue.control("w", cancel("a")).await.expect("sends");
    assert_eq!(next(&mut inbox).await, placed("b"));
    assert!(is_empty(&mut inbox).await);
    // A cancel of earlier placements leaves a later one.
    let later = Request { attempt: 1, ..request("a") };
    assert_eq!(queue.place("w", later.clone()).await.expect("places"), Placed::Accepted);
    queue.control("w", cancel("a")).await.expect("sends");
    assert_eq!(next(&mut inbox).await, Some(cancel("a")));
    assert_eq!(next(&mut inbox).await, Some(ToWorker::Place(Box::new(later))));
}

async fn a_waiting_control_ends_with_the_worker(side: Side) {
    let queue = side.queue(small()).await;
    let inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    queue.control("w", cancel("1")).await.expect("sends");
    queue.control("w", cancel("2")).await.expect("sends");
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.control("w", cancel("3")).await.expect("sends") }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(inbox);
    assert_eq!(waiting.await.expect("ends"), Controlled::Gone);
}

async fn a_waiting_receiver_wakes(side: Side) {
    let queue = side.queue(small()).await;
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    let receiving = tokio::spawn(async move { inbox.recv().await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    place(&*queue, "a").await;
    assert_eq!(receiving.await.expect("ends"), placed("a"));
}

async fn presence_lasts_as_long_as_the_inbox(side: Side) {
    let queue = side.queue(small()).await;
    assert!(queue.workers().await.expect("reads").is_empty());
    let first = queue.open_inbox(presence("w", "1")).await.expect("opens");
    let mut busier = presence("w", "1");
    busier.requests = 5;
    queue.refresh(busier.clone()).await.expect("refreshes");
    assert_eq!(queue.workers().await.expect("reads"), [busier]);
    queue.refresh(presence("other", "1")).await.expect("is ignored");
    queue.refresh(presence("w", "old")).await.expect("is ignored");
    assert_eq!(queue.workers().await.expect("reads")[0].requests, 5);

    // A restarted worker takes its name over; the end of the old one does not end it.
    let mut first = first;
    place(&*queue, "a").await;
    let second = queue.open_inbox(presence("w", "2")).await.expect("opens");
    assert_eq!(next(&mut first).await, None);
    drop(first);
    assert_eq!(queue.workers().await.expect("reads")[0].incarnation, "2");
    assert_eq!(place(&*queue, "b").await, Placed::Accepted);
    drop(second);
    until("the worker goes", async || queue.workers().await.expect("reads").is_empty()).await;
}

async fn every_control_message_arrives_as_sent(side: Side) {
    let queue = side.queue(QueueLimits::default()).await;
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    let (adapter_id, job_id) = ("adp-1".to_owned(), "ftjob-1".to_owned());
    let messages = [
        ToWorker::Load { adapter_id: adapter_id.clone(), object: "adapters/x".to_owned() },
        ToWorker::Evict { adapter_id: adapter_id.clone(), hand_over: true },
        ToWorker::Evict { adapter_id, hand_over: false },
        ToWorker::MoveJob { job_id: job_id.clone(), to: Some("v".to_owned()) },
        ToWorker::MoveJob { job_id, to: None },
        ToWorker::Drain,
    ];
    place(&*queue, "a").await;
    for message in &messages {
        queue.control("w", message.clone()).await.expect("sends");
    }
    for message in messages {
        assert_eq!(next(&mut inbox).await, Some(message), "before requests, in order");
    }
    assert_eq!(next(&mut inbox).await, placed("a"));
}

async fn a_closed_inbox_is_gone_at_once(side: Side) {
    let queue = side.queue(QueueLimits::default()).await;
    let inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    inbox.close().await;
    assert_eq!(queue.workers().await.expect("reads"), []);
    // A late sign of life does not bring it back.
    queue.refresh(presence("w", "1")).await.expect("is ignored");
    assert_eq!(place(&*queue, "a").await, Placed::Gone);
}

async fn token_messages_are_bounded(side: Side) {
    let queue = side.queue(small()).await;
    let publish = async |sequence| queue.publish("g", message(sequence)).await.expect("publishes");
    assert_eq!(publish(0).await, Delivered::GatewayGone);
    let mut tokens = queue.gateway_tokens("g").await.expect("opens");
    assert_eq!(queue.gateways().await.expect("reads"), ["g"]);
    assert_eq!(publish(0).await, Delivered::Delivered);
    assert_eq!(publish(1).await, Delivered::Delivered);
    assert_eq!(publish(2).await, Delivered::Dropped, "a slow gateway sees a gap");
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Message(message(0))));
    assert_eq!(publish(3).await, Delivered::Delivered);
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Message(message(1))));
    assert_eq!(next_tokens(&mut tokens).await, Some(Received::Message(message(3))));

    let successor = queue.gateway_tokens("g").await.expect("opens");
    assert_eq!(next_tokens(&mut tokens).await, None);
    drop(tokens);
    assert_eq!(queue.gateways().await.expect("reads"), ["g"], "the successor stays");
    drop(successor);
    until("the gateway goes", async || queue.gateways().await.expect("reads").is_empty()).await;
    assert_eq!(publish(4).await, Delivered::GatewayGone);
}

async fn a_publish_that_waits_ends_with_the_gateway(side: Side) {
    let limits = QueueLimits { token_messages: 1, ..QueueLimits::default() };
    let queue = side.queue(limits).await;
    let tokens = queue.gateway_tokens("g").await.expect("opens");
    queue.publish("g", message(0)).await.expect("publishes");
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.publish("g", message(1)).await.expect("publishes") }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(tokens);
    assert_eq!(waiting.await.expect("ends"), Delivered::GatewayGone);
}

async fn every_request_and_cancel_arrives_once_under_load(side: Side) {
    const EACH: usize = 500;
    let queue = side.queue(QueueLimits::default()).await;
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    let mut senders = tokio::task::JoinSet::new();
    for sender in 0..4 {
        let queue = Arc::clone(&queue);
        senders.spawn(async move {
            for number in 0..EACH {
                let id = format!("{sender}-{number}");
                while place(&*queue, &id).await == Placed::Full {
                    tokio::task::yield_now().await;
                }
                let sent = queue.control("w", cancel(&format!("c{id}"))).await.expect("sends");
                assert_eq!(sent, Controlled::Sent);
            }
        });
    }
    let (mut requests, mut cancels) = (0, 0);
    while requests < 4 * EACH || cancels < 4 * EACH {
        match inbox.recv().await.expect("is open") {
            ToWorker::Place(_) => requests += 1,
            ToWorker::Cancel { .. } => cancels += 1,
            other => panic!("nobody sent {other:?}"),
        }
    }
    senders.join_all().await;
    assert_eq!((requests, cancels), (4 * EACH, 4 * EACH));
    assert!(is_empty(&mut inbox).await);
}
