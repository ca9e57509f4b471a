//! The worker of G2: it admits every request, then says a word to all of them with each message,
//! once all of them have read the last.

use anyhow::{Context, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use storage::Storage;
use storage::ids::incarnation;
use storage::queue::message::{
    Finish, Item, PROTOCOL_VERSION, Request, ToWorker, Token, TokenMessage, Update, WorkerPresence,
};
use storage::queue::{Delivered, Inbox};

/// Base that it serves.
pub const BASE: &str = "bench";

/// A worker with an open inbox.
pub struct Source {
    storage: Storage,
    presence: WorkerPresence,
    inbox: Inbox,
    sequence: u64,
}

impl Source {
    pub async fn open(storage: Storage) -> anyhow::Result<Self> {
        let presence = WorkerPresence {
            worker_id: "source".to_owned(),
            incarnation: incarnation(),
            protocol: vec![PROTOCOL_VERSION],
            base: BASE.to_owned(),
            base_fingerprint: "none".to_owned(),
            device: "none".to_owned(),
            adapters: Vec::new(),
            requests: 0,
            free_blocks: 1,
            total_blocks: 1,
            training_jobs: 0,
            training_room: 0,
            draining: false,
        };
        let inbox = storage.queue.open_inbox(presence.clone()).await?;
        Ok(Self { storage, presence, inbox, sequence: 0 })
    }

    /// Admits `streams` requests, then gives each `tokens` tokens; `read` counts what clients have.
    pub async fn run(
        mut self,
        streams: usize,
        tokens: u64,
        read: Arc<AtomicU64>,
    ) -> anyhow::Result<()> {
        let mut requests: Vec<Request> = Vec::with_capacity(streams);
        while requests.len() < streams {
            let Some(message) = self.inbox.recv().await else { bail!("the inbox was taken over") };
            if let ToWorker::Place(request) = message {
                let admitted =
                    Update::Admitted { prompt_tokens: 1, fingerprint: "fp_none".to_owned() };
                self.say(&[*request.clone()], |_| admitted.clone()).await?;
                requests.push(*request);
            }
        }
        for index in 0..tokens {
            // All have read the one before: no two tokens of a stream leave in one write.
            while read.load(Relaxed) < index * streams as u64 {
                tokio::task::yield_now().await;
            }
            let finish = (index + 1 == tokens).then_some(Finish::Length);
            let word = |_: &Request| Update::Tokens {
                choice: 0,
                first: index as u32,
                tokens: vec![Token { id: 7, logprob: None }],
                text: " word".to_owned(),
                finish,
            };
            self.say(&requests, word).await?;
        }
        Ok(())
    }

    async fn say(
        &mut self,
        requests: &[Request],
        update: impl Fn(&Request) -> Update,
    ) -> anyhow::Result<()> {
        let gateway = &requests.first().context("no request")?.gateway;
        let item = |request: &Request| Item {
            request_id: request.request_id.clone(),
            attempt: request.attempt,
            update: update(request),
        };
        let message = TokenMessage {
            worker_incarnation: self.presence.incarnation.clone(),
            sequence: self.sequence,
            items: requests.iter().map(item).collect(),
        };
        self.sequence += 1;
        match self.storage.queue.publish(gateway, message).await? {
            Delivered::Delivered => Ok(()),
            lost => bail!("a token message was not delivered: {lost:?}"),
        }
    }
}
