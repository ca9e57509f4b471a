//! Resume points: internal saves of a running job, at most two kept, never listed.

use super::Jobs;
use crate::db::row::get;
use crate::db::{Write, patiently};
use crate::error::Result;
use crate::objects::ObjectKey;
use sqlx::any::AnyRow;

/// How many are kept: the newest, and the one before it should the newest prove unreadable.
const KEPT: i64 = 2;

/// A save that is complete in the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumePointRow {
    /// `ftjob-…`
    pub job: String,
    /// Optimizer steps done.
    pub step: i64,
    /// The attempt that wrote it.
    pub attempt: i64,
}

impl ResumePointRow {
    /// Where it lies.
    pub fn key(&self) -> ObjectKey {
        ObjectKey::ResumePoint { job: self.job.clone(), attempt: self.attempt, step: self.step }
    }
}

impl Jobs<'_> {
    /// A job's resume points, newest first.
    pub async fn resume_points(&self, job: &str) -> Result<Vec<ResumePointRow>> {
        let rows = sqlx::query(
            "SELECT job, step, attempt FROM resume_points WHERE job = $1 ORDER BY step DESC",
        )
        .bind(job)
        .fetch_all(&self.db.pool)
        .await?;
        rows.iter().map(read).collect()
    }

    /// Forgets the resume points of ended jobs, at most `limit`, and returns their keys for
    /// deletion: those of cancelled jobs have no owner left to remove them.
    pub async fn take_leftover_resume_points(&self, limit: u32) -> Result<Vec<ObjectKey>> {
        patiently!(self.try_take_leftovers(limit))
    }

    async fn try_take_leftovers(&self, limit: u32) -> Result<Vec<ObjectKey>> {
        let mut write = self.db.begin().await?;
        let rows = sqlx::query(
            "SELECT job, step, attempt FROM resume_points
             WHERE job IN (SELECT id FROM jobs WHERE finished_at IS NOT NULL)
             ORDER BY job, step LIMIT $1",
        )
        .bind(i64::from(limit))
        .fetch_all(write.connection())
        .await?;
        let points: Vec<_> = rows.iter().map(read).collect::<Result<_>>()?;
        for point in &points {
            sqlx::query("DELETE FROM resume_points WHERE job = $1 AND step = $2")
                .bind(&point.job)
                .bind(point.step)
                .execute(write.connection())
                .await?;
        }
        write.commit().await?;
        Ok(points.iter().map(ResumePointRow::key).collect())
    }
}

impl Write {
    /// Records a resume point and forgets all but the last two; returns what to delete.
    pub(super) async fn insert_resume_point(
        &mut self,
        point: &ResumePointRow,
    ) -> Result<Vec<ObjectKey>> {
        let replaced = sqlx::query(
            "SELECT job, step, attempt FROM resume_points
             WHERE job = $1 AND step = $2 AND attempt <> $3",
        )
        .bind(&point.job)
        .bind(point.step)
        .bind(point.attempt)
        .fetch_all(self.connection())
        .await?;
        let now = self.now_ms();
        sqlx::query(crate::db::sql(format!(
            "INSERT INTO resume_points (job, step, attempt, created_at)
             VALUES ($1, $2, $3, {now} / 1000)
             ON CONFLICT (job, step) DO UPDATE SET attempt = excluded.attempt"
        )))
        .bind(&point.job)
        .bind(point.step)
        .bind(point.attempt)
        .execute(self.connection())
        .await?;
        let mut keys = self.keep_resume_points(&point.job, KEPT).await?;
        for row in &replaced {
            keys.push(read(row)?.key());
        }
        Ok(keys)
    }

    /// Forgets all but the `kept` newest resume points of a job; returns what to delete.
    pub(super) async fn keep_resume_points(
        &mut self,
        job: &str,
        kept: i64,
    ) -> Result<Vec<ObjectKey>> {
        let rows = sqlx::query(
            "DELETE FROM resume_points WHERE job = $1 AND step NOT IN
                 (SELECT step FROM resume_points WHERE job = $1 ORDER BY step DESC LIMIT $2)
             RETURNING job, step, attempt",
        )
        .bind(job)
        .bind(kept)
        .fetch_all(self.connection())
        .await?;
        rows.iter().map(|row| Ok(read(row)?.key())).collect()
    }
}

fn read(row: &AnyRow) -> Result<ResumePointRow> {
    Ok(ResumePointRow {
        job: get(row, "job")?,
        step: get(row, "step")?,
        attempt: get(row, "attempt")?,
    })
}
