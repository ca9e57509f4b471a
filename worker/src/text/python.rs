//! Python's text forms of values, which templates written for jinja2 rely on: `json.dumps`,
//! `str()`, `repr()` and `strftime`.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use time::OffsetDateTime;
use time::format_description::parse_strftime_owned;

/// Deepest nesting written; inputs nest less (the JSON parser stops at 128).
const DEPTH_MAX: usize = 256;

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: keys keep their order, separators are
/// `", "` and `": "`, with an indent `","` and a line break.
pub fn json_dumps(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let mut out = String::new();
    write_json(&mut out, value, indent, 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        return Err(Error::new(ErrorKind::BadSerialization, "value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::Map => {
            out.push('{');
            let mut empty = true;
            for key in value.try_iter()? {
                separate(out, empty, indent, depth + 1);
                empty = false;
                match key.as_str() {
                    Some(text) => write_json_string(out, text),
                    None => write_json_string(out, &json_dumps(&key, None)?),
                }
                out.push_str(": ");
                write_json(out, &value.get_item(&key)?, indent, depth + 1)?;
            }
            close(out, empty, indent, depth, '}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                separate(out, empty, indent, depth + 1);
                empty = false;
                write_json(out, &item, indent, depth + 1)?;
            }
            close(out, empty, indent, depth, ']');
        }
        ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default()),
        kind => {
            let detail = format!("a value of type {kind} has no JSON form");
            return Err(Error::new(ErrorKind::BadSerialization, detail));
        }
    }
    Ok(())
}

fn separate(out: &mut String, first: bool, indent: Option<usize>, depth: usize) {
    match indent {
        Some(width) => {
            out.push_str(if first { "\n" } else { ",\n" });
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
        None if first => {}
        None => out.push_str(", "),
    }
}

fn close(out: &mut String, empty: bool, indent: Option<usize>, depth: usize, bracket: char) {
    if let (Some(width), false) = (indent, empty) {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
    out.push(bracket);
}

fn write_json_string(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if control < ' ' => {
                let _ = write!(out, "\\u{:04x}", control as u32);
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

/// Integers as they are, floats in the shortest form as Python writes them (`1.0`, `1e-05`).
fn write_number(out: &mut String, value: &Value) {
    match f64::try_from(value.clone()) {
        Ok(number) if !value.is_integer() => write_float(out, number),
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

fn write_float(out: &mut String, number: f64) {
    if !number.is_finite() {
        let name = if number.is_nan() { "NaN" } else { "Infinity" };
        out.push_str(if number < 0.0 { "-Infinity" } else { name });
        return;
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
    } else {
        let plain = format!("{number}");
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    }
}

/// `str(value)`: what jinja2 prints for an expression.
pub fn python_str(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        ValueKind::Undefined => Ok(String::new()),
        _ => {
            let mut out = String::new();
            write_repr(&mut out, value, 0)?;
            Ok(out)
        }
    }
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        return Err(Error::new(ErrorKind::BadSerialization, "value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::String => write_repr_string(out, value.as_str().unwrap_or_default()),
        // Namespaces, functions and the like are maps to the engine but print as themselves.
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn write_repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            same if same == quote => {
                out.push('\\');
                out.push(same);
            }
            control if control < ' ' || control == '\u{7f}' => {
                let _ = write!(out, "\\x{:02x}", control as u32);
            }
            other => out.push(other),
        }
    }
    out.push(quote);
}

/// `datetime.strftime(format)` of a time in UTC.
pub fn strftime(unix_time: i64, format: &str) -> Result<String, Error> {
    let fault = |reason: String| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now(\"{format}\"): {reason}"))
    };
    let moment =
        OffsetDateTime::from_unix_timestamp(unix_time).map_err(|e| fault(e.to_string()))?;
    let items = parse_strftime_owned(format).map_err(|e| fault(e.to_string()))?;
    moment.format(&items).map_err(|e| fault(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_does() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123456789012345.6, "123456789012345.6"),
            (1e15, "1000000000000000.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e300, "1.5e+300"),
        ];
        for (number, text) in cases {
            assert_eq!(json_dumps(&Value::from(number), None).unwrap(), text);
        }
    }

    #[test]
    fn json_keeps_order_escapes_and_indents() {
        let value = Value::from_pairs([
            (Value::from("z"), Value::from(vec![Value::from(1), Value::from(true)])),
            (Value::from("a"), Value::from("é\u{1}\"\n<b>")),
        ]);
        assert_eq!(
            json_dumps(&value, None).unwrap(),
            "{\"z\": [1, true], \"a\": \"é\\u0001\\\"\\n<b>\"}"
        );
        let empty = Value::from_pairs([(Value::from("k"), Value::from(Vec::<Value>::new()))]);
        assert_eq!(json_dumps(&empty, Some(2)).unwrap(), "{\n  \"k\": []\n}");
    }

    #[test]
    fn dates_follow_the_given_time() {
        assert_eq!(strftime(1_722_000_000, "%d %b %Y").unwrap(), "26 Jul 2024");
        assert!(strftime(0, "%Q").is_err());
    }
}
