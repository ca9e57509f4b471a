//! Every bound of the gateway, with its reason. Plain values; the binary fills them from flags.

use std::time::Duration;

use storage::sweep::SweepSettings;

/// How a gateway behaves.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Requests without a key run as `org-local` until the first key is made. Only for the
    /// embedded form bound to a loopback address; the caller vouches for that.
    pub open_access: bool,
    /// Web origins that may call from a browser; none by default.
    pub cors_origins: Vec<String>,
    /// A JSON body: the longest context in tokens, written as text or ids, fits many times over.
    pub body_bytes_max: usize,
    /// An uploaded file.
    pub file_bytes_max: u64,
    /// An uploaded batch file.
    pub batch_file_bytes_max: u64,
    /// One line of a training or batch file; it is checked in memory.
    pub line_bytes_max: usize,
    /// Uploads at once; each buffers up to 24 MiB on its way to the store.
    pub uploads_max: usize,
    /// Weights of an imported adapter; they are checked in memory.
    pub adapter_bytes_max: usize,
    /// Choices of one inference request over all its prompts.
    pub choices_max: u32,
    /// Inference requests at once in this process; each holds its prompt and tokens.
    pub requests_max: usize,
    /// Token messages buffered for a slow reader before its request is cancelled.
    pub stream_buffer_messages: usize,
    /// A request is refused when no worker has admitted it by then.
    pub admission_timeout: Duration,
    /// How long an open stream looks for another worker when its own is gone.
    pub replacement_timeout: Duration,
    /// Silence after which a stream sends a comment line; clients and proxies cut after more.
    pub keep_alive: Duration,
    /// How long `pause` waits for the job to be saved before it shows the row as it is.
    pub pause_wait: Duration,
    /// How long an operator's move of an adapter or job may take before it is said to fail.
    pub move_wait: Duration,
    /// Limits per organization; none by default.
    pub rate_limits: RateLimits,
    /// Pinned adapters per organization: pins take device memory from everybody.
    pub pinned_adapters_max: usize,
    /// Jobs with method `dpo` are accepted; off while no worker trains them.
    pub dpo: bool,
    /// Connections at once: one file descriptor each.
    pub connections_max: usize,
    /// A connection that has not sent its headers by then is closed.
    pub header_timeout: Duration,
    /// A request body that sends nothing for so long is given up.
    pub body_idle_timeout: Duration,
    /// An upload must end within this: its object gets a row only then, and an object that stays
    /// without one is swept.
    pub upload_time_max: Duration,
    /// What is removed when nobody needs it any more.
    pub sweep: SweepSettings,
    /// Open requests may go on so long after shutdown began.
    pub shutdown_grace: Duration,
}

/// Limits of one organization per minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Inference requests.
    pub requests_per_minute: Option<u32>,
    /// Prompt and completion tokens.
    pub tokens_per_minute: Option<u32>,
}

impl Default for GatewayConfig {
    fn default() -> GatewayConfig {
        GatewayConfig {
            open_access: false,
            cors_origins: Vec::new(),
            body_bytes_max: 16 << 20,
            file_bytes_max: 512 << 20,
            batch_file_bytes_max: 200 << 20,
            line_bytes_max: 16 << 20,
            uploads_max: 8,
            adapter_bytes_max: 2 << 30,
            choices_max: 128,
            requests_max: 4096,
            stream_buffer_messages: 1024,
            admission_timeout: Duration::from_secs(60),
            replacement_timeout: Duration::from_secs(15),
            keep_alive: Duration::from_secs(10),
            pause_wait: Duration::from_secs(30),
            move_wait: Duration::from_secs(30),
            rate_limits: RateLimits::default(),
            pinned_adapters_max: 8,
            dpo: false,
            connections_max: 8192,
            header_timeout: Duration::from_secs(15),
            body_idle_timeout: Duration::from_secs(30),
            upload_time_max: Duration::from_secs(6 * 60 * 60),
            sweep: SweepSettings::default(),
            shutdown_grace: Duration::from_secs(20),
        }
    }
}
