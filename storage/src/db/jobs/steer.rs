//! What the API does with jobs: look, list, cancel, pause, resume.

use super::status::{By, from_states};
use super::{COLUMNS, JobRow, JobStatus, Jobs, read};
use crate::db::row::get;
use crate::db::{Listing, NewEvent, Page, event_kind, patiently, sql};
use crate::error::{Error, Result};

/// Which jobs a list shows by their metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetadataFilter {
    /// All of these pairs must be there; at most [`MetadataFilter::MAX_PAIRS`] count.
    pub pairs: Vec<(String, String)>,
    /// Only jobs without metadata.
    pub absent: bool,
}

impl MetadataFilter {
    /// A job has no more pairs, so a longer filter matches nothing anyway; the gateway refuses it.
    pub const MAX_PAIRS: usize = 16;
}

/// Outcome of a change of state that a client asked for.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one per request, matched at once")]
pub enum Transition {
    /// Done; the row as it is now.
    Done(JobRow),
    /// Not from this state.
    Refused(JobStatus),
    /// No such job for this organization.
    NotFound,
}

impl Jobs<'_> {
    /// By id.
    pub async fn get(&self, org: &str, id: &str) -> Result<Option<JobRow>> {
        let row =
            sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = $1 AND org = $2")))
                .bind(id)
                .bind(org)
                .fetch_optional(&self.db.pool)
                .await?;
        row.as_ref().map(read).transpose()
    }

    /// One job, whoever it belongs to: for operators.
    pub async fn of_anyone(&self, id: &str) -> Result<Option<JobRow>> {
        let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = $1")))
            .bind(id)
            .fetch_optional(&self.db.pool)
            .await?;
        row.as_ref().map(read).transpose()
    }

    /// A page of an organization's jobs.
    pub async fn list(
        &self,
        org: &str,
        page: &Page,
        filter: &MetadataFilter,
    ) -> Result<Listing<JobRow>> {
        let start = match &page.after {
            None => page.before_all(),
            Some(after) => {
                sqlx::query_scalar("SELECT sequence FROM jobs WHERE id = $1 AND org = $2")
                    .bind(after)
                    .bind(org)
                    .fetch_optional(&self.db.pool)
                    .await?
                    .ok_or_else(|| Error::UnknownCursor(after.clone()))?
            }
        };
        let (direction, beyond) = page.direction();
        let pairs = &filter.pairs[..filter.pairs.len().min(MetadataFilter::MAX_PAIRS)];
        let mut wanted = String::new();
        if filter.absent {
            wanted.push_str(" AND metadata IS NULL");
        }
        for place in 0..pairs.len() {
            let (name, value) = (2 * place + 4, 2 * place + 5);
            wanted.push_str(&format!(
                " AND EXISTS (SELECT 1 FROM job_metadata
                     WHERE job = jobs.id AND name = ${name} AND value = ${value})"
            ));
        }
        let statement = sql(format!(
            "SELECT {COLUMNS} FROM jobs WHERE org = $1 AND sequence {beyond} $2{wanted}
             ORDER BY sequence {direction} LIMIT $3"
        ));
        let mut query = sqlx::query(statement).bind(org).bind(start).bind(page.rows_to_read());
        for (name, value) in pairs {
            query = query.bind(name).bind(value);
        }
        let rows = query.fetch_all(&self.db.pool).await?;
        Ok(Listing::cut(rows.iter().map(read).collect::<Result<_>>()?, page))
    }

    /// Ends a job that has not ended. Its owner's later writes are lost.
    pub async fn cancel(&self, org: &str, id: &str) -> Result<Transition> {
        let change = Change {
            allowed: from_states(JobStatus::Cancelled, By::Client),
            set: format!(
                "status = 'cancelled', finished_at = {} / 1000, intent = NULL, owner = NULL,
                 lease_until = 0, estimated_finish = NULL",
                self.db.now_ms()
            ),
            event: Some(|_| NewEvent::info(event_kind::CANCELLED, 0, "The job has been cancelled")),
        };
        patiently!(self.try_change(org, id, &change))
    }

    /// Asks the owner of a running job to save and pause it; asking again changes nothing. The
    /// state becomes `paused` by the owner's write.
    pub async fn request_pause(&self, org: &str, id: &str) -> Result<Transition> {
        let change = Change {
            allowed: from_states(JobStatus::Paused, By::Owner),
            set: "intent = 'pause'".to_owned(),
            event: None,
        };
        patiently!(self.try_change(org, id, &change))
    }

    /// Puts a paused job back in the queue.
    pub async fn resume(&self, org: &str, id: &str) -> Result<Transition> {
        let change = Change {
            allowed: from_states(JobStatus::Queued, By::Client),
            set: "status = 'queued', intent = NULL".to_owned(),
            event: Some(|job| {
                NewEvent::info(event_kind::RESUMED, job.attempt, "The job has been resumed")
            }),
        };
        patiently!(self.try_change(org, id, &change))
    }

    async fn try_change(&self, org: &str, id: &str, change: &Change) -> Result<Transition> {
        let Change { allowed, set, event } = change;
        let mut write = self.db.begin().await?;
        let changed = sqlx::query(sql(format!(
            "UPDATE jobs SET {set}, event_sequence = event_sequence + 1
             WHERE id = $1 AND org = $2 AND {allowed} RETURNING {COLUMNS}, event_sequence"
        )))
        .bind(id)
        .bind(org)
        .fetch_optional(write.connection())
        .await?;
        let Some(row) = changed else {
            drop(write);
            let found = self.get(org, id).await?;
            return Ok(found.map_or(Transition::NotFound, |job| Transition::Refused(job.status)));
        };
        let job = read(&row)?;
        if let Some(event) = event {
            write.insert_events(id, get(&row, "event_sequence")?, &[event(&job)]).await?;
        }
        write.commit().await?;
        Ok(Transition::Done(job))
    }
}

/// One change a client may ask for.
struct Change {
    allowed: String,
    set: String,
    event: Option<fn(&JobRow) -> NewEvent>,
}
