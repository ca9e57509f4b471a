//! A base's chat template, rendered as `transformers` renders it with jinja2: block trimming,
//! Python's text forms and methods, `raise_exception`, `strftime_now`, loop controls.
//!
//! A render is bounded: work and memory by fuel, nesting by a recursion limit, output by size.
//! Control tokens in the result come from the template alone (see [`super::spellings`]).

use std::path::Path;

use minijinja::{Environment, Value};
use serde_json::{Map, json};
use thiserror::Error;

use super::inputs::{CallForm, Inputs};
use super::jinja::{describe, environment, failure, without_generation_tags};
use super::message::{Conversation, Ending, Message, Role, ToolCall};
use super::python;
use super::spellings::{Rendered, Spellings, remove_marks};
use super::template_source::TemplateSource;

/// Largest rendered text; contexts are far smaller.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
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
        let marked = Inputs::new(spellings, self.form, Some(mark));
        let marked_text = self.render_text(conversation, &marked)?;
        let controls = spellings.find(&marked_text);
        let rendered = remove_marks(Rendered { text: marked_text, controls }, mark);
        if rendered.text == text {
            return Ok(rendered);
        }
        // The template decided otherwise for a marked input. Where that did not change which
        // control tokens there are, all of the first text's are the template's own.
        let controls = spellings.find(&text);
        if controls.iter().map(|c| c.id).eq(rendered.controls.iter().map(|c| c.id)) {
            return Ok(Rendered { text, controls });
        }
        Ok(rendered)
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
