//! Reads a JSONL training file line by line, in bounded memory beyond the examples themselves.

use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use super::chat::{chat, completion_message};
use super::fault::{FAULTS_MAX, FileFault, ReadError};
use super::{Chat, Dataset, Example, Format, Preference, Purpose};

/// Longest line read.
const LINE_BYTES_MAX: usize = 16 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const UNEXPECTED_FORMAT: &str =
    "Unexpected file format, expected either prompt/completion pairs or chat messages";

/// The object of one line.
type Object = Map<String, Value>;

/// Reads and checks a whole file. Stops after ten faults.
pub fn read(mut reader: impl BufRead, purpose: Purpose) -> Result<Dataset, ReadError> {
    let mut state = State::default();
    let mut line = Vec::new();
    let mut line_number = 0;
    while state.faults.len() < FAULTS_MAX {
        line.clear();
        let limit = LINE_BYTES_MAX as u64 + 1;
        if reader.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        line_number += 1;
        if line.len() > LINE_BYTES_MAX {
            let fault = format!("Line {line_number} is longer than {LINE_BYTES_MAX} bytes");
            state.faults.push(fault);
            break;
        }
        let text = match line_number {
            1 => line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&line),
            _ => &line,
        };
        if !text.trim_ascii().is_empty() {
            state.add_line(text, line_number);
        }
    }
    state.finish(purpose)
}

#[derive(Default)]
struct State {
    format: Option<Format>,
    examples: Vec<Example>,
    /// Lines that are not blank.
    count: usize,
    /// Examples before the format was known, in which no key of a format stood.
    unrecognised: Vec<usize>,
    faults: Vec<String>,
}

impl State {
    fn add_line(&mut self, text: &[u8], line_number: usize) {
        self.count += 1;
        let number = self.count;
        let Ok(object) = serde_json::from_slice::<Object>(text) else {
            self.faults.push(format!("Line {line_number} is not a valid JSON object"));
            return;
        };
        let found = format_of(&object);
        if self.format.is_none() {
            match found {
                Some(format) => self.set_format(format),
                None => {
                    if self.unrecognised.len() < FAULTS_MAX {
                        self.unrecognised.push(number);
                    }
                    return;
                }
            }
        }
        let Some(format) = self.format else { return };
        let example = match found {
            Some(other) if other != format => Err(format!(
                ": is in the {} format, but the file is in the {} format",
                other.as_str(),
                format.as_str()
            )),
            _ => example(object, format),
        };
        match example {
            Err(fault) => self.faults.push(format!("Example {number}{fault}")),
            Ok(example) if self.faults.is_empty() => self.examples.push(example),
            Ok(_) => self.examples.clear(),
        }
    }

    fn set_format(&mut self, format: Format) {
        self.format = Some(format);
        let key = required_keys(format)[0];
        let missing = |number: usize| format!("Example {number}: missing key \"{key}\"");
        self.faults.extend(std::mem::take(&mut self.unrecognised).into_iter().map(missing));
    }

    fn finish(mut self, purpose: Purpose) -> Result<Dataset, ReadError> {
        if !self.unrecognised.is_empty() {
            self.faults.push(UNEXPECTED_FORMAT.to_owned());
        }
        if !self.faults.is_empty() {
            self.faults.truncate(FAULTS_MAX);
            return Err(FileFault::content(purpose, &self.faults).into());
        }
        match self.format {
            Some(format) if self.count >= purpose.examples_min() => {
                Ok(Dataset { format, examples: self.examples })
            }
            _ => Err(FileFault::count(purpose, self.count).into()),
        }
    }
}

fn required_keys(format: Format) -> &'static [&'static str] {
    match format {
        Format::Chat => &["messages"],
        Format::Completion => &["prompt", "completion"],
        Format::Preference => &["input", "preferred_completion", "non_preferred_completion"],
    }
}

fn format_of(object: &Object) -> Option<Format> {
    [Format::Chat, Format::Completion, Format::Preference]
        .into_iter()
        .find(|format| required_keys(*format).iter().any(|key| object.contains_key(*key)))
}

/// One example; a fault is the text after `Example N`.
fn example(mut object: Object, format: Format) -> Result<Example, String> {
    if let Some(key) = required_keys(format).iter().find(|key| object.get(**key).is_none()) {
        return Err(format!(": missing key \"{key}\""));
    }
    match format {
        Format::Chat => {
            let chat = chat(object)?;
            if !ends_with_assistant(&chat) {
                return Err(": last message must be from the assistant".into());
            }
            if !chat.trained.contains(&true) {
                return Err(": no assistant message to train on".into());
            }
            Ok(Example::Chat(chat))
        }
        Format::Completion => {
            refuse_unknown_keys(&object, required_keys(format))?;
            let mut text = |key: &str| match object.remove(key) {
                Some(Value::String(text)) => Ok(text),
                _ => Err(format!(": \"{key}\" must be a string")),
            };
            Ok(Example::Completion { prompt: text("prompt")?, completion: text("completion")? })
        }
        Format::Preference => preference(object),
    }
}

fn preference(mut object: Object) -> Result<Example, String> {
    refuse_unknown_keys(&object, required_keys(Format::Preference))?;
    let Some(Value::Object(input)) = object.remove("input") else {
        return Err(": \"input\" must be an object".into());
    };
    let mut input = chat(input)?;
    if ends_with_assistant(&input)
        || input.messages.last().is_some_and(|last| last.role == crate::text::Role::System)
    {
        return Err(": input must end with a user or tool message".into());
    }
    input.trained.fill(false);
    let mut answer = |key: &str| completion_message(key, object.remove(key), &input);
    let preferred = answer("preferred_completion")?;
    let non_preferred = answer("non_preferred_completion")?;
    Ok(Example::Preference(Box::new(Preference { input, preferred, non_preferred })))
}

fn ends_with_assistant(chat: &Chat) -> bool {
    chat.messages.last().is_some_and(|last| last.role == crate::text::Role::Assistant)
}

/// A fault for the first key that is not one of `known`.
pub(super) fn refuse_unknown_keys(object: &Object, known: &[&str]) -> Result<(), String> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(format!(": unknown key {}", quoted(key))),
        None => Ok(()),
    }
}

/// A text of the file within a message: quoted, on one line, not too long.
pub(super) fn quoted(text: &str) -> String {
    let mut short: String = text.chars().take(64).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    Value::String(short).to_string()
}
