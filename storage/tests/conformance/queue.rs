//! The in-process queue: bounds, control past requests, presence by life.

use std::time::Duration;

use storage::queue::message::{
    Input, Limits, Request, Sampling, Target, ToWorker, TokenMessage, WorkerPresence,
};
use storage::queue::{Controlled, Delivered, LocalQueue, Placed, Queue, QueueLimits};

fn queue() -> LocalQueue {
    LocalQueue::new(QueueLimits {
        inbox_requests: 2,
        inbox_controls: 2,
        token_messages: 2,
        publish_patience: Duration::from_millis(50),
    })
}

fn presence(worker: &str, incarnation: &str) -> WorkerPresence {
    WorkerPresence {
        worker_id: worker.to_owned(),
        incarnation: incarnation.to_owned(),
        protocol: vec![1],
        base: "base".to_owned(),
        base_fingerprint: "fp".to_owned(),
        device: "cpu".to_owned(),
        adapters: Vec::new(),
        requests: 0,
        free_blocks: 8,
        total_blocks: 8,
        training_jobs: 0,
        training_room: 1,
        draining: false,
    }
}

fn request(id: &str) -> Request {
    Request {
        request_id: id.to_owned(),
        attempt: 0,
        gateway: "g".to_owned(),
        org: "org".to_owned(),
        base: "base".to_owned(),
        target: Target::Base,
        input: Input::Text("hi".to_owned()),
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 1,
            logprobs: None,
        },
        limits: Limits::default(),
        choices: 1,
        replay: Vec::new(),
    }
}

fn message(sequence: u64) -> TokenMessage {
    TokenMessage { worker_incarnation: "i".to_owned(), sequence, items: Vec::new() }
}

fn cancel(id: &str) -> ToWorker {
    ToWorker::Cancel { request_id: id.to_owned() }
}

fn nudge(id: &str) -> ToWorker {
    ToWorker::JobNudge { job_id: id.to_owned() }
}

async fn place(queue: &LocalQueue, id: &str) -> Placed {
    queue.place("w", request(id)).await.expect("places")
}

#[tokio::test]
async fn an_inbox_is_bounded_and_in_order() {
    let queue = queue();
    assert_eq!(place(&queue, "a").await, Placed::Gone);
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    assert_eq!(place(&queue, "a").await, Placed::Accepted);
    assert_eq!(place(&queue, "b").await, Placed::Accepted);
    assert_eq!(place(&queue, "c").await, Placed::Full);
    assert_eq!(inbox.recv().await, Some(ToWorker::Place(Box::new(request("a")))));
    assert_eq!(place(&queue, "c").await, Placed::Accepted);
    assert_eq!(inbox.try_recv(), Some(ToWorker::Place(Box::new(request("b")))));
    assert_eq!(inbox.try_recv(), Some(ToWorker::Place(Box::new(request("c")))));
    assert_eq!(inbox.try_recv(), None);
    drop(inbox);
    assert_eq!(place(&queue, "d").await, Placed::Gone);
    assert_eq!(queue.control("w", cancel("a")).await.expect("sends"), Controlled::Gone);
}

#[tokio::test]
async fn control_passes_requests_and_is_never_lost() {
    let queue = queue();
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    place(&queue, "a").await;
    place(&queue, "b").await;
    // The inbox is full of requests; control gets in, once per message.
    queue.control("w", cancel("x")).await.expect("sends");
    queue.control("w", cancel("x")).await.expect("sends");
    queue.nudge_job("j").await.expect("nudges");
    queue.nudge_job("j").await.expect("nudges");
    // A third distinct one waits for room, and is not lost.
    let waiting = tokio::spawn({
        let queue = queue.clone();
        async move { queue.control("w", cancel("y")).await.expect("sends") }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(!waiting.is_finished());
    assert_eq!(inbox.recv().await, Some(cancel("x")));
    assert_eq!(waiting.await.expect("ends"), Controlled::Sent);
    assert_eq!(inbox.recv().await, Some(nudge("j")));
    assert_eq!(inbox.recv().await, Some(cancel("y")));
    // What still waits is cancelled where it is.
    queue.control("w", cancel("a")).await.expect("sends");
    assert_eq!(inbox.recv().await, Some(ToWorker::Place(Box::new(request("b")))));
    assert_eq!(inbox.try_recv(), None);
}

#[tokio::test]
async fn a_waiting_control_ends_with_the_worker() {
    let queue = queue();
    let inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    queue.control("w", cancel("1")).await.expect("sends");
    queue.control("w", cancel("2")).await.expect("sends");
    let waiting = tokio::spawn({
        let queue = queue.clone();
        async move { queue.control("w", cancel("3")).await.expect("sends") }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(inbox);
    assert_eq!(waiting.await.expect("ends"), Controlled::Gone);
}

#[tokio::test]
async fn a_waiting_receiver_wakes() {
    let queue = queue();
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    let receiving = tokio::spawn(async move { inbox.recv().await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    place(&queue, "a").await;
    assert_eq!(receiving.await.expect("ends"), Some(ToWorker::Place(Box::new(request("a")))));
}

#[tokio::test]
async fn presence_lasts_as_long_as_the_inbox() {
    let queue = queue();
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
    place(&queue, "a").await;
    let second = queue.open_inbox(presence("w", "2")).await.expect("opens");
    assert_eq!(first.recv().await, None);
    drop(first);
    assert_eq!(queue.workers().await.expect("reads")[0].incarnation, "2");
    assert_eq!(place(&queue, "b").await, Placed::Accepted);
    drop(second);
    assert!(queue.workers().await.expect("reads").is_empty());
}

#[tokio::test]
async fn token_messages_are_bounded() {
    let queue = queue();
    let publish = async |sequence| queue.publish("g", message(sequence)).await.expect("publishes");
    assert_eq!(publish(0).await, Delivered::GatewayGone);
    let mut tokens = queue.gateway_tokens("g").await.expect("opens");
    assert_eq!(queue.gateways().await.expect("reads"), ["g"]);
    assert_eq!(publish(0).await, Delivered::Delivered);
    assert_eq!(publish(1).await, Delivered::Delivered);
    assert_eq!(publish(2).await, Delivered::Dropped, "a slow gateway sees a gap");
    assert_eq!(tokens.recv().await, Some(message(0)));
    assert_eq!(publish(3).await, Delivered::Delivered);
    assert_eq!(tokens.recv().await, Some(message(1)));
    assert_eq!(tokens.recv().await, Some(message(3)));

    let successor = queue.gateway_tokens("g").await.expect("opens");
    assert_eq!(tokens.recv().await, None);
    drop(tokens);
    assert_eq!(queue.gateways().await.expect("reads"), ["g"], "the successor stays");
    drop(successor);
    assert!(queue.gateways().await.expect("reads").is_empty());
    assert_eq!(publish(4).await, Delivered::GatewayGone);
}

#[tokio::test]
async fn a_publish_that_waits_ends_with_the_gateway() {
    let queue = LocalQueue::new(QueueLimits { token_messages: 1, ..QueueLimits::default() });
    let tokens = queue.gateway_tokens("g").await.expect("opens");
    queue.publish("g", message(0)).await.expect("publishes");
    let waiting = tokio::spawn({
        let queue = queue.clone();
        async move { queue.publish("g", message(1)).await.expect("publishes") }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(tokens);
    assert_eq!(waiting.await.expect("ends"), Delivered::GatewayGone);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_and_cancel_arrives_once_under_load() {
    const EACH: usize = 500;
    let queue = LocalQueue::default();
    let mut inbox = queue.open_inbox(presence("w", "1")).await.expect("opens");
    let mut senders = tokio::task::JoinSet::new();
    for sender in 0..4 {
        let queue = queue.clone();
        senders.spawn(async move {
            for number in 0..EACH {
                let id = format!("{sender}-{number}");
                while place(&queue, &id).await == Placed::Full {
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
            ToWorker::JobNudge { .. } => panic!("nobody nudged"),
        }
    }
    senders.join_all().await;
    assert_eq!((requests, cancels, inbox.try_recv()), (4 * EACH, 4 * EACH, None));
}
