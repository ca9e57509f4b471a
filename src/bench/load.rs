//! How fast a base's files come onto the device.

use super::base::Base;
use super::figures::Report;
use kernels::Device;
use std::time::Instant;

/// Positions of the rotary tables that are made with it.
const POSITIONS: usize = 4096;

/// The first load reads what the system has not cached; the others show the copy alone.
pub fn load<D: Device>(
    device: &D,
    base: &Base,
    repeats: usize,
    report: &Report,
) -> anyhow::Result<()> {
    let bytes = base.file_bytes()? as f64;
    report.head();
    for round in 0..=repeats {
        let start = Instant::now();
        let weights = base.weights(device, POSITIONS)?;
        device.mark()?.wait()?;
        let secs = start.elapsed().as_secs_f64();
        drop(weights);
        let name = if round == 0 { "load first" } else { "load again" };
        let details = format!("{:.2} GB in {secs:.3} s", bytes / 1e9);
        report.line(name, bytes / 1e9 / secs, "GB/s", None, &details);
    }
    Ok(())
}
