//! What crosses between a gateway and a worker. The in-process queue carries the same values as
//! Redis does; every one is plain serde data under a [`PROTOCOL_VERSION`].
//!
//! Times never cross: each process judges its own monotonic clock.

use serde::{Deserialize, Serialize};

/// Version of the envelopes below; presence says which versions a worker speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// The model a request was resolved to by the gateway: always exact, never a fallback.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The base itself.
    Base,
    /// An immutable adapter version.
    Adapter {
        /// Row id, `adp-…`.
        adapter_id: String,
        /// The name clients use, `ft:…`.
        model: String,
        /// Object key of its folder of PEFT files.
        object: String,
    },
    /// The live weights of a running or paused job.
    Job {
        /// `ftjob-…`.
        job_id: String,
    },
}

/// A chat message as templates see it. Content parts are joined already.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool` (developer has become system).
    pub role: String,
    /// Text; absent only on assistant messages.
    pub content: Option<String>,
    /// Optional speaker name.
    pub name: Option<String>,
    /// Calls of an assistant message.
    pub tool_calls: Vec<ToolCall>,
    /// The call a tool message answers.
    pub tool_call_id: Option<String>,
    /// Reasoning text that clients replay.
    pub reasoning_content: Option<String>,
}

/// One function call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// `call_…`.
    pub id: String,
    /// Function name.
    pub name: String,
    /// JSON text of the arguments.
    pub arguments: String,
}

/// What the model reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// Rendered by the worker with the base's chat template.
    Chat {
        /// At least one message.
        messages: Vec<ChatMessage>,
        /// Tool definitions as the client sent them.
        tools: Vec<serde_json::Value>,
        /// Extra template variables.
        template_kwargs: serde_json::Map<String, serde_json::Value>,
    },
    /// Plain text: tokenised as it is, no template.
    Text(String),
    /// Token ids used verbatim.
    Tokens(Vec<u32>),
}

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass; 0 is greedy.
    pub top_p: f32,
    /// Keep the k likeliest; 0 off.
    pub top_k: u32,
    /// Least relative probability; 0 off.
    pub min_p: f32,
    /// −2 to 2, over generated tokens.
    pub presence_penalty: f32,
    /// −2 to 2, over generated tokens.
    pub frequency_penalty: f32,
    /// 1 off.
    pub repetition_penalty: f32,
    /// Token id to bias, −100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Always present: the gateway draws one where the client gave none.
    pub seed: i64,
    /// Report log-probabilities with so many alternatives (0–20).
    pub logprobs: Option<u8>,
}

/// When generation ends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Upper bound of generated tokens per choice; clamped to the remaining context.
    pub max_tokens: Option<u32>,
    /// End tokens are not drawn before so many tokens.
    pub min_tokens: u32,
    /// Texts that end a choice; never returned.
    pub stop: Vec<String>,
    /// Token ids that end a choice.
    pub stop_token_ids: Vec<u32>,
    /// The model's own end tokens do not end a choice.
    pub ignore_eos: bool,
}

/// One inference request, placed on a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Unique, `chatcmpl-…` or `cmpl-…`.
    pub request_id: String,
    /// Placement number from 0; a message with another attempt is dropped.
    pub attempt: u32,
    /// The gateway process to answer.
    pub gateway: String,
    /// Owner, for fairness and metrics.
    pub org: String,
    /// Base model name.
    pub base: String,
    /// What runs on it.
    pub target: Target,
    /// Prompt.
    pub input: Input,
    /// Sampling parameters.
    pub sampling: Sampling,
    /// Stop conditions.
    pub limits: Limits,
    /// Number of choices (n), at least 1.
    pub choices: u32,
    /// Tokens already sent per choice when the request is placed again; empty at first.
    pub replay: Vec<Replay>,
}

/// What a client has of one choice when its request moves to another worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    /// Generated token ids so far.
    pub tokens: Vec<u32>,
    /// Characters of text already sent.
    pub text_chars: u32,
    /// The choice had ended with this reason.
    pub finish: Option<Finish>,
}

/// Gateway → worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    /// Run this.
    Place(Box<Request>),
    /// The client is gone.
    Cancel {
        /// Which request.
        request_id: String,
        /// Its placements up to this one: a cancel that comes late must not meet a later one.
        attempt: u32,
    },
    /// A job's row changed (created, cancel, pause, resume): look now, not at the next poll.
    JobNudge {
        /// Which job.
        job_id: String,
    },
    /// Have an adapter's weights on the device before requests come, if there is room beside
    /// what is in use.
    Load {
        /// Row id, `adp-…`.
        adapter_id: String,
        /// Object key of its folder of PEFT files.
        object: String,
    },
    /// Let go of an adapter: the copies on the device and in host memory.
    Evict {
        /// Row id, `adp-…`.
        adapter_id: String,
        /// Its requests are handed over; else they finish first.
        hand_over: bool,
    },
    /// Save a job at its next step boundary and leave it to another worker.
    MoveJob {
        /// Which job.
        job_id: String,
        /// The worker to hear of it first; none: all.
        to: Option<String>,
    },
    /// Take no new work, hand over what runs, and end, as on SIGTERM.
    Drain,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// End token or stop text.
    Stop,
    /// Token limit or end of the context.
    Length,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Log-probability and alternatives, where asked for.
    pub logprob: Option<TokenLogprob>,
}

/// Log-probabilities of one position; values are finite (−9999 stands for −∞).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Of the drawn token.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The likeliest, descending: bytes and value.
    pub top: Vec<(Vec<u8>, f32)>,
}

/// Why a request was not, or no longer, served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which kind; the gateway maps it to a status.
    pub kind: RefusalKind,
    /// Message for the client.
    pub message: String,
    /// Offending field.
    pub param: Option<String>,
}

/// Kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// 400 `invalid_value`: template refused the conversation, bad token id.
    Invalid,
    /// 400 `context_length_exceeded`.
    ContextLength,
    /// 404 `model_not_found`: the adapter or job is gone.
    ModelNotFound,
    /// 503: full, draining, or nothing to answer with yet; another worker may take the request.
    Overloaded,
    /// 503: a store that all workers share did not give what the request needs in time.
    Unavailable,
    /// 500: a fault here; logged with the request id.
    Internal,
}

/// What a worker says of one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// Tokenised and accepted, before any wait for a slot or blocks: the gateway answers 200 now.
    Admitted {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// `fp_…`, names base, kernels and adapter version.
        fingerprint: String,
    },
    /// New tokens of one choice.
    Tokens {
        /// Choice index.
        choice: u32,
        /// Index of the first token among the choice's generated ones.
        first: u32,
        /// The tokens.
        tokens: Vec<Token>,
        /// Text that became certain with them (complete UTF-8, no possible stop prefix).
        text: String,
        /// Set on the choice's last message.
        finish: Option<Finish>,
    },
    /// Handed over: the worker has let go of the request, which is to be placed again with the
    /// tokens so far; its last message of this attempt.
    Moved,
    /// Refused or failed; the last message of the request.
    Failed(Refusal),
}

/// One update addressed to one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Which request.
    pub request_id: String,
    /// Of which placement.
    pub attempt: u32,
    /// What happened.
    pub update: Update,
}

/// Worker → gateway: one message per worker step and gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenMessage {
    /// Random at worker start.
    pub worker_incarnation: String,
    /// From 0, per worker incarnation and gateway; a gap means a lost message.
    pub sequence: u64,
    /// All that happened in the step.
    pub items: Vec<Item>,
}

/// A worker as others see it; refreshed and expiring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerPresence {
    /// Stable name, also the inbox address.
    pub worker_id: String,
    /// Random at process start.
    pub incarnation: String,
    /// Protocol versions it speaks.
    pub protocol: Vec<u32>,
    /// Base model name.
    pub base: String,
    /// Fingerprint of the base's weights and tokenizer.
    pub base_fingerprint: String,
    /// Device in words.
    pub device: String,
    /// Adapters with weights on the device or in host memory.
    pub adapters: Vec<ResidentAdapter>,
    /// Requests waiting or running.
    pub requests: u32,
    /// KV blocks free.
    pub free_blocks: u32,
    /// KV blocks in all.
    pub total_blocks: u32,
    /// Jobs training now.
    pub training_jobs: u32,
    /// Jobs it can train at once.
    pub training_room: u32,
    /// Takes no new work.
    pub draining: bool,
}

impl WorkerPresence {
    /// Whether an adapter, or a job's published weights, lie on its device.
    pub fn holds(&self, id: &str) -> bool {
        self.adapters.iter().any(|adapter| adapter.on_device && adapter.id == id)
    }
}

/// Where an adapter's weights lie on a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidentAdapter {
    /// `adp-…` or `ftjob-…`.
    pub id: String,
    /// Optimizer steps that a job's weights have seen; an `adp-…` id is one version itself.
    #[serde(default)]
    pub version: Option<u64>,
    /// On the device (else host memory).
    pub on_device: bool,
    /// Requests using it now.
    pub requests: u32,
}
