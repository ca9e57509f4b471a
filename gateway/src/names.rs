//! What model names mean, for inference: the database is asked each time, so a deleted name is
//! gone at once; only while it is away does its last answer stand in, for a few minutes.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use storage::Db;
use storage::db::Resolved;

use crate::error::{ApiError, ApiResult};

/// How old an answer may be that is used while the database is away.
pub const STALE_MAX: Duration = Duration::from_secs(5 * 60);

/// How long an inference request waits for the database where an older answer may do.
pub const PATIENCE: Duration = Duration::from_millis(1500);

/// Names remembered; beyond it the cache starts over.
const NAMES_MAX: usize = 10_000;

/// Organization and name.
type Key = (String, String);

/// The answers so far.
#[derive(Debug, Default)]
pub struct Names {
    known: Mutex<HashMap<Key, (Resolved, Instant)>>,
}

impl Names {
    /// What a name means for an organization; 404 where it means nothing, 503 where the database
    /// is away and was never asked.
    pub async fn resolve(&self, db: &Db, org: &str, model: &str) -> ApiResult<Resolved> {
        let resolved = self.look_up(db, org, model).await?;
        resolved.ok_or_else(|| ApiError::model_not_found(model))
    }

    /// What a name means for an organization; None where it means nothing.
    pub async fn look_up(
        &self,
        db: &Db,
        org: &str,
        model: &str,
    ) -> storage::Result<Option<Resolved>> {
        let key = (org.to_owned(), model.to_owned());
        match db.within(PATIENCE, db.resolve(org, model)).await {
            Ok(Some(resolved)) => {
                self.remember(key, resolved.clone());
                Ok(Some(resolved))
            }
            Ok(None) => {
                self.known().remove(&key);
                Ok(None)
            }
            Err(error) if error.is_unavailable() => match self.recall(&key) {
                Some(resolved) => {
                    tracing::debug!(%error, "a model name is taken from the cache");
                    Ok(Some(resolved))
                }
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    fn remember(&self, key: Key, resolved: Resolved) {
        let mut known = self.known();
        if known.len() >= NAMES_MAX && !known.contains_key(&key) {
            known.clear();
        }
        known.insert(key, (resolved, Instant::now()));
    }

    fn recall(&self, key: &Key) -> Option<Resolved> {
        let known = self.known();
        let (resolved, at) = known.get(key)?;
        (at.elapsed() < STALE_MAX).then(|| resolved.clone())
    }

    /// Every change leaves the value whole, so a panic elsewhere does not spoil it.
    fn known(&self) -> MutexGuard<'_, HashMap<Key, (Resolved, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::db::BaseRow;

    #[test]
    fn answers_are_forgotten_when_they_are_old() {
        let names = Names::default();
        let key = ("org".to_owned(), "b".to_owned());
        let row = BaseRow {
            name: "b".to_owned(),
            fingerprint: "p".to_owned(),
            context: 1,
            modules: None,
            created_at: 0,
        };
        names.remember(key.clone(), Resolved::Base(row));
        assert!(names.recall(&key).is_some());
        let Some(old) = Instant::now().checked_sub(STALE_MAX) else { return };
        for (_, at) in names.known().values_mut() {
            *at = old;
        }
        assert_eq!(names.recall(&key), None);
    }
}
