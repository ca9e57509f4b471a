//! The sweeper: removes what nobody needs any more. Any number of processes run one; a lease lets
//! one at a time work, in rounds that are bounded and go on where the last one stopped, so a
//! sweeper may die anywhere.
//!
//! Rows decide. An object goes only when no row names it and it is older than
//! [`SweepSettings::age`]: whoever stores an object names it in a row soon after, or never.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep};

use crate::db::{Db, Duty};
use crate::error::Result;
use crate::ids::incarnation;
use crate::objects::{ObjectEntry, ObjectKey, ObjectKind, Objects};

/// Kinds in the order of their names, which is the order of a pass.
const KINDS: [ObjectKind; 3] = [ObjectKind::Adapters, ObjectKind::Files, ObjectKind::ResumePoints];

/// How much is done how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepSettings {
    /// Between two rounds.
    pub period: Duration,
    /// Within which a round must end; a sweeper that died is followed by another after it.
    pub lease: Duration,
    /// How old an object is before the lack of a row counts. Far longer than any upload and any
    /// outage of the database during which a worker still holds its job, and than clocks differ.
    pub age: Duration,
    /// Rows of each sort that one round removes.
    pub rows: u32,
    /// Objects that one round looks at.
    pub objects: usize,
    /// Between two passes over all objects: listing a large bucket has its price.
    pub pass_pause: Duration,
}

impl Default for SweepSettings {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(60),
            lease: Duration::from_secs(120),
            age: Duration::from_secs(24 * 60 * 60),
            rows: 200,
            objects: 2000,
            pass_pause: Duration::from_secs(60 * 60),
        }
    }
}

/// What a round removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Expired files.
    pub files: usize,
    /// Resume points of ended jobs.
    pub resume_points: usize,
    /// Idempotency keys past their time.
    pub idempotency: u64,
    /// Objects that no row named.
    pub objects: usize,
    /// Uploads that nobody finished.
    pub uploads: usize,
    /// Whether the last object has been looked at.
    pub pass_ended: bool,
}

/// One process's sweeper.
#[derive(Debug)]
pub struct Sweeper {
    db: Db,
    objects: Objects,
    settings: SweepSettings,
    owner: String,
    /// Old uploads by the store's names, and when this process first saw them.
    uploads: Mutex<HashMap<String, Instant>>,
    /// Something was said of objects that are not ours.
    warned: AtomicBool,
}

impl Sweeper {
    /// Over the rows and objects that belong together.
    pub fn new(db: Db, objects: Objects, settings: SweepSettings) -> Self {
        let (uploads, warned) = (Mutex::default(), AtomicBool::new(false));
        Self { db, objects, settings, owner: incarnation(), uploads, warned }
    }

    /// Sweeps for good. The first round comes at a random moment of a period, so that processes
    /// started together do not ask together.
    pub async fn run(self) {
        let share = rand::rng().random_range(0.0..1.0);
        sleep(self.settings.period.mul_f64(share)).await;
        loop {
            match self.round().await {
                Ok(swept) if swept == Swept::default() => {}
                Ok(swept) => tracing::debug!(?swept, "swept"),
                // Away stores are said by those who need them.
                Err(error) if error.is_unavailable() => {
                    tracing::debug!(%error, "a round of sweeping ended early");
                }
                Err(error) => tracing::warn!(%error, "a round of sweeping ended early"),
            }
            sleep(self.settings.period).await;
        }
    }

    /// Does what is due and what nobody else is doing.
    pub async fn round(&self) -> Result<Swept> {
        let mut swept = Swept::default();
        let rows = self.rows(&mut swept).await;
        let objects = self.orphans(&mut swept).await;
        rows.and(objects)?;
        Ok(swept)
    }

    async fn rows(&self, swept: &mut Swept) -> Result<()> {
        let duties = self.db.duties();
        let Some(shift) = duties.take(Duty::Rows, &self.owner, self.lease_ms()).await? else {
            return Ok(());
        };
        let outcome = self.sweep_rows(swept).await;
        duties.leave(&shift, None, millis(self.settings.period)).await?;
        outcome
    }

    /// Rows first: an object that is left by a fault here is found by its age.
    async fn sweep_rows(&self, swept: &mut Swept) -> Result<()> {
        let end = self.end();
        let most = self.settings.rows;
        let leftovers = self.db.leftovers();
        swept.idempotency = leftovers.forget_idempotency(most).await?;
        let points = self.db.jobs().take_leftover_resume_points(most).await?;
        swept.resume_points = self.remove(points.iter(), end).await?;
        let files = leftovers.take_expired_files(most).await?;
        swept.files = self.remove(files.iter(), end).await?;
        Ok(())
    }

    async fn orphans(&self, swept: &mut Swept) -> Result<()> {
        let duties = self.db.duties();
        let Some(shift) = duties.take(Duty::Objects, &self.owner, self.lease_ms()).await? else {
            return Ok(());
        };
        let mut place = shift.place.clone();
        let outcome = self.sweep_objects(&mut place, swept).await;
        swept.pass_ended = outcome.is_ok() && place.is_none();
        let pause = if swept.pass_ended { self.settings.pass_pause } else { self.settings.period };
        duties.leave(&shift, place.as_deref(), millis(pause)).await?;
        outcome
    }

    /// Looks at the objects beyond `place`, and moves it on past those it is done with.
    async fn sweep_objects(&self, place: &mut Option<String>, swept: &mut Swept) -> Result<()> {
        let end = self.end();
        let installation = self.db.leftovers().installation().await?;
        if !self.objects.belongs_to(&installation).await? {
            self.warn("the object store belongs to another database: no object is removed");
            return Ok(());
        }
        let mut left = self.settings.objects;
        for kind in KINDS {
            let folder = place.as_deref().and_then(|name| name.split('/').next());
            let after = match folder {
                Some(folder) if folder > kind.folder() => continue,
                Some(folder) if folder == kind.folder() => place.clone(),
                _ => None,
            };
            let page = self.objects.page(kind, after.as_deref(), left).await?;
            let (looked, last) = (page.len(), page.last().map(|entry| entry.name.clone()));
            swept.objects += self.judge(&page, end).await?;
            if looked == left || Instant::now() >= end {
                *place = last.or(after);
                return Ok(());
            }
            left -= looked;
        }
        *place = None;
        swept.uploads = self.sweep_uploads(end).await?;
        Ok(())
    }

    /// Ends uploads that are old and that were there in an earlier pass too: what a store tells of
    /// their beginning is not trusted alone.
    async fn sweep_uploads(&self, end: Instant) -> Result<usize> {
        let old_before = self.db.leftovers().now().await? - self.settings.age.as_secs() as i64;
        let listed = self.objects.unfinished_uploads().await?;
        let old = listed.into_iter().filter(|upload| upload.begun <= second(old_before));
        let due = {
            let mut known = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
            let (now, before) = (Instant::now(), std::mem::take(&mut *known));
            let mut due = Vec::new();
            for upload in old {
                match before.get(&upload.id) {
                    Some(seen) if now - *seen >= self.settings.pass_pause => due.push(upload),
                    seen => {
                        known.insert(upload.id, seen.copied().unwrap_or(now));
                    }
                }
            }
            due
        };
        let mut ended = 0;
        for upload in due {
            if Instant::now() >= end {
                break;
            }
            self.objects.abort_upload(&upload).await?;
            ended += 1;
        }
        Ok(ended)
    }

    /// Removes those objects of a page that are old and not named.
    async fn judge(&self, page: &[ObjectEntry], end: Instant) -> Result<usize> {
        let leftovers = self.db.leftovers();
        let age_secs = self.settings.age.as_secs() as i64;
        let old_before = leftovers.now().await? - age_secs;
        let mut old = Vec::new();
        for entry in page {
            match ObjectKey::parse(&entry.name) {
                None => self.warn(&format!(
                    "'{}' in the object store is none of ours: it and its like are left alone",
                    entry.name
                )),
                Some(key) if entry.modified_at <= old_before => old.push(key),
                Some(_) => {}
            }
        }
        let unnamed = leftovers.unnamed(&old, age_secs).await?;
        self.remove(unnamed.into_iter(), end).await
    }

    /// Removes objects while there is time; the rest is found again.
    async fn remove<'k>(
        &self,
        keys: impl Iterator<Item = &'k ObjectKey>,
        end: Instant,
    ) -> Result<usize> {
        let mut removed = 0;
        for key in keys {
            if Instant::now() >= end {
                break;
            }
            self.objects.delete(key).await?;
            removed += 1;
        }
        Ok(removed)
    }

    fn warn(&self, what: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!("{what}");
        }
    }

    /// A holder stops at two thirds of its lease.
    fn end(&self) -> Instant {
        Instant::now() + self.settings.lease * 2 / 3
    }

    fn lease_ms(&self) -> i64 {
        millis(self.settings.lease)
    }
}

/// Unix seconds as stores write times, without fraction and zone.
fn second(unix_secs: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(unix_secs).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (date, time) = (at.date(), at.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::second;

    #[test]
    fn times_are_written_as_stores_write_them() {
        assert_eq!(second(0), "1970-01-01T00:00:00");
        assert_eq!(second(1_795_491_090), "2026-11-24T03:31:30");
    }
}
