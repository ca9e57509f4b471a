//! Reads a JSON object field by field with errors that name the field's path.
//!
//! Policy: `null` means "not given"; what is left over at the end is an unknown parameter. Nothing
//! here knows what a field means.

use serde_json::{Map, Number, Value};

use crate::error::{ApiError, ApiResult};

/// A JSON object being taken apart.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Path of the object itself; empty at the top.
    path: String,
}

impl Fields {
    /// Parses a request body. Depth is bounded by the parser (128); `NaN`, `Infinity` and numbers
    /// beyond a double are not JSON.
    pub fn parse(body: &[u8]) -> ApiResult<Fields> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields { map, path: String::new() }),
            _ => Err(ApiError::not_json()),
        }
    }

    /// An object found at `path`.
    pub fn of(value: Value, path: impl Into<String>) -> ApiResult<Fields> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { map, path }),
            other => Err(ApiError::invalid_type(path, "an object", &other)),
        }
    }

    /// Full path of one key.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Takes a value; `null` is absent.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    /// Takes a value and says whether the key was there, `null` included.
    pub fn take_raw(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key)
    }

    /// The error for a required key that is absent.
    pub fn missing(&self, key: &str) -> ApiError {
        ApiError::missing(self.path(key))
    }

    /// A string, if given.
    pub fn string(&mut self, key: &str) -> ApiResult<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::invalid_type(self.path(key), "a string", &other)),
        }
    }

    /// A string that must be given.
    pub fn required_string(&mut self, key: &str) -> ApiResult<String> {
        self.string(key)?.ok_or_else(|| self.missing(key))
    }

    /// A boolean, if given.
    pub fn boolean(&mut self, key: &str) -> ApiResult<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(ApiError::invalid_type(self.path(key), "a boolean", &other)),
        }
    }

    /// An integer within `min..=max`, if given.
    pub fn integer(&mut self, key: &str, min: i64, max: i64) -> ApiResult<Option<i64>> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => integer(&value, &self.path(key), min, max).map(Some),
        }
    }

    /// A number within `min..=max`, if given.
    pub fn number(&mut self, key: &str, min: f64, max: f64) -> ApiResult<Option<f64>> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => number(&value, &self.path(key), min, max).map(Some),
        }
    }

    /// An array, if given.
    pub fn array(&mut self, key: &str) -> ApiResult<Option<Vec<Value>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(ApiError::invalid_type(self.path(key), "an array", &other)),
        }
    }

    /// A nested object, if given.
    pub fn object(&mut self, key: &str) -> ApiResult<Option<Fields>> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => Fields::of(value, self.path(key)).map(Some),
        }
    }

    /// One of `allowed`, if given.
    pub fn choice<'a>(&mut self, key: &str, allowed: &[&'a str]) -> ApiResult<Option<&'a str>> {
        let Some(text) = self.string(key)? else { return Ok(None) };
        match allowed.iter().find(|value| **value == text) {
            Some(value) => Ok(Some(value)),
            None => Err(not_one_of(&self.path(key), &text, allowed)),
        }
    }

    /// Ends the reading: any key left is unknown.
    pub fn finish(self) -> ApiResult<()> {
        match self.map.keys().next() {
            Some(key) => Err(ApiError::unknown_parameter(self.path(&clip(key)))),
            None => Ok(()),
        }
    }

    /// What is left, for objects whose keys are free.
    pub fn rest(self) -> Map<String, Value> {
        self.map
    }
}

/// The error for a value outside its list.
pub fn not_one_of(path: &str, got: &str, allowed: &[&str]) -> ApiError {
    let list: Vec<String> = allowed.iter().map(|value| format!("'{value}'")).collect();
    let message =
        format!("Invalid value: '{}'. Supported values are: {}.", clip(got), list.join(", "));
    ApiError::invalid_value(path, message)
}

/// A string value at `path`.
pub fn text(value: Value, path: &str) -> ApiResult<String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(ApiError::invalid_type(path, "a string", &other)),
    }
}

/// An integer value within `min..=max` at `path`.
pub fn integer(value: &Value, path: &str, min: i64, max: i64) -> ApiResult<i64> {
    let Value::Number(number) = value else {
        return Err(ApiError::invalid_type(path, "an integer", value));
    };
    let below = || {
        let message = format!(
            "Invalid '{path}': integer below minimum value. \
             Expected a value >= {min}, but got {number} instead."
        );
        ApiError::bad("integer_below_min_value", path, message)
    };
    let above = || {
        let message = format!(
            "Invalid '{path}': integer above maximum value. \
             Expected a value <= {max}, but got {number} instead."
        );
        ApiError::bad("integer_above_max_value", path, message)
    };
    match (number.as_i64(), number.as_f64()) {
        (Some(n), _) if n < min => Err(below()),
        (Some(n), _) if n > max => Err(above()),
        (Some(n), _) => Ok(n),
        // Integers beyond 64 bits arrive as doubles.
        (None, Some(f)) if f.fract() == 0.0 && f >= 9e18 => Err(above()),
        (None, Some(f)) if f.fract() == 0.0 && f <= -9e18 => Err(below()),
        _ => Err(ApiError::invalid_type(path, "an integer", value)),
    }
}

/// A number value within `min..=max` at `path`.
pub fn number(value: &Value, path: &str, min: f64, max: f64) -> ApiResult<f64> {
    let finite = match value {
        Value::Number(number) => number.as_f64().filter(|f| f.is_finite()),
        _ => None,
    };
    let Some(f) = finite else {
        return Err(ApiError::invalid_type(path, "a number", value));
    };
    let got: &Number = match value {
        Value::Number(number) => number,
        _ => return Err(ApiError::invalid_type(path, "a number", value)),
    };
    if f < min {
        let message = format!(
            "Invalid '{path}': decimal below minimum value. \
             Expected a value >= {min}, but got {got} instead."
        );
        return Err(ApiError::bad("decimal_below_min_value", path, message));
    }
    if f > max {
        let message = format!(
            "Invalid '{path}': decimal above maximum value. \
             Expected a value <= {max}, but got {got} instead."
        );
        return Err(ApiError::bad("decimal_above_max_value", path, message));
    }
    Ok(f)
}

/// Refuses U+0000 in a field that is stored.
pub fn no_nul(text: &str, path: &str) -> ApiResult<()> {
    if text.contains('\0') {
        let message = format!("Invalid '{path}': must not contain the null character.");
        return Err(ApiError::invalid_value(path, message));
    }
    Ok(())
}

/// Refuses strings of more than `max` characters.
pub fn max_chars(text: &str, path: &str, max: usize) -> ApiResult<()> {
    let got = text.chars().count();
    if got > max {
        let message = format!(
            "Invalid '{path}': string too long. \
             Expected a string with maximum length {max}, \
             but got a string with length {got} instead."
        );
        return Err(ApiError::bad("string_above_max_length", path, message));
    }
    Ok(())
}

/// Refuses arrays of more than `max` items.
pub fn max_items(got: usize, path: &str, max: usize) -> ApiResult<()> {
    if got > max {
        let message = format!(
            "Invalid '{path}': array too long. \
             Expected an array with maximum length {max}, \
             but got an array with length {got} instead."
        );
        return Err(ApiError::bad("array_above_max_length", path, message));
    }
    Ok(())
}

/// The error for an array that must not be empty.
pub fn empty_array(path: &str) -> ApiError {
    let message = format!(
        "Invalid '{path}': empty array. \
         Expected an array with minimum length 1, but got an empty array instead."
    );
    ApiError::bad("empty_array", path, message)
}

/// `metadata`: at most 16 pairs, keys of 64 and string values of 512 characters, no U+0000.
pub fn metadata(fields: &mut Fields) -> ApiResult<Option<Map<String, Value>>> {
    let Some(object) = fields.object("metadata")? else { return Ok(None) };
    let path = fields.path("metadata");
    let map = object.rest();
    if map.len() > 16 {
        let message = format!(
            "Invalid '{path}': too many properties. \
             Expected at most 16 properties, but got {} properties instead.",
            map.len()
        );
        return Err(ApiError::invalid_value(path, message));
    }
    for (key, value) in &map {
        let at = format!("{path}.{}", clip(key));
        max_chars(key, &at, 64)?;
        no_nul(key, &at)?;
        match value {
            Value::String(text) => {
                max_chars(text, &at, 512)?;
                no_nul(text, &at)?;
            }
            other => return Err(ApiError::invalid_type(at, "a string", other)),
        }
    }
    Ok(Some(map))
}

/// A client's text as it may appear in a message: bounded.
pub fn clip(text: &str) -> String {
    const SHOWN_CHARS: usize = 100;
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(error: ApiError) -> (Option<&'static str>, String) {
        let body = error.reply().error;
        (body.code, body.message)
    }

    #[test]
    fn numbers_name_their_bounds() {
        let mut fields = Fields::parse(br#"{"temperature": 3, "n": "2", "k": 1.5}"#).unwrap();
        let (code, message) = code_of(fields.number("temperature", 0.0, 2.0).unwrap_err());
        assert_eq!(code, Some("decimal_above_max_value"));
        assert_eq!(
            message,
            "Invalid 'temperature': decimal above maximum value. \
             Expected a value <= 2, but got 3 instead."
        );
        let (code, message) = code_of(fields.integer("n", 1, 128).unwrap_err());
        assert_eq!(code, Some("invalid_type"));
        assert_eq!(message, "Invalid type for 'n': expected an integer, but got a string instead.");
        let (_, message) = code_of(fields.integer("k", 1, 128).unwrap_err());
        assert!(message.contains("got a decimal number"), "{message}");
    }

    #[test]
    fn integers_beyond_64_bits_are_out_of_range_not_of_another_type() {
        for (text, code) in [
            ("9223372036854775808", "integer_above_max_value"),
            ("1000000000000000000000000", "integer_above_max_value"),
            ("-1000000000000000000000000", "integer_below_min_value"),
        ] {
            let body = format!("{{\"seed\": {text}}}");
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            let error = fields.integer("seed", i64::MIN, i64::MAX).unwrap_err();
            assert_eq!(code_of(error).0, Some(code));
        }
    }

    #[test]
    fn null_is_absent_and_leftovers_are_unknown() {
        let mut fields = Fields::parse(br#"{"a": null, "b": {"c": 1}}"#).unwrap();
        assert_eq!(fields.string("a").unwrap(), None);
        let nested = fields.object("b").unwrap().unwrap();
        let (code, message) = code_of(nested.finish().unwrap_err());
        assert_eq!(code, Some("unknown_parameter"));
        assert_eq!(message, "Unknown parameter: 'b.c'.");
        fields.finish().unwrap();
    }

    #[test]
    fn what_is_not_json_is_said_so() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        for body in ["", "{", "[]", "{\"a\": NaN}", "{\"a\": 1e999}", "{\"a\":\"\\ud800\"}", &deep]
        {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(error.reply().error.message.starts_with("We could not parse"));
        }
    }
}
