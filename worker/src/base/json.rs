//! Typed access to the fields of a JSON object, with errors that name field and value.
//!
//! `null` counts as absent, as Hugging Face writes unset fields.

use serde_json::{Map, Value};

/// A field that cannot be used, or a file that is no JSON object (then `field` is empty).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", if field.is_empty() { String::new() } else { format!("field `{field}` ") })]
pub struct FieldError {
    /// The field, nested ones with dots.
    pub field: String,
    /// Continues a sentence that starts with the field.
    pub reason: String,
}

/// Longest value quoted in an error, in characters.
const QUOTED_CHARS: usize = 80;

/// `text` on one line and of bounded length, for errors about what a stranger's file holds.
pub(crate) fn quoted(text: &str, chars: usize) -> String {
    let mut quoted = String::new();
    for (at, c) in text.chars().enumerate() {
        if at == chars {
            quoted.push('…');
            break;
        }
        match c.is_control() {
            true => quoted.extend(c.escape_debug()),
            false => quoted.push(c),
        }
    }
    quoted
}

/// Reads the text of a JSON object.
pub(crate) fn object(text: &[u8]) -> Result<Map<String, Value>, FieldError> {
    let fault = |reason: String| FieldError { field: String::new(), reason };
    match serde_json::from_slice(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(fault("is not a JSON object".into())),
        Err(error) => Err(fault(quoted(&format!("is not JSON: {error}"), 2 * QUOTED_CHARS))),
    }
}

/// The fields of one object.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, prefix: "" }
    }

    /// The value of a field that is there and not null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether there is no field at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether the field is written down, be it as null.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// An error about `name` and its value.
    pub(crate) fn fault(&self, name: &str, reason: &str) -> FieldError {
        let reason = match self.get(name) {
            None => format!("is missing: {reason}"),
            Some(value) => {
                let quoted = quoted(&value.to_string(), QUOTED_CHARS);
                format!("is {quoted}: {reason}")
            }
        };
        FieldError { field: format!("{}{name}", self.prefix), reason }
    }

    /// A whole number from 1 to `limit`.
    pub(crate) fn count(&self, name: &str, limit: usize) -> Result<Option<usize>, FieldError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(count) if count >= 1 && count <= limit as u64 => Ok(Some(count as usize)),
            _ => Err(self.fault(name, &format!("a whole number from 1 to {limit} is needed"))),
        }
    }

    /// As [`Fields::count`], required.
    pub(crate) fn need_count(&self, name: &str, limit: usize) -> Result<usize, FieldError> {
        let count = self.count(name, limit)?;
        count.ok_or_else(|| self.fault(name, &format!("a whole number up to {limit} is needed")))
    }

    /// A finite number above zero.
    pub(crate) fn positive(&self, name: &str) -> Result<Option<f64>, FieldError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(self.fault(name, "a number above 0 is needed")),
        }
    }

    /// As [`Fields::positive`], required.
    pub(crate) fn need_positive(&self, name: &str) -> Result<f64, FieldError> {
        self.positive(name)?.ok_or_else(|| self.fault(name, "a number above 0 is needed"))
    }

    /// A boolean; absent is false.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, FieldError> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.fault(name, "true or false is needed")),
        }
    }

    /// A string.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, FieldError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.fault(name, "a string is needed")),
        }
    }

    /// A nested object; errors about its fields start with `prefix`.
    pub(crate) fn nested(
        &self,
        name: &str,
        prefix: &'a str,
    ) -> Result<Option<Fields<'a>>, FieldError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map, prefix })),
            Some(_) => Err(self.fault(name, "an object is needed")),
        }
    }

    /// Refuses a field that is set to anything but null, false, 0, an empty list or object.
    pub(crate) fn refuse_set(&self, name: &str, reason: &str) -> Result<(), FieldError> {
        let set = match self.get(name) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => *flag,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::String(_)) => true,
        };
        if set { Err(self.fault(name, reason)) } else { Ok(()) }
    }
}
