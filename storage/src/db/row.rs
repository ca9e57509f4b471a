//! Reading columns: names, JSON texts and enums, with the column named when it cannot be read.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::AnyRow;
use sqlx::{Any, Decode, Row, Type};

use crate::error::{Error, Result};

/// A column's value.
pub(super) fn get<'r, T>(row: &'r AnyRow, column: &'static str) -> Result<T>
where
    T: Decode<'r, Any> + Type<Any>,
{
    Ok(row.try_get(column)?)
}

/// A 0/1 column.
pub(super) fn flag(row: &AnyRow, column: &'static str) -> Result<bool> {
    Ok(get::<i64>(row, column)? != 0)
}

/// A JSON text column.
pub(super) fn json<T: DeserializeOwned>(row: &AnyRow, column: &'static str) -> Result<T> {
    parse(column, &get::<String>(row, column)?)
}

/// A JSON text column that may be NULL.
pub(super) fn json_or_null<T: DeserializeOwned>(
    row: &AnyRow,
    column: &'static str,
) -> Result<Option<T>> {
    get::<Option<String>>(row, column)?.map(|text| parse(column, &text)).transpose()
}

/// JSON text for a column; U+0000 inside strings becomes an escape.
pub(super) fn to_json<T: Serialize>(column: &'static str, value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::Unreadable { column, reason: error.to_string() })
}

/// A closed set of words.
pub(super) fn word<T>(
    row: &AnyRow,
    column: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T> {
    let text: String = get(row, column)?;
    parse(&text).ok_or_else(|| Error::Unreadable { column, reason: format!("unknown {text:?}") })
}

fn parse<T: DeserializeOwned>(column: &'static str, text: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|error| Error::Unreadable { column, reason: error.to_string() })
}
