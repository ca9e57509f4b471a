//! Names that say nothing about the thing they name.

use crate::fault::Fault;
use crate::rust::Rust;

/// As the last word of a type's name.
const EMPTY_WORDS: [&str; 8] =
    ["Manager", "Helper", "Util", "Service", "Context", "Data", "Info", "Handler"];

/// Types declared with a name that ends in an empty word.
pub fn check_type_names(rust: &Rust) -> Vec<Fault> {
    let mut faults = Vec::new();
    for keyword in ["struct", "enum", "trait", "type", "union"] {
        for at in rust.find(&[keyword]) {
            let Some(name) = rust.tokens.get(at + 1).map(|token| token.text.as_str()) else {
                continue;
            };
            let word = last_word(name);
            if EMPTY_WORDS.contains(&word) {
                let what = format!("type {name} is named {word}; say what it is");
                faults.push(Fault::new(&rust.path, rust.tokens[at].line, what));
            }
        }
    }
    faults
}

/// `KeyManager` → `Manager`; an acronym counts as part of the word after it.
fn last_word(name: &str) -> &str {
    let start = name.char_indices().rev().find(|(_, letter)| letter.is_uppercase());
    start.map_or(name, |(index, _)| &name[index..])
}

#[test]
fn empty_names_fail_as_whole_words() {
    let text = "struct KeyManager;\nenum Metadata {}\ntrait Data {}\nstruct Infos;\n\
        type DataRow = u8;\nstruct UserInfo<T>(T);\n";
    let faults = check_type_names(&Rust::of("a.rs", text));
    let mut lines: Vec<String> = faults.iter().map(Fault::to_string).collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            "a.rs:1: type KeyManager is named Manager; say what it is",
            "a.rs:3: type Data is named Data; say what it is",
            "a.rs:6: type UserInfo is named Info; say what it is",
        ]
    );
}
