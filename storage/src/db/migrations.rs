//! The schema's steps, embedded in the binary; one text each for SQLite and Postgres.

use std::borrow::Cow;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyConnection, SqlSafeStr};

use crate::error::Result;

/// Version, name and text of every step, in order; released steps never change.
const STEPS: [(i64, &str, &str); 1] =
    [(1, "initial", include_str!("../../../migrations/0001_initial.sql"))];

/// Brings a database up to date; refuses one whose steps differ from these. On Postgres an advisory
/// lock keeps processes apart; on SQLite the caller has begun a write transaction.
pub(super) async fn run(connection: &mut AnyConnection) -> Result<()> {
    let steps = STEPS.iter().map(|&(version, name, text)| {
        let (name, text) = (Cow::Borrowed(name), text.into_sql_str());
        Migration::new(version, name, MigrationType::Simple, text, false)
    });
    let migrator = Migrator::with_migrations(steps.collect());
    // Not `run`: its future cannot be spawned, for a lifetime the compiler cannot generalise.
    migrator.run_direct(None, connection, false).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::STEPS;

    #[test]
    fn every_file_in_the_folder_is_a_step() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations");
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .expect("the folder is there")
            .map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"))
            .filter(|name| name.ends_with(".sql"))
            .collect();
        files.sort();
        let steps: Vec<_> =
            STEPS.iter().map(|(version, name, _)| format!("{version:04}_{name}.sql")).collect();
        assert_eq!(files, steps);
    }
}
