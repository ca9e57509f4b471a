//! The job's states and the one table of who may move it where.

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// Created; its files are being checked.
    ValidatingFiles,
    /// Waits for a worker with room.
    Queued,
    /// A worker trains it, or its lease has lapsed and another will.
    Running,
    /// Saved and set aside until resumed.
    Paused,
    /// Done; its model is listed.
    Succeeded,
    /// Ended by a fault.
    Failed,
    /// Ended by its owner's wish.
    Cancelled,
}

/// Who changes a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The organization, through the API.
    Client,
    /// A worker taking hold of it.
    Claimant,
    /// The worker that holds its lease.
    Owner,
}

impl JobStatus {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::ValidatingFiles,
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word in rows and replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The reverse of [`JobStatus::as_str`].
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }

    /// Nothing changes a terminal job.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// The whole state machine. An owner "moving" a job to the state it is in means writing about it
/// (events, progress); a claimant doing so means taking over from a lapsed lease. A claimant fails
/// a job that has ended worker after worker.
pub fn may_change(from: JobStatus, to: JobStatus, by: By) -> bool {
    use JobStatus::*;
    match by {
        By::Client => match to {
            Cancelled => !from.is_terminal(),
            Queued => from == Paused,
            _ => false,
        },
        By::Claimant => {
            matches!(
                (from, to),
                (ValidatingFiles, ValidatingFiles | Failed)
                    | (Queued, Running)
                    | (Running, Running | Failed)
            )
        }
        By::Owner => matches!(
            (from, to),
            (ValidatingFiles, ValidatingFiles | Queued | Failed)
                | (Running, Running | Paused | Succeeded | Failed)
        ),
    }
}

/// `status IN (…)` with every state from which `by` may go to `to`.
pub(super) fn from_states(to: JobStatus, by: By) -> String {
    in_states(|from| may_change(from, to, by))
}

/// `status IN (…)` with every state in which the owner may write without a change of state.
pub(super) fn owned_states() -> String {
    in_states(|status| may_change(status, status, By::Owner))
}

fn in_states(allowed: impl Fn(JobStatus) -> bool) -> String {
    let words: Vec<_> = JobStatus::ALL
        .into_iter()
        .filter(|status| allowed(*status))
        .map(|status| format!("'{}'", status.as_str()))
        .collect();
    format!("status IN ({})", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows: from; columns: to, in the order of [`JobStatus::ALL`]. `C` client, `T` claimant
    /// (takes), `O` owner.
    const TABLE: [[&str; 7]; 7] = [
        // validating queued running paused succeeded failed cancelled
        ["TO", "O", "", "", "", "TO", "C"],  // validating_files
        ["", "", "T", "", "", "", "C"],      // queued
        ["", "", "TO", "O", "O", "TO", "C"], // running
        ["", "C", "", "", "", "", "C"],      // paused
        ["", "", "", "", "", "", ""],        // succeeded
        ["", "", "", "", "", "", ""],        // failed
        ["", "", "", "", "", "", ""],        // cancelled
    ];

    #[test]
    fn every_change_is_as_the_table_says() {
        for (from, row) in JobStatus::ALL.into_iter().zip(TABLE) {
            for (to, who) in JobStatus::ALL.into_iter().zip(row) {
                for (by, letter) in [(By::Client, 'C'), (By::Claimant, 'T'), (By::Owner, 'O')] {
                    assert_eq!(
                        may_change(from, to, by),
                        who.contains(letter),
                        "{from:?} -> {to:?} by {by:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn words_go_both_ways() {
        for status in JobStatus::ALL {
            assert_eq!(JobStatus::parse(status.as_str()), Some(status));
        }
        assert_eq!(JobStatus::parse("pausing"), None);
    }

    #[test]
    fn statements_list_the_allowed_states() {
        assert_eq!(from_states(JobStatus::Queued, By::Client), "status IN ('paused')");
        assert_eq!(owned_states(), "status IN ('validating_files', 'running')");
    }
}
