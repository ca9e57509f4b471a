//! `loquetier bench gateway`: what the gateway and the queue cost, over a real Redis, on the CPU.
//!
//! G1 is the time they add to the first token and to each next one: the same requests through
//! HTTP, gateway, Redis and worker, and to the engine directly. G2 is how many tokens a second one
//! gateway process on one core hands out to many open streams, each token an event of its own.

mod added;
mod process;
mod source;
mod streams;

use super::args::GatewayArgs;
use super::figures::Report;
use storage::ids::alphanumerics;
use storage::queue::{RedisOptions, RedisQueue};
use storage::{Db, Objects, Storage};

/// Measures G1 and G2.
pub fn measure(args: &GatewayArgs, threads: usize, mut report: Report) -> anyhow::Result<()> {
    report.head();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    added::measure(&runtime, args, threads, &mut report)?;
    runtime.block_on(streams::measure(args, &mut report))
}

/// This process is the gateway of G2.
pub fn serve(args: &GatewayArgs, folder: &std::path::Path) -> anyhow::Result<()> {
    process::serve(args, folder)
}

/// Keys of one measurement, apart from whatever else uses that Redis.
fn prefix() -> String {
    format!("loquetier-bench-{}", alphanumerics(8))
}

/// Rows and objects in a folder, messages over Redis.
async fn storage(
    folder: &std::path::Path,
    redis_url: &str,
    prefix: String,
) -> anyhow::Result<Storage> {
    let db = Db::open_folder(folder).await?;
    let objects = Objects::open_local(&folder.join("objects"))?;
    let options = RedisOptions { prefix, ..RedisOptions::default() };
    let queue = RedisQueue::connect(redis_url, options).await?;
    Ok(Storage::of_parts(db, std::sync::Arc::new(queue), objects))
}

/// The value below which `percent` of the values lie.
fn percentile(values: &mut [f64], percent: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((percent / 100.0 * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_values() {
        let mut values: Vec<f64> = (0..101).rev().map(f64::from).collect();
        assert_eq!(percentile(&mut values, 50.0), 50.0);
        assert_eq!(percentile(&mut values, 99.0), 99.0);
        assert!(percentile(&mut [], 50.0).is_nan());
    }
}
