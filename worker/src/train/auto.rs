//! Turns a job request, once its files are known, into numbers: "auto" and every absent field get
//! their value here and nowhere else.
//!
//! What comes out is both the [`JobSpec`] that trains and the JSON that the job's row keeps and
//! clients are shown; resolving that JSON again changes nothing. The gateway has checked requests
//! already; a row may be older than this build, so every fault still names its field.

use super::fields::{FieldFault, Fields};
use super::spec::{Init, JobSpec, LoraSpec, Scheduler, TrainingSpec, module_named};
use kernels::Module;
use serde_json::{Value, json};
use std::ops::RangeInclusive;

/// What the defaults depend on.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Training examples, after those with nothing to train on are dropped.
    pub examples: usize,
    /// Hidden size of the base (H).
    pub hidden: usize,
    /// Context of the base in tokens.
    pub context: usize,
    /// Rows that the training arena holds.
    pub arena_rows: usize,
    /// Sum of rows × rank that the training arena holds.
    pub arena_rank_rows: usize,
}

/// A request with all its numbers.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What the trainer reads.
    pub spec: JobSpec,
    /// `hyperparameters`, `lora` and `training` with numbers, as the row keeps and clients see.
    /// `training.learning_rate` is before the multiplier, as in a request.
    pub echo: Value,
}

/// Peak learning rate of a base of that hidden size, before the multiplier.
///
/// 2e-4 suits bases of hidden size 2048 and more. Below that it grows as 2048 / H, up to 4e-3,
/// because the same change of behaviour needs larger steps. On the demo base (H 256), whose two
/// data sets are 108 steps, rank 16 learns at any rate from 5e-4 to 4e-3 and rank 256 no longer at
/// 4e-3; at 1.6e-3 ranks 4 to 32 answer all held-out prompts as trained, rank 256 at least eight
/// of ten. Rounded to a hundred-thousandth because people read it.
pub fn default_learning_rate(hidden: usize) -> f64 {
    let rate = 2e-4 * 2048.0 / hidden.max(1) as f64;
    (rate.clamp(2e-4, 4e-3) * 1e5).round() / 1e5
}

/// 3 passes; below 100 examples as many as make 300 examples in all, at most 25.
pub fn default_epochs(examples: usize) -> usize {
    300usize.div_ceil(examples.max(1)).clamp(3, 25)
}

/// About 0.2 % of the examples, 4–64.
pub fn default_batch_size(examples: usize) -> usize {
    ((examples + 250) / 500).clamp(4, 64)
}

/// Resolves `request` (the row's `hyperparameters` or `method`, `lora` and `training`).
pub fn resolve(
    job_id: &str,
    seed: u64,
    request: &Value,
    facts: &Facts,
) -> Result<Resolved, FieldFault> {
    let mut echo = defaults(facts);
    merge(&mut echo, "hyperparameters", hyperparameters(request)?)?;
    merge(&mut echo, "lora", request.get("lora"))?;
    merge(&mut echo, "training", request.get("training"))?;

    let rank = Fields::of(&echo, "lora")?.integer("rank", RANKS)?;
    if echo["lora"]["alpha"].is_null() {
        echo["lora"]["alpha"] = json!(2 * rank);
    }
    let longest = facts.context.min(facts.arena_rows).min(facts.arena_rank_rows / rank);
    if echo["training"]["max_sequence_length"].is_null() {
        echo["training"]["max_sequence_length"] = json!(longest);
    }
    let spec = spec_of(job_id, seed, &echo)?;
    if spec.training.max_sequence_length > longest {
        return Err(FieldFault {
            field: "training.max_sequence_length".to_owned(),
            problem: format!("must be at most {longest} for this base and rank here"),
        });
    }
    Ok(Resolved { spec, echo })
}

/// The spec of a row that was resolved before: `echo` must hold every field.
pub fn spec_of(job_id: &str, seed: u64, echo: &Value) -> Result<JobSpec, FieldFault> {
    let hyper = Fields::of(echo, "hyperparameters")?;
    let lora = Fields::of(echo, "lora")?;
    let training = Fields::of(echo, "training")?;
    let multiplier = hyper.decimal("learning_rate_multiplier", "above 0", |x| x > 0.0)?;
    let learning_rate = training.decimal("learning_rate", "above 0", |x| x > 0.0)? * multiplier;
    if !learning_rate.is_finite() || learning_rate == 0.0 {
        let problem = "times learning_rate is no usable number";
        return Err(hyper.fault("learning_rate_multiplier", problem));
    }
    let lora = LoraSpec {
        rank: lora.integer("rank", RANKS)?,
        alpha: lora.decimal("alpha", "above 0", |x| x > 0.0)?,
        dropout: lora.decimal("dropout", "within [0, 1)", |x| (0.0..1.0).contains(&x))?,
        targets: targets(&lora)?,
        use_rslora: lora.flag("use_rslora")?,
        init: lora.choice("init", &[("default", Init::Default), ("gaussian", Init::Gaussian)])?,
    };
    let not_negative = |x: f64| x >= 0.0;
    let decay = |x: f64| (0.0..1.0).contains(&x);
    let training = TrainingSpec {
        n_epochs: hyper.integer("n_epochs", 1..=50)?,
        batch_size: hyper.integer("batch_size", 1..=256)?,
        learning_rate,
        scheduler: training.choice("lr_scheduler", SCHEDULERS)?,
        warmup_ratio: training
            .decimal("warmup_ratio", "within 0–1", |x| (0.0..=1.0).contains(&x))?,
        weight_decay: training.decimal("weight_decay", "0 or above", not_negative)?,
        adam_beta1: training.decimal("adam_beta1", "within [0, 1)", decay)?,
        adam_beta2: training.decimal("adam_beta2", "within [0, 1)", decay)?,
        max_grad_norm: training.decimal("max_grad_norm", "0 or above", not_negative)?,
        max_sequence_length: training.integer("max_sequence_length", 1..=u32::MAX as usize)?,
        checkpoint_every_steps: training.integer("checkpoint_every_steps", 1..=usize::MAX)?,
        seed,
    };
    Ok(JobSpec { job_id: job_id.to_owned(), lora, training })
}

const RANKS: RangeInclusive<usize> = 1..=256;
const SCHEDULERS: &[(&str, Scheduler)] = &[
    ("linear", Scheduler::Linear),
    ("cosine", Scheduler::Cosine),
    ("constant", Scheduler::Constant),
];

/// Every field that a request may hold, with its default; null where it depends on the rank.
fn defaults(facts: &Facts) -> Value {
    json!({
        "hyperparameters": {
            "n_epochs": default_epochs(facts.examples),
            "batch_size": default_batch_size(facts.examples),
            "learning_rate_multiplier": 1,
        },
        "lora": {
            "rank": 16,
            "alpha": null,
            "dropout": 0,
            "target_modules": "all-linear",
            "use_rslora": false,
            "init": "default",
        },
        "training": {
            "learning_rate": default_learning_rate(facts.hidden),
            "lr_scheduler": "linear",
            "warmup_ratio": 0.03,
            "weight_decay": 0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "max_grad_norm": 1,
            "max_sequence_length": null,
            "checkpoint_every_steps": 50,
        },
    })
}

/// The hyperparameters of a request, from either place that the contract allows.
fn hyperparameters(request: &Value) -> Result<Option<&Value>, FieldFault> {
    let method = request.get("method").filter(|value| !value.is_null());
    if let Some(kind) =
        method.and_then(|method| method.get("type")).filter(|kind| **kind != "supervised")
    {
        return Err(FieldFault {
            field: "method.type".to_owned(),
            problem: format!("{kind} cannot be trained here"),
        });
    }
    let in_method = method.and_then(|method| method.get("supervised")?.get("hyperparameters"));
    Ok(request.get("hyperparameters").filter(|value| !value.is_null()).or(in_method))
}

/// Puts what a section of the request gives over its defaults; null and "auto" give nothing.
fn merge(echo: &mut Value, section: &str, given: Option<&Value>) -> Result<(), FieldFault> {
    let fault = |field: String, problem: &str| FieldFault { field, problem: problem.to_owned() };
    let given = match given {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(given)) => given,
        Some(_) => return Err(fault(section.to_owned(), "must be an object")),
    };
    for (key, value) in given {
        let Some(place) = echo[section].get_mut(key) else {
            return Err(fault(format!("{section}.{key}"), "is not known"));
        };
        let auto = section == "hyperparameters" && value == "auto";
        if !value.is_null() && !auto {
            *place = value.clone();
        }
    }
    Ok(())
}

/// The adapted modules: "all-linear" or a list of names, in canonical order, none twice.
fn targets(lora: &Fields) -> Result<Vec<Module>, FieldFault> {
    let key = "target_modules";
    let value = lora.value(key)?;
    if value == "all-linear" {
        return Ok(Module::ALL.to_vec());
    }
    let names = value.as_array().filter(|names| !names.is_empty());
    let names =
        names.ok_or_else(|| lora.fault(key, "must be \"all-linear\" or a list of names"))?;
    let mut targets = Vec::with_capacity(names.len());
    for name in names {
        let module = name.as_str().and_then(module_named);
        targets.push(module.ok_or_else(|| lora.fault(key, &format!("{name} is no module")))?);
    }
    targets.sort_unstable();
    targets.dedup();
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        examples: 144,
        hidden: 256,
        context: 1024,
        arena_rows: 4096,
        arena_rank_rows: 64 * 4096,
    };

    fn resolved(request: Value) -> Result<Resolved, FieldFault> {
        resolve("ftjob-a", 42, &request, &FACTS)
    }

    #[test]
    fn an_empty_request_gets_every_default() {
        let echo = json!({
            "hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0, "target_modules": "all-linear",
                     "use_rslora": false, "init": "default"},
            "training": {"learning_rate": 0.0016, "lr_scheduler": "linear", "warmup_ratio": 0.03,
                         "weight_decay": 0, "adam_beta1": 0.9, "adam_beta2": 0.999,
                         "max_grad_norm": 1, "max_sequence_length": 1024,
                         "checkpoint_every_steps": 50},
        });
        let nothing_given = [
            json!({}),
            json!({"hyperparameters": null, "lora": null, "training": null, "method": null}),
            json!({"hyperparameters": {"n_epochs": "auto", "batch_size": null}, "lora": {}}),
            json!({"method": {"type": "supervised", "supervised": {}}}),
        ];
        for request in nothing_given {
            let resolved = resolved(request).unwrap();
            assert_eq!(resolved.echo, echo);
            assert_eq!(resolved.spec.lora.targets, Module::ALL);
            assert_eq!((resolved.spec.lora.alpha, resolved.spec.training.seed), (32.0, 42));
        }
    }

    #[test]
    fn what_is_given_stays_and_the_rank_moves_its_defaults() {
        let request = json!({
            "hyperparameters": {"n_epochs": 7, "learning_rate_multiplier": 1.7},
            "lora": {"rank": 256, "target_modules": ["down_proj", "q_proj", "q_proj"],
                     "use_rslora": true, "init": "gaussian", "dropout": 0.05},
            "training": {"learning_rate": 2e-4, "lr_scheduler": "cosine", "warmup_ratio": 0},
        });
        let Resolved { spec, echo } = resolved(request).unwrap();
        assert_eq!(spec.training.learning_rate, 2e-4 * 1.7);
        assert_eq!(echo["training"]["learning_rate"], json!(2e-4));
        assert_eq!((spec.training.n_epochs, spec.training.scheduler), (7, Scheduler::Cosine));
        assert_eq!(spec.lora.targets, [Module::Q, Module::Down]);
        assert_eq!((spec.lora.alpha, spec.lora.init), (512.0, Init::Gaussian));
        // 64 × 4096 rank-rows hold 1024 rows of rank 256, as many as the context.
        assert_eq!(spec.training.max_sequence_length, 1024);
        let facts = Facts { arena_rank_rows: 256 * 100, ..FACTS };
        let small = resolve("ftjob-a", 42, &json!({"lora": {"rank": 256}}), &facts).unwrap();
        assert_eq!(small.spec.training.max_sequence_length, 100);
    }

    #[test]
    fn what_the_row_keeps_gives_the_same_spec_through_text() {
        for rate in [1.0 / 3.0, 0.1 + 0.2, 4e-3] {
            let request = json!({
                "method": {"type": "supervised", "supervised": {"hyperparameters":
                    {"learning_rate_multiplier": rate, "batch_size": 9}}},
                "lora": {"alpha": rate},
            });
            let first = resolved(request).unwrap();
            assert_eq!(first.spec.training.batch_size, 9);
            let row: Value = serde_json::from_str(&first.echo.to_string()).unwrap();
            assert_eq!(spec_of("ftjob-a", 42, &row).unwrap(), first.spec);
            let again = resolved(row).unwrap();
            assert_eq!((again.spec, again.echo), (first.spec, first.echo));
        }
    }

    #[test]
    fn faults_name_their_field() {
        let cases = [
            (json!({"lora": {"rank": 0}}), "lora.rank"),
            (json!({"lora": {"rank": 257}}), "lora.rank"),
            (json!({"lora": {"rank": 1.5}}), "lora.rank"),
            (json!({"lora": {"rank": "16"}}), "lora.rank"),
            (json!({"lora": {"alpha": 0}}), "lora.alpha"),
            (json!({"lora": {"dropout": 1}}), "lora.dropout"),
            (json!({"lora": {"target_modules": []}}), "lora.target_modules"),
            (json!({"lora": {"target_modules": ["lm_head"]}}), "lora.target_modules"),
            (json!({"lora": {"target_modules": "q_proj"}}), "lora.target_modules"),
            (json!({"lora": {"use_rslora": 1}}), "lora.use_rslora"),
            (json!({"lora": {"init": "auto"}}), "lora.init"),
            (json!({"lora": {"r": 8}}), "lora.r"),
            (json!({"lora": []}), "lora"),
            (json!({"hyperparameters": {"n_epochs": 51}}), "hyperparameters.n_epochs"),
            (json!({"hyperparameters": {"batch_size": 0}}), "hyperparameters.batch_size"),
            (
                json!({"hyperparameters": {"learning_rate_multiplier": 1e308},
                       "training": {"learning_rate": 1e10}}),
                "hyperparameters.learning_rate_multiplier",
            ),
            (
                json!({"hyperparameters": {"learning_rate_multiplier": 1e-300},
                       "training": {"learning_rate": 1e-300}}),
                "hyperparameters.learning_rate_multiplier",
            ),
            (json!({"training": {"lr_scheduler": "step"}}), "training.lr_scheduler"),
            (json!({"training": {"warmup_ratio": 1.1}}), "training.warmup_ratio"),
            (json!({"training": {"adam_beta2": 1}}), "training.adam_beta2"),
            (json!({"training": {"weight_decay": -1}}), "training.weight_decay"),
            (json!({"training": {"max_sequence_length": 1025}}), "training.max_sequence_length"),
            (json!({"training": {"checkpoint_every_steps": 0}}), "training.checkpoint_every_steps"),
            (json!({"method": {"type": "dpo"}}), "method.type"),
        ];
        for (request, field) in cases {
            assert_eq!(resolved(request.clone()).unwrap_err().field, field, "{request}");
        }
        let mut row = resolved(json!({})).unwrap().echo;
        row["training"].as_object_mut().unwrap().remove("adam_beta1");
        let fault = spec_of("ftjob-a", 42, &row).unwrap_err();
        assert_eq!(fault.to_string(), "training.adam_beta1: is missing");
    }

    #[test]
    fn defaults_follow_size_and_number_of_examples() {
        for (hidden, rate) in
            [(64, 4e-3), (256, 1.6e-3), (576, 7.1e-4), (1024, 4e-4), (2048, 2e-4), (8192, 2e-4)]
        {
            assert_eq!(default_learning_rate(hidden), rate, "hidden {hidden}");
        }
        for (examples, epochs) in [(0, 25), (10, 25), (20, 15), (99, 4), (100, 3), (100_000, 3)] {
            assert_eq!(default_epochs(examples), epochs, "{examples} examples");
        }
        for (examples, batch) in [(10, 4), (2_249, 4), (2_250, 5), (10_000, 20), (1_000_000, 64)] {
            assert_eq!(default_batch_size(examples), batch, "{examples} examples");
        }
    }
}
