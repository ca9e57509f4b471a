//! A conversation as template variables. With a mark, every text that a client controls carries
//! it wherever it could become part of a control token; structure (roles, well-known keys) stays
//! as it is, so that templates decide alike with and without marks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use minijinja::Value;
use serde_json::Value as Json;

use super::message::{Conversation, Message};
use super::spellings::{Spellings, insert_marks};

/// Words of tool definitions that templates compare with. They are part of the interface, not a
/// client's text.
const STRUCTURE: [&str; 19] = [
    "type",
    "function",
    "name",
    "description",
    "parameters",
    "properties",
    "required",
    "items",
    "enum",
    "strict",
    "default",
    "object",
    "string",
    "number",
    "integer",
    "boolean",
    "array",
    "null",
    "arguments",
];

/// How this template wants tool calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallForm {
    /// Arguments as JSON text, not as an object.
    pub arguments_as_text: bool,
    /// Ids of nine letters or digits.
    pub short_ids: bool,
}

/// Turns a conversation into template variables.
pub struct Inputs<'a> {
    spellings: &'a Spellings,
    form: CallForm,
    mark: Option<char>,
    risky: Cell<bool>,
    private: RefCell<BTreeSet<char>>,
}

impl<'a> Inputs<'a> {
    /// Without a mark, texts stay as they are.
    pub fn new(spellings: &'a Spellings, form: CallForm, mark: Option<char>) -> Self {
        let (risky, private) = (Cell::new(false), RefCell::new(BTreeSet::new()));
        Self { spellings, form, mark, risky, private }
    }

    /// Whether some text seen so far could become part of a control token.
    pub fn risky(&self) -> bool {
        self.risky.get()
    }

    /// Characters of the private planes in the texts seen so far, where those were risky or not:
    /// a mark must be none of them.
    pub fn private_characters(&self) -> BTreeSet<char> {
        self.private.borrow().clone()
    }

    /// The variables that depend on the conversation.
    pub fn variables(&self, conversation: &Conversation<'_>) -> Vec<(String, Value)> {
        let messages: Vec<Value> =
            conversation.messages.iter().map(|message| self.message(message)).collect();
        // transformers always defines `tools`; templates ask whether it is none.
        let tools = match conversation.tools {
            [] => Value::from(()),
            tools => tools.iter().map(|tool| self.json(tool)).collect(),
        };
        let mut variables =
            vec![("messages".to_owned(), Value::from(messages)), ("tools".to_owned(), tools)];
        for (name, value) in conversation.template_kwargs {
            variables.push((name.clone(), self.setting(value)));
        }
        variables
    }

    /// A template variable that a client sets. Plain words choose between what the template has
    /// to say, as roles do; anything else is text.
    fn setting(&self, value: &Json) -> Value {
        let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        match value {
            Json::String(word) if word.chars().all(letter) => Value::from(word.as_str()),
            other => self.json(other),
        }
    }

    fn message(&self, message: &Message) -> Value {
        let content = message.content.as_deref().unwrap_or_default();
        let mut fields =
            vec![("role", Value::from(message.role.as_str())), ("content", self.text(content))];
        if let Some(name) = &message.name {
            fields.push(("name", self.text(name)));
        }
        if let Some(reasoning) = &message.reasoning_content {
            fields.push(("reasoning_content", self.text(reasoning)));
        }
        if let Some(id) = &message.tool_call_id {
            fields.push(("tool_call_id", self.call_id(id)));
        }
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| {
                let function = Value::from_pairs([
                    ("name", self.text(&call.name)),
                    ("arguments", self.arguments(&call.arguments)),
                ]);
                Value::from_pairs([
                    ("id", self.call_id(&call.id)),
                    ("type", Value::from("function")),
                    ("function", function),
                ])
            });
            fields.push(("tool_calls", calls.collect()));
        }
        Value::from_pairs(fields)
    }

    /// An object where the text is one and the template takes it, as `transformers` advises.
    fn arguments(&self, arguments: &str) -> Value {
        if !self.form.arguments_as_text
            && let Ok(object @ Json::Object(_)) = serde_json::from_str(arguments)
        {
            return self.json(&object);
        }
        self.text(arguments)
    }

    fn call_id(&self, id: &str) -> Value {
        if !self.form.short_ids {
            return self.text(id);
        }
        let letters: Vec<char> = id.chars().filter(char::is_ascii_alphanumeric).collect();
        let kept: String = letters[letters.len().saturating_sub(9)..].iter().collect();
        Value::from(format!("{kept:0>9}"))
    }

    fn json(&self, value: &Json) -> Value {
        match value {
            Json::Null => Value::from(()),
            Json::Bool(value) => Value::from(*value),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), _, _) => Value::from(value),
                (_, Some(value), _) => Value::from(value),
                (_, _, value) => Value::from(value.unwrap_or_default()),
            },
            Json::String(text) => self.word(text),
            Json::Array(items) => items.iter().map(|item| self.json(item)).collect(),
            Json::Object(fields) => Value::from_pairs(
                fields.iter().map(|(key, value)| (self.word(key), self.json(value))),
            ),
        }
    }

    fn word(&self, word: &str) -> Value {
        if STRUCTURE.contains(&word) { Value::from(word) } else { self.text(word) }
    }

    fn text(&self, text: &str) -> Value {
        if self.mark.is_none() {
            self.private.borrow_mut().extend(text.chars().filter(|c| *c >= '\u{f0000}'));
        }
        let breaks = self.spellings.breaks(text);
        if breaks.is_empty() {
            return Value::from(text);
        }
        self.risky.set(true);
        match self.mark {
            None => Value::from(text),
            Some(mark) => Value::from(insert_marks(text, &breaks, mark)),
        }
    }
}
