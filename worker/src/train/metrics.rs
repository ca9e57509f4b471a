//! What a job reports about its steps: rows of `step_metrics.csv`, metrics of checkpoints, and the
//! events that training itself writes.
//!
//! The texts are part of the HTTP contract. Events of status changes (started, paused, checkpoint
//! created, completed …) are written with those changes by the job's rows, not here.

use serde_json::{Map, Value, json};

/// First line of `step_metrics.csv`. Further columns may be added to the right only.
pub const CSV_HEADER: &str = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,\
    full_valid_loss,full_valid_mean_token_accuracy,learning_rate,grad_norm,tokens\n";

/// What one optimizer step came to. Losses and accuracies are means over trained tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: usize,
    /// Steps of the whole job.
    pub total_steps: usize,
    /// Loss of the step's examples, before its update.
    pub train_loss: f64,
    /// Share of their trained tokens that were the likeliest.
    pub train_accuracy: f64,
    /// Loss of a validation batch, where one was due.
    pub valid_loss: Option<f64>,
    /// Its accuracy.
    pub valid_accuracy: Option<f64>,
    /// Loss of the whole validation file, at an epoch's end.
    pub full_valid_loss: Option<f64>,
    /// Its accuracy.
    pub full_valid_accuracy: Option<f64>,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping; not finite where the update was skipped.
    pub grad_norm: f64,
    /// Tokens that went through training in this step.
    pub tokens: u64,
    /// The gradient was not finite, so the weights were left as they were.
    pub skipped: bool,
}

impl StepMetrics {
    /// The measured losses and accuracies under their names in replies; what is not finite counts
    /// as not measured, because JSON has no word for it.
    fn named(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let named = [
            ("train_loss", Some(self.train_loss)),
            ("train_mean_token_accuracy", Some(self.train_accuracy)),
            ("valid_loss", self.valid_loss),
            ("valid_mean_token_accuracy", self.valid_accuracy),
            ("full_valid_loss", self.full_valid_loss),
            ("full_valid_mean_token_accuracy", self.full_valid_accuracy),
        ];
        let measured = |(name, value): (_, Option<f64>)| Some((name, value?));
        named.into_iter().filter_map(measured).filter(|(_, value)| value.is_finite())
    }
}

/// The step's line of `step_metrics.csv`, newline included; an empty cell was not measured.
pub fn csv_row(metrics: &StepMetrics) -> String {
    let cells = [
        Some(metrics.train_loss),
        Some(metrics.train_accuracy),
        metrics.valid_loss,
        metrics.valid_accuracy,
        metrics.full_valid_loss,
        metrics.full_valid_accuracy,
        Some(metrics.learning_rate),
        Some(metrics.grad_norm),
    ];
    let cells = cells.map(|cell| cell.map_or_else(String::new, decimal));
    format!("{},{},{}\n", metrics.step, cells.join(","), metrics.tokens)
}

/// A finite number with nine significant digits and no exponent; empty where it is not finite.
fn decimal(value: f64) -> String {
    if !value.is_finite() {
        return String::new();
    }
    let places = if value == 0.0 { 8 } else { 8 - i64::from(exponent(value)) };
    format!("{value:.*}", usize::try_from(places).unwrap_or(0))
}

/// Power of ten of the value's first digit, once rounded to nine.
fn exponent(value: f64) -> i32 {
    let scientific = format!("{value:.8e}");
    scientific.split_once('e').and_then(|(_, power)| power.parse().ok()).unwrap_or(0)
}

/// `metrics` of a checkpoint made after the step.
pub fn checkpoint_metrics(metrics: &StepMetrics) -> Map<String, Value> {
    let mut object = Map::from_iter([("step".to_owned(), json!(metrics.step))]);
    object.extend(metrics.named().map(|(name, value)| (name.to_owned(), json!(value))));
    object
}

/// An event of a job, before it is a row. One with the same kind and key is the same event.
#[derive(Clone, Debug, PartialEq)]
pub struct JobNotice {
    /// What happened.
    pub kind: &'static str,
    /// The step, or what else tells its repetitions apart.
    pub key: i64,
    /// A warning; otherwise information.
    pub warn: bool,
    /// For people.
    pub message: String,
    /// Numbers of a metrics event; empty for a message.
    pub data: Map<String, Value>,
}

/// Which of a job's files an event speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// The file it learns from.
    Training,
    /// The file it is measured on.
    Validation,
}

impl FileRole {
    fn word(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Validation => "validation",
        }
    }
}

impl JobNotice {
    /// A step is done: its measured losses, with all numbers in `data`.
    pub fn step(metrics: &StepMetrics) -> Self {
        let StepMetrics { step, total_steps, .. } = *metrics;
        let loss = |loss: f64| match loss.is_finite() {
            true => format!("{loss:.2}"),
            false => "not finite".to_owned(),
        };
        let train = loss(metrics.train_loss);
        let mut message = format!("Step {step}/{total_steps}: training loss={train}");
        if let Some(valid) = metrics.valid_loss {
            message += &format!(", validation loss={}", loss(valid));
        }
        if let Some(valid) = metrics.full_valid_loss {
            message += &format!(", full validation loss={}", loss(valid));
        }
        let mut data = checkpoint_metrics(metrics);
        data.insert("total_steps".to_owned(), json!(total_steps));
        Self { kind: "step", key: key(step), warn: false, message, data }
    }

    /// A step's gradient was not finite, so its update was left out.
    pub fn skipped(metrics: &StepMetrics) -> Self {
        let StepMetrics { step, total_steps, .. } = *metrics;
        let message = format!(
            "Step {step}/{total_steps}: the gradient is not finite, so the weights were not updated"
        );
        Self::warning("skipped", key(step), message)
    }

    /// Examples of a file were cut at the end to `limit` tokens.
    pub fn truncated(file: FileRole, examples: usize, limit: usize) -> Self {
        let message = format!(
            "{examples} {} example(s) longer than {limit} tokens were cut at the end",
            file.word()
        );
        Self::warning("truncated", file as i64, message)
    }

    /// Examples of a file were left out, because the cut left nothing to train on.
    pub fn dropped(file: FileRole, examples: usize, limit: usize) -> Self {
        let message = format!(
            "{examples} {} example(s) were dropped: nothing to train on within {limit} tokens",
            file.word()
        );
        Self::warning("dropped", file as i64, message)
    }

    fn warning(kind: &'static str, key: i64, message: String) -> Self {
        Self { kind, key, warn: true, message, data: Map::new() }
    }
}

fn key(step: usize) -> i64 {
    i64::try_from(step).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> StepMetrics {
        StepMetrics {
            step: 3,
            total_steps: 10,
            train_loss: 0.7251,
            train_accuracy: 0.5,
            learning_rate: 2e-4,
            grad_norm: 12.0 + 1.0 / 3.0,
            tokens: 812,
            ..StepMetrics::default()
        }
    }

    fn validated() -> StepMetrics {
        StepMetrics {
            valid_loss: Some(1.0),
            valid_accuracy: Some(0.25),
            full_valid_loss: Some(1.125),
            full_valid_accuracy: Some(1.0),
            ..metrics()
        }
    }

    #[test]
    fn the_csv_begins_as_the_contract_says_and_rows_match_its_columns() {
        let contract = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy";
        assert!(CSV_HEADER.starts_with(contract) && CSV_HEADER.ends_with("tokens\n"));
        assert!(!CSV_HEADER.contains(' '));
        assert_eq!(
            csv_row(&metrics()),
            "3,0.725100000,0.500000000,,,,,0.000200000000,12.3333333,812\n"
        );
        for row in [csv_row(&metrics()), csv_row(&validated())] {
            assert_eq!(row.matches(',').count(), CSV_HEADER.matches(',').count());
        }
        assert!(csv_row(&validated()).contains(",1.00000000,0.250000000,1.12500000,1.00000000,"));
    }

    #[test]
    fn decimals_are_plain_and_keep_nine_digits() {
        let cases = [
            (0.0, "0.00000000"),
            (1.0, "1.00000000"),
            (9.999, "9.99900000"),
            (9.999_999_999_9, "10.0000000"),
            (-0.001_234_567_891, "-0.00123456789"),
            (1.5e-9, "0.00000000150000000"),
            (123_456_789_012.0, "123456789012"),
            (f64::NAN, ""),
            (f64::NEG_INFINITY, ""),
        ];
        for (value, expected) in cases {
            assert_eq!(decimal(value), expected);
        }
        for value in [f64::MAX, f64::MIN_POSITIVE, f64::from_bits(1), 1e22, 0.1 + 0.2] {
            let back: f64 = decimal(value).parse().unwrap();
            assert!((back - value).abs() <= value * 1e-8, "{value}");
        }
    }

    #[test]
    fn step_events_say_what_was_measured() {
        let event = JobNotice::step(&metrics());
        assert_eq!(event.message, "Step 3/10: training loss=0.73");
        assert_eq!((event.kind, event.key, event.warn), ("step", 3, false));
        let expected = json!({"step": 3, "total_steps": 10, "train_loss": 0.7251,
            "train_mean_token_accuracy": 0.5});
        assert_eq!(Value::Object(event.data), expected);

        let event = JobNotice::step(&validated());
        let losses = "training loss=0.73, validation loss=1.00, full validation loss=1.12";
        assert_eq!(event.message, format!("Step 3/10: {losses}"));
        let expected = json!({"step": 3, "total_steps": 10, "train_loss": 0.7251,
            "train_mean_token_accuracy": 0.5, "valid_loss": 1.0,
            "valid_mean_token_accuracy": 0.25, "full_valid_loss": 1.125,
            "full_valid_mean_token_accuracy": 1.0});
        assert_eq!(Value::Object(event.data), expected);
    }

    #[test]
    fn checkpoints_leave_out_what_was_not_measured() {
        let expected = json!({"step": 3, "train_loss": 0.7251, "train_mean_token_accuracy": 0.5});
        assert_eq!(Value::Object(checkpoint_metrics(&metrics())), expected);
        assert_eq!(checkpoint_metrics(&validated()).len(), 7);
    }

    #[test]
    fn nothing_that_is_not_finite_reaches_a_client() {
        let metrics = StepMetrics {
            train_loss: f64::NAN,
            grad_norm: f64::INFINITY,
            full_valid_loss: Some(f64::INFINITY),
            skipped: true,
            ..metrics()
        };
        assert_eq!(csv_row(&metrics), "3,,0.500000000,,,,,0.000200000000,,812\n");
        let event = JobNotice::step(&metrics);
        let losses = "training loss=not finite, full validation loss=not finite";
        assert_eq!(event.message, format!("Step 3/10: {losses}"));
        let expected = json!({"step": 3, "total_steps": 10, "train_mean_token_accuracy": 0.5});
        assert_eq!(Value::Object(event.data), expected);
        let event = JobNotice::skipped(&metrics);
        assert!(event.warn && event.key == 3 && event.data.is_empty());
        assert!(event.message.starts_with("Step 3/10: the gradient is not finite"));
    }

    #[test]
    fn warnings_of_the_two_files_are_two_events() {
        let training = JobNotice::truncated(FileRole::Training, 5, 1024);
        let text = "5 training example(s) longer than 1024 tokens were cut at the end";
        assert_eq!(training.message, text);
        let validation = JobNotice::truncated(FileRole::Validation, 5, 1024);
        assert_ne!((training.kind, training.key), (validation.kind, validation.key));
        let dropped = JobNotice::dropped(FileRole::Validation, 1, 64);
        let text = "1 validation example(s) were dropped: nothing to train on within 64 tokens";
        assert_eq!(dropped.message, text);
    }
}
