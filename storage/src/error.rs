//! What can go wrong in storage, as callers branch on it.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Every failure of rows, objects and the data folder. "No such row" is never one of them:
/// lookups return `Option`, changes return an enum.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `after` names nothing in this list (400 on `after`).
    #[error("no item {0:?} in this list to continue after")]
    UnknownCursor(String),
    /// A stored text holds U+0000, which Postgres cannot keep (400 on the field).
    #[error("{field} must not contain U+0000")]
    NulCharacter {
        /// Name of the offending field.
        field: &'static str,
    },
    /// The `ft:` name exists (deleted ones included); draw another.
    #[error("an adapter named {0:?} exists already")]
    NameTaken(String),
    /// Another `serve` holds the data folder.
    #[error(
        "the data folder {} is in use by another running `loquetier serve`; stop that one or \
         choose another folder with --data-dir", .0.display()
    )]
    FolderInUse(PathBuf),
    /// The data folder cannot be made or read.
    #[error("data folder {}: {source}", path.display())]
    Folder {
        /// The folder or file in it.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither `postgres://` nor `sqlite://`.
    #[error("the database address must start with postgres:// or sqlite://")]
    DatabaseScheme,
    /// No such object.
    #[error("no object {0:?} in the store")]
    ObjectMissing(String),
    /// An object name that could leave its folder, or an empty one.
    #[error("{0:?} is not an object name")]
    ObjectName(String),
    /// A row holds what this version cannot read.
    #[error("column {column} holds what cannot be read: {reason}")]
    Unreadable {
        /// Which column.
        column: &'static str,
        /// Why.
        reason: String,
    },
    /// The database refused or is away; see [`Error::is_unavailable`].
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// The shared database has not been brought up to date.
    #[error("the database's schema is at step {found} of {wanted}; run `loquetier migrate` first")]
    SchemaBehind {
        /// Steps taken.
        found: i64,
        /// Steps this release needs.
        wanted: i64,
    },
    /// The shared database was changed by a newer release in a way that this one cannot follow.
    #[error(
        "the database's schema needs a release that knows step {needed}; this one ends at step \
         {known}: upgrade it"
    )]
    SchemaAhead {
        /// The step that a release must know.
        needed: i64,
        /// This release's last step.
        known: i64,
    },
    /// The schema could not be brought up to date.
    #[error("migrating the database: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// Redis is away, or does not answer in time.
    #[error("Redis is unavailable: {0}")]
    QueueAway(String),
    /// Redis refused a command, or its address is none.
    #[error("Redis: {0}")]
    Queue(redis::RedisError),
    /// A message that cannot be written, or not be read by this version.
    #[error("a message between gateway and worker: {0}")]
    QueueMessage(String),
    /// The object store refused, or a local disk failed.
    #[error("object store: {0}")]
    Objects(object_store::Error),
    /// The object store is away or overloaded; see [`Error::is_unavailable`].
    #[error("object store unavailable: {0}")]
    ObjectsUnavailable(object_store::Error),
    /// The object store's address cannot be used.
    #[error("object store address: {0}")]
    ObjectsAddress(String),
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        if crate::objects::is_away(&error) {
            Self::ObjectsUnavailable(error)
        } else {
            Self::Objects(error)
        }
    }
}

impl Error {
    /// The database, Redis or the object store is away, not at odds with the request: callers may
    /// serve what they remember and try again later.
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Database(error) => crate::db::is_away(error),
            Self::QueueAway(_) | Self::ObjectsUnavailable(_) => true,
            _ => false,
        }
    }

    /// A collision with another transaction: the same transaction may succeed when run again.
    pub(crate) fn is_transient(&self) -> bool {
        let Self::Database(sqlx::Error::Database(database)) = self else { return false };
        // Postgres: serialization failure, deadlock. SQLite: LOCKED, and BUSY with its extended
        // codes (recovery, snapshot, timeout); the low byte of an extended code is the plain one.
        database.code().is_some_and(|code| match code.as_ref() {
            "40001" | "40P01" => true,
            other if other.len() <= 4 => {
                other.parse::<u32>().is_ok_and(|number| matches!(number & 0xff, 5 | 6))
            }
            _ => false,
        })
    }
}
