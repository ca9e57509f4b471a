//! What a fine-tuning job trains and how: numbers only, every default already applied.
//!
//! A spec is fixed when the job's files are validated and never changes afterwards, so a resumed
//! run reads the same numbers as the first. This module knows no defaults (see `auto`), no files
//! and no device.

use kernels::Module;
use serde::{Deserialize, Serialize};

/// Added to the root of Adam's second moment.
pub const ADAM_EPS: f64 = 1e-8;

/// How the adapter's A starts; B always starts at zero, so a fresh adapter changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Kaiming-uniform with a = √5: uniform within ±1/√in.
    Default,
    /// Normal with standard deviation 1/R.
    Gaussian,
}

/// How the learning rate goes on after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Straight down towards zero.
    Linear,
    /// Half a cosine down towards zero.
    Cosine,
    /// Stays at its peak.
    Constant,
}

/// Shape of the adapter that a job trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraSpec {
    /// R, 1–256.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability that an input element of A is dropped, in [0, 1).
    pub dropout: f64,
    /// Adapted modules in canonical order, none twice, at least one.
    #[serde(with = "module_names")]
    pub targets: Vec<Module>,
    /// Scale by 1/√R in place of 1/R.
    pub use_rslora: bool,
    /// Start of A.
    pub init: Init,
}

impl LoraSpec {
    /// Factor of B·A·x: alpha/R, or alpha/√R for rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// How a job trains its adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSpec {
    /// Passes over the examples, at least 1.
    pub n_epochs: usize,
    /// Examples per optimizer step, at least 1.
    pub batch_size: usize,
    /// Peak learning rate, multiplier applied.
    pub learning_rate: f64,
    /// Shape after warm-up.
    pub scheduler: Scheduler,
    /// Share of all steps that warm up, 0–1.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// First-moment decay, in [0, 1).
    pub adam_beta1: f64,
    /// Second-moment decay, in [0, 1).
    pub adam_beta2: f64,
    /// Largest gradient norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Rows after which an example is cut.
    pub max_sequence_length: usize,
    /// Optimizer steps from one resume point to the next, at least 1.
    pub checkpoint_every_steps: usize,
    /// Seed of order, initialisation and dropout.
    pub seed: u64,
}

impl TrainingSpec {
    /// Optimizer steps of the whole job: an epoch's last, smaller batch is a step too.
    pub fn total_steps(&self, examples: usize) -> usize {
        self.n_epochs * super::order::steps_per_epoch(examples, self.batch_size)
    }
}

/// One job, as its trainer and its resume points keep it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// `ftjob-…`.
    pub job_id: String,
    /// The adapter.
    pub lora: LoraSpec,
    /// The training.
    pub training: TrainingSpec,
}

/// Name of a module as requests, adapter files and base files write it.
pub fn module_name(module: Module) -> &'static str {
    match module {
        Module::Q => "q_proj",
        Module::K => "k_proj",
        Module::V => "v_proj",
        Module::O => "o_proj",
        Module::Gate => "gate_proj",
        Module::Up => "up_proj",
        Module::Down => "down_proj",
    }
}

/// The module of that name.
pub fn module_named(name: &str) -> Option<Module> {
    Module::ALL.into_iter().find(|&module| module_name(module) == name)
}

/// Modules as a list of names, kept in canonical order.
mod module_names {
    use super::{Module, module_name, module_named};
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(modules: &[Module], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(modules.iter().map(|&module| module_name(module)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Module>, D::Error> {
        let mut modules = Vec::new();
        for name in Vec::<String>::deserialize(from)? {
            let module = module_named(&name)
                .ok_or_else(|| D::Error::custom(format!("no module is named {name}")))?;
            modules.push(module);
        }
        if modules.is_empty() || !modules.is_sorted_by(|a, b| a < b) {
            return Err(D::Error::custom("modules must be in canonical order, none twice"));
        }
        Ok(modules)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A spec whose numbers have no short decimal form, to catch any rounding on the way.
    pub fn awkward_spec() -> JobSpec {
        JobSpec {
            job_id: "ftjob-abcdefghijklmnopqrst".to_owned(),
            lora: LoraSpec {
                rank: 12,
                alpha: 0.1 + 0.2,
                dropout: 1.0 / 3.0,
                targets: vec![Module::Q, Module::Down],
                use_rslora: true,
                init: Init::Gaussian,
            },
            training: TrainingSpec {
                n_epochs: 3,
                batch_size: 4,
                learning_rate: 2e-4 * 1.7,
                scheduler: Scheduler::Cosine,
                warmup_ratio: 0.03,
                weight_decay: f64::MIN_POSITIVE,
                adam_beta1: 0.9,
                adam_beta2: 0.999,
                max_grad_norm: 1.0,
                max_sequence_length: 1024,
                checkpoint_every_steps: 50,
                seed: u64::MAX,
            },
        }
    }

    #[test]
    fn a_spec_comes_back_from_json_to_the_bit() {
        let spec = awkward_spec();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<JobSpec>(&text).unwrap(), spec);
        assert!(text.contains(r#""targets":["q_proj","down_proj"]"#), "{text}");
        assert!(text.contains(r#""scheduler":"cosine""#), "{text}");
    }

    #[test]
    fn a_spec_with_a_wrong_module_or_key_is_refused() {
        let text = serde_json::to_string(&awkward_spec()).unwrap();
        let good = r#"["q_proj","down_proj"]"#;
        for modules in
            [r#"["lm_head"]"#, r#"["down_proj","q_proj"]"#, r#"["q_proj","q_proj"]"#, "[]"]
        {
            let text = text.replace(good, modules);
            assert!(serde_json::from_str::<JobSpec>(&text).is_err(), "{modules}");
        }
        let text = text.replace("weight_decay", "decay");
        assert!(serde_json::from_str::<JobSpec>(&text).is_err());
    }

    #[test]
    fn names_and_modules_pair_up() {
        for module in Module::ALL {
            assert_eq!(module_named(module_name(module)), Some(module));
        }
        assert_eq!(module_named("lm_head"), None);
    }

    #[test]
    fn the_scale_follows_the_kind() {
        let mut lora = awkward_spec().lora;
        (lora.rank, lora.alpha, lora.use_rslora) = (16, 32.0, false);
        assert_eq!(lora.scale(), 2.0);
        lora.use_rslora = true;
        assert_eq!(lora.scale(), 8.0);
    }

    #[test]
    fn an_epochs_last_smaller_batch_is_a_step() {
        let training = awkward_spec().training;
        assert_eq!(training.total_steps(10), 9);
        assert_eq!(training.total_steps(8), 6);
    }
}
