//! Base models: first-seen time (a model's `created`), context and weight fingerprint.

use serde_json::Value;
use sqlx::any::AnyRow;

use super::row::{get, json_or_null, to_json};
use super::{Db, patiently, sql, without_nul};
use crate::error::Result;

/// A base model as its worker announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBase {
    /// Served model name.
    pub name: String,
    /// Fingerprint of weights and tokenizer.
    pub fingerprint: String,
    /// Longest sequence, in tokens.
    pub context: i64,
    /// Sizes of its modules, as its worker reads them: what an adapter must fit.
    pub modules: Value,
}

/// A base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseRow {
    /// Served model name.
    pub name: String,
    /// Fingerprint of weights and tokenizer.
    pub fingerprint: String,
    /// Longest sequence, in tokens.
    pub context: i64,
    /// Sizes of its modules; absent where only an older release has served it.
    pub modules: Option<Value>,
    /// Unix seconds of its first registration ever.
    pub created_at: i64,
}

/// What registering a base found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upserted {
    /// The row as it is now.
    pub row: BaseRow,
    /// The fingerprint it had before; absent for a new name. Where it differs from the row's, the
    /// name now means other weights, and adapters of the old ones no longer fit.
    pub fingerprint_before: Option<String>,
}

const COLUMNS: &str = "name, fingerprint, context, modules, created_at";

/// Access to bases.
#[derive(Clone, Copy, Debug)]
pub struct Bases<'a> {
    pub(super) db: &'a Db,
}

impl Bases<'_> {
    /// Registers a base; `created_at` stays that of the first time.
    pub async fn upsert(&self, base: &NewBase) -> Result<Upserted> {
        without_nul("base", &base.name)?;
        patiently!(self.try_upsert(base))
    }

    async fn try_upsert(&self, base: &NewBase) -> Result<Upserted> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let inserted = sqlx::query(sql(format!(
            "INSERT INTO bases (name, fingerprint, context, created_at)
             VALUES ($1, $2, $3, {now} / 1000) ON CONFLICT (name) DO NOTHING"
        )))
        .bind(&base.name)
        .bind(&base.fingerprint)
        .bind(base.context)
        .execute(write.connection())
        .await?
        .rows_affected();
        let before: String = sqlx::query_scalar("SELECT fingerprint FROM bases WHERE name = $1")
            .bind(&base.name)
            .fetch_one(write.connection())
            .await?;
        let row = sqlx::query(sql(format!(
            "UPDATE bases SET fingerprint = $2, context = $3, modules = $4 WHERE name = $1
             RETURNING {COLUMNS}"
        )))
        .bind(&base.name)
        .bind(&base.fingerprint)
        .bind(base.context)
        .bind(to_json("modules", &base.modules)?)
        .fetch_one(write.connection())
        .await?;
        write.commit().await?;
        let fingerprint_before = (inserted == 0).then_some(before);
        Ok(Upserted { row: read(&row)?, fingerprint_before })
    }

    /// By name.
    pub async fn get(&self, name: &str) -> Result<Option<BaseRow>> {
        let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM bases WHERE name = $1")))
            .bind(name)
            .fetch_optional(&self.db.pool)
            .await?;
        row.as_ref().map(read).transpose()
    }

    /// All, by name; an operator adds them one by one, so there are few.
    pub async fn list(&self) -> Result<Vec<BaseRow>> {
        let rows = sqlx::query(sql(format!("SELECT {COLUMNS} FROM bases ORDER BY name")))
            .fetch_all(&self.db.pool)
            .await?;
        rows.iter().map(read).collect()
    }
}

fn read(row: &AnyRow) -> Result<BaseRow> {
    Ok(BaseRow {
        name: get(row, "name")?,
        fingerprint: get(row, "fingerprint")?,
        context: get(row, "context")?,
        modules: json_or_null(row, "modules")?,
        created_at: get(row, "created_at")?,
    })
}
