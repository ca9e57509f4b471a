//! Token counts and adapter uses of this process, added up in memory and written every few
//! seconds, so that a request costs no transaction.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use storage::Storage;
use storage::db::{UsageRow, UsageSum};

const HOUR_SECS: i64 = 3600;

/// Organizations × models × hours not written yet; beyond it new ones are in the metrics only. The
/// database being away for hours is what gathers them.
const ACCOUNTS_MAX: usize = 100_000;

#[derive(Debug, Default)]
struct Open {
    /// By organization, model and hour.
    counts: HashMap<(String, String, i64), UsageSum>,
    uses: HashMap<String, i64>,
}

/// What has not been written yet.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<Open>);

/// Unix seconds by this host's clock; for accounts and replies, never for decisions.
pub fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

impl Ledger {
    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one request.
    pub fn add(&self, org: &str, model: &str, prompt_tokens: u64, completion_tokens: u64) {
        let hour = unix_now() / HOUR_SECS * HOUR_SECS;
        let mut open = self.open();
        let key = (org.to_owned(), model.to_owned(), hour);
        if open.counts.len() >= ACCOUNTS_MAX && !open.counts.contains_key(&key) {
            tracing::warn!(org, model, "too many accounts at once; one request is not counted");
            return;
        }
        let sum = open.counts.entry(key).or_default();
        sum.requests += 1;
        sum.prompt_tokens += prompt_tokens as i64;
        sum.completion_tokens += completion_tokens as i64;
    }

    /// Notes that an adapter was used now.
    pub fn used(&self, adapter_id: &str) {
        let mut open = self.open();
        if open.uses.len() < ACCOUNTS_MAX || open.uses.contains_key(adapter_id) {
            open.uses.insert(adapter_id.to_owned(), unix_now());
        }
    }

    /// Writes what has gathered; what cannot be written now is kept for the next time.
    pub async fn flush(&self, storage: &Storage) {
        let Open { counts, uses } = std::mem::take(&mut *self.open());
        let rows: Vec<UsageRow> = counts
            .into_iter()
            .map(|((org, model, hour), counts)| UsageRow { org, model, hour, counts })
            .collect();
        if !rows.is_empty()
            && let Err(error) = storage.db.usage().add(&rows).await
        {
            tracing::warn!(%error, "usage could not be written; it is kept");
            self.restore(rows);
        }
        let uses: Vec<(String, i64)> = uses.into_iter().collect();
        if !uses.is_empty()
            && let Err(error) = storage.db.adapters().touch_used(&uses).await
        {
            // Only a time of last use: the next use writes it.
            tracing::warn!(%error, "uses of adapters could not be written");
        }
    }

    fn restore(&self, rows: Vec<UsageRow>) {
        let mut open = self.open();
        for row in rows {
            let sum = open.counts.entry((row.org, row.model, row.hour)).or_default();
            sum.requests += row.counts.requests;
            sum.prompt_tokens += row.counts.prompt_tokens;
            sum.completion_tokens += row.counts.completion_tokens;
        }
    }
}
