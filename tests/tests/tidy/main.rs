//! The rules of this repository that a program can check, run over the whole tree.
//!
//! Each rule is a small pure function from text to faults, with a test beside it that shows it can
//! fail. Rules know paths, text and Rust tokens; they never build or run what they read.

mod crates;
mod fault;
mod layout;
mod leftovers;
mod limits;
mod names;
mod rust;
mod tree;

use fault::Fault;
use rust::Rust;
use std::path::Path;

#[test]
fn the_tree_keeps_its_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root");
    let files = tree::read(root).expect("the tree can be read");
    assert!(files.len() > 50, "only {} files under {}", files.len(), root.display());
    let mut faults = layout::check(&files);
    faults.extend(crates::check_manifests(&files));
    let test_only = tree::test_only_paths(&files);
    for file in &files {
        faults.extend(limits::check_file(file));
        faults.extend(leftovers::check_words(file));
        if !file.is_rust() {
            continue;
        }
        faults.extend(layout::check_module_doc(file));
        match Rust::parse(file) {
            Ok(mut rust) => {
                rust.test_only |= test_only.iter().any(|path| file.path.starts_with(path));
                faults.extend(check_rust(&rust));
            }
            Err(reason) => faults.push(Fault::new(&file.path, 1, reason)),
        }
    }
    faults.sort();
    let lines: Vec<String> = faults.iter().map(Fault::to_string).collect();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), lines.join("\n"));
}

fn check_rust(rust: &Rust) -> Vec<Fault> {
    let rules = [
        limits::check_functions,
        leftovers::check_macros,
        leftovers::check_panics,
        leftovers::check_ignored_tests,
        names::check_type_names,
        crates::check_unsafe,
        crates::check_sql,
        crates::check_worker_imports,
    ];
    rules.iter().flat_map(|rule| rule(rust)).collect()
}
