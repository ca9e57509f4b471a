//! A base's chat template, rendered as `transformers` renders it with jinja2: block trimming,
//! Python's text forms and methods, `raise_exception`, `strftime_now`, loop controls.
//!
//! A render is bounded: work and memory by fuel, nesting by a recursion limit, output by size.
//! Control tokens in the result come from the template alone (see [`super::spellings`]).

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde_json::{Map, json};
use thiserror::Error;

use super::inputs::{CallForm, Inputs};
use super::message::{Conversation, Ending, Message, Role, ToolCall};
use super::python;
use super::spellings::{Rendered, Spellings, remove_marks};
use super::template_source::TemplateSource;

/// Work of one render: about one unit per instruction and per 64 bytes made. Long conversations
/// need some hundred thousand.
const FUEL: u64 = 8_000_000;
/// Nested macros, loops and includes.
const RECURSION_MAX: usize = 200;
/// Largest rendered text; contexts are far smaller.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
/// Widest `tojson(indent=…)`.
const INDENT_MAX: usize = 32;
/// Marks come from the private planes, where texts rarely hold anything.
const MARKS: std::ops::RangeInclusive<char> = '\u{f0000}'..='\u{10fffd}';
/// Variables that a client may not set.
const RESERVED: [&str; 6] =
    ["messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception", "namespace"];

/// Why a template could not be loaded, or a conversation not be rendered.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// The base has none.
    #[error("the model has no chat template")]
    Missing,
    /// Unreadable, or a syntax error, found at start.
    #[error("chat template is not usable: {0}")]
    Invalid(String),
    /// The template refused the conversation, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the model's chat template cannot render this conversation: {0}")]
    Failed(String),
    /// A limit of rendering was reached.
    #[error("the conversation is too large for the model's chat template")]
    OverLimit,
    /// `chat_template_kwargs` names a variable that clients may not set.
    #[error("chat_template_kwargs must not set \"{0}\"")]
    Reserved(String),
    /// The last message is not one to continue.
    #[error("only a last assistant message that the template writes out can be continued")]
    NothingToContinue,
}

impl TemplateError {
    /// Whether the conversation is at fault (else the base's files are).
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Invalid(_))
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    tokens: Vec<(String, String)>,
    form: CallForm,
}

impl ChatTemplate {
    /// From a folder in Hugging Face layout; none when it has no template.
    pub fn load(folder: &Path) -> Result<Option<Self>, TemplateError> {
        TemplateSource::read(folder)?.map(Self::compile).transpose()
    }

    /// From the bytes of `tokenizer_config.json` and `chat_template.jinja`.
    pub fn parse(
        config: Option<&[u8]>,
        jinja: Option<&[u8]>,
    ) -> Result<Option<Self>, TemplateError> {
        TemplateSource::parse(config, jinja)?.map(Self::compile).transpose()
    }

    fn compile(source: TemplateSource) -> Result<Self, TemplateError> {
        let mut environment = environment();
        let has_tool_use = source.tool_use.is_some();
        let short_ids = source.default.contains("length != 9");
        let named = [("default", Some(source.default)), ("tool_use", source.tool_use)];
        for (name, text) in named {
            let Some(text) = text else { continue };
            let text = without_generation_tags(&text);
            environment.add_template_owned(name, text).map_err(|error| {
                let line = error.line().unwrap_or_default();
                TemplateError::Invalid(format!("line {line}: {}", describe(&error)))
            })?;
        }
        let mut template = Self {
            environment,
            has_tool_use,
            tokens: source.tokens,
            form: CallForm { arguments_as_text: false, short_ids },
        };
        template.form.arguments_as_text = template.wants_arguments_as_text()?;
        Ok(template)
    }

    /// Renders a conversation. `spellings` are the control tokens of the base's tokenizer.
    pub fn render(
        &self,
        conversation: &Conversation<'_>,
        spellings: &Spellings,
    ) -> Result<Rendered, TemplateError> {
        let reserved = |name: &&String| {
            RESERVED.contains(&name.as_str()) || self.tokens.iter().any(|(token, _)| token == *name)
        };
        if let Some(name) = conversation.template_kwargs.keys().find(reserved) {
            return Err(TemplateError::Reserved(name.clone()));
        }
        if conversation.ending == Ending::Continue {
            return self.render_continued(conversation, spellings);
        }
        let inputs = Inputs::new(spellings, self.form, None);
        let text = self.render_text(conversation, &inputs)?;
        if !inputs.risky() {
            return Ok(Rendered { controls: spellings.find(&text), text });
        }
        let mut used = inputs.private_characters();
        used.extend(text.chars().filter(|character| MARKS.contains(character)));
        let mark = MARKS.into_iter().find(|mark| !used.contains(mark));
        let mark = mark.ok_or(TemplateError::OverLimit)?;
        let text =
            self.render_text(conversation, &Inputs::new(spellings, self.form, Some(mark)))?;
        let controls = spellings.find(&text);
        Ok(remove_marks(Rendered { text, controls }, mark))
    }

    /// Cuts the closed conversation behind its last message's text, as `transformers` does.
    fn render_continued(
        &self,
        conversation: &Conversation<'_>,
        spellings: &Spellings,
    ) -> Result<Rendered, TemplateError> {
        let Some((last, earlier)) = conversation.messages.split_last() else {
            return Err(TemplateError::NothingToContinue);
        };
        if last.role != Role::Assistant || !last.tool_calls.is_empty() {
            return Err(TemplateError::NothingToContinue);
        }
        let content = last.content.as_deref().unwrap_or_default().trim();
        if content.is_empty() {
            let open = Conversation { messages: earlier, ending: Ending::Open, ..*conversation };
            return self.render(&open, spellings);
        }
        let closed = Conversation { ending: Ending::Closed, ..*conversation };
        let mut rendered = self.render(&closed, spellings)?;
        let start = rendered.text.rfind(content).ok_or(TemplateError::NothingToContinue)?;
        rendered.text.truncate(start + content.len());
        rendered.controls.retain(|control| control.range.end <= rendered.text.len());
        Ok(rendered)
    }

    fn render_text(
        &self,
        conversation: &Conversation<'_>,
        inputs: &Inputs<'_>,
    ) -> Result<String, TemplateError> {
        let named = self.tokens.iter().map(|(name, text)| (name.clone(), Value::from(&**text)));
        let mut variables: Vec<(String, Value)> = named.collect();
        variables.extend(inputs.variables(conversation));
        let open = conversation.ending == Ending::Open;
        variables.push(("add_generation_prompt".into(), Value::from(open)));
        let unix_time = conversation.unix_time;
        let now = move |format: &str| python::strftime(unix_time, format);
        variables.push(("strftime_now".into(), Value::from_function(now)));
        let name = match self.has_tool_use && !conversation.tools.is_empty() {
            true => "tool_use",
            false => "default",
        };
        let text = self
            .environment
            .get_template(name)
            .and_then(|template| template.render(Value::from_pairs(variables)))
            .map_err(failure)?;
        if text.len() > OUTPUT_BYTES_MAX {
            return Err(TemplateError::OverLimit);
        }
        Ok(text)
    }

    /// Whether only JSON text comes out right where a call's arguments stand: some templates add
    /// them to a string. Found by rendering a call both ways.
    fn wants_arguments_as_text(&self) -> Result<bool, TemplateError> {
        let spellings =
            Spellings::new(&[]).map_err(|error| TemplateError::Invalid(error.to_string()))?;
        let mut call = Message::new(Role::Assistant, "");
        call.tool_calls.push(ToolCall {
            id: "abcdefghi".into(),
            name: "probe".into(),
            arguments: r#"{"needle": 7}"#.into(),
        });
        let messages = [Message::new(Role::User, "x"), call];
        let tools = [json!({"type": "function", "function": {"name": "probe",
            "description": "x", "parameters": {"type": "object", "properties": {}}}})];
        let conversation = Conversation {
            messages: &messages,
            tools: &tools,
            template_kwargs: &Map::new(),
            ending: Ending::Closed,
            unix_time: 0,
        };
        let shows = |arguments_as_text: bool| {
            let form = CallForm { arguments_as_text, ..self.form };
            let text = self.render_text(&conversation, &Inputs::new(&spellings, form, None));
            text.is_ok_and(|text| text.contains("needle"))
        };
        Ok(!shows(false) && shows(true))
    }
}

fn environment() -> Environment<'static> {
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

fn failure(error: Error) -> TemplateError {
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
fn describe(error: &Error) -> String {
    let text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `{% generation %}` marks trained text for other trainers. It changes no text, so it becomes
/// a block that does nothing, with the same whitespace control.
fn without_generation_tags(source: &str) -> String {
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
