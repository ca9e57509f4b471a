//! The command line of `loquetier bench`.

use crate::cli::DeviceKind;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// `loquetier bench`.
#[derive(Args, Debug, Clone)]
pub struct BenchArgs {
    /// On what, and where to.
    #[command(flatten)]
    pub common: CommonArgs,
    /// What to measure.
    #[command(subcommand)]
    pub measure: Measure,
}

/// What all measurements share.
#[derive(Args, Debug, Clone)]
pub struct CommonArgs {
    /// Device to compute on.
    #[arg(long, global = true, env = "LOQUETIER_DEVICE", value_enum,
          default_value_t = DeviceKind::Auto)]
    pub device: DeviceKind,
    /// Threads of the CPU device; 0: one per core.
    #[arg(long, global = true, env = "LOQUETIER_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Results that do not depend on what else is in the batch, bit for bit, as on the CPU.
    #[arg(long, global = true, env = "LOQUETIER_BATCH_INVARIANT",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub batch_invariant: bool,
    /// Random weights of this shape, made on the device: llama3-8b, llama3.2-1b, qwen2.5-7b,
    /// qwen3-8b, or tiny.
    #[arg(long, global = true, value_name = "SHAPE", conflicts_with = "base_model")]
    pub random_weights: Option<String>,
    /// Folder of a base in Hugging Face layout; with neither, the embedded demo base.
    #[arg(long, global = true, env = "LOQUETIER_BASE_MODEL")]
    pub base_model: Option<PathBuf>,
    /// Rows of one step, all kinds together; by default what `serve` takes on that device.
    #[arg(long, global = true, env = "LOQUETIER_STEP_ROWS",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65536))]
    pub step_rows: Option<usize>,
    /// Append the figures to this file, one JSON object a line.
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "quick")]
    pub json: Option<PathBuf>,
    /// Write what the device did and when to this file, for Chrome's tracing page or Perfetto.
    #[arg(long, global = true, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Rounds measured after the warm-up; the figure is the median over all.
    #[arg(long, global = true, default_value_t = 3,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=100))]
    pub repeats: usize,
    /// Everything small and short, to see that it runs; its figures mean nothing.
    #[arg(long, global = true)]
    pub quick: bool,
    /// Commit that the figures are of; asked of git by default.
    #[arg(long, global = true, env = "LOQUETIER_COMMIT")]
    pub commit: Option<String>,
}

impl CommonArgs {
    /// The demo base on the CPU, everything else as it is by default.
    pub fn of_demo_base() -> Self {
        Self {
            device: DeviceKind::Cpu,
            threads: 0,
            batch_invariant: false,
            random_weights: None,
            base_model: None,
            step_rows: None,
            json: None,
            trace: None,
            repeats: 1,
            quick: false,
            commit: None,
        }
    }
}

/// What to measure.
#[derive(Subcommand, Debug, Clone)]
pub enum Measure {
    /// Fine-tuning alone, optimizer included: F1, F2, F3, F4.
    Finetune(FinetuneArgs),
    /// Decoding, all sequences at once, prefill excluded: D1, D2, D3.
    Decode(DecodeArgs),
    /// Reading prompts: D4.
    Prefill(PrefillArgs),
    /// Loading a base's files onto the device.
    Load,
    /// The SMLM operation alone, checked against the CPU, against its bytes.
    Smlm(SmlmArgs),
    /// F1–F4 and D1–D4 in one process, on one base.
    All(AllArgs),
    /// What gateway and queue cost, over a real Redis, on the CPU: G1, G2.
    Gateway(GatewayArgs),
}

/// `loquetier bench finetune`.
#[derive(Args, Debug, Clone)]
pub struct FinetuneArgs {
    /// Full rows of random tokens: examples per optimizer step × rows of each.
    #[arg(long, default_value = "4x2048", conflicts_with = "data")]
    pub shape: Grid,
    /// Chat examples as JSONL, read with the demo base's tokenizer and template, packed.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Jobs at once on --data; with 4, one alone is measured first and the sum compared with it.
    #[arg(long, default_value_t = 1, requires = "data",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4))]
    pub jobs: usize,
    /// Rank of a job alone.
    #[arg(long, default_value_t = 16,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=256))]
    pub rank: usize,
    /// Examples per optimizer step of --data.
    #[arg(long, default_value_t = 64,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1024))]
    pub batch_size: usize,
    /// How long at least to measure.
    #[arg(long, default_value_t = 60.0)]
    pub seconds: f64,
    /// Rows that a micro-batch aims at.
    #[arg(long, default_value_t = 8192,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=131072))]
    pub micro_rows: usize,
}

/// `loquetier bench decode`.
#[derive(Args, Debug, Clone)]
pub struct DecodeArgs {
    /// Sequences at once.
    #[arg(long, default_value_t = 1,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub sequences: usize,
    /// Adapters they are spread over; 0: the base alone.
    #[arg(long, default_value_t = 0,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=4096))]
    pub adapters: usize,
    /// Rank of the adapters, on all modules.
    #[arg(long, default_value_t = 16,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=256))]
    pub rank: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    pub prompt: usize,
    /// Tokens generated for each.
    #[arg(long, default_value_t = 128)]
    pub output: usize,
}

/// `loquetier bench prefill`.
#[derive(Args, Debug, Clone)]
pub struct PrefillArgs {
    /// Prompts × tokens of each.
    #[arg(long, default_value = "16x2048")]
    pub shape: Grid,
    /// Adapters they are spread over; 0: the base alone.
    #[arg(long, default_value_t = 16)]
    pub adapters: usize,
    /// Rank of the adapters, on all modules.
    #[arg(long, default_value_t = 16,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=256))]
    pub rank: usize,
}

/// `loquetier bench smlm`.
#[derive(Args, Debug, Clone)]
pub struct SmlmArgs {
    /// Rows of the batch.
    #[arg(long, default_value_t = 8192)]
    pub rows: usize,
    /// Segments they are cut into.
    #[arg(long, default_value_t = 4)]
    pub segments: usize,
    /// Ranks of the adapters, one after another round and round.
    #[arg(long, default_value = "16", value_delimiter = ',')]
    pub ranks: Vec<usize>,
    /// Only this group of modules.
    #[arg(long, value_enum)]
    pub group: Option<GroupName>,
    /// Measure backward too.
    #[arg(long)]
    pub backward: bool,
}

/// Modules that share an input.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupName {
    /// Query, key and value projections.
    Qkv,
    /// Attention output projection.
    O,
    /// Gate and up projections.
    GateUp,
    /// Down projection.
    Down,
}

/// `loquetier bench all`.
#[derive(Args, Debug, Clone)]
pub struct AllArgs {
    /// Chat examples of F2 and F3.
    #[arg(long)]
    pub data: PathBuf,
    /// How long at least to measure each of F2 and F3.
    #[arg(long, default_value_t = 60.0)]
    pub seconds: f64,
}

/// `loquetier bench gateway`.
#[derive(Args, Debug, Clone)]
pub struct GatewayArgs {
    /// Redis that the messages go through; its other keys are left alone.
    #[arg(long, env = "LOQUETIER_REDIS_URL", hide_env_values = true)]
    pub redis_url: String,
    /// Requests of G1, one after another.
    #[arg(long, default_value_t = 200,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    pub requests: usize,
    /// Tokens generated for each of them.
    #[arg(long, default_value_t = 64,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=256))]
    pub tokens: usize,
    /// Open streams of G2.
    #[arg(long, default_value_t = 256,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub streams: usize,
    /// Tokens of each stream.
    #[arg(long, default_value_t = 5000,
          value_parser = clap::value_parser!(u64).range(10..=1_000_000))]
    pub stream_tokens: u64,
    /// Be the gateway process of G2, with its rows in this folder.
    #[arg(long, hide = true)]
    pub serve_folder: Option<PathBuf>,
    /// Of the keys in Redis.
    #[arg(long, hide = true)]
    pub prefix: Option<String>,
}

/// Two counts, as in `4x2048`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Examples or prompts.
    pub count: usize,
    /// Rows or tokens of each.
    pub length: usize,
}

impl FromStr for Grid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(['x', '×']);
        let number = |part: &str| part.parse::<usize>().ok().filter(|number| *number > 0);
        match parts.and_then(|(count, length)| Some((number(count)?, number(length)?))) {
            Some((count, length)) => Ok(Self { count, length }),
            None => Err("two counts are needed, as in 4x2048".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_two_counts() {
        assert_eq!("4x2048".parse(), Ok(Grid { count: 4, length: 2048 }));
        for text in ["", "4", "4x", "0x8", "4x8x9", "ax2"] {
            assert!(text.parse::<Grid>().is_err(), "{text}");
        }
    }
}
