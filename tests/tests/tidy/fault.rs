//! One broken rule at one place.

use std::fmt;

/// A place and what is wrong there; prints as `path:line: what`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    path: String,
    line: usize,
    what: String,
}

impl Fault {
    /// `line` counts from 1.
    pub fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

#[test]
fn prints_as_a_place_an_editor_can_open() {
    assert_eq!(Fault::new("a/b.rs", 3, "too long").to_string(), "a/b.rs:3: too long");
}
