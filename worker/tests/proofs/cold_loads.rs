//! A whole worker and a cold adapter that many ask for at once: the object store is read once.

use crate::common::{Adapter, DEMO, base_files};
use kernels::{Cpu, Module};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use storage::objects::S3Config;
use storage::queue::message::{Finish, Input, Limits, Request, Sampling, Target, ToWorker, Update};
use storage::queue::{Placed, Queue, Received, TokenReceiver};
use storage::{Objects, Storage};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use worker::adapters::peft;
use worker::{Worker, WorkerOptions};

/// Requests that come at once.
const REQUESTS: usize = 24;

/// How long the store takes: all requests have come before the first answer.
const SLOW: Duration = Duration::from_millis(400);

/// An object store that gives two files, slowly, and counts how often.
#[derive(Clone)]
struct Shelf {
    files: Arc<[(&'static str, Vec<u8>); 2]>,
    reads: Arc<Mutex<BTreeMap<&'static str, usize>>>,
}

impl Shelf {
    async fn open(self) -> Objects {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(self.clone().answer(client));
            }
        });
        let credential = |name: &str| (name.to_owned(), "x".to_owned());
        let environment = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].map(credential).into();
        let url = "s3://bucket".to_owned();
        let limits = Default::default();
        Objects::open_s3(&S3Config { url, endpoint, region: None, environment, limits }).unwrap()
    }

    async fn answer(self, client: TcpStream) {
        let mut client = BufReader::new(client);
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if client.read_line(&mut head).await.is_ok_and(|bytes| bytes == 0) {
                    return;
                }
            }
            let path = head.split(' ').nth(1).unwrap();
            let (name, bytes) = self.files.iter().find(|(name, _)| path.ends_with(name)).unwrap();
            *self.reads.lock().unwrap().entry(name).or_default() += 1;
            tokio::time::sleep(SLOW).await;
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\netag: \"1\"\r\n\
                 last-modified: Tue, 24 Nov 2026 08:00:00 GMT\r\n\r\n",
                bytes.len()
            );
            client.write_all(answer.as_bytes()).await.unwrap();
            client.write_all(bytes).await.unwrap();
        }
    }
}

fn request(number: usize) -> Request {
    Request {
        request_id: format!("cmpl-{number}"),
        attempt: 0,
        gateway: "g".to_owned(),
        org: "org".to_owned(),
        base: "base".to_owned(),
        target: Target::Adapter {
            adapter_id: "adp-1".to_owned(),
            model: "ft:base".to_owned(),
            object: "adapters/imported/one".to_owned(),
        },
        input: Input::Tokens(vec![1 + number as u32]),
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
        limits: Limits { max_tokens: Some(3), ignore_eos: true, ..Limits::default() },
        choices: 1,
        replay: Vec::new(),
    }
}

async fn place(queue: &dyn Queue, numbers: std::ops::Range<usize>) {
    for number in numbers {
        assert_eq!(queue.place("w", request(number)).await.unwrap(), Placed::Accepted);
    }
}

/// Waits until so many requests have been answered whole.
async fn answered(messages: &mut TokenReceiver, count: usize) {
    let mut ended = BTreeSet::new();
    while ended.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(60), messages.recv());
        let Some(Received::Message(message)) = next.await.expect("an answer") else { continue };
        for item in message.items {
            match item.update {
                Update::Tokens { finish: Some(Finish::Length), .. } => {
                    assert!(ended.insert(item.request_id));
                }
                Update::Tokens { .. } | Update::Admitted { .. } => {}
                other => panic!("{}: {other:?}", item.request_id),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_adapter_is_read_once_whoever_asks() {
    let adapter = Adapter::random(DEMO, 2, &[Module::Q, Module::V], 1);
    let shape = adapter.layout.shape();
    let files = [
        ("adapter_config.json", peft::write_config(shape, 0.0, "base")),
        ("adapter_model.safetensors", peft::write_weights(&adapter.layout, &adapter.values)),
    ];
    let shelf = Shelf { files: Arc::new(files), reads: Arc::default() };
    let folder = tempfile::tempdir().unwrap();
    let mut storage = Storage::open_embedded(folder.path()).await.unwrap();
    storage.objects = shelf.clone().open().await;
    let queue = storage.queue.clone();
    let options = WorkerOptions {
        worker_id: "w".to_owned(),
        kv_tokens: Some(4096),
        max_jobs: 0,
        ..WorkerOptions::default()
    };
    let device = Cpu::<f32>::new(1).unwrap();
    let worker = Worker::start(device, base_files(DEMO), options, storage).await.unwrap();
    let mut messages = queue.gateway_tokens("g").await.unwrap();

    place(&*queue, 0..REQUESTS).await;
    answered(&mut messages, REQUESTS).await;
    place(&*queue, REQUESTS..2 * REQUESTS).await;
    answered(&mut messages, REQUESTS).await;
    let reads = || shelf.reads.lock().unwrap().values().copied().collect::<Vec<_>>();
    assert_eq!(reads(), [1, 1], "each file once");

    // Nobody has it any more; its first asker goes while it is read, and others come.
    let (adapter_id, hand_over) = ("adp-1".to_owned(), false);
    queue.control("w", ToWorker::Evict { adapter_id, hand_over }).await.unwrap();
    while !queue.workers().await.unwrap()[0].adapters.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    place(&*queue, 100..101).await;
    while reads()[0] == 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (request_id, attempt) = ("cmpl-100".to_owned(), 0);
    queue.control("w", ToWorker::Cancel { request_id, attempt }).await.unwrap();
    place(&*queue, 101..105).await;
    answered(&mut messages, 4).await;
    assert_eq!(reads(), [2, 2], "once more, for all of them");
    worker.stop().await;
}
