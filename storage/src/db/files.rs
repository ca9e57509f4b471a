//! Files' rows. The bytes lie in the object store under the row's `object`.

use sqlx::any::AnyRow;

use super::idempotency::Earlier;
use super::row::get;
use super::{Db, Idempotency, Inserted, Listing, Page, Write, patiently, without_nul};
use crate::error::{Error, Result};

/// A file whose object is already stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// `file-…`, drawn before the upload because the object is named after it.
    pub id: String,
    /// Name the client gave; never a path here.
    pub filename: String,
    /// `fine-tune`, `fine-tune-results`, …
    pub purpose: String,
    /// Size.
    pub bytes: i64,
    /// Seconds it lives; absent: until deleted.
    pub expires_after_secs: Option<i64>,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRow {
    /// `file-…`; also names its object ([`crate::objects::ObjectKey::File`]).
    pub id: String,
    /// Owner.
    pub org: String,
    /// Name the client gave.
    pub filename: String,
    /// `fine-tune`, `fine-tune-results`, …
    pub purpose: String,
    /// Size.
    pub bytes: i64,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds; absent: never. Past it the file behaves as deleted, except to its jobs.
    pub expires_at: Option<i64>,
}

/// Outcome of a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileDeleted {
    /// Gone; its object may be removed now.
    Deleted,
    /// This unfinished job reads it.
    InUse(String),
    /// No such file (any more).
    NotFound,
}

/// Access to files.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    pub(super) db: &'a Db,
}

const COLUMNS: &str = "id, org, filename, purpose, bytes, created_at, expires_at";

/// A job that still needs its files.
pub(super) const UNFINISHED: &str = "status IN ('validating_files', 'queued', 'running', 'paused')";

impl Files<'_> {
    /// Records an uploaded file.
    pub async fn insert(
        &self,
        org: &str,
        file: &NewFile,
        idempotency: Option<&Idempotency>,
    ) -> Result<Inserted<FileRow>> {
        without_nul("filename", &file.filename)?;
        patiently!(self.try_insert(org, file, idempotency))
    }

    async fn try_insert(
        &self,
        org: &str,
        file: &NewFile,
        idempotency: Option<&Idempotency>,
    ) -> Result<Inserted<FileRow>> {
        let mut write = self.db.begin().await?;
        if let Some(idempotency) = idempotency {
            match write.remember(org, "files", idempotency, &file.id).await? {
                Earlier::None => {}
                Earlier::Other => return Ok(Inserted::KeyReused),
                // Deleted since or not: the first reply again.
                Earlier::Same(id) => {
                    let row = sqlx::query(super::sql(format!(
                        "SELECT {COLUMNS} FROM files WHERE id = $1"
                    )))
                    .bind(id)
                    .fetch_one(write.connection())
                    .await?;
                    return Ok(Inserted::Replayed(read(&row)?));
                }
            }
        }
        let row = write.insert_file(org, file).await?;
        write.commit().await?;
        Ok(Inserted::New(row))
    }

    /// By id, unless deleted or expired.
    pub async fn get(&self, org: &str, id: &str) -> Result<Option<FileRow>> {
        let now = self.db.now_ms();
        let row = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM files WHERE id = $1 AND org = $2 AND deleted_at IS NULL
             AND (expires_at IS NULL OR expires_at > {now} / 1000)"
        )))
        .bind(id)
        .bind(org)
        .fetch_optional(&self.db.pool)
        .await?;
        row.as_ref().map(read).transpose()
    }

    /// A page of an organization's files, of one purpose or all.
    pub async fn list(
        &self,
        org: &str,
        purpose: Option<&str>,
        page: &Page,
    ) -> Result<Listing<FileRow>> {
        let now = self.db.now_ms();
        let start = match &page.after {
            None => page.before_all(),
            Some(after) => sqlx::query_scalar(super::sql(format!(
                "SELECT sequence FROM files WHERE id = $1 AND org = $2 AND deleted_at IS NULL
                 AND (expires_at IS NULL OR expires_at > {now} / 1000)"
            )))
            .bind(after)
            .bind(org)
            .fetch_optional(&self.db.pool)
            .await?
            .ok_or_else(|| Error::UnknownCursor(after.clone()))?,
        };
        let (direction, beyond) = page.direction();
        let rows = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM files
             WHERE org = $1 AND deleted_at IS NULL AND ($2 IS NULL OR purpose = $2)
             AND (expires_at IS NULL OR expires_at > {now} / 1000) AND sequence {beyond} $3
             ORDER BY sequence {direction} LIMIT $4"
        )))
        .bind(org)
        .bind(purpose.map(str::to_owned))
        .bind(start)
        .bind(page.rows_to_read())
        .fetch_all(&self.db.pool)
        .await?;
        Ok(Listing::cut(rows.iter().map(read).collect::<Result<_>>()?, page))
    }

    /// Deletes a file no unfinished job reads.
    pub async fn delete(&self, org: &str, id: &str) -> Result<FileDeleted> {
        patiently!(self.try_delete(org, id))
    }

    async fn try_delete(&self, org: &str, id: &str) -> Result<FileDeleted> {
        let mut write = self.db.begin().await?;
        // Holds the row against a job that is being created on it; the jobs are looked at after.
        if !write.hold_file(org, id).await? {
            return Ok(FileDeleted::NotFound);
        }
        let user: Option<String> = sqlx::query_scalar(super::sql(format!(
            "SELECT id FROM jobs WHERE org = $2 AND (training_file = $1 OR validation_file = $1)
             AND {UNFINISHED} LIMIT 1"
        )))
        .bind(id)
        .bind(org)
        .fetch_optional(write.connection())
        .await?;
        if let Some(job) = user {
            return Ok(FileDeleted::InUse(job));
        }
        let now = write.now_ms();
        sqlx::query(super::sql(format!(
            "UPDATE files SET deleted_at = {now} / 1000 WHERE id = $1"
        )))
        .bind(id)
        .execute(write.connection())
        .await?;
        write.commit().await?;
        Ok(FileDeleted::Deleted)
    }
}

impl Write {
    /// Locks a live file's row until the end of the transaction; false if there is none. An update
    /// that changes nothing is the one row lock both databases have.
    pub(super) async fn hold_file(&mut self, org: &str, id: &str) -> Result<bool> {
        let now = self.now_ms();
        let held = sqlx::query(super::sql(format!(
            "UPDATE files SET bytes = bytes WHERE id = $1 AND org = $2 AND deleted_at IS NULL
             AND (expires_at IS NULL OR expires_at > {now} / 1000)"
        )))
        .bind(id)
        .bind(org)
        .execute(self.connection())
        .await?
        .rows_affected();
        Ok(held == 1)
    }

    /// Adds a file's row.
    pub(super) async fn insert_file(&mut self, org: &str, file: &NewFile) -> Result<FileRow> {
        let now = self.now_ms();
        let sequence = self.next_sequence("files").await?;
        let row = sqlx::query(super::sql(format!(
            "INSERT INTO files (id, sequence, org, filename, purpose, bytes, created_at, expires_at)
             VALUES ($1, $2, $3, $4, $5, $6, {now} / 1000, {now} / 1000 + $7) RETURNING {COLUMNS}"
        )))
        .bind(&file.id)
        .bind(sequence)
        .bind(org)
        .bind(&file.filename)
        .bind(&file.purpose)
        .bind(file.bytes)
        .bind(file.expires_after_secs)
        .fetch_one(self.connection())
        .await?;
        read(&row)
    }
}

fn read(row: &AnyRow) -> Result<FileRow> {
    Ok(FileRow {
        id: get(row, "id")?,
        org: get(row, "org")?,
        filename: get(row, "filename")?,
        purpose: get(row, "purpose")?,
        bytes: get(row, "bytes")?,
        created_at: get(row, "created_at")?,
        expires_at: get(row, "expires_at")?,
    })
}
