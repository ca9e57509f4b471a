//! The Compose services speak of what there is. That the file is one of Compose is checked against
//! its schema by `./dev test`.

use std::collections::BTreeSet;
use std::path::PathBuf;

fn text(path: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Words that begin like a setting of the binary.
fn settings(text: &str) -> BTreeSet<&str> {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    text.split(|letter| !is_part(letter)).filter(|word| word.starts_with("LOQUETIER_")).collect()
}

#[test]
fn services_set_only_what_the_binary_reads() {
    let compose = text("docker-compose.yml");
    let set = settings(&compose);
    assert!(set.len() >= 8, "{set:?}");
    let flags = text("src/cli.rs");
    let read: BTreeSet<&str> = flags
        .split("env = \"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap_or_default())
        .collect();
    let unknown: Vec<_> = set.difference(&read).collect();
    assert!(unknown.is_empty(), "docker-compose.yml sets {unknown:?}, which no flag reads");
}

#[test]
fn the_image_is_built_with_the_compiler_that_is_asked_for() {
    let manifest = text("Cargo.toml");
    let version = manifest.lines().find_map(|line| line.strip_prefix("rust-version = \""));
    let version = version.expect("a rust-version").trim_end_matches('"');
    assert!(text("Dockerfile").contains(&format!("FROM rust:{version}-")), "not Rust {version}");
}
