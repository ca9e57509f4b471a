//! How a fine-tuning job is to train: `method`, the deprecated `hyperparameters`, and the
//! extensions `lora` and `training`. Checked here, stored and echoed in one canonical form:
//!
//! `{"method": {"type", "<type>": {"hyperparameters"}}, "hyperparameters", "lora", "training"}`
//!
//! A hyperparameter is a value or `"auto"`; elsewhere what is left to the service is absent and
//! shown as `"auto"`. Validation resolves both.

use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{Fields, empty_array, max_items, not_one_of};
use crate::wire::hyperparameters::{
    Method, auto_or_integer, auto_or_positive, parse_method, positive,
};
use crate::wire::message::strings;

/// Linear layers an adapter may sit on.
pub const MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Shape of the adapter that a job continues from; the new one has the same.
#[derive(Clone, Debug, PartialEq)]
pub struct ParentShape {
    /// LoRA rank.
    pub rank: i64,
    /// LoRA alpha.
    pub alpha: f64,
    /// Scaled by alpha/√rank.
    pub use_rslora: bool,
    /// Modules with weights.
    pub target_modules: Vec<String>,
}

/// Parses all four objects into the canonical form.
pub fn parse_settings(body: &mut Fields, parent: Option<&ParentShape>) -> ApiResult<Value> {
    let Method { kind, hyperparameters } = parse_method(body)?;
    let shared: Map<String, Value> =
        hyperparameters.clone().into_iter().filter(|(key, _)| key != "beta").collect();
    let lora = parse_lora(body.object("lora")?, parent)?;
    let training = parse_training(body.object("training")?)?;
    Ok(json!({
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
        "hyperparameters": shared,
        "lora": lora,
        "training": training,
    }))
}

fn empty(path: &str) -> ApiResult<Fields> {
    Fields::of(Value::Object(Map::new()), path)
}

fn parse_lora(given: Option<Fields>, parent: Option<&ParentShape>) -> ApiResult<Value> {
    let mut lora = given.map_or_else(|| empty("lora"), Ok)?;
    let rank = lora.integer("rank", 1, 256)?;
    let alpha = lora.take("alpha");
    let alpha = alpha.map(|value| positive(&value, "lora.alpha", 1e6)).transpose()?;
    let dropout = lora.number("dropout", 0.0, 0.95)?.unwrap_or(0.0);
    let modules = parse_modules(lora.take("target_modules"))?;
    let use_rslora = lora.boolean("use_rslora")?;
    let init = lora.choice("init", &["default", "gaussian"])?.unwrap_or("default");
    lora.finish()?;
    if let Some(parent) = parent {
        check_parent("lora.rank", rank, &parent.rank)?;
        check_parent("lora.alpha", alpha, &parent.alpha)?;
        check_parent("lora.use_rslora", use_rslora, &parent.use_rslora)?;
        check_parent("lora.target_modules", modules.clone(), &parent.target_modules)?;
    }
    let rank = parent.map(|parent| parent.rank).or(rank).unwrap_or(16);
    let alpha = parent.map(|parent| parent.alpha).or(alpha).unwrap_or(2.0 * rank as f64);
    let modules = match parent.map(|parent| parent.target_modules.clone()).or(modules) {
        Some(list) => json!(list),
        None => json!("all-linear"),
    };
    let use_rslora = parent.map(|parent| parent.use_rslora).or(use_rslora).unwrap_or(false);
    Ok(json!({
        "rank": rank,
        "alpha": plain_number(alpha),
        "dropout": plain_number(dropout),
        "target_modules": modules,
        "use_rslora": use_rslora,
        "init": init,
    }))
}

/// A job that continues an adapter keeps its shape.
fn check_parent<T: PartialEq>(path: &str, given: Option<T>, parent: &T) -> ApiResult<()> {
    match given {
        Some(given) if given != *parent => Err(ApiError::invalid_value(
            path,
            format!("Invalid '{path}': it must be that of the model you continue from."),
        )),
        _ => Ok(()),
    }
}

/// None stands for all linear layers; a list comes back in the canonical order.
fn parse_modules(given: Option<Value>) -> ApiResult<Option<Vec<String>>> {
    const PATH: &str = "lora.target_modules";
    let items = match given {
        None => return Ok(None),
        Some(Value::String(word)) if word == "all-linear" => return Ok(None),
        Some(Value::String(word)) => return Err(not_one_of(PATH, &word, &["all-linear"])),
        Some(Value::Array(items)) => items,
        Some(other) => {
            return Err(ApiError::invalid_type(PATH, "a string or an array", &other));
        }
    };
    if items.is_empty() {
        return Err(empty_array(PATH));
    }
    max_items(items.len(), PATH, MODULES.len())?;
    let names = strings(items, PATH)?;
    for (i, name) in names.iter().enumerate() {
        let path = format!("{PATH}[{i}]");
        if !MODULES.contains(&name.as_str()) {
            return Err(not_one_of(&path, name, &MODULES));
        }
        if names[..i].contains(name) {
            return Err(ApiError::invalid_value(path, format!("'{name}' is listed twice.")));
        }
    }
    let listed = |module: &&str| names.iter().any(|name| name == module);
    Ok(Some(MODULES.into_iter().filter(listed).map(str::to_owned).collect()))
}

fn parse_training(given: Option<Fields>) -> ApiResult<Value> {
    const SCHEDULES: [&str; 3] = ["linear", "cosine", "constant"];
    /// Adam's decay rates stay below one.
    const BETA_MAX: f64 = 0.999_999;
    let mut object = given.map_or_else(|| empty("training"), Ok)?;
    let schedule = object.choice("lr_scheduler", &SCHEDULES)?.unwrap_or("linear");
    let every = object.integer("checkpoint_every_steps", 1, 1_000_000)?.unwrap_or(50);
    let mut settings = json!({
        "lr_scheduler": schedule,
        "warmup_ratio": plain_number(object.number("warmup_ratio", 0.0, 1.0)?.unwrap_or(0.03)),
        "weight_decay": plain_number(object.number("weight_decay", 0.0, 1.0)?.unwrap_or(0.0)),
        "adam_beta1": plain_number(object.number("adam_beta1", 0.0, BETA_MAX)?.unwrap_or(0.9)),
        "adam_beta2": plain_number(object.number("adam_beta2", 0.0, BETA_MAX)?.unwrap_or(0.999)),
        "max_grad_norm": plain_number(object.number("max_grad_norm", 0.0, 1e6)?.unwrap_or(1.0)),
        "checkpoint_every_steps": every,
    });
    let rate = auto_or_positive(&mut object, "learning_rate", 1.0)?;
    let longest = auto_or_integer(&mut object, "max_sequence_length", 1, 1 << 24)?;
    for (key, value) in [("learning_rate", rate), ("max_sequence_length", longest)] {
        if value != "auto" {
            settings[key] = value;
        }
    }
    object.finish()?;
    Ok(settings)
}

/// The settings as a job shows them: what validation resolved, else what was asked for.
pub fn echo(request: &Value, resolved: Option<&Value>) -> Echo {
    let overlaid = |section: &str| {
        let mut map = request[section].as_object().cloned().unwrap_or_default();
        for (key, value) in resolved.and_then(|all| all[section].as_object()).into_iter().flatten()
        {
            map.insert(key.clone(), value.clone());
        }
        map
    };
    let hyperparameters = overlaid("hyperparameters");
    let mut method = request["method"].clone();
    let kind = method["type"].as_str().unwrap_or("supervised").to_owned();
    for (key, value) in &hyperparameters {
        method[&kind]["hyperparameters"][key] = value.clone();
    }
    let mut training = overlaid("training");
    for key in ["learning_rate", "max_sequence_length"] {
        training.entry(key).or_insert_with(|| json!("auto"));
    }
    Echo { method, hyperparameters, lora: overlaid("lora"), training }
}

/// The four objects of a job's reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Echo {
    /// `method`.
    pub method: Value,
    /// `hyperparameters`.
    pub hyperparameters: Map<String, Value>,
    /// `lora`.
    pub lora: Map<String, Value>,
    /// `training`.
    pub training: Map<String, Value>,
}

/// Whole numbers without a decimal point, as clients would have sent them.
fn plain_number(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(body: &str) -> ApiResult<Value> {
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        let settings = parse_settings(&mut fields, None)?;
        fields.finish()?;
        Ok(settings)
    }

    #[test]
    fn everything_has_a_default() {
        let all = settings("{}").unwrap();
        let auto = json!({
            "n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"
        });
        assert_eq!(all["method"]["type"], "supervised");
        assert_eq!(all["method"]["supervised"]["hyperparameters"], auto);
        assert_eq!(all["hyperparameters"], auto);
        assert_eq!(all["lora"]["rank"], 16);
        assert_eq!(all["lora"]["alpha"], 32);
        assert_eq!(all["lora"]["target_modules"], "all-linear");
        assert_eq!(all["training"]["checkpoint_every_steps"], 50);
        let shown = echo(&all, None);
        assert_eq!(shown.training["learning_rate"], "auto");
        let resolved = json!({
            "hyperparameters": {"n_epochs": 3},
            "training": {"learning_rate": 0.004},
        });
        let shown = echo(&all, Some(&resolved));
        assert_eq!(shown.training["learning_rate"], 0.004);
        assert_eq!(shown.hyperparameters["n_epochs"], 3);
        assert_eq!(shown.hyperparameters["batch_size"], "auto");
        assert_eq!(shown.method["supervised"]["hyperparameters"]["n_epochs"], 3);
    }

    #[test]
    fn faults_name_the_whole_path() {
        let long = r#"{"method":{"type":"dpo","dpo":{"hyperparameters":{"beta":3}}}}"#;
        for (body, param, code) in [
            (r#"{"lora":{"rank":0}}"#, "lora.rank", "integer_below_min_value"),
            (r#"{"lora":{"rnak":8}}"#, "lora.rnak", "unknown_parameter"),
            (r#"{"lora":{"dropout":"a"}}"#, "lora.dropout", "invalid_type"),
            (r#"{"lora":{"target_modules":[]}}"#, "lora.target_modules", "empty_array"),
            (r#"{"lora":{"target_modules":["x"]}}"#, "lora.target_modules[0]", "invalid_value"),
            (
                r#"{"training":{"learning_rate":0}}"#,
                "training.learning_rate",
                "decimal_below_min_value",
            ),
            (r#"{"training":{"epochs":1}}"#, "training.epochs", "unknown_parameter"),
            (r#"{"method":{"type":"reinforcement"}}"#, "method.type", "unsupported_value"),
            (r#"{"method":{"type":"x"}}"#, "method.type", "invalid_value"),
            (r#"{"method":{}}"#, "method.type", "missing_required_parameter"),
            (long, "method.dpo.hyperparameters.beta", "decimal_above_max_value"),
            (
                r#"{"hyperparameters":{"n_epochs":51}}"#,
                "hyperparameters.n_epochs",
                "integer_above_max_value",
            ),
        ] {
            let error = settings(body).unwrap_err().reply().error;
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert_eq!(error.code, Some(code), "{body}");
        }
    }

    #[test]
    fn old_and_new_hyperparameters_must_agree() {
        let method =
            r#""method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":3}}}"#;
        assert!(settings(&format!("{{{method},\"hyperparameters\":{{\"n_epochs\":3}}}}")).is_ok());
        let error =
            settings(&format!("{{{method},\"hyperparameters\":{{\"n_epochs\":4}}}}")).unwrap_err();
        assert_eq!(error.reply().error.code, Some("invalid_parameter_combination"));
    }

    #[test]
    fn dpo_has_a_beta_of_its_own_only() {
        let all = settings(r#"{"method":{"type":"dpo"}}"#).unwrap();
        assert_eq!(all["method"]["dpo"]["hyperparameters"]["beta"], "auto");
        assert!(all["hyperparameters"].get("beta").is_none());
    }

    #[test]
    fn a_continued_adapter_keeps_its_shape() {
        let parent = ParentShape {
            rank: 8,
            alpha: 8.0,
            use_rslora: false,
            target_modules: vec!["q_proj".to_owned()],
        };
        let mut fields = Fields::parse(b"{\"lora\":{\"rank\":8}}").unwrap();
        let all = parse_settings(&mut fields, Some(&parent)).unwrap();
        assert_eq!(all["lora"]["alpha"], 8);
        assert_eq!(all["lora"]["target_modules"], json!(["q_proj"]));
        let mut fields = Fields::parse(b"{\"lora\":{\"rank\":16}}").unwrap();
        let error = parse_settings(&mut fields, Some(&parent)).unwrap_err();
        assert_eq!(error.reply().error.param.as_deref(), Some("lora.rank"));
    }
}
