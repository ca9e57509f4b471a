//! What comes into the engine and what leaves it: the seam to `intake` and `outlet`.
//!
//! Closed enums of plain values. The engine knows no storage, no HTTP and no files.

use crate::adapters::layout::AdapterLayout;
use crate::text::Detokenizer;
use crate::train::{Example, JobSpec, StepMetrics};
use std::sync::Arc;

/// Number that intake gives a request; unique in this process.
pub type RequestKey = u64;

/// How tokens are drawn; a plain copy of the wire's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingSpec {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass.
    pub top_p: f32,
    /// 0 off.
    pub top_k: u32,
    /// 0 off.
    pub min_p: f32,
    /// Over generated tokens.
    pub presence_penalty: f32,
    /// Over generated tokens.
    pub frequency_penalty: f32,
    /// Over prompt and generated tokens; 1 off.
    pub repetition_penalty: f32,
    /// Token biases.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the request; choices derive theirs from it.
    pub seed: i64,
    /// Alternatives to report, where log-probabilities are wanted.
    pub logprobs: Option<u8>,
}

/// Which weights a request runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The base alone.
    Base,
    /// An immutable adapter, named by its key in the registry.
    Adapter(String),
    /// The live weights of a job that trains here.
    LiveJob(String),
}

/// One choice of a request, ready to run.
pub struct Choice {
    /// Tokens generated before the request came here.
    pub replay: Vec<u32>,
    /// The choice is over already, and how.
    pub finished: bool,
    /// Text state, fed with the replayed tokens.
    pub detokenizer: Detokenizer,
}

/// A tokenised request.
pub struct Admission {
    /// Its number.
    pub key: RequestKey,
    /// Prompt tokens, at least one, fewer than the context.
    pub prompt: Vec<u32>,
    /// Weights to run on.
    pub target: Target,
    /// Drawing.
    pub sampling: SamplingSpec,
    /// Most generated tokens per choice, as asked for; the engine clamps to the context.
    pub max_tokens: Option<u32>,
    /// End tokens are banned before so many generated tokens.
    pub min_tokens: u32,
    /// Tokens that end a choice: the model's, unless ignored, and the request's.
    pub end_tokens: Vec<u32>,
    /// Its choices, at least one.
    pub choices: Vec<Choice>,
}

/// Weights of an adapter in canonical layout.
pub struct AdapterWeights {
    /// Layout of `values`.
    pub layout: Arc<AdapterLayout>,
    /// Flat values.
    pub values: Arc<Vec<f32>>,
}

/// Where a job starts or goes on.
pub struct JobStart {
    /// The job's numbers.
    pub spec: JobSpec,
    /// Layout of its adapter.
    pub layout: Arc<AdapterLayout>,
    /// Encoded training examples.
    pub examples: Arc<Vec<Example>>,
    /// Encoded validation examples.
    pub validation: Arc<Vec<Example>>,
    /// Completed optimizer steps.
    pub step: usize,
    /// Master weights.
    pub params: Vec<f32>,
    /// First and second moments, where it has trained before.
    pub moments: Option<(Vec<f32>, Vec<f32>)>,
}

/// Into the engine.
pub enum Command {
    /// Run this request.
    Admit(Box<Admission>),
    /// Say that this request cannot run: it was found wanting before it came here.
    Refuse(RequestKey, Fault),
    /// Its client is gone.
    Cancel(RequestKey),
    /// Weights that [`Event::NeedAdapter`] asked for.
    AdapterReady(String, AdapterWeights),
    /// They cannot be had.
    AdapterFailed(String, Fault),
    /// The adapter was deleted: forget it once nobody reads it.
    ForgetAdapter(String),
    /// Let go of these requests: each is to go on at another worker with the tokens so far.
    HandOver(Leaving),
    /// Weights of an adapter before its requests come.
    Preload(String, AdapterWeights),
    /// Let an adapter go once nobody reads it.
    EvictAdapter(String),
    /// Keeps an adapter on the device, or lets it go.
    PinAdapter(String, bool),
    /// Train this job.
    StartJob(Box<JobStart>),
    /// Stop at the next optimizer step boundary and hand out the state.
    PauseJob(String),
    /// Train this job no further after the micro-batch in flight, its memory kept; or go on.
    HoldJob(String, bool),
    /// Drop the job: it was cancelled, or its lease is lost.
    StopJob(String),
    /// End the loop.
    Shutdown,
}

/// Which requests are handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// Those on this adapter.
    Of(String),
    /// All but those on live weights of jobs, which no other worker has.
    Movable,
    /// All.
    All,
}

/// Why a request ends without a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind.
    pub kind: FaultKind,
    /// For the client.
    pub message: String,
    /// Offending field.
    pub param: Option<String>,
}

/// Kinds of [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The request cannot be served as it is.
    Invalid,
    /// The prompt does not fit the context.
    ContextLength,
    /// The adapter or job is gone.
    ModelNotFound,
    /// No room now.
    Overloaded,
    /// What it needs cannot be had now, here or elsewhere.
    Unavailable,
    /// A fault here.
    Internal,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// End token or stop text.
    Stop,
    /// Token limit or end of the context.
    Length,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub id: u32,
    /// What it adds to the text, where log-probabilities were asked for; else empty.
    pub bytes: Vec<u8>,
    /// Log-probability and alternatives, where asked for.
    pub logprob: Option<(f32, Vec<(u32, f32)>)>,
}

/// What happened to a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Accepted; `version` names the weights it will run on.
    Admitted {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Part of the fingerprint: which adapter version.
        version: String,
    },
    /// New tokens of a choice.
    Tokens {
        /// Which choice.
        choice: u32,
        /// Index of the first token among the generated ones.
        first: u32,
        /// The tokens.
        tokens: Vec<Drawn>,
        /// Text that is certain now.
        text: String,
        /// On the last message of the choice.
        finish: Option<Finish>,
    },
    /// Handed over: it is to go on at another worker.
    Moved,
    /// The request is over, failed.
    Failed(Fault),
}

/// Why a job's state is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Internal resume point.
    Resume,
    /// End of an epoch: a listed checkpoint.
    Epoch,
    /// The job was paused; it has left the engine.
    Pause,
    /// The last step is done; the job has left the engine.
    Finish,
}

/// A job's state at an optimizer step boundary, in canonical layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Why.
    pub purpose: Purpose,
    /// Completed steps.
    pub step: usize,
    /// Master weights.
    pub params: Vec<f32>,
    /// First moments.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
}

/// What happened to a job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobEvent {
    /// It has its memory and trains.
    Started,
    /// There is no room for it now.
    NoRoom,
    /// An optimizer step is done (or was skipped: see its metrics).
    Step(StepMetrics),
    /// A state to keep. Follows the steps it contains.
    Snapshot(Box<Snapshot>),
    /// It left the engine because of [`Command::StopJob`].
    Stopped,
}

/// Out of the engine.
pub enum Event {
    /// All that happened to requests in one step.
    Outputs(Vec<(RequestKey, Output)>),
    /// Requests wait for this adapter.
    NeedAdapter(String),
    /// A job's news.
    Job(String, JobEvent),
    /// The device failed; nothing more will come.
    Broken(String),
}
