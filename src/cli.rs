//! The command line. Every flag has an environment twin, `LOQUETIER_…`.

use crate::bench::BenchArgs;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kernels::Memory;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use storage::sweep::SweepSettings;
use worker::WorkerOptions;

/// Serve and fine-tune many LoRA adapters on one base, in the same batches.
#[derive(Parser, Debug)]
#[command(name = "loquetier", version, about, propagate_version = true)]
pub struct Cli {
    /// What to log, as in `info,worker=debug`.
    #[arg(long, global = true, env = "LOQUETIER_LOG", default_value = "info")]
    pub log: String,
    /// Write logs as JSON lines.
    #[arg(long, global = true, env = "LOQUETIER_LOG_JSON",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub log_json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve one base: gateway and worker in this process, everything kept in one folder.
    Serve(ServeArgs),
    /// Show it all in a few minutes: chat, train two adapters at once, compare.
    Demo(DemoArgs),
    /// Serve HTTP: one of any number of gateways over shared storage.
    Gateway(GatewayArgs),
    /// Run one base on one device: one of any number of workers over shared storage.
    Worker(WorkerArgs),
    /// Bring the shared database's schema up to date.
    Migrate {
        /// Postgres: `postgres://user:password@host/database`.
        #[arg(long, env = "LOQUETIER_DATABASE_URL", hide_env_values = true)]
        database_url: String,
    },
    /// Make, list and revoke API keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Measure this build: fine-tuning, decoding, prefill, loading, SMLM.
    Bench(BenchArgs),
    /// Prepare the GPU kernels; needs no GPU.
    #[command(subcommand)]
    Kernels(KernelsCommand),
    /// Print the OpenAPI document.
    Openapi,
}

/// `loquetier kernels`.
#[derive(Subcommand, Debug)]
pub enum KernelsCommand {
    /// Compile all kernels into the cache, which may then be carried to another machine.
    Compile {
        /// Architecture of the GPU, such as sm_80 or sm_90a; may be given more than once.
        #[arg(long, required = true)]
        arch: Vec<kernels::cuda::compile::Arch>,
        /// The cache's folder; by default the one that `serve` reads.
        #[arg(long, env = "LOQUETIER_KERNEL_CACHE")]
        out: Option<PathBuf>,
    },
}

/// `loquetier serve`.
#[derive(Args, Debug, Clone)]
pub struct ServeArgs {
    /// Folder of the base in Hugging Face layout; without it the embedded demo base is served.
    #[arg(long, env = "LOQUETIER_BASE_MODEL")]
    pub base_model: Option<PathBuf>,
    /// Model name of the base; its folder's name by default.
    #[arg(long, env = "LOQUETIER_SERVED_MODEL_NAME")]
    pub served_model_name: Option<String>,
    /// Where jobs, files, adapters and keys are kept.
    #[arg(long, env = "LOQUETIER_DATA_DIR", default_value = "loquetier-data")]
    pub data_dir: PathBuf,
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, env = "LOQUETIER_LISTEN", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// Device to compute on.
    #[arg(long, env = "LOQUETIER_DEVICE", value_enum, default_value_t = DeviceKind::Auto)]
    pub device: DeviceKind,
    /// Web origins that may call from a browser.
    #[arg(long, env = "LOQUETIER_CORS_ORIGIN", value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// What is swept.
    #[command(flatten)]
    pub sweep: SweepArgs,
    /// Bounds and objectives.
    #[command(flatten)]
    pub tuning: TuningArgs,
}

/// What all processes of the production form share.
#[derive(Args, Debug, Clone)]
pub struct SharedArgs {
    /// Postgres: `postgres://user:password@host/database`.
    #[arg(long, env = "LOQUETIER_DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
    /// Redis: `redis://[user:password@]host[:port][/database]`; `rediss://…` is encrypted.
    #[arg(long, env = "LOQUETIER_REDIS_URL", hide_env_values = true)]
    pub redis_url: String,
    /// Bucket of an S3-compatible store: `s3://bucket` or `s3://bucket/prefix`. Credentials come
    /// from the usual AWS_… variables.
    #[arg(long, env = "LOQUETIER_OBJECT_STORE")]
    pub object_store: String,
    /// Another store than Amazon's; `http://…` is spoken to without encryption.
    #[arg(long, env = "LOQUETIER_S3_ENDPOINT")]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket, in place of AWS_REGION.
    #[arg(long, env = "LOQUETIER_S3_REGION")]
    pub s3_region: Option<String>,
}

/// What the sweeper does.
#[derive(Args, Debug, Clone)]
pub struct SweepArgs {
    /// How old an object without a row must be to be removed. Longer than the longest outage of
    /// the database and than clocks differ.
    #[arg(long, env = "LOQUETIER_ORPHAN_AGE_HOURS", default_value_t = 24,
          value_parser = clap::value_parser!(u64).range(12..=8760))]
    pub orphan_age_hours: u64,
}

impl SweepArgs {
    /// In the sweeper's terms.
    pub fn settings(&self) -> SweepSettings {
        let age = Duration::from_secs(self.orphan_age_hours * 3600);
        SweepSettings { age, ..SweepSettings::default() }
    }
}

/// `loquetier gateway`.
#[derive(Args, Debug, Clone)]
pub struct GatewayArgs {
    /// Address to listen on.
    #[arg(long, env = "LOQUETIER_LISTEN", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// Web origins that may call from a browser.
    #[arg(long, env = "LOQUETIER_CORS_ORIGIN", value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// What is swept.
    #[command(flatten)]
    pub sweep: SweepArgs,
    /// Where rows, messages and objects are.
    #[command(flatten)]
    pub shared: SharedArgs,
}

/// `loquetier worker`.
#[derive(Args, Debug, Clone)]
pub struct WorkerArgs {
    /// Folder of the base in Hugging Face layout; without it the embedded demo base is served.
    #[arg(long, env = "LOQUETIER_BASE_MODEL")]
    pub base_model: Option<PathBuf>,
    /// Model name of the base; its folder's name by default.
    #[arg(long, env = "LOQUETIER_SERVED_MODEL_NAME")]
    pub served_model_name: Option<String>,
    /// Name of this worker, unlike any other's; random by default.
    #[arg(long, env = "LOQUETIER_WORKER_ID")]
    pub worker_id: Option<String>,
    /// Do not run a worker, but tell the one named by --worker-id to leave: to hand its requests
    /// and adapters over, save its jobs and end. Returns when it is gone.
    #[arg(long, requires = "worker_id")]
    pub drain: bool,
    /// When leaving: how long requests that no other worker can take may go on.
    #[arg(long, env = "LOQUETIER_DRAIN_SECS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(0..=86400))]
    pub drain_secs: u64,
    /// Device to compute on.
    #[arg(long, env = "LOQUETIER_DEVICE", value_enum, default_value_t = DeviceKind::Auto)]
    pub device: DeviceKind,
    /// Where rows, messages and objects are.
    #[command(flatten)]
    pub shared: SharedArgs,
    /// Bounds and objectives.
    #[command(flatten)]
    pub tuning: TuningArgs,
}

/// `loquetier demo`.
#[derive(Args, Debug, Clone)]
pub struct DemoArgs {
    /// Exit when the demonstration is over: 0 when both adapters behave as trained.
    #[arg(long, env = "LOQUETIER_DEMO_ONCE",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub once: bool,
    /// Where to keep what it makes; a temporary folder by default.
    #[arg(long, env = "LOQUETIER_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address to listen on.
    #[arg(long, env = "LOQUETIER_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Bounds and objectives.
    #[command(flatten)]
    pub tuning: TuningArgs,
}

/// Devices.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A GPU where there is one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU, the first that CUDA_VISIBLE_DEVICES shows.
    Cuda,
}

/// Bounds and objectives of the worker.
#[derive(Args, Debug, Clone)]
pub struct TuningArgs {
    /// Threads of the CPU device; 0: one per core.
    #[arg(long, env = "LOQUETIER_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Rows of one step, all kinds together; 256 on the CPU, 2048 on a GPU.
    #[arg(long, env = "LOQUETIER_STEP_ROWS",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65536))]
    pub step_rows: Option<usize>,
    /// Sequences that run at once, more wait; 64 on the CPU, 256 on a GPU.
    #[arg(long, env = "LOQUETIER_MAX_SEQUENCES",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub max_sequences: Option<usize>,
    /// Longest sequence in tokens; the base's context by default.
    #[arg(long, env = "LOQUETIER_MAX_CONTEXT")]
    pub max_context: Option<usize>,
    /// Most tokens of key/value cache; what is left of a GPU's memory by default.
    #[arg(long, env = "LOQUETIER_KV_TOKENS")]
    pub kv_tokens: Option<usize>,
    /// Longest training example and largest micro-batch, in rows; 2048 on the CPU, 8192 on a GPU.
    #[arg(long, env = "LOQUETIER_ARENA_ROWS",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(16..=131072))]
    pub arena_rows: Option<usize>,
    /// Rows a micro-batch aims at; 512 on the CPU, 8192 on a GPU.
    #[arg(long, env = "LOQUETIER_MICRO_ROWS",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=131072))]
    pub micro_rows: Option<usize>,
    /// Labelled rows of one loss slice; 128 on the CPU, 1024 on a GPU.
    #[arg(long, env = "LOQUETIER_LOSS_ROWS",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65536))]
    pub loss_rows: Option<usize>,
    /// Largest rank of an adapter.
    #[arg(long, env = "LOQUETIER_MAX_RANK", default_value_t = 256,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=256))]
    pub max_rank: usize,
    /// On a GPU, answers and losses that do not depend on what else is in the batch, bit for bit,
    /// as on the CPU; slower where rows are few.
    #[arg(long, env = "LOQUETIER_BATCH_INVARIANT",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub batch_invariant: bool,
    /// Percentage of a GPU's free memory that may be taken.
    #[arg(long, env = "LOQUETIER_MEMORY_PERCENT", default_value_t = 92,
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub memory_percent: u8,
    /// Adapters on the device beside those of jobs.
    #[arg(long, env = "LOQUETIER_RESIDENT_ADAPTERS", default_value_t = 32,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65536))]
    pub resident_adapters: usize,
    /// Jobs that train at once; more are queued.
    #[arg(long, env = "LOQUETIER_MAX_JOBS", default_value_t = 4,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=1024))]
    pub max_jobs: usize,
    /// Objective for the time per output token while jobs train, in milliseconds.
    #[arg(long, env = "LOQUETIER_SLO_TPOT_MS", default_value_t = 45,
          value_parser = clap::value_parser!(u64).range(1..=60000))]
    pub slo_tpot_ms: u64,
    /// Seconds after which another worker takes over a job whose lease is not renewed.
    #[arg(long, env = "LOQUETIER_LEASE_SECS", default_value_t = 15,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_secs: u64,
    /// Seconds that requests wait for an adapter's weights while the object store is away; then
    /// they fail.
    #[arg(long, env = "LOQUETIER_COLD_WAIT_SECS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub cold_wait_secs: u64,
}

impl TuningArgs {
    /// The worker's options for a base of that name, on a device that has `memory`.
    pub fn options(&self, base_name: &str, memory: Option<Memory>) -> WorkerOptions {
        let suited = WorkerOptions::suited(memory);
        WorkerOptions {
            base_name: base_name.to_owned(),
            step_rows: self.step_rows.unwrap_or(suited.step_rows),
            max_sequences: self.max_sequences.unwrap_or(suited.max_sequences),
            max_context: self.max_context,
            kv_tokens: self.kv_tokens,
            arena_rows: self.arena_rows.unwrap_or(suited.arena_rows),
            micro_rows: self.micro_rows.unwrap_or(suited.micro_rows),
            loss_rows: self.loss_rows.unwrap_or(suited.loss_rows),
            max_rank: self.max_rank,
            memory_fraction: f64::from(self.memory_percent) / 100.0,
            resident_adapters: self.resident_adapters,
            max_jobs: self.max_jobs,
            tpot: Duration::from_millis(self.slo_tpot_ms),
            lease: Duration::from_secs(self.lease_secs),
            cold_wait: Duration::from_secs(self.cold_wait_secs),
            sole: true,
            ..suited
        }
    }
}

/// `loquetier keys`.
#[derive(Subcommand, Debug)]
pub enum KeysCommand {
    /// Make a key and print it, once.
    Create {
        /// Organization it belongs to.
        #[arg(long, default_value = "org-local")]
        org: String,
        /// May also steer the whole service.
        #[arg(long)]
        operator: bool,
        /// Where the rows are.
        #[command(flatten)]
        rows: RowsArgs,
    },
    /// List keys; secrets are not kept and not shown.
    List {
        /// Only those of this organization.
        #[arg(long)]
        org: Option<String>,
        /// Where the rows are.
        #[command(flatten)]
        rows: RowsArgs,
    },
    /// Revoke a key by its id.
    Revoke {
        /// `key-…`
        id: String,
        /// Where the rows are.
        #[command(flatten)]
        rows: RowsArgs,
    },
}

/// Where rows are kept.
#[derive(Args, Debug, Clone)]
pub struct RowsArgs {
    /// Data folder of `serve`.
    #[arg(long, env = "LOQUETIER_DATA_DIR", default_value = "loquetier-data")]
    pub data_dir: PathBuf,
    /// Database, in place of the data folder.
    #[arg(long, env = "LOQUETIER_DATABASE_URL")]
    pub database_url: Option<String>,
}
