//! An engine on its own thread, driven through its channels as intake and outlet do, with freed
//! memory poisoned. It starts at the first wait, so that what was sent before meets in one step.

use super::jobs::Job;
use super::reading::read;
use super::{Adapter, model, sizes};
use kernels::Cpu;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use worker::adapters::AdapterLayout;
use worker::engine::command::{
    AdapterWeights, Admission, Choice, Command, Event, Finish, JobEvent, Output, RequestKey,
    SamplingSpec, Snapshot, Target,
};
use worker::engine::gauges::Gauges;
use worker::engine::{Engine, Options};
use worker::model::{Model, Sizes};
use worker::text::{TextStart, Tokenizer};
use worker::train::StepMetrics;

/// Longest wait for one condition.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tokenizer of all rigs; its first ids are those of the golden bases.
pub fn tokenizer() -> &'static Tokenizer {
    // Read once, so that requests follow each other fast enough to meet in the engine.
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        let json = include_bytes!("../../fixtures/text/byte_level.json");
        Tokenizer::from_bytes(json).unwrap()
    });
    &TOKENIZER
}

/// Bounds that leave room for everything.
pub fn options() -> Options {
    Options {
        max_queue: 64,
        max_jobs: 4,
        target_rows: 48,
        tpot: Duration::from_millis(50),
        least_rows: 8,
        graphs: false,
        trace: None,
        poison: true,
    }
}

/// What a request came to so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Version of the weights, once admitted.
    pub version: Option<String>,
    /// Tokens per choice.
    pub tokens: Vec<Vec<u32>>,
    /// Log-probability and alternatives of those tokens that have them.
    pub logprobs: Vec<(f32, Vec<(u32, f32)>)>,
    /// Text per choice.
    pub text: Vec<String>,
    /// End per choice.
    pub finish: Vec<Option<Finish>>,
    /// Message of its failure.
    pub failed: Option<String>,
    /// It was handed over.
    pub moved: bool,
}

/// See the module.
pub struct Rig {
    commands: Sender<Command>,
    events: Receiver<Event>,
    engine: Option<Engine<Cpu<f32>>>,
    thread: Option<JoinHandle<()>>,
    /// The engine's counters.
    pub gauges: Arc<Gauges>,
    /// Adapters that are handed out when the engine asks for them.
    pub library: HashMap<String, Adapter>,
    /// Keys it asked for that are not in the library.
    pub asked: Vec<String>,
    /// Answers by request.
    pub answers: HashMap<RequestKey, Answer>,
    /// News by job, in order.
    pub news: HashMap<String, Vec<JobEvent>>,
    next: RequestKey,
}

impl Rig {
    /// With the usual sizes and options.
    pub fn new(base: &str) -> Self {
        Self::with(base, sizes(), options())
    }

    /// With sizes and options of its own.
    pub fn with(base: &str, sizes: Sizes, options: Options) -> Self {
        Self::late(base, sizes, options, 0)
    }

    /// On a device whose results come late, when they were asked for `polls` times.
    pub fn late(base: &str, sizes: Sizes, options: Options, polls: usize) -> Self {
        Self::build(base, sizes, options, polls, 4096)
    }

    /// The same; the engine gets no more than a few steps ahead of the test, however fast it is.
    pub fn held(base: &str, sizes: Sizes, options: Options, polls: usize) -> Self {
        Self::build(base, sizes, options, polls, 4)
    }

    fn build(base: &str, sizes: Sizes, options: Options, polls: usize, ahead: usize) -> Self {
        tokenizer();
        let mut model = model::<f32>(base, 1, sizes);
        model.device = model.device.late(polls);
        let (commands, inbox) = channel(64);
        let (outbox, events) = channel(ahead);
        let gauges = Arc::new(Gauges::idle(model.sizes.blocks));
        let engine = Engine::new(model, options, inbox, outbox, gauges.clone());
        Self {
            commands,
            events,
            engine: Some(engine),
            thread: None,
            gauges,
            library: HashMap::new(),
            asked: Vec::new(),
            answers: HashMap::new(),
            news: HashMap::new(),
            next: 1,
        }
    }

    /// Sends a command.
    pub fn send(&self, command: Command) {
        self.commands.blocking_send(command).expect("the engine runs");
    }

    /// Sends a request; its number.
    pub fn admit(&mut self, admission: Admission) -> RequestKey {
        let key = self.next;
        self.next += 1;
        let answer = Answer {
            tokens: vec![Vec::new(); admission.choices.len()],
            text: vec![String::new(); admission.choices.len()],
            finish: vec![None; admission.choices.len()],
            ..Answer::default()
        };
        self.answers.insert(key, answer);
        self.send(Command::Admit(Box::new(Admission { key, ..admission })));
        key
    }

    /// Sends a greedy request of one choice.
    pub fn chat(&mut self, target: Target, prompt: &[u32], tokens: u32) -> RequestKey {
        self.admit(request(target, prompt, tokens))
    }

    /// Starts a job.
    pub fn start(&self, job: &Job) {
        self.send(Command::StartJob(Box::new(job.start())));
    }

    /// Takes events until `done`; panics when the engine breaks or goes quiet.
    pub fn until(&mut self, done: impl Fn(&Self) -> bool) {
        if let Some(engine) = self.engine.take() {
            self.thread = Some(std::thread::spawn(move || engine.run()));
        }
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            match self.events.try_recv() {
                Ok(event) => self.take(event),
                Err(TryRecvError::Empty) => std::thread::sleep(Duration::from_micros(200)),
                Err(TryRecvError::Disconnected) => panic!("the engine is gone"),
            }
            assert!(Instant::now() < deadline, "waited too long: {:?}", self.answers);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Outputs(outputs) => {
                for (key, output) in outputs {
                    self.answers.get_mut(&key).unwrap().take(output);
                }
            }
            Event::NeedAdapter(key) => match self.library.get(&key) {
                Some(adapter) => self.send(ready(&key, adapter)),
                None => self.asked.push(key),
            },
            Event::Job(job, news) => self.news.entry(job).or_default().push(news),
            Event::Broken(fault) => panic!("the engine broke: {fault}"),
        }
    }

    /// Waits for the end of a request; its answer.
    pub fn answer(&mut self, key: RequestKey) -> Answer {
        self.until(|rig| rig.answers[&key].is_over());
        self.answers[&key].clone()
    }

    /// Waits for the end of a greedy request of one choice; its tokens.
    pub fn tokens(&mut self, key: RequestKey) -> Vec<u32> {
        let mut answer = self.answer(key);
        assert_eq!(answer.failed, None);
        answer.tokens.remove(0)
    }

    /// News of a job so far.
    pub fn news_of(&self, job: &str) -> &[JobEvent] {
        self.news.get(job).map_or(&[], Vec::as_slice)
    }

    /// Steps that a job has reported.
    pub fn steps(&self, job: &str) -> Vec<StepMetrics> {
        let step = |news: &JobEvent| match news {
            JobEvent::Step(metrics) => Some(metrics.clone()),
            _ => None,
        };
        self.news_of(job).iter().filter_map(step).collect()
    }

    /// States that a job has handed out.
    pub fn snapshots(&self, job: &str) -> Vec<Snapshot> {
        let snapshot = |news: &JobEvent| match news {
            JobEvent::Snapshot(snapshot) => Some((**snapshot).clone()),
            _ => None,
        };
        self.news_of(job).iter().filter_map(snapshot).collect()
    }

    /// Waits until nothing is held: no request, no block, no reader.
    pub fn until_idle(&mut self) {
        self.until(|rig| {
            let gauges = &rig.gauges;
            gauges.requests.load(Relaxed) == 0
                && gauges.free_blocks.load(Relaxed) == gauges.total_blocks.load(Relaxed)
                && gauges.residents().iter().all(|resident| resident.readers == 0)
        });
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.commands.try_send(Command::Shutdown));
        self.events.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the engine panicked");
        }
    }
}

impl Answer {
    fn is_over(&self) -> bool {
        self.failed.is_some() || self.moved || self.finish.iter().all(Option::is_some)
    }

    fn take(&mut self, output: Output) {
        assert!(!self.moved, "nothing follows a hand-over: {output:?}");
        match output {
            Output::Moved => self.moved = true,
            Output::Admitted { version, .. } => self.version = Some(version),
            Output::Failed(fault) => self.failed = Some(fault.message),
            Output::Tokens { choice, first, tokens, text, finish } => {
                let choice = choice as usize;
                assert_eq!(self.finish[choice], None, "nothing follows the end");
                assert_eq!(first as usize, self.tokens[choice].len(), "no gap, no repeat");
                self.tokens[choice].extend(tokens.iter().map(|token| token.id));
                self.logprobs.extend(tokens.into_iter().filter_map(|token| token.logprob));
                self.text[choice].push_str(&text);
                self.finish[choice] = finish;
            }
        }
    }
}

/// Weights as intake sends them.
pub fn ready(key: &str, adapter: &Adapter) -> Command {
    let (layout, values) = (adapter.layout.clone(), adapter.values.clone());
    Command::AdapterReady(key.to_owned(), AdapterWeights { layout, values })
}

/// A greedy request of one choice.
pub fn request(target: Target, prompt: &[u32], tokens: u32) -> Admission {
    Admission {
        key: 0,
        prompt: prompt.to_vec(),
        target,
        sampling: SamplingSpec {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        },
        max_tokens: Some(tokens),
        min_tokens: 0,
        end_tokens: Vec::new(),
        choices: vec![choice(&[])],
    }
}

/// A fresh choice that ends at one of `stops`.
pub fn choice(stops: &[String]) -> Choice {
    let detokenizer = tokenizer().detokenizer(stops, TextStart::Continued);
    Choice { replay: Vec::new(), finished: false, detokenizer }
}

/// A model apart from any engine: says what greedy generation should be, by a full forward of
/// all tokens at each step.
pub struct Oracle(Model<Cpu<f32>>);

impl Oracle {
    /// Over a golden base.
    pub fn new(base: &str) -> Self {
        Self(model(base, 1, sizes()))
    }

    /// Greedy tokens after `prompt`, through an adapter or the base alone.
    pub fn greedy(&mut self, adapter: Option<&Adapter>, prompt: &[u32], count: usize) -> Vec<u32> {
        let slot = adapter.map(|adapter| {
            super::place(&mut self.0, 0, 0, adapter);
            (0, adapter.rank())
        });
        let vocab = self.0.config.vocab;
        let mut tokens = prompt.to_vec();
        for _ in 0..count {
            let logits = read(&mut self.0, &tokens, slot, &[]);
            let last = &logits[logits.len() - vocab..];
            let best = (0..vocab).max_by(|a, b| last[*a].total_cmp(&last[*b]).then(b.cmp(a)));
            tokens.push(best.unwrap() as u32);
        }
        tokens.split_off(prompt.len())
    }

    /// The same through weights that a snapshot holds.
    pub fn greedy_through(
        &mut self,
        layout: &Arc<AdapterLayout>,
        params: &[f32],
        prompt: &[u32],
        count: usize,
    ) -> Vec<u32> {
        let adapter = Adapter { layout: layout.clone(), values: Arc::new(params.to_vec()) };
        self.greedy(Some(&adapter), prompt, count)
    }
}
