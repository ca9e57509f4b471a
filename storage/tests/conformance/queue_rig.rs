//! A fresh queue per test, on both sides of the seam, and what travels through it.

use std::sync::Arc;
use std::time::Duration;

use storage::ids::alphanumerics;
use storage::queue::message::{
    Input, Limits, Request, Sampling, Target, ToWorker, TokenMessage, WorkerPresence,
};
use storage::queue::{
    Inbox, LocalQueue, Placed, Queue, QueueLimits, RedisOptions, RedisQueue, TokenReceiver,
};
use tokio::time::{Instant, sleep, timeout};

/// Declares a test that runs on both queues; the body is an `async fn(Side)`.
macro_rules! on_both_queues {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use crate::queue_rig::{Side, redis_url};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn local() {
                super::$name(Side::Local).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn redis() {
                if let Some(url) = redis_url() {
                    super::$name(Side::Redis(url)).await;
                }
            }
        }
    )+ };
}
pub(crate) use on_both_queues;

/// None where no server was given; `./dev test` always gives one.
pub fn redis_url() -> Option<String> {
    std::env::var("LOQUETIER_TEST_REDIS_URL").ok()
}

/// Which queue.
pub enum Side {
    Local,
    Redis(String),
}

impl Side {
    /// An empty queue.
    pub async fn queue(&self, limits: QueueLimits) -> Arc<dyn Queue> {
        match self {
            Self::Local => Arc::new(LocalQueue::new(limits)),
            Self::Redis(url) => {
                let options = RedisOptions { limits, ..fresh() };
                Arc::new(RedisQueue::connect(url, options).await.expect("connects"))
            }
        }
    }
}

/// Options with a prefix of their own.
pub fn fresh() -> RedisOptions {
    RedisOptions { prefix: format!("test-{}", alphanumerics(12)), ..RedisOptions::default() }
}

/// Bounds that a test reaches.
pub fn small() -> QueueLimits {
    QueueLimits {
        inbox_requests: 2,
        inbox_controls: 2,
        token_messages: 2,
        publish_patience: Duration::from_millis(100),
    }
}

pub fn presence(worker: &str, incarnation: &str) -> WorkerPresence {
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

pub fn request(id: &str) -> Request {
    Request {
        request_id: id.to_owned(),
        attempt: 0,
        gateway: "g".to_owned(),
        org: "org".to_owned(),
        base: "base".to_owned(),
        target: Target::Base,
        input: Input::Text("hi \0 \u{1F600}".to_owned()),
        sampling: Sampling {
            temperature: 0.1,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: i64::MIN,
            logprobs: None,
        },
        limits: Limits::default(),
        choices: 1,
        replay: Vec::new(),
    }
}

pub fn placed(id: &str) -> Option<ToWorker> {
    Some(ToWorker::Place(Box::new(request(id))))
}

pub fn message(sequence: u64) -> TokenMessage {
    TokenMessage { worker_incarnation: "i".to_owned(), sequence, items: Vec::new() }
}

pub fn cancel(id: &str) -> ToWorker {
    ToWorker::Cancel { request_id: id.to_owned(), attempt: 0 }
}

pub fn nudge(id: &str) -> ToWorker {
    ToWorker::JobNudge { job_id: id.to_owned() }
}

/// Places a request on worker `w`.
pub async fn place(queue: &dyn Queue, id: &str) -> Placed {
    queue.place("w", request(id)).await.expect("places")
}

/// Whether nothing comes for a while.
pub async fn is_empty(inbox: &mut Inbox) -> bool {
    timeout(Duration::from_millis(60), inbox.recv()).await.is_err()
}

/// The next message of an inbox, soon.
pub async fn next(inbox: &mut Inbox) -> Option<ToWorker> {
    timeout(Duration::from_secs(10), inbox.recv()).await.expect("comes soon")
}

/// The next of a stream of token messages, soon.
pub async fn next_tokens(tokens: &mut TokenReceiver) -> Option<storage::queue::Received> {
    timeout(Duration::from_secs(10), tokens.recv()).await.expect("comes soon")
}

/// Waits for what happens soon after a drop.
pub async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !check().await {
        assert!(Instant::now() < end, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}
