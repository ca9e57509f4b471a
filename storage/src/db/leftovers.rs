//! What nobody needs any more: rows past their time, and which objects no row names. What is told
//! here to be gone is gone for good; whoever removes an object afterwards may stop half-way, for
//! an object without a row is found again by its age.

use std::collections::HashSet;

use super::files::UNFINISHED;
use super::row::{get, json};
use super::{AdapterRef, Db, patiently, sql};
use crate::error::Result;
use crate::ids::alphanumerics;
use crate::objects::ObjectKey;

/// Values in one `IN (…)`; both databases allow many more.
const BATCH: usize = 200;

/// Access to leftovers.
#[derive(Clone, Copy, Debug)]
pub struct Leftovers<'a> {
    pub(super) db: &'a Db,
}

impl Leftovers<'_> {
    /// Unix seconds by the database's clock.
    pub async fn now(&self) -> Result<i64> {
        let now = self.db.now_ms();
        let secs = sql(format!("SELECT {now} / 1000"));
        Ok(sqlx::query_scalar(secs).fetch_one(&self.db.pool).await?)
    }

    /// A name drawn once for this database, whoever asks.
    pub async fn installation(&self) -> Result<String> {
        let name: Result<String> = patiently!(self.try_installation());
        name
    }

    async fn try_installation(&self) -> Result<String> {
        let mut write = self.db.begin().await?;
        sqlx::query(
            "INSERT INTO settings (name, value) VALUES ('installation', $1)
             ON CONFLICT (name) DO NOTHING",
        )
        .bind(alphanumerics(24))
        .execute(write.connection())
        .await?;
        let name = sqlx::query_scalar("SELECT value FROM settings WHERE name = 'installation'")
            .fetch_one(write.connection())
            .await?;
        write.commit().await?;
        Ok(name)
    }

    /// Deletes up to `limit` expired files that no unfinished job reads; their objects may go.
    pub async fn take_expired_files(&self, limit: u32) -> Result<Vec<ObjectKey>> {
        let now = self.db.now_ms();
        let expired: Vec<String> = sqlx::query_scalar(sql(format!(
            "SELECT id FROM files WHERE expires_at <= {now} / 1000 AND deleted_at IS NULL
             AND NOT EXISTS (SELECT 1 FROM jobs WHERE {UNFINISHED}
                 AND (training_file = files.id OR validation_file = files.id))
             ORDER BY expires_at LIMIT $1"
        )))
        .bind(i64::from(limit))
        .fetch_all(&self.db.pool)
        .await?;
        let mut taken = Vec::new();
        for id in expired {
            let gone: Result<bool> = patiently!(self.try_take_expired(&id));
            if gone? {
                taken.push(ObjectKey::File { id });
            }
        }
        Ok(taken)
    }

    async fn try_take_expired(&self, id: &str) -> Result<bool> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        // Holds the row against a job that was begun on it just before it expired; the jobs are
        // looked at after.
        let held = sqlx::query(sql(format!(
            "UPDATE files SET bytes = bytes
             WHERE id = $1 AND expires_at <= {now} / 1000 AND deleted_at IS NULL"
        )))
        .bind(id)
        .execute(write.connection())
        .await?
        .rows_affected();
        let reader: Option<String> = sqlx::query_scalar(sql(format!(
            "SELECT id FROM jobs WHERE {UNFINISHED}
             AND (training_file = $1 OR validation_file = $1) LIMIT 1"
        )))
        .bind(id)
        .fetch_optional(write.connection())
        .await?;
        if held == 0 || reader.is_some() {
            return Ok(false);
        }
        sqlx::query(sql(format!("UPDATE files SET deleted_at = {now} / 1000 WHERE id = $1")))
            .bind(id)
            .execute(write.connection())
            .await?;
        write.commit().await?;
        Ok(true)
    }

    /// Forgets up to `limit` idempotency keys past their time; how many there were.
    pub async fn forget_idempotency(&self, limit: u32) -> Result<u64> {
        patiently!(self.try_forget_idempotency(limit))
    }

    async fn try_forget_idempotency(&self, limit: u32) -> Result<u64> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        // Up to the time of the last of them, so that one statement with plain columns will do.
        let until: Option<i64> = sqlx::query_scalar(sql(format!(
            "SELECT MAX(expires_ms) FROM (SELECT expires_ms FROM idempotency
                 WHERE expires_ms <= {now} ORDER BY expires_ms LIMIT $1) AS oldest"
        )))
        .bind(i64::from(limit))
        .fetch_one(write.connection())
        .await?;
        let Some(until) = until else { return Ok(0) };
        let forgotten = sqlx::query("DELETE FROM idempotency WHERE expires_ms <= $1")
            .bind(until)
            .execute(write.connection())
            .await?
            .rows_affected();
        write.commit().await?;
        Ok(forgotten)
    }

    /// Which of these objects no row names. A deleted adapter still names its own for `grace_secs`,
    /// for requests under way, and as long as an unfinished job continues from it.
    pub async fn unnamed<'k>(
        &self,
        objects: &'k [ObjectKey],
        grace_secs: i64,
    ) -> Result<Vec<&'k ObjectKey>> {
        let named = self.named(objects, grace_secs).await?;
        Ok(objects.iter().filter(|key| !named.contains(&naming(key))).collect())
    }

    async fn named(&self, objects: &[ObjectKey], grace_secs: i64) -> Result<HashSet<String>> {
        let (mut files, mut folders, mut jobs) = (Vec::new(), Vec::new(), Vec::new());
        for key in objects {
            match key {
                ObjectKey::File { id } => files.push(id.as_str()),
                ObjectKey::AdapterConfig { object } | ObjectKey::AdapterWeights { object } => {
                    folders.push(object.as_str());
                }
                ObjectKey::ResumePoint { job, .. } => jobs.push(job.as_str()),
            }
        }
        let mut named = HashSet::new();
        let live = "SELECT id FROM files WHERE deleted_at IS NULL AND id";
        for row in self.among(live, &files).await? {
            named.insert(get(&row, "id")?);
        }
        if !folders.is_empty() {
            let now = self.db.now_ms();
            let live = format!(
                "SELECT object FROM adapters
                 WHERE (deleted_at IS NULL OR deleted_at > {now} / 1000 - {grace_secs}) AND object"
            );
            for row in self.among(&live, &folders).await? {
                named.insert(get(&row, "object")?);
            }
            named.extend(self.parents().await?);
        }
        let points = "SELECT job, attempt, step FROM resume_points WHERE job";
        for row in self.among(points, &jobs).await? {
            let (attempt, step) = (get(&row, "attempt")?, get(&row, "step")?);
            named.insert(naming(&ObjectKey::ResumePoint { job: get(&row, "job")?, attempt, step }));
        }
        Ok(named)
    }

    /// Folders of the adapters that unfinished jobs continue from.
    async fn parents(&self) -> Result<Vec<String>> {
        let rows = sqlx::query(sql(format!(
            "SELECT parent FROM jobs WHERE {UNFINISHED} AND parent IS NOT NULL"
        )))
        .fetch_all(&self.db.pool)
        .await?;
        rows.iter().map(|row| Ok(json::<AdapterRef>(row, "parent")?.object)).collect()
    }

    /// Rows of `select … column` whose column is one of the values.
    async fn among(&self, select: &str, values: &[&str]) -> Result<Vec<sqlx::any::AnyRow>> {
        let distinct: HashSet<&str> = values.iter().copied().collect();
        let values: Vec<&str> = distinct.into_iter().collect();
        let mut found = Vec::new();
        for batch in values.chunks(BATCH) {
            let places: Vec<String> = (1..=batch.len()).map(|n| format!("${n}")).collect();
            let text = sql(format!("{select} IN ({})", places.join(", ")));
            let query = batch.iter().fold(sqlx::query(text), |query, v| query.bind(v.to_string()));
            found.extend(query.fetch_all(&self.db.pool).await?);
        }
        Ok(found)
    }
}

/// What a row would call an object.
fn naming(key: &ObjectKey) -> String {
    match key {
        ObjectKey::File { id } => id.clone(),
        ObjectKey::AdapterConfig { object } | ObjectKey::AdapterWeights { object } => {
            object.clone()
        }
        ObjectKey::ResumePoint { job, attempt, step } => format!("{job}/{attempt}-{step}"),
    }
}
