//! `method` and the deprecated `hyperparameters`: two places for the same numbers, which must
//! agree where both are given.

use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{self, Fields, not_one_of};

/// How a job trains.
#[derive(Clone, Debug, PartialEq)]
pub struct Method {
    /// `supervised` or `dpo`.
    pub kind: &'static str,
    /// All of the method's, each given or `"auto"`.
    pub hyperparameters: Hyperparameters,
}

/// By name; a number or `"auto"`.
pub type Hyperparameters = Map<String, Value>;

/// Takes both fields from a request.
pub fn parse_method(body: &mut Fields) -> ApiResult<Method> {
    let given = parse_given(body)?;
    let old = match body.object("hyperparameters")? {
        Some(object) => Some(parse_hyperparameters(object, false)?),
        None => None,
    };
    let (kind, new) = given.unwrap_or(("supervised", None));
    if let (Some(new), Some(old)) = (&new, &old)
        && !agree(new, old)
    {
        return Err(ApiError::bad(
            "invalid_parameter_combination",
            "hyperparameters",
            format!(
                "'hyperparameters' and 'method.{kind}.hyperparameters' differ; \
                 give only one of them."
            ),
        ));
    }
    let mut hyperparameters = new.or(old).unwrap_or_else(auto_hyperparameters);
    if kind == "dpo" {
        hyperparameters.entry("beta").or_insert_with(|| json!("auto"));
    }
    Ok(Method { kind, hyperparameters })
}

fn auto_hyperparameters() -> Hyperparameters {
    let auto = |key: &str| (key.to_owned(), json!("auto"));
    [auto("n_epochs"), auto("batch_size"), auto("learning_rate_multiplier")].into_iter().collect()
}

fn agree(new: &Hyperparameters, old: &Hyperparameters) -> bool {
    old.iter().all(|(key, value)| new.get(key) == Some(value))
}

/// The type of `method` and its hyperparameters, if given.
fn parse_given(body: &mut Fields) -> ApiResult<Option<(&'static str, Option<Hyperparameters>)>> {
    const TYPES: [&str; 2] = ["supervised", "dpo"];
    let Some(mut method) = body.object("method")? else { return Ok(None) };
    let word = method.required_string("type")?;
    if word == "reinforcement" {
        let message = "Fine-tuning with method 'reinforcement' is not supported.";
        return Err(ApiError::unsupported_value("method.type", message));
    }
    let Some(kind) = TYPES.into_iter().find(|kind| *kind == word) else {
        return Err(not_one_of("method.type", &word, &TYPES));
    };
    let mut hyper = None;
    if let Some(mut own) = method.object(kind)? {
        if let Some(object) = own.object("hyperparameters")? {
            hyper = Some(parse_hyperparameters(object, kind == "dpo")?);
        }
        own.finish()?;
    }
    for other in ["supervised", "dpo", "reinforcement"] {
        if other != kind && method.take(other).is_some() {
            let path = format!("method.{other}");
            let message = format!("'{path}' is not allowed when 'method.type' is '{kind}'.");
            return Err(ApiError::bad("invalid_parameter_combination", path, message));
        }
    }
    method.finish()?;
    Ok(Some((kind, hyper)))
}

fn parse_hyperparameters(mut object: Fields, dpo: bool) -> ApiResult<Hyperparameters> {
    let mut hyper = Map::new();
    hyper.insert("n_epochs".to_owned(), auto_or_integer(&mut object, "n_epochs", 1, 50)?);
    hyper.insert("batch_size".to_owned(), auto_or_integer(&mut object, "batch_size", 1, 256)?);
    let key = "learning_rate_multiplier";
    hyper.insert(key.to_owned(), auto_or_positive(&mut object, key, f64::MAX)?);
    if dpo {
        hyper.insert("beta".to_owned(), auto_or_positive(&mut object, "beta", 2.0)?);
    }
    object.finish()?;
    Ok(hyper)
}

/// `"auto"` (also when absent) or an integer.
pub fn auto_or_integer(object: &mut Fields, key: &str, min: i64, max: i64) -> ApiResult<Value> {
    let path = object.path(key);
    match object.take(key) {
        None => Ok(json!("auto")),
        Some(Value::String(word)) if word == "auto" => Ok(json!("auto")),
        Some(value) => fields::integer(&value, &path, min, max).map(|n| json!(n)),
    }
}

/// `"auto"` (also when absent) or a number above 0.
pub fn auto_or_positive(object: &mut Fields, key: &str, max: f64) -> ApiResult<Value> {
    let path = object.path(key);
    match object.take(key) {
        None => Ok(json!("auto")),
        Some(Value::String(word)) if word == "auto" => Ok(json!("auto")),
        Some(value) => positive(&value, &path, max).map(|_| value),
    }
}

/// A number above 0.
pub fn positive(value: &Value, path: &str, max: f64) -> ApiResult<f64> {
    let number = fields::number(value, path, 0.0, max)?;
    if number == 0.0 {
        let message = format!(
            "Invalid '{path}': decimal below minimum value. \
             Expected a value > 0, but got {value} instead."
        );
        return Err(ApiError::bad("decimal_below_min_value", path, message));
    }
    Ok(number)
}
