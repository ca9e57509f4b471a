//! The files of the repository, read once. What a build, a run or an editor leaves behind is not
//! part of it.

use std::fs;
use std::io;
use std::path::Path;

/// Folders that hold no source: build output, run data, version control, caches.
const SKIPPED: [&str; 8] = [
    ".git",
    ".stage",
    ".venv",
    "__pycache__",
    "loquetier-data",
    "node_modules",
    "proptest-regressions",
    "target",
];

/// One file: its path from the root with `/` between parts, its size, and its text if it has any.
pub struct File {
    pub path: String,
    pub bytes: u64,
    /// Empty where the file is not UTF-8.
    pub text: String,
}

impl File {
    #[cfg(test)]
    pub fn of(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), bytes: text.len() as u64, text: text.to_owned() }
    }

    /// What follows the last dot, or nothing.
    pub fn extension(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        name.rsplit_once('.').map_or("", |(_, extension)| extension)
    }

    pub fn is_rust(&self) -> bool {
        self.extension() == "rs"
    }

    /// Whether people write it by hand as code: Rust, Python, shell, CUDA, JavaScript.
    pub fn is_code(&self) -> bool {
        matches!(self.extension(), "rs" | "py" | "sh" | "cu" | "cuh" | "js" | "mjs")
            || self.text.starts_with("#!")
    }
}

/// Every file under `root`, in the order of their paths.
pub fn read(root: &Path) -> io::Result<Vec<File>> {
    let mut files = Vec::new();
    read_folder(root, "", &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn read_folder(folder: &Path, prefix: &str, files: &mut Vec<File>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        let kind = entry.file_type()?;
        if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
            read_folder(&entry.path(), &path, files)?;
        } else if kind.is_file() {
            let content = fs::read(entry.path())?;
            let bytes = content.len() as u64;
            files.push(File { path, bytes, text: String::from_utf8(content).unwrap_or_default() });
        }
    }
    Ok(())
}

/// Paths, of a module's file or the start of its folder, that a `#[cfg(test)] mod name;` declares.
pub fn test_only_paths(files: &[File]) -> Vec<String> {
    let mut paths = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let mut lines = file.text.lines().map(str::trim).peekable();
        while let Some(line) = lines.next() {
            let declared = lines.peek().and_then(|next| declared_module(next));
            if let (true, Some(module)) = (line == "#[cfg(test)]", declared) {
                let folder = module_folder(&file.path);
                paths.push(format!("{folder}/{module}.rs"));
                paths.push(format!("{folder}/{module}/"));
            }
        }
    }
    paths
}

fn declared_module(line: &str) -> Option<&str> {
    let line = line.strip_prefix("pub ").or(line.strip_prefix("pub(crate) ")).unwrap_or(line);
    line.strip_prefix("mod ")?.strip_suffix(';')
}

/// The folder in which a module's own modules lie: `a/mod.rs` → `a`, `a/b.rs` → `a/b`.
fn module_folder(path: &str) -> String {
    let (folder, name) = path.rsplit_once('/').unwrap_or((".", path));
    match name {
        "mod.rs" | "lib.rs" | "main.rs" => folder.to_owned(),
        _ => path.trim_end_matches(".rs").to_owned(),
    }
}

#[test]
fn finds_modules_that_only_tests_see() {
    let module = File::of("a/src/text/mod.rs", "//! Text.\n#[cfg(test)]\nmod tests;\nmod plain;\n");
    let file = File::of("a/src/lone.rs", "#[cfg(test)]\npub(crate) mod proofs;");
    assert_eq!(
        test_only_paths(&[module, file]),
        ["a/src/text/tests.rs", "a/src/text/tests/", "a/src/lone/proofs.rs", "a/src/lone/proofs/",]
    );
}

#[test]
fn reads_files_by_path_and_skips_build_output() {
    let root = tempfile::tempdir().expect("a folder");
    fs::create_dir_all(root.path().join("src")).expect("src");
    fs::create_dir_all(root.path().join("target/debug")).expect("target");
    fs::write(root.path().join("src/b.rs"), "//! B.").expect("b.rs");
    fs::write(root.path().join("a.bin"), [0xff, 0xfe]).expect("a.bin");
    fs::write(root.path().join("target/debug/c.rs"), "").expect("c.rs");
    let files = read(root.path()).expect("a readable tree");
    let seen: Vec<_> = files.iter().map(|f| (f.path.as_str(), f.text.as_str())).collect();
    assert_eq!(seen, [("a.bin", ""), ("src/b.rs", "//! B.")]);
    assert_eq!(files[0].bytes, 2);
}
