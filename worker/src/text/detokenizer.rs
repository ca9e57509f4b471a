//! Token ids to text while they are generated. Holds back what is not certain yet: bytes that
//! may still become a character, and text that may still become a stop string. The text does not
//! depend on how it was cut into tokens or calls.
//!
//! Bytes that can no longer become valid UTF-8 turn into one U+FFFD per maximal invalid subpart.

use std::sync::Arc;

use super::token_bytes::TokenBytes;

/// Where the generated text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextStart {
    /// It is a text of its own (a chat answer): the space that SentencePiece puts before a text
    /// is taken away.
    Fresh,
    /// It continues a prompt (`/v1/completions`): its first space counts.
    Continued,
}

/// Text that became certain with one token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// The text, perhaps empty.
    pub text: String,
    /// A stop string is complete: nothing follows.
    pub stopped: bool,
}

/// The state of one generated sequence.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    table: Arc<TokenBytes>,
    stops: Vec<String>,
    stops_armed: bool,
    /// Spaces still to be taken from the start.
    leading_spaces: usize,
    /// The start of a character.
    bytes: Vec<u8>,
    /// Decoded text that may be the start of a stop string.
    held: String,
    emitted_chars: usize,
    stopped: bool,
}

impl Detokenizer {
    /// For one sequence; empty stop strings count for nothing.
    pub fn new(table: Arc<TokenBytes>, stops: &[String], start: TextStart) -> Self {
        let leading_spaces = match start {
            TextStart::Fresh => table.leading_spaces,
            TextStart::Continued => 0,
        };
        Self {
            table,
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            stops_armed: true,
            leading_spaces,
            bytes: Vec::new(),
            held: String::new(),
            emitted_chars: 0,
            stopped: false,
        }
    }

    /// While disarmed (before the least number of tokens), stop strings are not looked for;
    /// text that passes then is never part of a later match.
    pub fn arm_stops(&mut self, armed: bool) {
        self.stops_armed = armed;
    }

    /// The bytes that `push` of this token would add to the text now. Over all tokens of a
    /// sequence they join to its text, except where it is cut or not valid UTF-8.
    pub fn bytes_of(&self, id: u32) -> &[u8] {
        let bytes = self.table.get(id);
        let spaces = bytes.iter().take_while(|byte| **byte == b' ').count();
        &bytes[spaces.min(self.leading_spaces)..]
    }

    /// Adds one token. After a stop nothing changes any more.
    pub fn push(&mut self, id: u32) -> Delta {
        if self.stopped {
            return Delta { text: String::new(), stopped: true };
        }
        let before = self.table.get(id).len();
        let new = self.bytes_of(id).to_vec();
        if before > 0 {
            let taken = before - new.len();
            self.leading_spaces = if new.is_empty() { self.leading_spaces - taken } else { 0 };
        }
        self.bytes.extend(new);
        self.decode();
        self.release()
    }

    /// Ends the sequence and returns the text that was held back: an unfinished character as
    /// one U+FFFD, the start of a stop string as it is.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        if !std::mem::take(&mut self.bytes).is_empty() {
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        let mut delta = self.release();
        if !delta.stopped {
            let rest = std::mem::take(&mut self.held);
            self.emitted_chars += rest.chars().count();
            delta.text.push_str(&rest);
        }
        self.stopped = true;
        delta.text
    }

    /// Characters returned so far: where a replayed sequence goes on.
    pub fn emitted_chars(&self) -> usize {
        self.emitted_chars
    }

    /// Moves complete characters from `bytes` to `held`.
    fn decode(&mut self) {
        let mut start = 0;
        loop {
            match std::str::from_utf8(&self.bytes[start..]) {
                Ok(text) => {
                    self.held.push_str(text);
                    start = self.bytes.len();
                }
                Err(error) => {
                    let valid = start + error.valid_up_to();
                    self.held.push_str(&String::from_utf8_lossy(&self.bytes[start..valid]));
                    start = valid;
                    if let Some(invalid) = error.error_len() {
                        self.held.push(char::REPLACEMENT_CHARACTER);
                        start += invalid;
                        continue;
                    }
                }
            }
            break;
        }
        self.bytes.drain(..start);
    }

    /// Takes from `held` what is certain.
    fn release(&mut self) -> Delta {
        let certain = match self.first_stop() {
            Some(start) => {
                self.stopped = true;
                start
            }
            None => self.held.len() - self.possible_stop_len(),
        };
        let rest = self.held.split_off(certain);
        let text = std::mem::replace(&mut self.held, rest);
        if self.stopped {
            self.held.clear();
            self.bytes.clear();
        }
        self.emitted_chars += text.chars().count();
        Delta { text, stopped: self.stopped }
    }

    /// Start of the stop string that is complete first (of several that end there, the longest):
    /// the one that reading character by character finds.
    fn first_stop(&self) -> Option<usize> {
        if !self.stops_armed {
            return None;
        }
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// Bytes at the end of `held` that may be the start of a stop string.
    fn possible_stop_len(&self) -> usize {
        if !self.stops_armed {
            return 0;
        }
        let longest = |stop: &String| {
            stop.char_indices()
                .map(|(at, _)| at)
                .rev()
                .find(|at| self.held.ends_with(&stop[..*at]))
                .unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}
