//! API keys: only a hash is kept; the secret is shown once.

use sha2::{Digest, Sha256};
use sqlx::any::AnyRow;

use super::row::{get, word};
use super::{Db, patiently, without_nul};
use crate::error::Result;
use crate::ids::{IdKind, alphanumerics, new_id};

/// Random characters of a secret: 48 of 62 symbols, 285 bits, so a plain SHA-256 is enough.
const SECRET_LENGTH: usize = 48;

/// Leading hexadecimal digits of the hash by which a key is looked up. The rest is compared in
/// constant time, so timing tells at most these digits of a hash, never of a secret.
const LOOKUP_DIGITS: usize = 16;

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Uses the API for its organization.
    Member,
    /// Also sees and steers the whole service.
    Operator,
}

impl Role {
    /// The word in rows and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Member => "member",
            Self::Operator => "operator",
        }
    }

    /// The reverse of [`Role::as_str`].
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "member" => Some(Self::Member),
            "operator" => Some(Self::Operator),
            _ => None,
        }
    }
}

/// A key without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// `key-…`
    pub id: String,
    /// Owner, `org-…`.
    pub org: String,
    /// What it may do.
    pub role: Role,
    /// Start and end of the secret, for people: `sk-Ab…9xYz`.
    pub hint: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds; absent while valid.
    pub revoked_at: Option<i64>,
}

/// Who a valid secret belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Owner, `org-…`.
    pub org: String,
    /// What it may do.
    pub role: Role,
    /// `key-…`
    pub key_id: String,
}

/// Access to keys.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    pub(super) db: &'a Db,
}

const COLUMNS: &str = "id, org, role, hint, created_at, revoked_at";

impl Keys<'_> {
    /// Makes a key. The second value is the secret `sk-…`; nothing can show it again.
    pub async fn create(&self, org: &str, role: Role) -> Result<(KeyRow, String)> {
        without_nul("org", org)?;
        let secret = format!("sk-{}", alphanumerics(SECRET_LENGTH));
        let row = patiently!(self.try_create(org, role, &secret))?;
        Ok((row, secret))
    }

    async fn try_create(&self, org: &str, role: Role, secret: &str) -> Result<KeyRow> {
        let hash = hash_of(secret);
        let hint = format!("{}…{}", &secret[..5], &secret[secret.len() - 4..]);
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let sequence = write.next_sequence("api_keys").await?;
        let row = sqlx::query(super::sql(format!(
            "INSERT INTO api_keys (id, sequence, org, role, lookup, secret_hash, hint, created_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, {now} / 1000) RETURNING {COLUMNS}"
        )))
        .bind(new_id(IdKind::Key))
        .bind(sequence)
        .bind(org)
        .bind(role.as_str())
        .bind(&hash[..LOOKUP_DIGITS])
        .bind(&hash)
        .bind(hint)
        .fetch_one(write.connection())
        .await?;
        write.commit().await?;
        read(&row)
    }

    /// Who holds this secret; nobody if it is unknown or revoked.
    pub async fn authenticate(&self, secret: &str) -> Result<Option<Caller>> {
        let hash = hash_of(secret);
        let rows = sqlx::query(
            "SELECT id, org, role, secret_hash FROM api_keys
             WHERE lookup = $1 AND revoked_at IS NULL",
        )
        .bind(&hash[..LOOKUP_DIGITS])
        .fetch_all(&self.db.pool)
        .await?;
        for row in &rows {
            if equal_in_constant_time(&get::<String>(row, "secret_hash")?, &hash) {
                return Ok(Some(Caller {
                    org: get(row, "org")?,
                    role: word(row, "role", Role::parse)?,
                    key_id: get(row, "id")?,
                }));
            }
        }
        Ok(None)
    }

    /// Keys, newest first, of one organization or of all; made by hand, so there are few.
    pub async fn list(&self, org: Option<&str>) -> Result<Vec<KeyRow>> {
        let rows = sqlx::query(super::sql(format!(
            "SELECT {COLUMNS} FROM api_keys WHERE ($1 IS NULL OR org = $1) ORDER BY sequence DESC"
        )))
        .bind(org.map(str::to_owned))
        .fetch_all(&self.db.pool)
        .await?;
        rows.iter().map(read).collect()
    }

    /// Ends a key for good; false if there is no such key. Revoking twice keeps the first time.
    pub async fn revoke(&self, id: &str) -> Result<bool> {
        patiently!(self.try_revoke(id))
    }

    async fn try_revoke(&self, id: &str) -> Result<bool> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let changed = sqlx::query(super::sql(format!(
            "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, {now} / 1000) WHERE id = $1"
        )))
        .bind(id)
        .execute(write.connection())
        .await?
        .rows_affected();
        write.commit().await?;
        Ok(changed > 0)
    }

    /// Whether a key was ever made, revoked ones included: open access has then ended for good.
    pub async fn any_ever(&self) -> Result<bool> {
        let row =
            sqlx::query("SELECT id FROM api_keys LIMIT 1").fetch_optional(&self.db.pool).await?;
        Ok(row.is_some())
    }
}

fn read(row: &AnyRow) -> Result<KeyRow> {
    Ok(KeyRow {
        id: get(row, "id")?,
        org: get(row, "org")?,
        role: word(row, "role", Role::parse)?,
        hint: get(row, "hint")?,
        created_at: get(row, "created_at")?,
        revoked_at: get(row, "revoked_at")?,
    })
}

/// SHA-256 in lowercase hexadecimal.
fn hash_of(secret: &str) -> String {
    Sha256::digest(secret.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn equal_in_constant_time(left: &str, right: &str) -> bool {
    let difference =
        left.bytes().zip(right.bytes()).fold(0, |sum, (left, right)| sum | (left ^ right));
    left.len() == right.len() && difference == 0
}
