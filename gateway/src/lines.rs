//! The syntax of JSON Lines, checked while a file streams by: UTF-8, one JSON object per line.
//! What the lines mean is for the job.

use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};

/// Checks a stream of chunks.
#[derive(Debug)]
pub struct LineCheck {
    line: Vec<u8>,
    number: u64,
    line_bytes_max: usize,
    fault: Option<String>,
}

impl LineCheck {
    /// Before the first byte.
    pub fn new(line_bytes_max: usize) -> LineCheck {
        LineCheck { line: Vec::new(), number: 0, line_bytes_max, fault: None }
    }

    /// Looks at the next bytes. After the first fault nothing more is looked at.
    pub fn feed(&mut self, mut chunk: &[u8]) {
        while self.fault.is_none() {
            match chunk.iter().position(|byte| *byte == b'\n') {
                Some(end) => {
                    self.append(&chunk[..end]);
                    self.end_line();
                    chunk = &chunk[end + 1..];
                }
                None => return self.append(chunk),
            }
        }
    }

    /// The first fault of the whole file.
    pub fn finish(mut self) -> Option<String> {
        if self.fault.is_none() {
            self.end_line();
        }
        self.fault
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.line.len() + bytes.len() > self.line_bytes_max {
            let (line, max) = (self.number + 1, self.line_bytes_max);
            self.fault = Some(format!("Line {line} is longer than {max} bytes."));
            self.line = Vec::new();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }

    fn end_line(&mut self) {
        if self.fault.is_some() {
            return;
        }
        self.number += 1;
        let bom: &[u8] = if self.number == 1 { "\u{feff}".as_bytes() } else { b"" };
        let bytes = self.line.strip_prefix(bom).unwrap_or(&self.line);
        self.fault = match std::str::from_utf8(bytes) {
            Err(_) => Some(format!("Line {} is not valid UTF-8.", self.number)),
            Ok(text) if text.trim().is_empty() || is_object(text) => None,
            Ok(_) => Some(format!("Line {} is not a valid JSON object.", self.number)),
        };
        self.line.clear();
    }
}

/// Whether a text is one JSON object; nothing of it is kept.
fn is_object(text: &str) -> bool {
    struct Object;
    impl<'de> Visitor<'de> for Object {
        type Value = ();

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok(())
        }
    }
    let mut json = serde_json::Deserializer::from_str(text);
    json.deserialize_map(Object).is_ok() && json.end().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(file: &[u8]) -> Option<String> {
        let whole = {
            let mut check = LineCheck::new(64);
            check.feed(file);
            check.finish()
        };
        // Chunk borders change nothing.
        for size in 1..5 {
            let mut check = LineCheck::new(64);
            file.chunks(size).for_each(|chunk| check.feed(chunk));
            assert_eq!(check.finish(), whole);
        }
        whole
    }

    #[test]
    fn good_files() {
        for file in ["{}", "{}\n", "\u{feff}{\"a\":1}\r\n\r\n {\"b\":[{}]} \n", "\n\n"] {
            assert_eq!(fault(file.as_bytes()), None, "{file:?}");
        }
    }

    #[test]
    fn the_first_fault_has_its_line_number() {
        let long = format!("{{}}\n{{\"a\":\"{}\"}}", "x".repeat(100));
        for (file, line) in [
            (&b"{}\n[]\n"[..], "Line 2 is not a valid JSON object."),
            (b"{}\n\n{\"a\":}\n{", "Line 3 is not a valid JSON object."),
            (b"{} {}", "Line 1 is not a valid JSON object."),
            (b"{\"a\":NaN}", "Line 1 is not a valid JSON object."),
            (b"{}\n{\"a\":\"\xff\"}", "Line 2 is not valid UTF-8."),
            (b"{}\n\xef\xbb\xbf{}", "Line 2 is not a valid JSON object."),
            (long.as_bytes(), "Line 2 is longer than 64 bytes."),
        ] {
            assert_eq!(fault(file).as_deref(), Some(line));
        }
    }
}
