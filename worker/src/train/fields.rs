//! Typed reading of a section of a request's JSON: every fault names the field by its path.

use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// A field of a request that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldFault {
    /// Path of the field, as `lora.rank`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Typed reading of one section; every fault carries the path.
pub struct Fields<'a> {
    section: &'static str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The section of that name.
    pub fn of(echo: &'a Value, section: &'static str) -> Result<Self, FieldFault> {
        let object = echo.get(section).and_then(Value::as_object).ok_or_else(|| FieldFault {
            field: section.to_owned(),
            problem: "must be an object".to_owned(),
        })?;
        Ok(Self { section, object })
    }

    /// A fault of one of its fields.
    pub fn fault(&self, key: &str, problem: &str) -> FieldFault {
        FieldFault { field: format!("{}.{key}", self.section), problem: problem.to_owned() }
    }

    /// A field's value; absent is a fault.
    pub fn value(&self, key: &str) -> Result<&'a Value, FieldFault> {
        self.object.get(key).ok_or_else(|| self.fault(key, "is missing"))
    }

    /// A whole number within the range.
    pub fn integer(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize, FieldFault> {
        let value = self.value(key)?;
        let whole = |x: &f64| x.fract() == 0.0 && (0.0..=9e15).contains(x);
        let number = value.as_u64().or_else(|| value.as_f64().filter(whole).map(|x| x as u64));
        let number = number.and_then(|number| usize::try_from(number).ok());
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            self.fault(key, &format!("must be an integer from {least} to {most}, but is {value}"))
        })
    }

    /// A number that is allowed; `expected` says in words what is.
    pub fn decimal(
        &self,
        key: &str,
        expected: &str,
        allowed: impl Fn(f64) -> bool,
    ) -> Result<f64, FieldFault> {
        let value = self.value(key)?;
        value
            .as_f64()
            .filter(|&number| allowed(number))
            .ok_or_else(|| self.fault(key, &format!("must be a number {expected}, but is {value}")))
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<bool, FieldFault> {
        self.value(key)?.as_bool().ok_or_else(|| self.fault(key, "must be true or false"))
    }

    /// One of the named choices.
    pub fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, FieldFault> {
        let value = self.value(key)?;
        let found = choices.iter().find(|(name, _)| value == name);
        found.map(|&(_, choice)| choice).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|&(name, _)| name).collect();
            self.fault(key, &format!("must be one of {}, but is {value}", names.join(", ")))
        })
    }
}
