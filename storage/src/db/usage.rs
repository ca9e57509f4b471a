//! Token counts per organization, model and hour; added up, never listed one by one.

use super::row::get;
use super::{Db, patiently, without_nul};
use crate::error::Result;

/// Counts to add to one hour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// Who.
    pub org: String,
    /// With which model.
    pub model: String,
    /// Unix seconds of the hour's start.
    pub hour: i64,
    /// What.
    pub counts: UsageSum,
}

/// Counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageSum {
    /// Requests answered.
    pub requests: i64,
    /// Prompt tokens.
    pub prompt_tokens: i64,
    /// Generated tokens.
    pub completion_tokens: i64,
    /// Tokens seen by training.
    pub trained_tokens: i64,
}

/// Access to usage.
#[derive(Clone, Copy, Debug)]
pub struct Usage<'a> {
    pub(super) db: &'a Db,
}

impl Usage<'_> {
    /// Adds counts, all or none.
    pub async fn add(&self, rows: &[UsageRow]) -> Result<()> {
        let mut in_order: Vec<_> = rows.iter().collect();
        // One order for all writers, so that their row locks cannot cross.
        in_order.sort_by_key(|row| (&row.org, &row.model, row.hour));
        for row in rows {
            without_nul("model", &row.model)?;
        }
        patiently!(self.try_add(&in_order))
    }

    async fn try_add(&self, rows: &[&UsageRow]) -> Result<()> {
        let mut write = self.db.begin().await?;
        for row in rows {
            sqlx::query(
                "INSERT INTO usage
                     (org, model, hour, requests, prompt_tokens, completion_tokens, trained_tokens)
                 VALUES ($1, $2, $3, $4, $5, $6, $7)
                 ON CONFLICT (org, model, hour) DO UPDATE SET
                     requests = usage.requests + excluded.requests,
                     prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens,
                     completion_tokens = usage.completion_tokens + excluded.completion_tokens,
                     trained_tokens = usage.trained_tokens + excluded.trained_tokens",
            )
            .bind(&row.org)
            .bind(&row.model)
            .bind(row.hour)
            .bind(row.counts.requests)
            .bind(row.counts.prompt_tokens)
            .bind(row.counts.completion_tokens)
            .bind(row.counts.trained_tokens)
            .execute(write.connection())
            .await?;
        }
        write.commit().await
    }

    /// Sums of an organization (of one model or all) over hours `from ≤ hour < until`.
    pub async fn sum(
        &self,
        org: &str,
        model: Option<&str>,
        from: i64,
        until: i64,
    ) -> Result<UsageSum> {
        let row = sqlx::query(
            "SELECT CAST(COALESCE(SUM(requests), 0) AS BIGINT) AS requests,
                 CAST(COALESCE(SUM(prompt_tokens), 0) AS BIGINT) AS prompt_tokens,
                 CAST(COALESCE(SUM(completion_tokens), 0) AS BIGINT) AS completion_tokens,
                 CAST(COALESCE(SUM(trained_tokens), 0) AS BIGINT) AS trained_tokens
             FROM usage
             WHERE org = $1 AND ($2 IS NULL OR model = $2) AND hour >= $3 AND hour < $4",
        )
        .bind(org)
        .bind(model.map(str::to_owned))
        .bind(from)
        .bind(until)
        .fetch_one(&self.db.pool)
        .await?;
        Ok(UsageSum {
            requests: get(&row, "requests")?,
            prompt_tokens: get(&row, "prompt_tokens")?,
            completion_tokens: get(&row, "completion_tokens")?,
            trained_tokens: get(&row, "trained_tokens")?,
        })
    }
}
