//! G2: one gateway process, many open streams, a client that counts events.

use super::super::args::GatewayArgs;
use super::super::figures::Report;
use super::process::Process;
use super::source::{BASE, Source};
use super::{prefix, storage};
use anyhow::{Context, bail};
use memchr::memmem::Finder;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use storage::db::NewBase;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// What every event begins with.
const EVENT: &[u8] = b"data: {";
/// Of all tokens, what is read before the clock counts.
const WARM_UP: f64 = 0.1;
/// Silence after which the measurement has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn measure(args: &GatewayArgs, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let prefix = prefix();
    let storage = storage(folder.path(), &args.redis_url, prefix.clone()).await?;
    let base = NewBase {
        name: BASE.to_owned(),
        fingerprint: "none".to_owned(),
        context: 1 << 30,
        modules: json!({}),
    };
    storage.db.bases().upsert(&base).await?;
    let source = Source::open(storage).await?;
    let gateway = Process::start(&args.redis_url, folder.path(), &prefix)?;
    let read = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    tasks.spawn(source.run(args.streams, args.stream_tokens, read.clone()));
    for index in 0..args.streams {
        tasks.spawn(stream(gateway.address, index, args.stream_tokens, read.clone()));
    }
    let all = args.streams as u64 * args.stream_tokens;
    let begin = (all as f64 * WARM_UP) as u64;
    let (start, before, cpu) = tokio::select! {
        reached = reach(&read, begin) => {
            (Instant::now(), reached, gateway.cpu_seconds())
        }
        Some(Ok(Err(error))) = tasks.join_next() => return Err(error),
    };
    let mut last = (Instant::now(), before);
    while let Some(ended) = tasks.join_next().await {
        ended??;
        last = (Instant::now(), read.load(Relaxed));
    }
    if read.load(Relaxed) != all {
        bail!("{} of {all} tokens arrived", read.load(Relaxed));
    }
    let seconds = (last.0 - start).as_secs_f64();
    let busy = match (cpu, gateway.cpu_seconds()) {
        (Some(before), Some(now)) => format!("{:.0} %", 100.0 * (now - before) / seconds),
        _ => "unknown".to_owned(),
    };
    let core = if gateway.pinned { "on a core of its own" } else { "not pinned" };
    let details = format!(
        "{} streams, {} tokens each, {seconds:.1} s; gateway {core}, its processor time {busy}",
        args.streams, args.stream_tokens
    );
    report.figure("G2", (all - before) as f64 / seconds, "tokens/s", &details)
}

/// Waits until so many tokens are read; how many that were.
async fn reach(read: &AtomicU64, count: u64) -> u64 {
    loop {
        let now = read.load(Relaxed);
        if now >= count {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// One client: counts the events of its stream until the end. The last token's event and the one
/// that says why it ended are one message; only the first counts.
async fn stream(
    address: SocketAddr,
    index: usize,
    tokens: u64,
    read: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let body = json!({"model": BASE, "prompt": "x", "seed": index, "stream": true,
                      "max_tokens": tokens});
    let body = body.to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(request.as_bytes()).await?;
    let finder = Finder::new(EVENT);
    let mut buffer = vec![0; 64 << 10];
    let (mut kept, mut seen) = (0, 0);
    loop {
        let received = tokio::time::timeout(PATIENCE, connection.read(&mut buffer[kept..])).await;
        let received = received.context("a stream is silent")??;
        if received == 0 {
            break;
        }
        let filled = kept + received;
        let found = finder.find_iter(&buffer[..filled]).count() as u64;
        // A mark that the read has cut in two is found with the next one.
        let rest = filled.saturating_sub(EVENT.len() - 1);
        buffer.copy_within(rest..filled, 0);
        kept = filled - rest;
        let counted = found.min(tokens.saturating_sub(seen));
        seen += found;
        read.fetch_add(counted, Relaxed);
    }
    match seen == tokens + 1 {
        true => Ok(()),
        false => bail!("a stream of {tokens} tokens had {seen} events"),
    }
}
