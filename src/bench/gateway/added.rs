//! G1: the same requests, one after another, through everything and to the engine alone.

use super::super::args::{CommonArgs, GatewayArgs};
use super::super::base::Base;
use super::super::figures::Report;
use super::super::random::Random;
use super::super::rig::Rig;
use super::{percentile, prefix, storage};
use crate::adapter_check::RowCheck;
use crate::embedded;
use crate::server::listen;
use anyhow::{Context, bail};
use gateway::{Gateway, GatewayConfig};
use kernels::Cpu;
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use worker::engine::command::{Event, Output, Target};
use worker::{Worker, WorkerOptions};

/// Tokens of each prompt.
const PROMPT: usize = 64;
/// Requests before the clock counts.
const WARM_UP: usize = 10;

/// Milliseconds to the first text of each request, and between its tokens after that.
#[derive(Default)]
struct Times {
    first: Vec<f64>,
    token: Vec<f64>,
}

impl Times {
    /// Notes a request of `tokens` tokens.
    fn note(&mut self, sent: Instant, first: Instant, last: Instant, tokens: usize) {
        self.first.push((first - sent).as_secs_f64() * 1e3);
        self.token.push((last - first).as_secs_f64() * 1e3 / (tokens.max(2) - 1) as f64);
    }
}

pub fn measure(
    runtime: &Runtime,
    args: &GatewayArgs,
    threads: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut alone = alone(args, threads)?;
    let mut through = runtime.block_on(through(args, threads))?;
    let mut show = |id, through: &mut [f64], alone: &mut [f64]| {
        let mut at = |percent| (percentile(through, percent), percentile(alone, percent));
        let ((half, half_alone), (most, most_alone)) = (at(50.0), at(99.0));
        let details = format!(
            "{} requests, {PROMPT} in {} out; P50 {half:.3} against {half_alone:.3}, P99 \
             {most:.3} against {most_alone:.3} (+{:.3})",
            args.requests,
            args.tokens,
            most - most_alone
        );
        report.figure(id, half - half_alone, "ms", &details)
    };
    show("G1-first", &mut through.first, &mut alone.first)?;
    show("G1-token", &mut through.token, &mut alone.token)
}

fn options() -> WorkerOptions {
    WorkerOptions { base_name: embedded::NAME.to_owned(), max_jobs: 0, ..WorkerOptions::default() }
}

/// The engine, driven through its channels.
fn alone(args: &GatewayArgs, threads: usize) -> anyhow::Result<Times> {
    let base = Base::open(&CommonArgs::of_demo_base())?;
    let mut rig = Rig::start(Cpu::<f32>::new(threads)?, base, &options(), None)?;
    let mut times = Times::default();
    for index in 0..WARM_UP + args.requests {
        let request = rig.request(Target::Base, PROMPT, args.tokens);
        let sent = Instant::now();
        rig.send(request)?;
        let (mut first, mut last) = (None, None);
        while last.is_none() {
            let (at, event) = rig.next()?;
            let Event::Outputs(outputs) = event else { continue };
            for (_, output) in outputs {
                let Output::Tokens { text, finish, .. } = output else { continue };
                if !text.is_empty() {
                    first.get_or_insert(at);
                }
                last = finish.map(|_| at);
            }
        }
        if let (true, Some(first), Some(last)) = (index >= WARM_UP, first, last) {
            times.note(sent, first, last, args.tokens);
        }
    }
    rig.stop()?;
    Ok(times)
}

/// Client, HTTP, gateway, Redis, worker, and all the way back, in this process.
async fn through(args: &GatewayArgs, threads: usize) -> anyhow::Result<Times> {
    let folder = tempfile::tempdir()?;
    let prefix = prefix();
    let of_worker = storage(folder.path(), &args.redis_url, prefix.clone()).await?;
    let of_gateway = storage(folder.path(), &args.redis_url, prefix).await?;
    let device = Cpu::<f32>::new(threads)?;
    let worker = Worker::start(device, embedded::open()?, options(), of_worker).await?;
    let config = GatewayConfig { open_access: true, ..GatewayConfig::default() };
    let check = Arc::new(RowCheck { db: of_gateway.db.clone() });
    let gateway = Gateway::start(of_gateway, config, check).await?;
    let listener = listen(([127, 0, 0, 1], 0).into()).await?;
    let url = format!("http://{}/v1/completions", listener.local_addr()?);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(gateway::serve(listener, gateway, async {
        let _ = stopped.await;
    }));
    let http = reqwest::Client::builder().no_proxy().build()?;
    let (mut times, mut random) = (Times::default(), Random::new(1));
    for index in 0..WARM_UP + args.requests {
        let prompt = random.tokens(PROMPT, embedded::open()?.config().vocab);
        let (sent, first, last) = ask(&http, &url, prompt, index, args.tokens).await?;
        if index >= WARM_UP {
            times.note(sent, first, last, args.tokens);
        }
    }
    drop((stop, http));
    serving.await??;
    worker.stop().await;
    Ok(times)
}

/// When a request was sent, and when its first text and its end came.
async fn ask(
    http: &reqwest::Client,
    url: &str,
    prompt: Vec<u32>,
    index: usize,
    tokens: usize,
) -> anyhow::Result<(Instant, Instant, Instant)> {
    let body = json!({
        "model": embedded::NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "seed": index + 1,
        "ignore_eos": true,
        "stream": true,
    });
    let request = http.post(url).json(&body);
    let sent = Instant::now();
    let mut reply = request.send().await?;
    if !reply.status().is_success() {
        bail!("the gateway refused a request: {}", reply.text().await?);
    }
    let mut first = None;
    let mut last = None;
    while let Some(chunk) = reply.chunk().await? {
        let at = Instant::now();
        first.get_or_insert(at);
        if last.is_none() && chunk.windows(17).any(|part| part == b"\"finish_reason\":\"") {
            last = Some(at);
        }
    }
    Ok((sent, first.context("a reply without text")?, last.context("a reply that never ended")?))
}
