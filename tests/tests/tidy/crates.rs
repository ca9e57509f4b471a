//! Which crate and which module may know what.

use crate::fault::Fault;
use crate::rust::Rust;
use crate::tree::File;

const CRATES: [&str; 4] = ["gateway", "kernels", "storage", "worker"];

/// Which of our crates each crate may name in its manifest. Whole-system tests may name all.
const MAY_USE: [(&str, &[&str]); 4] = [
    ("gateway", &["storage"]),
    ("kernels", &[]),
    ("storage", &[]),
    ("worker", &["storage", "kernels"]),
];

/// The files of the worker that know both storage and engine, by the start of their paths.
const WORKER_BORDER: [&str; 5] = [
    "worker/src/intake/",
    "worker/src/intake.rs",
    "worker/src/outlet.rs",
    "worker/src/lib.rs",
    "worker/src/run",
];

/// Where `unsafe` may stand: kernels, and the one place that maps weights into memory.
const MAY_BE_UNSAFE: [&str; 2] = ["kernels/", "worker/src/base/folder.rs"];

/// Dependencies between our crates, in any section of a manifest.
pub fn check_manifests(files: &[File]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (name, allowed) in MAY_USE {
        let path = format!("{name}/Cargo.toml");
        let Some(manifest) = files.iter().find(|file| file.path == path) else {
            faults.push(Fault::new(&path, 1, "manifest is missing"));
            continue;
        };
        for (line, dependency) in dependencies(&manifest.text) {
            if CRATES.contains(&dependency) && !allowed.contains(&dependency) {
                faults.push(Fault::new(&path, line, format!("{name} must not use {dependency}")));
            }
        }
    }
    faults
}

/// Line and name of each entry of a `[…dependencies]` section.
fn dependencies(manifest: &str) -> Vec<(usize, &str)> {
    let mut inside = false;
    let mut found = Vec::new();
    for (index, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            inside = line.trim_end().ends_with("dependencies]");
        } else if inside {
            let end = line.find(['.', '=', ' ']).unwrap_or(line.len());
            found.push((index + 1, line[..end].trim_matches('"')));
        }
    }
    found
}

/// `unsafe` outside the places that need it.
pub fn check_unsafe(rust: &Rust) -> Vec<Fault> {
    if MAY_BE_UNSAFE.iter().any(|path| rust.path.starts_with(path)) {
        return Vec::new();
    }
    let found = rust.find(&["unsafe"]);
    found.map(|at| Fault::new(&rust.path, rust.tokens[at].line, "unsafe is not for here")).collect()
}

/// Statements and the database library outside storage.
pub fn check_sql(rust: &Rust) -> Vec<Fault> {
    if rust.path.starts_with("storage/") {
        return Vec::new();
    }
    let mut faults = Vec::new();
    for at in rust.find(&["sqlx"]) {
        faults.push(Fault::new(&rust.path, rust.tokens[at].line, "only storage knows sqlx"));
    }
    for (at, token) in rust.tokens.iter().enumerate() {
        let is_doc = at >= 2 && rust.stands_at(at - 2, &["doc", "="]);
        if token.is_literal && !is_doc && is_sql(&token.text) {
            faults.push(Fault::new(&rust.path, token.line, "only storage knows SQL"));
        }
    }
    faults
}

/// Whether a literal, in its quotes, is a statement of a database.
fn is_sql(literal: &str) -> bool {
    let start = literal.find('"').map_or(literal.len(), |quote| quote + 1);
    let text = literal[start..].trim_start().trim_start_matches("\\n").to_lowercase();
    let forms = [
        ("select ", " from "),
        ("insert ", "into "),
        ("update ", " set "),
        ("delete ", "from "),
        ("create ", " table "),
        ("alter ", " table "),
    ];
    forms.iter().any(|(first, then)| {
        text.strip_prefix(first).is_some_and(|rest| format!(" {rest}").contains(then))
    })
}

/// `storage` below the worker's border.
pub fn check_worker_imports(rust: &Rust) -> Vec<Fault> {
    let is_border = WORKER_BORDER.iter().any(|path| rust.path.starts_with(path));
    if !rust.path.starts_with("worker/src/") || is_border {
        return Vec::new();
    }
    let paths = rust.find(&["storage", ":", ":"]);
    let imports = rust.find(&["use", "storage"]);
    let lines = paths.chain(imports).map(|at| rust.tokens[at].line);
    lines.map(|line| Fault::new(&rust.path, line, "only intake and outlet know storage")).collect()
}

#[cfg(test)]
fn printed(faults: &[Fault]) -> Vec<String> {
    faults.iter().map(Fault::to_string).collect()
}

#[test]
fn crates_that_look_the_wrong_way_fail() {
    let manifest = |name: &str, text: &str| File::of(&format!("{name}/Cargo.toml"), text);
    let files = [
        manifest("gateway", "[package]\nworker = 1\n[dependencies]\nstorage.workspace = true\n"),
        manifest("kernels", "[dependencies]\nrayon = \"1\"\n"),
        manifest("storage", "[dev-dependencies]\nkernels = { path = \"../kernels\" }\n"),
        manifest("worker", "[dependencies]\nstorage.workspace = true\ngateway.workspace = true\n"),
    ];
    assert_eq!(
        printed(&check_manifests(&files)),
        [
            "storage/Cargo.toml:2: storage must not use kernels",
            "worker/Cargo.toml:3: worker must not use gateway",
        ]
    );
}

#[test]
fn unsafe_fails_outside_kernels() {
    let text = "#![forbid(unsafe_code)]\nfn a() { unsafe { b() } }\n";
    assert_eq!(
        printed(&check_unsafe(&Rust::of("gateway/src/a.rs", text))),
        ["gateway/src/a.rs:2: unsafe is not for here"]
    );
    assert_eq!(check_unsafe(&Rust::of("kernels/src/a.rs", text)), []);
}

#[test]
fn sql_fails_outside_storage() {
    // Spelled in halves, so that this file passes its own rule.
    let text = format!(
        "//! select a from b\nuse {}x::Any;\nconst A: &str = \"{}ect a\n from b\";\n\
         const B: &str = r#\"Insert {}to t\"#;\nconst C: &str = \"select a model, update a key\";",
        "sql", "sel", "in"
    );
    assert_eq!(
        printed(&check_sql(&Rust::of("worker/src/a.rs", &text))),
        [
            "worker/src/a.rs:2: only storage knows sqlx",
            "worker/src/a.rs:3: only storage knows SQL",
            "worker/src/a.rs:5: only storage knows SQL",
        ]
    );
    assert_eq!(check_sql(&Rust::of("storage/src/a.rs", &text)), []);
}

#[test]
fn storage_fails_below_the_border_of_the_worker() {
    let text = "use storage::Ids;\nfn a(storage: u8) -> storage::Key { storage }\n";
    let mut lines = printed(&check_worker_imports(&Rust::of("worker/src/engine/a.rs", text)));
    lines.dedup();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(check_worker_imports(&Rust::of("worker/src/intake/a.rs", text)), []);
    assert_eq!(check_worker_imports(&Rust::of("gateway/src/a.rs", text)), []);
}
