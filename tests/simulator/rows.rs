//! What the statements of `storage::db::jobs` mean, written down a second time as plain data. The
//! simulated world uses it with a clock of its own; `equal_rows.rs` holds it against the databases.

use std::collections::BTreeMap;

use storage::db::{
    By, Claim, Intent, JobError, JobRow, JobStatus, JobWrite, NewCheckpoint, NewEvent, Renewed,
    ResumePointRow, StatusChange, Written, event_kind, may_change,
};

/// Resume points kept of one job.
const KEPT: usize = 2;
/// Claims without progress after which a job fails.
const FRUITLESS: i64 = 3;

/// An event as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub sequence: i64,
    pub kind: String,
    pub key: i64,
    pub message: String,
}

/// A job with all that hangs on it.
#[derive(Clone, Debug)]
pub struct Row {
    pub job: JobRow,
    pub lease_until: i64,
    event_sequence: i64,
    /// Claims in a row that came no further.
    fruitless: i64,
    furthest_step: i64,
    pub events: Vec<Event>,
    /// Attempt by step.
    pub points: BTreeMap<i64, i64>,
    /// Checkpoint by step: model name and folder.
    pub checkpoints: BTreeMap<i64, (String, String)>,
}

/// All jobs, oldest first.
#[derive(Default)]
pub struct Rows {
    pub rows: Vec<Row>,
    /// Takes writes of whoever held the job once.
    pub unfenced: bool,
}

/// An empty job of this id.
pub fn new_job(id: &str) -> JobRow {
    JobRow {
        id: id.to_owned(),
        org: "org".to_owned(),
        model: "base".to_owned(),
        base: "base".to_owned(),
        base_fingerprint: "print".to_owned(),
        parent: None,
        training_file: "file-1".to_owned(),
        validation_file: None,
        suffix: None,
        seed: 1,
        request: serde_json::Value::Null,
        resolved: None,
        metadata: None,
        status: JobStatus::ValidatingFiles,
        intent: None,
        owner: None,
        attempt: 0,
        created_at: 0,
        started_at: None,
        finished_at: None,
        trained_tokens: None,
        estimated_finish: None,
        fine_tuned_model: None,
        result_files: Vec::new(),
        error: None,
        step: 0,
        total_steps: None,
    }
}

impl Row {
    /// The row as it is created.
    pub fn new(job: JobRow) -> Self {
        let mut row = Self {
            job,
            lease_until: 0,
            event_sequence: 0,
            fruitless: 0,
            furthest_step: 0,
            events: Vec::new(),
            points: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
        };
        row.add_events(&[
            NewEvent::info(event_kind::CREATED, 0, "created"),
            NewEvent::info(event_kind::VALIDATING, 0, "validating"),
        ]);
        row
    }

    /// Numbers are drawn for repeated events too; the events are not added again.
    fn add_events(&mut self, events: &[NewEvent]) {
        for event in events {
            self.event_sequence += 1;
            let known = |old: &Event| old.kind == event.kind && old.key == event.key;
            if !self.events.iter().any(known) {
                self.events.push(Event {
                    sequence: self.event_sequence,
                    kind: event.kind.to_owned(),
                    key: event.key,
                    message: event.message.clone(),
                });
            }
        }
    }

    fn is_held(&self, claim: &Claim) -> bool {
        self.job.owner.as_ref() == Some(&claim.owner) && self.job.attempt == claim.attempt
    }

    fn may(&self, to: JobStatus, by: By) -> bool {
        may_change(self.job.status, to, by)
    }

    /// Forgets all but the newest points.
    fn keep_points(&mut self, kept: usize) -> Vec<ResumePointRow> {
        let mut gone = Vec::new();
        while self.points.len() > kept {
            if let Some((step, attempt)) = self.points.pop_first() {
                gone.push(ResumePointRow { job: self.job.id.clone(), step, attempt });
            }
        }
        gone
    }

    fn add_point(&mut self, step: i64, attempt: i64) -> Vec<ResumePointRow> {
        let job = self.job.id.clone();
        let replaced = self.points.insert(step, attempt).filter(|before| *before != attempt);
        let mut gone = self.keep_points(KEPT);
        gone.extend(replaced.map(|attempt| ResumePointRow { job, step, attempt }));
        gone
    }

    fn end(&mut self, status: JobStatus, now: i64) {
        self.job.status = status;
        self.job.intent = None;
        self.job.owner = None;
        self.lease_until = 0;
        self.job.estimated_finish = None;
        if status.is_terminal() {
            self.job.finished_at = Some(now);
        }
    }

    /// Fails after claims that all ended with their worker.
    fn give_up(&mut self, to: JobStatus, now: i64) {
        let what = if to == JobStatus::ValidatingFiles { "checking its files" } else { "training" };
        self.end(JobStatus::Failed, now);
        self.job.error = Some(JobError {
            code: "worker_lost".to_owned(),
            message: format!(
                "The job failed: {what} was tried {FRUITLESS} times, and each time its worker \
                 was lost before it came any further."
            ),
            param: None,
        });
        self.add_events(&[NewEvent::info(event_kind::FAILED, 0, "failed")]);
    }

    fn write(&mut self, claim: &Claim, write: &JobWrite, now: i64) -> Vec<ResumePointRow> {
        let reached = write.resume_point.max(write.progress.map(|progress| progress.step));
        if write.status.is_some() || reached.is_some_and(|step| step > self.furthest_step) {
            self.fruitless = 0;
        }
        self.furthest_step = self.furthest_step.max(reached.unwrap_or(0));
        let job = &mut self.job;
        if let Some(progress) = write.progress {
            job.step = progress.step;
            job.total_steps = Some(progress.total_steps);
            job.estimated_finish = progress.estimated_finish.or(job.estimated_finish);
        }
        job.resolved = write.resolved.clone().or(job.resolved.take());
        let mut gone = Vec::new();
        if let Some(step) = write.resume_point {
            gone.extend(self.add_point(step, claim.attempt));
        }
        let mut events = write.events.clone();
        let named = |checkpoint: &NewCheckpoint| {
            let adapter = &checkpoint.adapter;
            (adapter.model.clone(), adapter.object.clone())
        };
        if let Some(checkpoint) = &write.checkpoint {
            self.checkpoints.entry(checkpoint.step).or_insert_with(|| named(checkpoint));
            events.push(NewEvent::info(event_kind::CHECKPOINT, checkpoint.step, "checkpoint"));
        }
        if let Some(change) = &write.status {
            self.end(change.to(), now);
        }
        match &write.status {
            None => {}
            Some(StatusChange::Queued) => {
                events.push(NewEvent::info(event_kind::VALIDATED, 0, "validated"));
            }
            Some(StatusChange::Paused) => {
                events.push(NewEvent::info(event_kind::PAUSED, claim.attempt, "paused"));
            }
            Some(StatusChange::Failed(error)) => {
                self.job.error = Some(error.clone());
                gone.extend(self.keep_points(0));
                events.push(NewEvent::info(event_kind::FAILED, 0, "failed"));
            }
            Some(StatusChange::Succeeded { checkpoint, result_file, trained_tokens }) => {
                self.checkpoints.insert(checkpoint.step, named(checkpoint));
                self.job.fine_tuned_model = Some(checkpoint.adapter.model.clone());
                self.job.result_files = vec![result_file.id.clone()];
                self.job.trained_tokens = Some(*trained_tokens);
                gone.extend(self.keep_points(0));
                events.push(NewEvent::info(event_kind::MODEL, 0, "model"));
                events.push(NewEvent::info(event_kind::COMPLETED, 0, "completed"));
            }
        }
        self.add_events(&events);
        gone
    }
}

impl Rows {
    pub fn get(&mut self, id: &str) -> Option<&mut Row> {
        self.rows.iter_mut().find(|row| row.job.id == id)
    }

    /// Takes the oldest job that may go to `to` and whose lease has run out.
    pub fn claim(&mut self, worker: &str, lease_ms: i64, to: JobStatus, now: i64) -> Option<Claim> {
        let free = |row: &&mut Row| row.may(to, By::Claimant) && row.lease_until <= now;
        let row = loop {
            let row = self.rows.iter_mut().find(free)?;
            if row.fruitless < FRUITLESS {
                break self.rows.iter_mut().find(free)?;
            }
            row.give_up(to, now);
        };
        row.job.owner = Some(worker.to_owned());
        row.job.attempt += 1;
        row.fruitless += 1;
        row.job.status = to;
        row.lease_until = now + lease_ms;
        if to == JobStatus::Running {
            row.job.started_at = row.job.started_at.or(Some(now));
            row.add_events(&[NewEvent::info(event_kind::STARTED, 0, "started")]);
        } else {
            row.event_sequence += 1;
        }
        let job = row.job.clone();
        Some(Claim { attempt: job.attempt, owner: worker.to_owned(), job })
    }

    pub fn renew(&mut self, claim: &Claim, lease_ms: i64, now: i64) -> Renewed {
        let unfenced = self.unfenced;
        match self.get(&claim.job.id) {
            Some(row) if (unfenced || row.is_held(claim)) && row.may(row.job.status, By::Owner) => {
                row.lease_until = now + lease_ms;
                Renewed::Kept { intent: row.job.intent }
            }
            _ => Renewed::Lost,
        }
    }

    pub fn release(&mut self, claim: &Claim) {
        if let Some(row) = self.get(&claim.job.id)
            && row.is_held(claim)
        {
            row.job.owner = None;
            row.lease_until = 0;
            row.fruitless = (row.fruitless - 1).max(0);
        }
    }

    pub fn write(&mut self, claim: &Claim, write: &JobWrite, now: i64) -> Written {
        let unfenced = self.unfenced;
        let Some(row) = self.get(&claim.job.id) else { return Written::Lost };
        let to = write.status.as_ref().map_or(row.job.status, StatusChange::to);
        if !(unfenced || row.is_held(claim)) || !row.may(to, By::Owner) {
            return Written::Lost;
        }
        let gone = row.write(claim, write, now);
        Written::Done { pruned: gone.iter().map(ResumePointRow::key).collect() }
    }

    /// Newest first.
    pub fn points(&mut self, id: &str) -> Vec<ResumePointRow> {
        let Some(row) = self.get(id) else { return Vec::new() };
        let point = |(step, attempt): (&i64, &i64)| ResumePointRow {
            job: id.to_owned(),
            step: *step,
            attempt: *attempt,
        };
        row.points.iter().rev().map(point).collect()
    }

    /// Each of the next three: whether it was done.
    pub fn cancel(&mut self, id: &str, now: i64) -> bool {
        let Some(row) = self.get(id) else { return false };
        let may = row.may(JobStatus::Cancelled, By::Client);
        if may {
            row.end(JobStatus::Cancelled, now);
            row.add_events(&[NewEvent::info(event_kind::CANCELLED, 0, "cancelled")]);
        }
        may
    }

    pub fn request_pause(&mut self, id: &str) -> bool {
        let Some(row) = self.get(id) else { return false };
        let may = row.may(JobStatus::Paused, By::Owner);
        if may {
            row.job.intent = Some(Intent::Pause);
            row.event_sequence += 1;
        }
        may
    }

    pub fn resume(&mut self, id: &str) -> bool {
        let Some(row) = self.get(id) else { return false };
        let may = row.may(JobStatus::Queued, By::Client);
        if may {
            row.job.status = JobStatus::Queued;
            row.job.intent = None;
            let key = row.job.attempt;
            row.add_events(&[NewEvent::info(event_kind::RESUMED, key, "resumed")]);
        }
        may
    }
}
