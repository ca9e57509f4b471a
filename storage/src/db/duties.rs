//! Duties: what one process at a time does for all, by a lease and at intervals. Whoever finds one
//! due does it; where it was left off is kept beside it, so that the next one goes on there.

use super::row::get;
use super::{Db, patiently, sql};
use crate::error::Result;

/// A duty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Rows past their time.
    Rows,
    /// Objects that nothing names.
    Objects,
}

impl Duty {
    fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Objects => "objects",
        }
    }
}

/// A hold on a duty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shift {
    duty: Duty,
    attempt: i64,
    /// Where the last one stopped; none: at the beginning.
    pub place: Option<String>,
}

/// Access to duties.
#[derive(Clone, Copy, Debug)]
pub struct Duties<'a> {
    pub(super) db: &'a Db,
}

impl Duties<'_> {
    /// Takes a duty that is due and that nobody holds, for `lease_ms`.
    pub async fn take(&self, duty: Duty, owner: &str, lease_ms: i64) -> Result<Option<Shift>> {
        patiently!(self.try_take(duty, owner, lease_ms))
    }

    async fn try_take(&self, duty: Duty, owner: &str, lease_ms: i64) -> Result<Option<Shift>> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let row = sqlx::query(sql(format!(
            "UPDATE duties SET owner = $2, attempt = attempt + 1, lease_until = {now} + $3
             WHERE name = $1 AND lease_until <= {now} AND due_ms <= {now}
             RETURNING attempt, place"
        )))
        .bind(duty.name())
        .bind(owner)
        .bind(lease_ms)
        .fetch_optional(write.connection())
        .await?;
        write.commit().await?;
        row.map(|row| {
            Ok(Shift { duty, attempt: get(&row, "attempt")?, place: get(&row, "place")? })
        })
        .transpose()
    }

    /// Gives a duty back, to be due again after `pause_ms`, at `place`. False, and nothing is
    /// changed, where another has taken it meanwhile.
    pub async fn leave(&self, shift: &Shift, place: Option<&str>, pause_ms: i64) -> Result<bool> {
        patiently!(self.try_leave(shift, place, pause_ms))
    }

    async fn try_leave(&self, shift: &Shift, place: Option<&str>, pause_ms: i64) -> Result<bool> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let left = sqlx::query(sql(format!(
            "UPDATE duties SET owner = NULL, lease_until = 0, place = $3, due_ms = {now} + $4
             WHERE name = $1 AND attempt = $2"
        )))
        .bind(shift.duty.name())
        .bind(shift.attempt)
        .bind(place.map(str::to_owned))
        .bind(pause_ms)
        .execute(write.connection())
        .await?
        .rows_affected();
        write.commit().await?;
        Ok(left == 1)
    }
}
