//! The schema's steps, embedded in the binary; one text each for SQLite and Postgres.

use std::borrow::Cow;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyConnection, SqlSafeStr};

use crate::error::{Error, Result};

/// Version, name and text of every step, in order; released steps never change.
const STEPS: [(i64, &str, &str); 3] = [
    (1, "initial", include_str!("../../../migrations/0001_initial.sql")),
    (2, "upkeep", include_str!("../../../migrations/0002_upkeep.sql")),
    (3, "fruitless_claims", include_str!("../../../migrations/0003_fruitless_claims.sql")),
];

/// Brings a database up to date; refuses one whose steps differ from these, or that a newer release
/// has closed to this one. On Postgres an advisory lock keeps processes apart; on SQLite the caller
/// has begun a write transaction.
pub(super) async fn run(connection: &mut AnyConnection) -> Result<()> {
    let steps = STEPS.iter().map(|&(version, name, text)| {
        let (name, text) = (Cow::Borrowed(name), text.into_sql_str());
        Migration::new(version, name, MigrationType::Simple, text, false)
    });
    let mut migrator = Migrator::with_migrations(steps.collect());
    // Steps of a newer release: whether this one can live with them is said by the database.
    migrator.set_ignore_missing(true);
    // Not `run`: its future cannot be spawned, for a lifetime the compiler cannot generalise.
    migrator.run_direct(None, connection, false).await?;
    check_compatible(connection).await
}

/// Number of the last step.
pub(super) fn last() -> i64 {
    STEPS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

/// Errors unless all steps have been taken, and none that this release cannot live with.
pub(super) async fn check(connection: &mut AnyConnection) -> Result<()> {
    let taken = "SELECT CAST(COUNT(*) AS BIGINT) FROM _sqlx_migrations \
                 WHERE success AND version <= $1";
    let found = sqlx::query_scalar::<_, i64>(taken).bind(last()).fetch_one(&mut *connection).await;
    let found = match found {
        Ok(count) => count,
        // No table of steps: a new database.
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => 0,
        Err(error) => return Err(error.into()),
    };
    if found < STEPS.len() as i64 {
        return Err(Error::SchemaBehind { found, wanted: STEPS.len() as i64 });
    }
    check_compatible(connection).await
}

/// Newer releases first add to the schema and take away only later; what they take away they note.
async fn check_compatible(connection: &mut AnyConnection) -> Result<()> {
    let since = "SELECT value FROM settings WHERE name = 'compatible_since'";
    let since: String = sqlx::query_scalar(since).fetch_one(connection).await?;
    let needed = since.parse::<i64>().map_err(|_| Error::Unreadable {
        column: "value",
        reason: format!("compatible_since is {since:?}"),
    })?;
    if needed > last() { Err(Error::SchemaAhead { needed, known: last() }) } else { Ok(()) }
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
