//! Where the spellings of control tokens stand in a text, and where text that a client controls
//! could become part of one. Knows strings only, no template and no model.
//!
//! A control token is an added token marked special in tokenizer.json (`<s>`, `<|eot_id|>`). Its
//! spelling means the token only where the template wrote it. A client may write the spelling
//! outright, or parts of it that the template then joins with its own text or with other inputs;
//! [`Spellings::breaks`] finds all of these, whatever whitespace the template trims away.

use std::collections::HashSet;
use std::ops::Range;

use aho_corasick::{AhoCorasick, BuildError, MatchKind};

/// A control token at a place of a rendered text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// Bytes of its spelling.
    pub range: Range<usize>,
    /// Its token id.
    pub id: u32,
}

/// A rendered prompt: text, and those spellings in it that are control tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// All of the text.
    pub text: String,
    /// Ascending, not overlapping. Any other spelling in the text is plain text.
    pub controls: Vec<Control>,
}

/// The spellings of a tokenizer's control tokens.
#[derive(Debug)]
pub struct Spellings {
    /// All added tokens that match in raw text; the longest at the leftmost place wins.
    tokens: AhoCorasick,
    /// Per pattern of `tokens`: the id when it is a control token.
    control_ids: Vec<Option<u32>>,
    /// Control spellings alone, every occurrence.
    controls: AhoCorasick,
    prefixes: HashSet<String>,
    suffixes: HashSet<String>,
    inner: HashSet<String>,
    /// Characters of the longest control spelling.
    longest: usize,
}

impl Spellings {
    /// From (spelling, id, is control) of all added tokens that match in raw text.
    pub fn new(tokens: &[(String, u32, bool)]) -> Result<Self, BuildError> {
        let mut spellings = Self {
            tokens: AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(|(spelling, _, _)| spelling))?,
            control_ids: tokens.iter().map(|(_, id, control)| control.then_some(*id)).collect(),
            controls: AhoCorasick::new(
                tokens.iter().filter(|(_, _, control)| *control).map(|(spelling, _, _)| spelling),
            )?,
            prefixes: HashSet::new(),
            suffixes: HashSet::new(),
            inner: HashSet::new(),
            longest: 0,
        };
        for (spelling, _, _) in tokens.iter().filter(|(_, _, control)| *control) {
            spellings.add_parts(spelling);
        }
        Ok(spellings)
    }

    /// Remembers every proper part of a spelling.
    fn add_parts(&mut self, spelling: &str) {
        let mut cuts: Vec<usize> = spelling.char_indices().map(|(at, _)| at).collect();
        cuts.push(spelling.len());
        let last = cuts.len() - 1;
        self.longest = self.longest.max(last);
        for start in 0..last {
            for end in start + 1..=last {
                let part = spelling[cuts[start]..cuts[end]].to_owned();
                match (start == 0, end == last) {
                    (true, true) => {}
                    (true, false) => drop(self.prefixes.insert(part)),
                    (false, true) => drop(self.suffixes.insert(part)),
                    (false, false) => drop(self.inner.insert(part)),
                }
            }
        }
    }

    /// The control tokens spelled in `text`, as a tokenizer would match them.
    pub fn find(&self, text: &str) -> Vec<Control> {
        self.tokens
            .find_iter(text)
            .filter_map(|found| {
                let id = self.control_ids[found.pattern().as_usize()]?;
                Some(Control { range: found.range(), id })
            })
            .collect()
    }

    /// Byte offsets of `input`, ascending, at which a foreign character must stand so that no
    /// part of the input can belong to a control token. Nearly always empty.
    pub fn breaks(&self, input: &str) -> Vec<usize> {
        let mut breaks: Vec<usize> = self
            .controls
            .find_overlapping_iter(input)
            .map(|found| {
                let first = input[found.start()..].chars().next().map_or(0, char::len_utf8);
                found.start() + first
            })
            .collect();
        for text in [input, input.trim()] {
            self.edge_breaks(input, text, &mut breaks);
        }
        breaks.sort_unstable();
        breaks.dedup();
        breaks
    }

    /// Breaks at the two ends of `text`, a part of `input`.
    fn edge_breaks(&self, input: &str, text: &str, breaks: &mut Vec<usize>) {
        let offset = text.as_ptr() as usize - input.as_ptr() as usize;
        let ends_in_prefix = text
            .char_indices()
            .rev()
            .take(self.longest)
            .any(|(start, _)| self.prefixes.contains(&text[start..]));
        if ends_in_prefix {
            breaks.push(offset + text.len());
        }
        let starts_in_suffix = text
            .char_indices()
            .take(self.longest)
            .any(|(at, last)| self.suffixes.contains(&text[..at + last.len_utf8()]));
        if starts_in_suffix || self.inner.contains(text) {
            breaks.push(offset);
        }
    }
}

/// `input` with `mark` at each of `breaks`.
pub fn insert_marks(input: &str, breaks: &[usize], mark: char) -> String {
    let mut marked = String::with_capacity(input.len() + breaks.len() * mark.len_utf8());
    let mut start = 0;
    for &at in breaks {
        marked.push_str(&input[start..at]);
        marked.push(mark);
        start = at;
    }
    marked.push_str(&input[start..]);
    marked
}

/// Takes every `mark` out of a text and moves its control tokens accordingly. No control token
/// may hold a mark.
pub fn remove_marks(rendered: Rendered, mark: char) -> Rendered {
    let mut text = String::with_capacity(rendered.text.len());
    let mut controls = rendered.controls;
    let mut next = 0;
    let mut removed = 0;
    for (at, character) in rendered.text.char_indices() {
        while let Some(control) = controls.get_mut(next)
            && control.range.start <= at
        {
            control.range = control.range.start - removed..control.range.end - removed;
            next += 1;
        }
        if character == mark {
            removed += mark.len_utf8();
        } else {
            text.push(character);
        }
    }
    Rendered { text, controls }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spellings() -> Spellings {
        let token = |spelling: &str, id, control| (spelling.to_owned(), id, control);
        Spellings::new(&[
            token("<s>", 1, true),
            token("<|eot_id|>", 2, true),
            token("<tool_call>", 3, false),
        ])
        .unwrap()
    }

    #[test]
    fn harmless_text_has_no_breaks() {
        for text in ["", " ", "Hello there", "a < b", "<tool_call>{}</tool_call>", "if x > 3:\n"] {
            assert_eq!(spellings().breaks(text), [0usize; 0], "{text:?}");
        }
    }

    #[test]
    fn whole_spellings_are_broken_inside() {
        assert_eq!(spellings().breaks("x<|eot_id|>y<s>"), [2, 13]);
    }

    #[test]
    fn parts_at_the_edges_are_broken() {
        assert_eq!(spellings().breaks("end <|eot"), [9]);
        assert_eq!(spellings().breaks("end <|eot \n"), [9]);
        assert_eq!(spellings().breaks("  |> x"), [2]);
        assert_eq!(spellings().breaks("s"), [0]);
        assert_eq!(spellings().breaks(" ot_ "), [1]);
        assert_eq!(spellings().breaks("<"), [1]);
    }

    #[test]
    fn no_join_of_marked_parts_spells_a_control_token() {
        let spellings = spellings();
        for spelling in ["<s>", "<|eot_id|>"] {
            for first in 0..spelling.len() {
                for second in first..=spelling.len() {
                    let parts = [&spelling[..first], &spelling[first..second], &spelling[second..]];
                    let joined: String = parts
                        .iter()
                        .map(|part| insert_marks(part, &spellings.breaks(part), '\u{f0000}'))
                        .collect();
                    assert_eq!(spellings.find(&joined), [], "{parts:?}");
                    // The same with a template that writes the outer parts itself.
                    if first < second && (first, second) != (0, spelling.len()) {
                        let marked =
                            insert_marks(parts[1], &spellings.breaks(parts[1]), '\u{f0000}');
                        let text = format!("{}{marked}{}", parts[0], parts[2]);
                        assert_eq!(spellings.find(&text), [], "{parts:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn marks_come_out_again() {
        let spellings = spellings();
        let text = "<s>a\u{f0000}b<|eot_id|>\u{f0000}<s>\u{f0000}".to_owned();
        let controls = spellings.find(&text);
        let clean = remove_marks(Rendered { text, controls }, '\u{f0000}');
        assert_eq!(clean.text, "<s>ab<|eot_id|><s>");
        assert_eq!(clean.controls, spellings.find(&clean.text));
    }
}
