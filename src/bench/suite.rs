//! The measurements by the names that the goals give them, over one engine on one base.

use super::args::{AllArgs, CommonArgs, DecodeArgs, FinetuneArgs, Grid, PrefillArgs};
use super::base::Base;
use super::decode::{Decoded, Decoding, decode, prefill};
use super::figures::Report;
use super::finetune::{Trained, Training, train};
use super::rig::Rig;
use super::{data, random::Random};
use kernels::{Device, Memory};
use std::path::Path;
use std::sync::Arc;
use worker::WorkerOptions;
use worker::train::Example;

/// Optimizer steps of F1 that random rows are made for: no epoch ends while the clock runs.
const FULL_ROW_STEPS: usize = 512;

/// How long everything is; also what the engine's memory is made for.
#[derive(Clone, Debug)]
pub struct Lengths {
    /// Examples per step and rows of each in F1.
    pub rows: Grid,
    /// Examples per optimizer step in F2 and F3.
    pub batch_size: usize,
    /// Rows that a micro-batch aims at.
    pub micro_rows: usize,
    /// Jobs at once.
    pub jobs: usize,
    /// Largest rank.
    pub rank: usize,
    /// Sequences that decode in D2 and D3.
    pub sequences: usize,
    /// Adapters in D2.
    pub adapters: usize,
    /// Prompt and generated tokens of decoding.
    pub prompt: usize,
    /// See `prompt`.
    pub output: usize,
    /// Prompts of D4.
    pub prefill: Grid,
    /// Seconds of F1.
    pub seconds: f64,
    /// No measurement of jobs lasts longer, whatever is asked for.
    pub most_seconds: f64,
}

impl Lengths {
    /// As the goals say.
    pub fn full() -> Self {
        Self {
            rows: Grid { count: 4, length: 2048 },
            batch_size: 64,
            micro_rows: 8192,
            jobs: 4,
            rank: 64,
            sequences: 64,
            adapters: 32,
            prompt: 128,
            output: 128,
            prefill: Grid { count: 16, length: 2048 },
            seconds: 20.0,
            most_seconds: f64::INFINITY,
        }
    }

    /// All of it, as short as it can be.
    pub fn quick() -> Self {
        Self {
            rows: Grid { count: 2, length: 64 },
            batch_size: 4,
            micro_rows: 256,
            jobs: 4,
            rank: 64,
            sequences: 4,
            adapters: 2,
            prompt: 8,
            output: 8,
            prefill: Grid { count: 2, length: 64 },
            seconds: 0.0,
            most_seconds: 0.0,
        }
    }

    /// Room for jobs alone.
    pub fn finetune(self, args: &FinetuneArgs) -> Self {
        let micro_rows = self.micro_rows.min(args.micro_rows.max(args.shape.length));
        let rank = if args.jobs == 1 { args.rank } else { 64.max(args.rank) };
        let none = Grid { count: 1, length: 1 };
        let rows = if args.data.is_none() { args.shape } else { none };
        let batch_size = args.batch_size;
        Self {
            rows,
            batch_size,
            micro_rows,
            jobs: args.jobs,
            rank,
            sequences: 1,
            prefill: none,
            ..self
        }
    }

    /// Room for those sequences alone.
    pub fn decode(self, args: &DecodeArgs) -> Self {
        Self {
            jobs: 0,
            rank: args.rank,
            sequences: args.sequences,
            adapters: args.adapters,
            prompt: args.prompt,
            output: args.output,
            prefill: Grid { count: 1, length: 1 },
            ..self
        }
    }

    /// Room for those prompts alone.
    pub fn prefill(self, args: &PrefillArgs) -> Self {
        let (prefill, adapters, rank) = (args.shape, args.adapters, args.rank);
        Self { jobs: 0, rank, sequences: 1, prefill, adapters, ..self }
    }

    fn options(&self, memory: Option<Memory>, step_rows: Option<usize>) -> WorkerOptions {
        let decoded = self.prompt + self.output;
        let context = decoded.max(self.prefill.length + 1);
        // Blocks are filled to their last row only where lengths divide by theirs.
        let room = |tokens: usize| tokens.next_multiple_of(16) + 16;
        let kv = (self.sequences * room(decoded))
            .max(self.prefill.count * room(self.prefill.length + 1));
        let sequences = self.sequences.max(self.prefill.count);
        let rows = self.micro_rows.max(self.rows.length);
        let suited = WorkerOptions::suited(memory);
        WorkerOptions {
            step_rows: step_rows.unwrap_or(suited.step_rows),
            max_sequences: sequences,
            max_queue: 2 * sequences,
            max_context: Some(context),
            kv_tokens: Some(kv),
            arena_rows: if self.jobs == 0 { 16 } else { rows },
            micro_rows: self.micro_rows,
            resident_adapters: self.adapters.max(1),
            max_jobs: self.jobs,
            max_rank: self.rank,
            ..suited
        }
    }
}

/// See the module.
pub struct Suite {
    rig: Rig,
    lengths: Lengths,
    repeats: usize,
    report: Report,
}

impl Suite {
    /// Starts the engine with room for `lengths`.
    pub fn start<D: Device>(
        device: D,
        base: Base,
        lengths: Lengths,
        args: &CommonArgs,
        report: Report,
    ) -> anyhow::Result<Self> {
        let options = lengths.options(device.memory()?, args.step_rows);
        let rig = Rig::start(device, base, &options, args.trace.clone())?;
        report.head();
        Ok(Self { rig, lengths, repeats: args.repeats, report })
    }

    /// F1, or F2 and F3.
    pub fn finetune(mut self, args: &FinetuneArgs) -> anyhow::Result<()> {
        match &args.data {
            None => {
                let usual = (args.shape.count, args.shape.length, args.rank) == (4, 2048, 16);
                self.full_rows(usual.then_some("F1"), args.rank, args.seconds)?;
            }
            Some(path) => {
                let examples = self.chats(path)?;
                let usual = (args.batch_size, args.rank) == (64, 16);
                let id = |id| usual.then_some(id);
                let alone = self.chats_alone(id("F2"), args.rank, &examples, args.seconds)?;
                if args.jobs > 1 {
                    let id = id("F3").filter(|_| args.jobs == 4);
                    self.chats_together(id, args.jobs, &examples, args.seconds, alone)?;
                }
            }
        }
        self.rig.stop()
    }

    /// D1, D2, or what D3 is reckoned from.
    pub fn decode(mut self, args: &DecodeArgs) -> anyhow::Result<()> {
        let decoded = self.decoding(args.sequences, args.adapters, args.rank)?;
        let (value, details) = (decoded.tokens_per_sec(args.sequences), details(&decoded, args));
        let id = match (args.sequences, args.adapters) {
            (1, 0) => Some("D1-base"),
            (1, 1) => Some("D1-adapter"),
            (64, 32) => Some("D2"),
            _ => None,
        };
        let usual = (args.rank, args.prompt, args.output) == (16, 128, 128);
        self.report.show(id.filter(|_| usual), "decode", value, "tokens/s", &details)?;
        self.rig.stop()
    }

    /// D4.
    pub fn prefill(mut self, args: &PrefillArgs) -> anyhow::Result<()> {
        let PrefillArgs { shape, adapters, rank } = *args;
        let usual = (shape.count, shape.length, adapters, rank) == (16, 2048, 16, 16);
        self.prompts(usual.then_some("D4"), args)?;
        self.rig.stop()
    }

    /// All of them; their ids and values.
    pub fn all(mut self, args: &AllArgs) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let Lengths { sequences: many, adapters, prefill, seconds, .. } = self.lengths.clone();
        let tokens = "tokens/s";
        for (id, count) in [("D1-base", 0), ("D1-adapter", 1)] {
            let decoded = self.decoding(1, count, 16)?;
            let details = details(&decoded, &self.decode_args(1, count));
            self.report.figure(id, decoded.tokens_per_sec(1), tokens, &details)?;
        }
        let base = self.decoding(many, 0, 16)?.tokens_per_sec(many);
        let one = self.decoding(many, 1, 16)?.tokens_per_sec(many);
        let decoded = self.decoding(many, adapters, 16)?;
        let each = decoded.tokens_per_sec(many);
        let text = details(&decoded, &self.decode_args(many, adapters));
        self.report.figure("D2", each, tokens, &text)?;
        for (id, with) in [("D3-1", one), ("D3-32", each)] {
            let text = format!("{with:.0} of the base's {base:.0} tokens/s");
            self.report.figure(id, 100.0 * (1.0 - with / base), "%", &text)?;
        }
        self.prompts(
            Some("D4"),
            &PrefillArgs { shape: prefill, adapters: prefill.count, rank: 16 },
        )?;
        self.full_rows(Some("F1"), 16, seconds)?;
        let examples = self.chats(&args.data)?;
        let alone = self.chats_alone(Some("F2"), 16, &examples, args.seconds)?;
        self.chats_together(Some("F3"), self.lengths.jobs, &examples, args.seconds, alone)?;
        self.rig.stop()?;
        Ok(self.report.values)
    }

    fn decode_args(&self, sequences: usize, adapters: usize) -> DecodeArgs {
        let Lengths { prompt, output, .. } = self.lengths;
        DecodeArgs { sequences, adapters, rank: 16, prompt, output }
    }

    fn decoding(
        &mut self,
        sequences: usize,
        adapters: usize,
        rank: usize,
    ) -> anyhow::Result<Decoded> {
        let Lengths { prompt, output, .. } = self.lengths;
        let what = Decoding { sequences, adapters, rank, prompt, output };
        decode(&mut self.rig, &what, self.repeats)
    }

    fn prompts(&mut self, id: Option<&'static str>, args: &PrefillArgs) -> anyhow::Result<()> {
        let PrefillArgs { shape, adapters, rank } = *args;
        let time = prefill(&mut self.rig, shape, adapters, rank, self.repeats)?.as_secs_f64();
        let value = (shape.count * shape.length) as f64 / time;
        let details = format!(
            "{}x{} prompts, {adapters} adapters r{rank}, {:.1} ms",
            shape.count,
            shape.length,
            time * 1e3
        );
        self.report.show(id, "prefill", value, "tokens/s", &details)
    }

    fn full_rows(
        &mut self,
        id: Option<&'static str>,
        rank: usize,
        seconds: f64,
    ) -> anyhow::Result<()> {
        let grid = self.lengths.rows;
        let vocab = self.rig.config.vocab;
        let examples = data::full_rows(&mut Random::new(11), grid, FULL_ROW_STEPS, vocab);
        let job = Training::all(rank, grid.count, Arc::new(examples));
        let seconds = seconds.min(self.lengths.most_seconds);
        let done = train(&mut self.rig, &[job], seconds)?.remove(0);
        let rows = (grid.count * grid.length) as f64;
        let details = format!(
            "{}x{} full rows, r{rank}, {} steps, median {:.1} ms, loss {:.2} to {:.2}",
            grid.count,
            grid.length,
            done.steps,
            done.step.as_secs_f64() * 1e3,
            done.losses.0,
            done.losses.1
        );
        let value = rows * done.steps_per_sec();
        self.report.show(id, "finetune", value, "tokens/s", &details)?;
        let megabytes = self.rig.row_bytes / 1e6;
        let details = "training arena and workspace, by the memory plan";
        self.report.show(id.map(|_| "F4"), "memory", megabytes, "MB/row", details)
    }

    fn chats(&self, path: &Path) -> anyhow::Result<Arc<Vec<Example>>> {
        let config = &self.rig.config;
        data::chats(path, self.lengths.micro_rows.min(config.context), config.vocab)
    }

    fn chats_alone(
        &mut self,
        id: Option<&'static str>,
        rank: usize,
        examples: &Arc<Vec<Example>>,
        seconds: f64,
    ) -> anyhow::Result<f64> {
        let job = Training::all(rank, self.lengths.batch_size, examples.clone());
        let done = train(&mut self.rig, &[job], seconds.min(self.lengths.most_seconds))?;
        let value = done[0].tokens_per_sec();
        self.report.show(id, "finetune", value, "tokens/s", &job_details(&done))?;
        Ok(value)
    }

    fn chats_together(
        &mut self,
        id: Option<&'static str>,
        count: usize,
        examples: &Arc<Vec<Example>>,
        seconds: f64,
        alone: f64,
    ) -> anyhow::Result<()> {
        let mut jobs = Training::four(self.lengths.batch_size, examples);
        jobs.truncate(count);
        let done = train(&mut self.rig, &jobs, seconds.min(self.lengths.most_seconds))?;
        let sum: f64 = done.iter().map(Trained::tokens_per_sec).sum();
        let details = format!("{sum:.0} of {alone:.0} tokens/s; {}", job_details(&done));
        self.report.show(id, "jobs", 100.0 * sum / alone, "%", &details)
    }
}

fn details(decoded: &Decoded, args: &DecodeArgs) -> String {
    let DecodeArgs { sequences, adapters, rank, prompt, output } = args;
    let on =
        if *adapters == 0 { "base".to_owned() } else { format!("{adapters} adapters r{rank}") };
    let Decoded { step, p99, steps } = decoded;
    format!(
        "{sequences} sequences, {on}, {prompt} in {output} out, step {:.3} ms, p99 {:.3}, \
         {steps} steps",
        step.as_secs_f64() * 1e3,
        p99.as_secs_f64() * 1e3
    )
}

fn job_details(done: &[Trained]) -> String {
    let job = |done: &Trained| {
        format!(
            "{} tokens in {} steps, {:.1} s, loss {:.2} to {:.2}",
            done.tokens,
            done.steps,
            done.time.as_secs_f64(),
            done.losses.0,
            done.losses.1
        )
    };
    done.iter().map(job).collect::<Vec<_>>().join("; ")
}
