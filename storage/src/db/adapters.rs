//! Adapters' rows: immutable versions with a model name each. Weights lie in the object store.

use sqlx::any::AnyRow;

use super::row::{flag, get, json, to_json};
use super::{Db, Listing, Page, Write, patiently, without_nul};
use crate::error::{Error, Result};
use crate::ids::{IdKind, new_id};

/// An adapter whose objects are already stored.
#[derive(Clone, Debug, PartialEq)]
pub struct NewAdapter {
    /// The name clients use, `ft:…`; unique for good.
    pub model: String,
    /// `lora` (rank-stabilised or not); room for other kinds.
    pub kind: String,
    /// Base model name.
    pub base: String,
    /// Fingerprint of the weights it was made for.
    pub base_fingerprint: String,
    /// LoRA rank R.
    pub rank: i64,
    /// LoRA alpha.
    pub alpha: f64,
    /// Scale by alpha/√R instead of alpha/R.
    pub use_rslora: bool,
    /// Projections with weights, `q_proj` ….
    pub target_modules: Vec<String>,
    /// Size of the weights on a device.
    pub bytes: i64,
    /// Version number within its lineage, for display and fingerprints.
    pub version: i64,
    /// Object folder, see [`crate::objects::ObjectKey::AdapterConfig`].
    pub object: String,
}

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterRow {
    /// `adp-…`
    pub id: String,
    /// Owner.
    pub org: String,
    /// The name clients use, `ft:…`.
    pub model: String,
    /// `lora`.
    pub kind: String,
    /// Base model name.
    pub base: String,
    /// Fingerprint of the weights it was made for.
    pub base_fingerprint: String,
    /// LoRA rank R.
    pub rank: i64,
    /// LoRA alpha.
    pub alpha: f64,
    /// Scale by alpha/√R instead of alpha/R.
    pub use_rslora: bool,
    /// Projections with weights.
    pub target_modules: Vec<String>,
    /// Size of the weights on a device.
    pub bytes: i64,
    /// Version number within its lineage.
    pub version: i64,
    /// Object folder.
    pub object: String,
    /// The job that trained it; absent for an import.
    pub job: Option<String>,
    /// Optimizer steps it has seen; absent for an import.
    pub step: Option<i64>,
    /// Unix seconds.
    pub created_at: i64,
    /// Kept on a device.
    pub pinned: bool,
    /// Unix seconds; absent before first use.
    pub last_used_at: Option<i64>,
}

/// What `/v1/models` shows of an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterName {
    /// `ft:…`
    pub model: String,
    /// Base model name.
    pub base: String,
    /// Unix seconds.
    pub created_at: i64,
}

/// Outcome of a deletion.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one per request, matched at once")]
pub enum AdapterDeleted {
    /// The name is gone. Its objects stay for now: requests under way and jobs that continue from
    /// it still read them.
    Deleted(AdapterRow),
    /// No such adapter (any more).
    NotFound,
}

/// Access to adapters.
#[derive(Clone, Copy, Debug)]
pub struct Adapters<'a> {
    pub(super) db: &'a Db,
}

pub(super) const COLUMNS: &str = "id, org, model, kind, base, base_fingerprint, rank, alpha, \
    use_rslora, target_modules, bytes, version, object, job, step, created_at, pinned, \
    last_used_at";

impl Adapters<'_> {
    /// Records an imported adapter. [`Error::NameTaken`] if its name was ever used.
    pub async fn insert(&self, org: &str, adapter: &NewAdapter) -> Result<AdapterRow> {
        check(adapter)?;
        patiently!(self.try_insert(org, adapter))
    }

    async fn try_insert(&self, org: &str, adapter: &NewAdapter) -> Result<AdapterRow> {
        let mut write = self.db.begin().await?;
        let row = write.insert_adapter(org, adapter, None).await?;
        write.commit().await?;
        Ok(row)
    }

    /// By its model name.
    pub async fn by_model(&self, org: &str, model: &str) -> Result<Option<AdapterRow>> {
        self.one("model = $2", org, model).await
    }

    /// By id or model name.
    pub async fn get(&self, org: &str, id_or_model: &str) -> Result<Option<AdapterRow>> {
        self.one("(id = $2 OR model = $2)", org, id_or_model).await
    }

    /// By id or model name, whoever it belongs to: for operators.
    pub async fn of_anyone(&self, id_or_model: &str) -> Result<Option<AdapterRow>> {
        let row = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM adapters WHERE deleted_at IS NULL AND (id = $1 OR model = $1)"
        )))
        .bind(id_or_model)
        .fetch_optional(&self.db.pool)
        .await?;
        row.as_ref().map(read).transpose()
    }

    async fn one(&self, which: &str, org: &str, name: &str) -> Result<Option<AdapterRow>> {
        let row = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM adapters WHERE org = $1 AND deleted_at IS NULL AND {which}"
        )))
        .bind(org)
        .bind(name)
        .fetch_optional(&self.db.pool)
        .await?;
        row.as_ref().map(read).transpose()
    }

    /// A page of an organization's adapters; `after` is an id or a model name.
    pub async fn list(&self, org: &str, page: &Page) -> Result<Listing<AdapterRow>> {
        let start = match &page.after {
            None => page.before_all(),
            Some(after) => sqlx::query_scalar(
                "SELECT sequence FROM adapters
                 WHERE org = $1 AND deleted_at IS NULL AND (id = $2 OR model = $2)",
            )
            .bind(org)
            .bind(after)
            .fetch_optional(&self.db.pool)
            .await?
            .ok_or_else(|| Error::UnknownCursor(after.clone()))?,
        };
        let (direction, beyond) = page.direction();
        let rows = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM adapters
             WHERE org = $1 AND deleted_at IS NULL AND sequence {beyond} $2
             ORDER BY sequence {direction} LIMIT $3"
        )))
        .bind(org)
        .bind(start)
        .bind(page.rows_to_read())
        .fetch_all(&self.db.pool)
        .await?;
        Ok(Listing::cut(rows.iter().map(read).collect::<Result<_>>()?, page))
    }

    /// All names of an organization, newest first (`GET /v1/models` has no pages).
    pub async fn names_of(&self, org: &str) -> Result<Vec<AdapterName>> {
        let rows = sqlx::query(
            "SELECT model, base, created_at FROM adapters
             WHERE org = $1 AND deleted_at IS NULL ORDER BY sequence DESC",
        )
        .bind(org)
        .fetch_all(&self.db.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(AdapterName {
                    model: get(row, "model")?,
                    base: get(row, "base")?,
                    created_at: get(row, "created_at")?,
                })
            })
            .collect()
    }

    /// Pins or unpins, by id or model name; the row as it is now, or none.
    pub async fn set_pinned(
        &self,
        org: &str,
        id_or_model: &str,
        pinned: bool,
    ) -> Result<Option<AdapterRow>> {
        let change = format!("pinned = {}", i64::from(pinned));
        patiently!(self.try_update(&change, org, id_or_model))
    }

    /// Deletes a name, by id or model name. The name is never given out again.
    pub async fn delete(&self, org: &str, id_or_model: &str) -> Result<AdapterDeleted> {
        let change = format!("deleted_at = {} / 1000", self.db.now_ms());
        let row: Result<_> = patiently!(self.try_update(&change, org, id_or_model));
        Ok(row?.map_or(AdapterDeleted::NotFound, AdapterDeleted::Deleted))
    }

    async fn try_update(&self, change: &str, org: &str, name: &str) -> Result<Option<AdapterRow>> {
        let mut write = self.db.begin().await?;
        let row = sqlx::query(super::sql(format!(
            "UPDATE adapters SET {change}
             WHERE org = $1 AND deleted_at IS NULL AND (id = $2 OR model = $2)
             RETURNING {COLUMNS}"
        )))
        .bind(org)
        .bind(name)
        .fetch_optional(write.connection())
        .await?;
        write.commit().await?;
        row.as_ref().map(read).transpose()
    }

    /// Notes uses: (adapter id, Unix seconds). Never moves a time back; unknown ids are ignored.
    pub async fn touch_used(&self, uses: &[(String, i64)]) -> Result<()> {
        let mut in_order: Vec<_> = uses.iter().collect();
        // One order for all writers, so that their row locks cannot cross.
        in_order.sort();
        patiently!(self.try_touch_used(&in_order))
    }

    async fn try_touch_used(&self, uses: &[&(String, i64)]) -> Result<()> {
        let mut write = self.db.begin().await?;
        for (id, at) in uses {
            sqlx::query(
                "UPDATE adapters SET last_used_at = $2
                 WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < $2)",
            )
            .bind(id)
            .bind(at)
            .execute(write.connection())
            .await?;
        }
        write.commit().await
    }
}

/// Texts that reach the database must be storable.
pub(super) fn check(adapter: &NewAdapter) -> Result<()> {
    without_nul("model", &adapter.model)?;
    without_nul("base", &adapter.base)?;
    without_nul("object", &adapter.object)?;
    adapter.target_modules.iter().try_for_each(|module| without_nul("target_modules", module))
}

impl Write {
    /// Adds an adapter's row; `trained` is its job and step.
    pub(super) async fn insert_adapter(
        &mut self,
        org: &str,
        adapter: &NewAdapter,
        trained: Option<(&str, i64)>,
    ) -> Result<AdapterRow> {
        let now = self.now_ms();
        let sequence = self.next_sequence("adapters").await?;
        let row = sqlx::query(super::sql(format!(
            "INSERT INTO adapters (id, sequence, org, model, kind, base, base_fingerprint, rank,
                 alpha, use_rslora, target_modules, bytes, version, object, job, step, created_at,
                 pinned)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,
                 {now} / 1000, 0)
             ON CONFLICT (model) DO NOTHING RETURNING {COLUMNS}"
        )))
        .bind(new_id(IdKind::Adapter))
        .bind(sequence)
        .bind(org)
        .bind(&adapter.model)
        .bind(&adapter.kind)
        .bind(&adapter.base)
        .bind(&adapter.base_fingerprint)
        .bind(adapter.rank)
        .bind(adapter.alpha)
        .bind(i64::from(adapter.use_rslora))
        .bind(to_json("target_modules", &adapter.target_modules)?)
        .bind(adapter.bytes)
        .bind(adapter.version)
        .bind(&adapter.object)
        .bind(trained.map(|(job, _)| job.to_owned()))
        .bind(trained.map(|(_, step)| step))
        .fetch_optional(self.connection())
        .await?;
        match row {
            Some(row) => read(&row),
            None => Err(Error::NameTaken(adapter.model.clone())),
        }
    }
}

/// From [`COLUMNS`].
pub(super) fn read(row: &AnyRow) -> Result<AdapterRow> {
    Ok(AdapterRow {
        id: get(row, "id")?,
        org: get(row, "org")?,
        model: get(row, "model")?,
        kind: get(row, "kind")?,
        base: get(row, "base")?,
        base_fingerprint: get(row, "base_fingerprint")?,
        rank: get(row, "rank")?,
        alpha: get(row, "alpha")?,
        use_rslora: flag(row, "use_rslora")?,
        target_modules: json(row, "target_modules")?,
        bytes: get(row, "bytes")?,
        version: get(row, "version")?,
        object: get(row, "object")?,
        job: get(row, "job")?,
        step: get(row, "step")?,
        created_at: get(row, "created_at")?,
        pinned: flag(row, "pinned")?,
        last_used_at: get(row, "last_used_at")?,
    })
}
