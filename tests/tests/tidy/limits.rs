//! How long a line, a function and a file may be.

use crate::fault::Fault;
use crate::rust::Rust;
use crate::tree::File;

const LINE_CHARS_MAX: usize = 100;
const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 400;
/// Large enough for the demo base, small enough to clone.
const FILE_BYTES_MAX: u64 = 12 * 1024 * 1024;

/// Bytes of any file; lines and their length in code.
pub fn check_file(file: &File) -> Vec<Fault> {
    let mut faults = Vec::new();
    if file.bytes > FILE_BYTES_MAX {
        faults.push(Fault::new(&file.path, 1, format!("file has {} bytes", file.bytes)));
    }
    if !file.is_code() {
        return faults;
    }
    let lines = file.text.lines().count();
    if lines > FILE_LINES_MAX {
        let what = format!("file has {lines} lines, more than {FILE_LINES_MAX}");
        faults.push(Fault::new(&file.path, lines, what));
    }
    for (index, line) in file.text.lines().enumerate() {
        let chars = line.chars().count();
        if chars > LINE_CHARS_MAX && !line.contains("://") {
            let what = format!("line has {chars} characters, more than {LINE_CHARS_MAX}");
            faults.push(Fault::new(&file.path, index + 1, what));
        }
    }
    faults
}

/// Lines of a function, from `fn` to its closing brace.
pub fn check_functions(rust: &Rust) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (name, first, last) in rust.functions() {
        let lines = last - first + 1;
        if lines > FUNCTION_LINES_MAX {
            let what = format!("function {name} has {lines} lines, more than {FUNCTION_LINES_MAX}");
            faults.push(Fault::new(&rust.path, first, what));
        }
    }
    faults
}

#[cfg(test)]
fn printed(faults: &[Fault]) -> Vec<String> {
    faults.iter().map(Fault::to_string).collect()
}

#[test]
fn long_lines_fail_where_they_hold_no_address() {
    let text = format!("{}\n{}\n# https://{}\n", "é".repeat(100), "x".repeat(101), "y".repeat(99));
    let faults = check_file(&File::of("a.py", &text));
    assert_eq!(printed(&faults), ["a.py:2: line has 101 characters, more than 100"]);
    assert_eq!(check_file(&File::of("a.json", &text)), []);
}

#[test]
fn long_files_fail() {
    assert_eq!(check_file(&File::of("a.sh", &"x\n".repeat(400))), []);
    let faults = check_file(&File::of("a.sh", &"x\n".repeat(401)));
    assert_eq!(printed(&faults), ["a.sh:401: file has 401 lines, more than 400"]);
}

#[test]
fn heavy_files_fail() {
    let mut file = File::of("a.bin", "");
    file.bytes = FILE_BYTES_MAX + 1;
    assert_eq!(printed(&check_file(&file)), ["a.bin:1: file has 12582913 bytes"]);
}

#[test]
fn long_functions_fail() {
    let body = |lines: usize| format!("\nfn long() {{{}}}\n", "\n".repeat(lines - 1));
    assert_eq!(check_functions(&Rust::of("a.rs", &body(70))), []);
    let faults = check_functions(&Rust::of("a.rs", &body(71)));
    assert_eq!(printed(&faults), ["a.rs:2: function long has 71 lines, more than 70"]);
}
