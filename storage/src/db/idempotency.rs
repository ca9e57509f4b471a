//! `Idempotency-Key`: the same key and body within a day give the first result again.

use super::Write;
use super::row::get;
use crate::error::Result;

/// How long a key is remembered.
const REMEMBERED_MS: i64 = 24 * 60 * 60 * 1000;

/// A client's key for one request body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// The header's value.
    pub key: String,
    /// Hash of the body (any text; equal bodies, equal hash).
    pub body_hash: String,
}

/// Outcome of an insert that may be a repetition.
#[derive(Clone, Debug, PartialEq)]
pub enum Inserted<T> {
    /// A new row.
    New(T),
    /// The row of the first request with this key, as it was when created.
    Replayed(T),
    /// The key was used with another body (400).
    KeyReused,
}

/// What a key meant before.
pub(super) enum Earlier {
    /// First use: it now stands for the new id.
    None,
    /// Repetition: the id made the first time.
    Same(String),
    /// Another body.
    Other,
}

impl Write {
    /// Ties a key to `id` unless it is taken. Two requests with one key at once: the second waits
    /// for the first's row lock and then finds its row.
    pub(super) async fn remember(
        &mut self,
        org: &str,
        route: &'static str,
        idempotency: &Idempotency,
        id: &str,
    ) -> Result<Earlier> {
        let now = self.now_ms();
        // Other expired keys are the sweeper's.
        sqlx::query(super::sql(format!(
            "DELETE FROM idempotency
             WHERE org = $1 AND route = $2 AND idempotency_key = $3 AND expires_ms <= {now}"
        )))
        .bind(org)
        .bind(route)
        .bind(&idempotency.key)
        .execute(self.connection())
        .await?;
        let inserted = sqlx::query(super::sql(format!(
            "INSERT INTO idempotency (org, route, idempotency_key, body_hash, object_id, expires_ms)
             VALUES ($1, $2, $3, $4, $5, {now} + $6) ON CONFLICT DO NOTHING"
        )))
        .bind(org)
        .bind(route)
        .bind(&idempotency.key)
        .bind(&idempotency.body_hash)
        .bind(id)
        .bind(REMEMBERED_MS)
        .execute(self.connection())
        .await?
        .rows_affected();
        if inserted == 1 {
            return Ok(Earlier::None);
        }
        let row = sqlx::query(
            "SELECT body_hash, object_id FROM idempotency
             WHERE org = $1 AND route = $2 AND idempotency_key = $3",
        )
        .bind(org)
        .bind(route)
        .bind(&idempotency.key)
        .fetch_one(self.connection())
        .await?;
        if get::<String>(&row, "body_hash")? == idempotency.body_hash {
            Ok(Earlier::Same(get(&row, "object_id")?))
        } else {
            Ok(Earlier::Other)
        }
    }
}
