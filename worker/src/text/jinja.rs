//! jinja2 as `transformers` sets it up: its whitespace rules, its additions (`raise_exception`,
//! its own `tojson`, `{% generation %}`), Python's text forms, and bounds on a render's work.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use thiserror::Error;

use super::python;
use super::template::TemplateError;

/// Work of one render: about one unit per instruction and per 64 bytes made; ten megabytes of
/// conversation need less than half.
const FUEL: u64 = 8_000_000;
/// Nested macros, loops and includes.
const RECURSION_MAX: usize = 200;
/// Widest `tojson(indent=…)`.
const INDENT_MAX: usize = 32;

/// An environment without templates.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_debug(false);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&python::python_str(value)?)?));
    environment.set_unknown_method_callback(|state, value, method, args| {
        match (value.as_str(), method, args) {
            (Some(text), "removeprefix", [prefix]) => {
                let prefix = prefix.as_str().unwrap_or_default();
                Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
            }
            (Some(text), "removesuffix", [suffix]) => {
                let suffix = suffix.as_str().unwrap_or_default();
                Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
            }
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
        }
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        let error = Error::new(ErrorKind::InvalidOperation, "raised by the template");
        Err(error.with_source(Raised(message)))
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| python::python_str(value));
    // In Python a string is a sequence, and a mapping is one as far as jinja2 can tell.
    let has_items = |value: &Value| value.as_str().is_some() || value.try_iter().is_ok();
    environment
        .add_test("sequence", move |value: &Value| !value.is_undefined() && has_items(value));
    environment.add_test("iterable", has_items);
    environment
}

fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // What transformers sets by default may be said outright.
    let ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    if ascii == Some(true) || indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, "unsupported arguments of tojson"));
    }
    kwargs.assert_all_used()?;
    python::json_dumps(value, indent)
}

/// The text a template passed to `raise_exception`.
#[derive(Debug, Error)]
#[error("{0}")]
struct Raised(String);

/// A failed render as its cause.
pub(super) fn failure(error: Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::OverLimit;
    }
    TemplateError::Failed(describe(&error))
}

/// One line that names what is wrong.
pub(super) fn describe(error: &Error) -> String {
    let text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `{% generation %}` marks trained text for other trainers. It changes no text, so it becomes
/// a block that does nothing, with the same whitespace control.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else { break };
        let inner = &tag[2..end];
        let name = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let block = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(before);
        match block {
            Some(block) => out.push_str(&format!("{{%{}%}}", inner.replacen(name, block, 1))),
            None => out.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}
