//! A job's events: unique by (job, kind, key), shown by sequence number.

use serde_json::{Map, Value};
use sqlx::any::AnyRow;

use super::row::{get, json, to_json, word};
use super::{Db, Listing, Page, Write};
use crate::error::{Error, Result};
use crate::ids::{IdKind, new_id};

/// Kinds of events, the second part of their identity. The third, `key`, is what may recur: the
/// step, the attempt, or 0 for what happens once.
pub mod event_kind {
    /// Once, by the creating transaction.
    pub const CREATED: &str = "created";
    /// Once, by the creating transaction.
    pub const VALIDATING: &str = "validating";
    /// Once, by the change to `queued`.
    pub const VALIDATED: &str = "validated";
    /// Once, by the first training claim.
    pub const STARTED: &str = "started";
    /// Per step: metrics.
    pub const STEP: &str = "step";
    /// Per step, with the checkpoint's row.
    pub const CHECKPOINT: &str = "checkpoint";
    /// Once, with success.
    pub const MODEL: &str = "model";
    /// Once, with success.
    pub const COMPLETED: &str = "completed";
    /// Per attempt.
    pub const PAUSED: &str = "paused";
    /// Per attempt.
    pub const RESUMED: &str = "resumed";
    /// Once.
    pub const CANCELLED: &str = "cancelled";
    /// Once.
    pub const FAILED: &str = "failed";
}

/// Severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Ordinary.
    Info,
    /// Something was changed or skipped.
    Warn,
    /// The job failed.
    Error,
}

impl Level {
    /// The word in rows and replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Info, Self::Warn, Self::Error].into_iter().find(|level| level.as_str() == word)
    }
}

/// Whether an event carries metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// Text.
    Message,
    /// Text and numbers in `data`.
    Metrics,
}

impl EventType {
    /// The word in rows and replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::Metrics => "metrics",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Message, Self::Metrics].into_iter().find(|kind| kind.as_str() == word)
    }
}

/// An event to add. One with the same (kind, key) already there makes this a no-op.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// One of [`event_kind`] or the worker's own word.
    pub kind: &'static str,
    /// Step, attempt, or 0.
    pub key: i64,
    /// Severity.
    pub level: Level,
    /// Message or metrics.
    pub event_type: EventType,
    /// For people; U+0000 is written as an escape.
    pub message: String,
    /// Empty for none.
    pub data: Map<String, Value>,
}

impl NewEvent {
    /// A plain information message.
    pub fn info(kind: &'static str, key: i64, message: impl Into<String>) -> Self {
        Self {
            kind,
            key,
            level: Level::Info,
            event_type: EventType::Message,
            message: message.into(),
            data: Map::new(),
        }
    }
}

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// `ftevent-…`
    pub id: String,
    /// `ftjob-…`
    pub job: String,
    /// Order within the job; may have gaps.
    pub sequence: i64,
    /// What happened, see [`event_kind`].
    pub kind: String,
    /// Step, attempt, or 0.
    pub key: i64,
    /// Severity.
    pub level: Level,
    /// Message or metrics.
    pub event_type: EventType,
    /// For people.
    pub message: String,
    /// Empty for none.
    pub data: Map<String, Value>,
    /// Unix seconds.
    pub created_at: i64,
}

/// Access to events.
#[derive(Clone, Copy, Debug)]
pub struct Events<'a> {
    pub(super) db: &'a Db,
}

const COLUMNS: &str =
    "id, job, sequence, kind, event_key, level, event_type, message, data, created_at";

impl Events<'_> {
    /// A page of a job's events by sequence. A job of another organization has none; look the job
    /// up first to tell that apart.
    pub async fn list(&self, org: &str, job: &str, page: &Page) -> Result<Listing<EventRow>> {
        let start = match &page.after {
            None => page.before_all(),
            Some(after) => sqlx::query_scalar(
                "SELECT sequence FROM events WHERE id = $1 AND job = $2
                 AND EXISTS (SELECT 1 FROM jobs WHERE id = $2 AND org = $3)",
            )
            .bind(after)
            .bind(job)
            .bind(org)
            .fetch_optional(&self.db.pool)
            .await?
            .ok_or_else(|| Error::UnknownCursor(after.clone()))?,
        };
        let (direction, beyond) = page.direction();
        let rows = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM events WHERE job = $1 AND sequence {beyond} $2
             AND EXISTS (SELECT 1 FROM jobs WHERE id = $1 AND org = $3)
             ORDER BY sequence {direction} LIMIT $4"
        )))
        .bind(job)
        .bind(start)
        .bind(org)
        .bind(page.rows_to_read())
        .fetch_all(&self.db.pool)
        .await?;
        Ok(Listing::cut(rows.iter().map(read).collect::<Result<_>>()?, page))
    }
}

impl Write {
    /// Adds events with numbers from `first` on; the caller has reserved them in the job's row,
    /// which this transaction has locked.
    pub(super) async fn insert_events(
        &mut self,
        job: &str,
        first: i64,
        events: &[NewEvent],
    ) -> Result<()> {
        let now = self.now_ms();
        for (sequence, event) in (first..).zip(events) {
            sqlx::query(super::sql(format!(
                "INSERT INTO events ({COLUMNS})
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, {now} / 1000)
                 ON CONFLICT (job, kind, event_key) DO NOTHING"
            )))
            .bind(new_id(IdKind::Event))
            .bind(job)
            .bind(sequence)
            .bind(event.kind)
            .bind(event.key)
            .bind(event.level.as_str())
            .bind(event.event_type.as_str())
            .bind(escape_nul(&event.message))
            .bind(to_json("data", &event.data)?)
            .execute(self.connection())
            .await?;
        }
        Ok(())
    }
}

/// U+0000 as a visible escape: Postgres keeps no NUL in text, and these texts are for people.
pub(super) fn escape_nul(text: &str) -> String {
    text.replace('\0', "\\u0000")
}

fn read(row: &AnyRow) -> Result<EventRow> {
    Ok(EventRow {
        id: get(row, "id")?,
        job: get(row, "job")?,
        sequence: get(row, "sequence")?,
        kind: get(row, "kind")?,
        key: get(row, "event_key")?,
        level: word(row, "level", Level::parse)?,
        event_type: word(row, "event_type", EventType::parse)?,
        message: get(row, "message")?,
        data: json(row, "data")?,
        created_at: get(row, "created_at")?,
    })
}
