//! Where things lie: folders the map must name, heads of modules, numbers of migrations.

use crate::fault::Fault;
use crate::tree::File;
use std::collections::BTreeSet;

const MAP: &str = "ARCHITECTURE.md";

/// Rules about the tree as a whole.
pub fn check(files: &[File]) -> Vec<Fault> {
    let mut faults = check_map(files);
    faults.extend(check_migrations(files));
    faults
}

/// Every folder at the top and every folder of a crate's source must be named in the map.
fn check_map(files: &[File]) -> Vec<Fault> {
    let Some(map) = files.iter().find(|file| file.path == MAP) else {
        return vec![Fault::new(MAP, 1, "the map of the repository is missing")];
    };
    let folders: BTreeSet<&str> = files.iter().flat_map(|file| map_folders(&file.path)).collect();
    let is_named = |folder: &str| {
        let name = folder.rsplit('/').next().unwrap_or(folder);
        let mut words = map.text.split(|c: char| c.is_whitespace() || matches!(c, '`' | '|' | ','));
        words.any(|word| word.strip_suffix('/').is_some_and(|w| w == name || w == folder))
    };
    let unnamed = folders.into_iter().filter(|folder| !is_named(folder));
    unnamed
        .map(|folder| Fault::new(MAP, 1, format!("does not name the folder {folder}/")))
        .collect()
}

/// The folders of a path that the map names: `a` of `a/…`, and `a/src/b` of `a/src/b/…`.
fn map_folders(path: &str) -> Vec<&str> {
    let cuts: Vec<usize> = path.match_indices('/').map(|(index, _)| index).collect();
    let mut folders: Vec<&str> = cuts.first().map(|&cut| &path[..cut]).into_iter().collect();
    if let [first, second, third, ..] = cuts[..]
        && &path[first..second] == "/src"
    {
        folders.push(&path[..third]);
    }
    folders
}

/// Migrations are `0001_name.sql`, `0002_…`, without a gap.
fn check_migrations(files: &[File]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let migrations = files.iter().filter_map(|file| {
        let name = file.path.strip_prefix("migrations/")?;
        name.ends_with(".sql").then_some((file, name))
    });
    for (index, (file, name)) in migrations.enumerate() {
        let number = format!("{:04}_", index + 1);
        if !name.starts_with(&number) {
            faults.push(Fault::new(&file.path, 1, format!("this migration must be {number}….sql")));
        }
    }
    faults
}

/// A module opens with what it holds.
pub fn check_module_doc(file: &File) -> Vec<Fault> {
    if file.text.starts_with("//! ") {
        return Vec::new();
    }
    vec![Fault::new(&file.path, 1, "a module begins with //! and what it holds")]
}

#[cfg(test)]
fn printed(faults: &[Fault]) -> Vec<String> {
    faults.iter().map(Fault::to_string).collect()
}

#[test]
fn folders_the_map_forgets_fail() {
    let paths = ["LICENSE", "a/src/lib.rs", "a/src/deep/er/x.rs", "b/x.rs", "aa/x.py"];
    let mut files: Vec<File> = paths.iter().map(|path| File::of(path, "")).collect();
    assert_eq!(
        printed(&check_map(&files)),
        ["ARCHITECTURE.md:1: the map of the repository is missing"]
    );
    files.push(File::of(MAP, "| `a/` | first |\n  src/deep  not a folder\n `b/`"));
    assert_eq!(
        printed(&check_map(&files)),
        [
            "ARCHITECTURE.md:1: does not name the folder a/src/deep/",
            "ARCHITECTURE.md:1: does not name the folder aa/",
        ]
    );
}

#[test]
fn unnumbered_migrations_fail() {
    let names = ["migrations/0001_first.sql", "migrations/0003_third.sql", "migrations/README.md"];
    let files: Vec<File> = names.iter().map(|name| File::of(name, "")).collect();
    assert_eq!(
        printed(&check_migrations(&files)),
        ["migrations/0003_third.sql:1: this migration must be 0002_….sql"]
    );
}

#[test]
fn modules_without_a_head_fail() {
    assert_eq!(check_module_doc(&File::of("a.rs", "//! Holds a.\n")), []);
    assert_eq!(check_module_doc(&File::of("a.rs", "use b;\n//! Late.\n")).len(), 1);
}
