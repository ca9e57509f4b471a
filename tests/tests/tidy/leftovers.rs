//! What must not stay in finished code: notes to self, unfinished bodies, tests that do not run,
//! panics that a user can reach.

use crate::fault::Fault;
use crate::rust::Rust;
use crate::tree::File;

/// Spelled in two halves, so that this file passes its own rule.
const WORDS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Notes to self in anything people write by hand.
pub fn check_words(file: &File) -> Vec<Fault> {
    let is_prose = matches!(file.extension(), "md" | "toml" | "sql" | "yml" | "yaml" | "jinja");
    if !file.is_code() && !is_prose {
        return Vec::new();
    }
    let mut faults = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let mut words = line.split(|c: char| !c.is_alphanumeric());
        if let Some(word) = words.find(|word| WORDS.contains(word)) {
            faults.push(Fault::new(&file.path, index + 1, format!("a note to self: {word}")));
        }
    }
    faults
}

/// Macros that stand for code not written or not meant to stay.
pub fn check_macros(rust: &Rust) -> Vec<Fault> {
    let mut faults = Vec::new();
    for name in ["todo", "unimplemented", "dbg"] {
        for at in rust.find(&[name, "!"]) {
            let what = format!("{name}! must not stay");
            faults.push(Fault::new(&rust.path, rust.tokens[at].line, what));
        }
    }
    faults
}

/// `.unwrap()` and `panic!` in product code.
pub fn check_panics(rust: &Rust) -> Vec<Fault> {
    let is_product = rust.path.starts_with("src/") || rust.path.contains("/src/");
    if !is_product {
        return Vec::new();
    }
    let mut faults = Vec::new();
    for (texts, what) in [
        (["panic", "!"].as_slice(), "panic! outside tests"),
        (&[".", "unwrap", "(", ")"], ".unwrap() outside tests"),
    ] {
        for at in rust.find(texts) {
            let line = rust.tokens[at].line;
            if !rust.is_test(line) {
                faults.push(Fault::new(&rust.path, line, what));
            }
        }
    }
    faults
}

/// Tests that are written but never run. Those that need a GPU run on a machine that has one:
/// `./dev gpu-test`.
pub fn check_ignored_tests(rust: &Rust) -> Vec<Fault> {
    let needs_gpu = |at: usize| {
        let reason = rust.tokens.get(at + 4).map(|token| token.text.as_str());
        reason.is_some_and(|reason| reason.starts_with("\"needs a GPU"))
    };
    let found = rust.find(&["#", "[", "ignore"]).filter(|&at| !needs_gpu(at));
    found.map(|at| Fault::new(&rust.path, rust.tokens[at].line, "a test that never runs")).collect()
}

#[cfg(test)]
fn lines(faults: &[Fault]) -> Vec<String> {
    faults.iter().map(Fault::to_string).collect()
}

#[test]
fn notes_to_self_fail_as_whole_words() {
    let text = format!("# {}: later\n# {}S are fine\n", WORDS[0], WORDS[0]);
    let faults = check_words(&File::of("a.py", &text));
    assert_eq!(lines(&faults), [format!("a.py:1: a note to self: {}", WORDS[0])]);
    assert_eq!(check_words(&File::of("a.json", &text)), []);
}

#[test]
fn unfinished_bodies_fail_even_in_tests_but_not_as_words() {
    let text = "fn a() { todo!() }\nfn todo() { let dbg = \"dbg!\"; }\n// unimplemented!\n";
    let faults = check_macros(&Rust::of("a/tests/b.rs", text));
    assert_eq!(lines(&faults), ["a/tests/b.rs:1: todo! must not stay"]);
}

#[test]
fn panics_fail_in_product_code_only() {
    let text = "fn a() {\n b.unwrap();\n panic!();\n b.unwrap_or(1);\n}\n\
        #[cfg(test)]\nmod tests {\n fn c() { d.unwrap() }\n}\n";
    let faults = check_panics(&Rust::of("a/src/b.rs", text));
    assert_eq!(
        lines(&faults),
        ["a/src/b.rs:3: panic! outside tests", "a/src/b.rs:2: .unwrap() outside tests"]
    );
    assert_eq!(check_panics(&Rust::of("a/tests/b.rs", text)), []);
}

#[test]
fn ignored_tests_fail() {
    let text = "#[test]\n#[ignore = \"slow\"]\nfn a() {}\n#[test]\n#[ignore = \"needs a GPU\"]\n\
        fn b() {}\n";
    let faults = check_ignored_tests(&Rust::of("a.rs", text));
    assert_eq!(lines(&faults), ["a.rs:2: a test that never runs"]);
}
