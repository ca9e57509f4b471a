//! The published shapes of request bodies, for the OpenAPI document. Nothing is deserialised into
//! them: parsing with its exact messages lives in the other wire modules, and a test holds every
//! field published here against the parser.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// Body of `POST /v1/chat/completions`.
#[derive(ToSchema)]
pub struct ChatCompletionRequest {
    /// A base, an `ft:` name, or the id of a running job.
    pub model: String,
    /// The conversation.
    #[schema(min_items = 1)]
    pub messages: Vec<RequestMessage>,
    /// Upper bound of generated tokens.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<i64>,
    /// The same, by its older name.
    #[schema(minimum = 1)]
    pub max_tokens: Option<i64>,
    /// Extension: variables for the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Value>,
    /// Return log-probabilities.
    pub logprobs: Option<bool>,
    /// So many alternatives each.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Nucleus mass; 0 is greedy.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Extension: keep the k likeliest.
    pub top_k: Option<i64>,
    /// Extension: least relative probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// Over generated tokens.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// Over generated tokens.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// Extension: 1 is off.
    pub repetition_penalty: Option<f64>,
    /// Extension: end tokens are not drawn before.
    pub min_tokens: Option<i64>,
    /// Extension: the model's own end tokens do not end a choice.
    pub ignore_eos: Option<bool>,
    /// Extension: token ids that end a choice.
    pub stop_token_ids: Option<Vec<i64>>,
    /// Choices.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<i64>,
    /// Up to four texts that end a choice.
    pub stop: Option<StopTexts>,
    /// Makes sampling repeatable.
    pub seed: Option<i64>,
    /// Bias by token id, −100 to 100.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Answer as server-sent events.
    pub stream: Option<bool>,
    /// Only with `stream`.
    pub stream_options: Option<StreamOptions>,
    /// Only `{"type":"text"}` so far.
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// Accepted with `tool_choice: none` so far.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// Only `none` so far.
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// No effect without tools.
    pub parallel_tool_calls: Option<bool>,
    /// Only `["text"]`.
    pub modalities: Option<Vec<String>>,
    /// No effect.
    pub metadata: Option<BTreeMap<String, String>>,
    /// No effect.
    pub service_tier: Option<String>,
    /// No effect.
    pub user: Option<String>,
    /// No effect.
    pub safety_identifier: Option<String>,
    /// No effect: nothing is stored.
    pub store: Option<bool>,
    /// No effect.
    #[schema(value_type = Option<Object>)]
    pub prediction: Option<Value>,
    /// No effect.
    pub reasoning_effort: Option<String>,
    /// No effect.
    pub verbosity: Option<String>,
    /// No effect.
    pub prompt_cache_key: Option<String>,
    /// No effect.
    pub prompt_cache_retention: Option<String>,
    /// No effect.
    #[schema(value_type = Option<Object>)]
    pub prompt_cache_options: Option<Value>,
}

/// One or several texts.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[schema(description = "A string or an array of 1 to 4 strings.")]
pub enum StopTexts {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// A chat message.
#[derive(ToSchema)]
pub struct RequestMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text, or an array of text parts.
    #[schema(value_type = Option<Object>)]
    pub content: Option<Value>,
    /// Speaker.
    pub name: Option<String>,
    /// Calls of an assistant message.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Vec<Value>>,
    /// The call a tool message answers.
    pub tool_call_id: Option<String>,
}

/// Options of a stream.
#[derive(ToSchema)]
pub struct StreamOptions {
    /// Send a last chunk with token counts.
    pub include_usage: Option<bool>,
    /// No effect.
    pub include_obfuscation: Option<bool>,
}

/// Body of `POST /v1/completions`.
#[derive(ToSchema)]
pub struct TextCompletionRequest {
    /// A base, an `ft:` name, or the id of a running job.
    pub model: String,
    /// A string, an array of strings, an array of token ids, or an array of those.
    #[schema(value_type = Object)]
    pub prompt: Value,
    /// Upper bound of generated tokens; 16 by default.
    #[schema(minimum = 0)]
    pub max_tokens: Option<i64>,
    /// Draw so many choices and return the best.
    #[schema(minimum = 1, maximum = 20)]
    pub best_of: Option<i64>,
    /// Return the prompt before the completion.
    pub echo: Option<bool>,
    /// Return log-probabilities with so many alternatives.
    #[schema(minimum = 0, maximum = 5)]
    pub logprobs: Option<i64>,
    /// Only the empty string.
    pub suffix: Option<String>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Nucleus mass; 0 is greedy.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Extension: keep the k likeliest.
    pub top_k: Option<i64>,
    /// Extension: least relative probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// Over generated tokens.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// Over generated tokens.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// Extension: 1 is off.
    pub repetition_penalty: Option<f64>,
    /// Extension: end tokens are not drawn before.
    pub min_tokens: Option<i64>,
    /// Extension: the model's own end tokens do not end a choice.
    pub ignore_eos: Option<bool>,
    /// Extension: token ids that end a choice.
    pub stop_token_ids: Option<Vec<i64>>,
    /// Choices per prompt.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<i64>,
    /// Up to four texts that end a choice.
    pub stop: Option<StopTexts>,
    /// Makes sampling repeatable.
    pub seed: Option<i64>,
    /// Bias by token id, −100 to 100.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Answer as server-sent events.
    pub stream: Option<bool>,
    /// Only with `stream`.
    pub stream_options: Option<StreamOptions>,
    /// No effect.
    pub user: Option<String>,
}

/// Body of `POST /v1/fine_tuning/jobs`.
#[derive(ToSchema)]
pub struct CreateJobRequest {
    /// A base, or an own `ft:` model to continue from.
    pub model: String,
    /// `file-…` with purpose `fine-tune`.
    pub training_file: String,
    /// `file-…` with purpose `fine-tune`.
    pub validation_file: Option<String>,
    /// Part of the result's name.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    pub suffix: Option<String>,
    /// Of all randomness of the job.
    #[schema(minimum = 0, maximum = 2147483647)]
    pub seed: Option<i64>,
    /// Up to 16 pairs.
    pub metadata: Option<BTreeMap<String, String>>,
    /// `{"type": "supervised", "supervised": {"hyperparameters": {…}}}`.
    #[schema(value_type = Option<Object>)]
    pub method: Option<Value>,
    /// Deprecated: the same as `method.supervised.hyperparameters`.
    #[schema(value_type = Option<Object>)]
    pub hyperparameters: Option<Value>,
    /// Only null or empty.
    #[schema(value_type = Option<Vec<Object>>)]
    pub integrations: Option<Vec<Value>>,
    /// Extension: shape of the adapter.
    pub lora: Option<LoraSettings>,
    /// Extension: how to train.
    pub training: Option<TrainingSettings>,
}

/// Shape of the adapter to train.
#[derive(ToSchema)]
pub struct LoraSettings {
    /// 16 by default.
    #[schema(minimum = 1, maximum = 256)]
    pub rank: Option<i64>,
    /// Twice the rank by default.
    pub alpha: Option<f64>,
    /// 0 by default.
    #[schema(minimum = 0, maximum = 0.95)]
    pub dropout: Option<f64>,
    /// `all-linear`, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
    #[schema(value_type = Option<Object>)]
    pub target_modules: Option<Value>,
    /// Scale by alpha/√rank.
    pub use_rslora: Option<bool>,
    /// `default` or `gaussian`.
    pub init: Option<String>,
}

/// How to train.
#[derive(ToSchema)]
pub struct TrainingSettings {
    /// Peak rate before the multiplier; chosen by the size of the base by default.
    pub learning_rate: Option<f64>,
    /// `linear`, `cosine` or `constant`.
    pub lr_scheduler: Option<String>,
    /// Share of the steps; 0.03 by default.
    pub warmup_ratio: Option<f64>,
    /// Decoupled; 0 by default.
    pub weight_decay: Option<f64>,
    /// 0.9 by default.
    pub adam_beta1: Option<f64>,
    /// 0.999 by default.
    pub adam_beta2: Option<f64>,
    /// 1 by default.
    pub max_grad_norm: Option<f64>,
    /// The base's context by default.
    pub max_sequence_length: Option<i64>,
    /// Resume points; 50 by default.
    pub checkpoint_every_steps: Option<i64>,
}

/// Body of `POST /v1/adapters/{adapter}/migrate`.
#[derive(ToSchema)]
pub struct MigrateRequest {
    /// Worker to move to; by default the least loaded one of the base that does not hold it.
    pub to: Option<String>,
    /// Worker to move from; by default all others that hold it.
    pub from: Option<String>,
}

/// Body of `POST /v1/adapters/{adapter}/evict`.
#[derive(ToSchema)]
pub struct EvictRequest {
    /// Worker to evict it from; by default all.
    pub worker: Option<String>,
}

/// Form of `POST /v1/files`.
#[derive(ToSchema)]
pub struct UploadForm {
    /// The bytes.
    #[schema(value_type = String, format = Binary)]
    pub file: Vec<u8>,
    /// `fine-tune`, `batch` or `user_data`.
    pub purpose: String,
    /// Only `created_at`.
    #[schema(rename = "expires_after[anchor]")]
    pub expires_after_anchor: Option<String>,
    /// How long the file lives.
    #[schema(rename = "expires_after[seconds]", minimum = 3600, maximum = 2592000)]
    pub expires_after_secs: Option<i64>,
}

/// Form of `POST /v1/adapters`.
#[derive(ToSchema)]
pub struct ImportForm {
    /// Part of the model's name.
    #[schema(pattern = "^[A-Za-z0-9._-]+$")]
    pub name: String,
    /// Base model name; needed where several are served.
    pub base: Option<String>,
    /// `adapter_config.json`.
    #[schema(value_type = String, format = Binary)]
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`.
    #[schema(value_type = String, format = Binary)]
    pub weights: Vec<u8>,
}
