//! A job's listed checkpoints: each is a model name. Written with the job, see `jobs::write`.

use serde_json::{Map, Value};
use sqlx::any::AnyRow;

use super::row::{get, json, to_json};
use super::{Db, Listing, NewAdapter, Page, Write};
use crate::error::{Error, Result};
use crate::ids::{IdKind, new_id};

/// A checkpoint and the adapter it is.
#[derive(Clone, Debug, PartialEq)]
pub struct NewCheckpoint {
    /// Optimizer steps done.
    pub step: i64,
    /// Losses and accuracies as replies show them.
    pub metrics: Map<String, Value>,
    /// The adapter; its `model` is the checkpoint's name.
    pub adapter: NewAdapter,
}

/// A checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointRow {
    /// `ftckpt_…`
    pub id: String,
    /// `ftjob-…`
    pub job: String,
    /// Optimizer steps done; one checkpoint per step.
    pub step: i64,
    /// Model name.
    pub model: String,
    /// Losses and accuracies.
    pub metrics: Map<String, Value>,
    /// Unix seconds.
    pub created_at: i64,
}

/// Access to checkpoints.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints<'a> {
    pub(super) db: &'a Db,
}

const COLUMNS: &str = "id, job, step, model, metrics, created_at";

impl Checkpoints<'_> {
    /// A page of a job's checkpoints by step. A job of another organization has none.
    pub async fn list(&self, org: &str, job: &str, page: &Page) -> Result<Listing<CheckpointRow>> {
        let start = match &page.after {
            None => page.before_all(),
            Some(after) => sqlx::query_scalar(
                "SELECT step FROM checkpoints WHERE id = $1 AND job = $2
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
            "SELECT {COLUMNS} FROM checkpoints WHERE job = $1 AND step {beyond} $2
             AND EXISTS (SELECT 1 FROM jobs WHERE id = $1 AND org = $3)
             ORDER BY step {direction} LIMIT $4"
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
    /// Lists a checkpoint and its adapter. One listed at this step before (by an earlier attempt,
    /// equal by construction) stays, and nothing is added.
    pub(super) async fn insert_checkpoint(
        &mut self,
        org: &str,
        job: &str,
        checkpoint: &NewCheckpoint,
    ) -> Result<bool> {
        let now = self.now_ms();
        let inserted = sqlx::query(super::sql(format!(
            "INSERT INTO checkpoints ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, {now} / 1000)
             ON CONFLICT (job, step) DO NOTHING"
        )))
        .bind(new_id(IdKind::Checkpoint))
        .bind(job)
        .bind(checkpoint.step)
        .bind(&checkpoint.adapter.model)
        .bind(to_json("metrics", &checkpoint.metrics)?)
        .execute(self.connection())
        .await?
        .rows_affected();
        if inserted == 1 {
            self.insert_adapter(org, &checkpoint.adapter, Some((job, checkpoint.step))).await?;
        }
        Ok(inserted == 1)
    }

    /// Lists the final model as its step's checkpoint, in place of one listed there before (whose
    /// adapter stays usable).
    pub(super) async fn insert_final_checkpoint(
        &mut self,
        org: &str,
        job: &str,
        checkpoint: &NewCheckpoint,
    ) -> Result<()> {
        if self.insert_checkpoint(org, job, checkpoint).await? {
            return Ok(());
        }
        self.insert_adapter(org, &checkpoint.adapter, Some((job, checkpoint.step))).await?;
        sqlx::query("UPDATE checkpoints SET model = $3, metrics = $4 WHERE job = $1 AND step = $2")
            .bind(job)
            .bind(checkpoint.step)
            .bind(&checkpoint.adapter.model)
            .bind(to_json("metrics", &checkpoint.metrics)?)
            .execute(self.connection())
            .await?;
        Ok(())
    }
}

fn read(row: &AnyRow) -> Result<CheckpointRow> {
    Ok(CheckpointRow {
        id: get(row, "id")?,
        job: get(row, "job")?,
        step: get(row, "step")?,
        model: get(row, "model")?,
        metrics: json(row, "metrics")?,
        created_at: get(row, "created_at")?,
    })
}
