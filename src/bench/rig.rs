//! The engine on its own thread, driven through its channels as intake and outlet do: no gateway,
//! no database, no queue between.

use super::base::Base;
use super::random::{AdapterValues, Random};
use anyhow::{Context, bail};
use kernels::{Device, Module};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use worker::WorkerOptions;
use worker::adapters::{AdapterLayout, AdapterShape};
use worker::base::BaseConfig;
use worker::engine::Engine;
use worker::engine::command::{
    AdapterWeights, Admission, Choice, Command, Event, Output, SamplingSpec, Target,
};
use worker::engine::gauges::Gauges;
use worker::engine::trace::Trace;
use worker::model::{Model, Part};
use worker::plan::MemoryPlan;
use worker::text::{TextStart, Tokenizer};

/// Commands and events that may wait; more than any measurement sends at once.
const CHANNEL: usize = 8192;

/// See the module.
pub struct Rig {
    /// Shapes of the base.
    pub config: BaseConfig,
    /// Bytes that training takes for a row of its largest micro-batch, workspace included; nothing
    /// of them is taken by anything else, so idle they hold nothing.
    pub row_bytes: f64,
    /// Where random prompts come from.
    pub random: Random,
    /// Values of adapters and first weights of jobs.
    pub values: AdapterValues,
    tokenizer: Tokenizer,
    commands: Sender<Command>,
    events: Receiver<Event>,
    thread: Option<JoinHandle<()>>,
    /// What is recorded, and the file it goes to.
    trace: Option<(Trace, PathBuf)>,
    adapters: HashMap<String, (usize, usize)>,
    next: u64,
}

impl Rig {
    /// Puts the base on the device and starts the engine.
    pub fn start<D: Device>(
        device: D,
        base: Base,
        options: &WorkerOptions,
        trace: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        let config = base.config().clone();
        let plan = options.plan::<D>(&config, device.memory()?)?;
        println!("device memory:\n{plan}");
        let training_bytes = training_bytes(&plan);
        let sizes = plan.sizes;
        let arena_rows = sizes.arena_rows;
        let mut engine_options = options.engine();
        let trace = trace.map(|path| (Trace::default(), path));
        engine_options.trace = trace.as_ref().map(|trace| trace.0.clone());
        let (commands, inbox) = channel(CHANNEL);
        let (outbox, events) = channel(CHANNEL);
        let (ready, started) = std::sync::mpsc::channel();
        let of_model = config.clone();
        let run = move || {
            let model = base
                .weights(&device, sizes.max_positions)
                .and_then(|weights| Ok(Model::new(device, of_model, weights, sizes)?));
            match model {
                Ok(model) => {
                    let gauges = Arc::new(Gauges::default());
                    let engine = Engine::new(model, engine_options, inbox, outbox, gauges);
                    let _ = ready.send(Ok(()));
                    engine.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run)?;
        started.recv().context("the engine thread ended while it loaded the base")??;
        Ok(Self {
            config,
            row_bytes: training_bytes as f64 / arena_rows as f64,
            random: Random::new(1),
            values: AdapterValues::new(),
            tokenizer: super::data::tokenizer()?,
            commands,
            events,
            thread: Some(thread),
            trace,
            adapters: HashMap::new(),
            next: 0,
        })
    }

    /// Sends a command.
    pub fn send(&self, command: Command) -> anyhow::Result<()> {
        self.commands.blocking_send(command).ok().context("the engine has ended")
    }

    /// The next event that is not a wish for an adapter, and when it came.
    pub fn next(&mut self) -> anyhow::Result<(Instant, Event)> {
        loop {
            let event = self.events.blocking_recv().context("the engine has ended")?;
            let at = Instant::now();
            match event {
                Event::Broken(fault) => bail!("the device failed: {fault}"),
                Event::NeedAdapter(key) => self.provide(key)?,
                event => {
                    refuse_failures(&event)?;
                    return Ok((at, event));
                }
            }
        }
    }

    fn provide(&self, key: String) -> anyhow::Result<()> {
        let (index, rank) = *self.adapters.get(&key).context("an adapter nobody asked for")?;
        let layout = layout(&self.config, rank, &Module::ALL)?;
        let values = self.values.of(&layout, index);
        let pin = Command::PinAdapter(key.clone(), true);
        self.send(Command::AdapterReady(key, AdapterWeights { layout, values }))?;
        self.send(pin)
    }

    /// Adapter number `index` of that rank on all modules, of `count`; none of 0: the base.
    pub fn target(&mut self, index: usize, count: usize, rank: usize) -> Target {
        if count == 0 {
            return Target::Base;
        }
        let index = index % count;
        let key = format!("r{rank}-{index}");
        self.adapters.insert(key.clone(), (index, rank));
        Target::Adapter(key)
    }

    /// A request with a fresh random prompt that ends only at its token limit.
    pub fn request(&mut self, target: Target, prompt: usize, output: usize) -> Command {
        self.next += 1;
        let detokenizer = self.tokenizer.detokenizer(&[], TextStart::Continued);
        Command::Admit(Box::new(Admission {
            key: self.next,
            prompt: self.random.tokens(prompt, self.config.vocab),
            target,
            sampling: sampling(self.next as i64),
            max_tokens: Some(output as u32),
            min_tokens: 0,
            end_tokens: Vec::new(),
            choices: vec![Choice { replay: Vec::new(), finished: false, detokenizer }],
        }))
    }

    /// Ends the engine and writes the trace.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.send(Command::Shutdown)?;
        self.events.close();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            bail!("the engine thread panicked");
        }
        if let Some((trace, path)) = self.trace.take() {
            std::fs::write(&path, trace.take_chrome().to_string())
                .with_context(|| format!("--trace: {} cannot be written", path.display()))?;
        }
        Ok(())
    }
}

fn training_bytes(plan: &MemoryPlan) -> u64 {
    let counts = |name: &str| name == Part::Arena.name() || name.contains("workspace");
    plan.parts.iter().filter(|part| counts(part.0)).map(|part| part.1).sum()
}

/// Layout of an adapter, alpha twice its rank.
pub fn layout(
    config: &BaseConfig,
    rank: usize,
    targets: &[Module],
) -> anyhow::Result<Arc<AdapterLayout>> {
    let shape = AdapterShape::new(rank, 2.0 * rank as f64, false, targets.to_vec())?;
    Ok(Arc::new(AdapterLayout::new(&config.dims(), &shape)))
}

fn refuse_failures(event: &Event) -> anyhow::Result<()> {
    let Event::Outputs(outputs) = event else { return Ok(()) };
    for (_, output) in outputs {
        if let Output::Failed(fault) = output {
            bail!("the engine refused a request: {}", fault.message);
        }
    }
    Ok(())
}

/// As a chat draws its tokens.
fn sampling(seed: i64) -> SamplingSpec {
    SamplingSpec {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        logit_bias: Vec::new(),
        seed,
        logprobs: None,
    }
}
