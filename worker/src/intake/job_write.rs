//! What a job's runner stores: objects first, then one fenced transaction that names them. Whatever
//! fails is tried again, in order, until it is done or the run ends because the lease is lost.

use super::job_run::{End, Run};
use super::outbox::Saved;
use super::{Shared, lock};
use crate::adapters::layout::module_name;
use crate::adapters::{AdapterLayout, peft};
use crate::engine::command::Purpose;
use crate::train::JobSpec;
use crate::train::metrics;
use crate::train::resume::{self, ResumeState};
use bytes::Bytes;
use rand::RngExt;
use rand::distr::Alphanumeric;
use std::sync::Arc;
use std::time::Duration;
use storage::db::{JobWrite, NewAdapter, NewCheckpoint, NewFile, StatusChange, Written};
use storage::ids::{IdKind, new_id};
use storage::objects::{ObjectKey, job_adapter_folder};
use tokio::time::{sleep, timeout};

/// Random characters at the end of a model's name.
const NAME_LENGTH: usize = 8;
/// First pause after a failed write; doubled each time, up to [`RETRY_LONGEST`].
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest pause between tries of a write.
const RETRY_LONGEST: Duration = Duration::from_secs(1);
/// How long a state may take to be stored before the steps after it are written first.
const OVERTAKE: Duration = Duration::from_secs(1);
/// For removing an old object; one that stays is swept later.
const REMOVE_WITHIN: Duration = Duration::from_secs(5);

/// Writes what a run's outbox holds.
pub struct Writer<'a> {
    /// The run.
    pub run: &'a Run,
    /// The job's numbers.
    pub spec: &'a JobSpec,
    /// Layout of its adapter.
    pub layout: &'a AdapterLayout,
}

impl Writer<'_> {
    /// Writes until the job leaves this worker.
    pub async fn write(&self) -> anyhow::Result<End> {
        loop {
            let next = lock(&self.run.outbox).next_state();
            if let Some(saved) = next {
                let end = self.keep(saved).await?;
                lock(&self.run.outbox).stored();
                self.run.changed.notify_one();
                if let Some(end) = end {
                    return Ok(end);
                }
            } else if lock(&self.run.outbox).has_events() {
                if !self.flush(None).await {
                    return Ok(End::Done);
                }
            } else {
                self.run.filled.notified().await;
            }
        }
    }

    /// Writes steps noted so far; with a state, only those that it contains. False: the claim is
    /// lost.
    async fn flush(&self, mark: Option<u64>) -> bool {
        let write = lock(&self.run.outbox).next_write(mark);
        self.run.changed.notify_one();
        send(self.run, &write).await
    }

    /// Stores a state, then writes the row that names it.
    async fn keep(&self, saved: Saved) -> anyhow::Result<Option<End>> {
        let leaving = self.run.is_left();
        let (purpose, mark) = (saved.snapshot.purpose, saved.mark);
        let storing = self.store(saved, leaving);
        tokio::pin!(storing);
        let stored = loop {
            tokio::select! {
                stored = &mut storing => break stored?,
                () = sleep(OVERTAKE) => {
                    while lock(&self.run.outbox).has_events() {
                        if !self.flush(None).await {
                            return Ok(Some(End::Done));
                        }
                    }
                }
            }
        };
        while lock(&self.run.outbox).is_behind(mark) {
            if !self.flush(Some(mark)).await {
                return Ok(Some(End::Done));
            }
        }
        let steps = lock(&self.run.outbox).next_write(Some(mark));
        let write = JobWrite { progress: steps.progress, events: steps.events, ..stored };
        if !send(self.run, &write).await {
            return Ok(Some(End::Done));
        }
        match purpose {
            Purpose::Resume | Purpose::Epoch => Ok(None),
            Purpose::Pause if leaving => {
                release(self.run).await;
                Ok(Some(End::Released))
            }
            Purpose::Pause | Purpose::Finish => Ok(Some(End::Done)),
        }
    }

    /// Stores a state's objects; what is to be written about it.
    async fn store(&self, saved: Saved, leaving: bool) -> anyhow::Result<JobWrite> {
        let step = saved.snapshot.step;
        match saved.snapshot.purpose {
            Purpose::Finish => {
                let status = Some(self.put_result(&saved).await?);
                Ok(JobWrite { status, ..JobWrite::default() })
            }
            Purpose::Epoch => {
                let name = format!("{}:ckpt-step-{step}", self.draw_name());
                let checkpoint = Some(self.put_adapter(&saved, name).await?);
                let resume_point = Some(self.put_resume_point(saved).await?);
                Ok(JobWrite { checkpoint, resume_point, ..JobWrite::default() })
            }
            purpose @ (Purpose::Resume | Purpose::Pause) => {
                let resume_point = Some(self.put_resume_point(saved).await?);
                let paused = purpose == Purpose::Pause && !leaving;
                let status = paused.then_some(StatusChange::Paused);
                Ok(JobWrite { resume_point, status, ..JobWrite::default() })
            }
        }
    }

    /// Stores the result; the job has succeeded with the write of this.
    async fn put_result(&self, saved: &Saved) -> anyhow::Result<StatusChange> {
        let checkpoint = Box::new(self.put_adapter(saved, self.draw_name()).await?);
        let id = new_id(IdKind::File);
        let csv = Bytes::from(saved.csv.clone());
        let result_file = NewFile {
            id: id.clone(),
            filename: "step_metrics.csv".to_owned(),
            purpose: "fine-tune-results".to_owned(),
            bytes: csv.len() as i64,
            expires_after_secs: None,
        };
        self.put(&ObjectKey::File { id }, csv).await;
        let trained_tokens = saved.trained_tokens as i64;
        Ok(StatusChange::Succeeded { checkpoint, result_file, trained_tokens })
    }

    fn draw_name(&self) -> String {
        let job = &self.run.claim.job;
        let suffix = job.suffix.as_deref().unwrap_or_default();
        let random: String =
            rand::rng().sample_iter(Alphanumeric).take(NAME_LENGTH).map(char::from).collect();
        format!("ft:{}:{}:{suffix}:{random}", job.base, job.org)
    }

    async fn put_adapter(&self, saved: &Saved, model: String) -> anyhow::Result<NewCheckpoint> {
        let claim = &self.run.claim;
        let (shape, base) = (self.layout.shape().clone(), claim.job.base.clone());
        let step = saved.snapshot.step as i64;
        let object = job_adapter_folder(&claim.job.id, claim.attempt, step);
        let config = peft::write_config(&shape, self.spec.lora.dropout, &base);
        let weights = peft::write_weights(self.layout, &saved.snapshot.params);
        let bytes = weights.len() as i64;
        let key = ObjectKey::AdapterWeights { object: object.clone() };
        self.put(&key, weights.into()).await;
        self.put(&ObjectKey::AdapterConfig { object: object.clone() }, config.into()).await;
        let adapter = NewAdapter {
            model,
            kind: "lora".to_owned(),
            base,
            base_fingerprint: self.run.shared.base_fingerprint.clone(),
            rank: shape.rank as i64,
            alpha: shape.alpha,
            use_rslora: shape.use_rslora,
            target_modules: shape.targets.iter().map(|m| module_name(*m).to_owned()).collect(),
            bytes,
            version: step,
            object,
        };
        let metrics = saved.last.as_ref().map(metrics::checkpoint_metrics).unwrap_or_default();
        Ok(NewCheckpoint { step, metrics, adapter })
    }

    /// Stores a resume point; its step.
    async fn put_resume_point(&self, saved: Saved) -> anyhow::Result<i64> {
        let (job, attempt) = (self.run.id().to_owned(), self.run.claim.attempt);
        let step = saved.snapshot.step;
        let state = ResumeState {
            spec: self.spec.clone(),
            step,
            trained_tokens: saved.trained_tokens,
            step_metrics: saved.csv,
            sums: Vec::new(),
            params: saved.snapshot.params,
            m: saved.snapshot.m,
            v: saved.snapshot.v,
        };
        let bytes = tokio::task::spawn_blocking(move || resume::encode(&state)).await??;
        let step = step as i64;
        self.put(&ObjectKey::ResumePoint { job, attempt, step }, bytes.into()).await;
        Ok(step)
    }

    /// Stores an object.
    async fn put(&self, key: &ObjectKey, bytes: Bytes) {
        let mut retry = Retry::new(self.run.id(), "storing an object");
        loop {
            self.run.firm().await;
            match self.run.shared.storage.objects.put(key, bytes.clone()).await {
                Ok(()) => return retry.done(),
                Err(error) => retry.wait(error).await,
            }
        }
    }
}

/// Writes about a run's job, and removes what no row names any more. A repeated write changes
/// nothing. False: the claim is lost.
pub async fn send(run: &Run, write: &JobWrite) -> bool {
    let mut retry = Retry::new(run.id(), "writing about a job");
    let pruned = loop {
        run.firm().await;
        match run.shared.storage.db.jobs().write(&run.claim, write).await {
            Ok(Written::Done { pruned }) => break pruned,
            Ok(Written::Lost) => return false,
            Err(error) => retry.wait(error).await,
        }
    };
    retry.done();
    if !pruned.is_empty() {
        tokio::spawn(remove(run.shared.clone(), pruned));
    }
    true
}

/// Removes objects; nobody waits for it.
async fn remove(shared: Arc<Shared>, keys: Vec<ObjectKey>) {
    for key in keys {
        let removed = timeout(REMOVE_WITHIN, shared.storage.objects.delete(&key)).await;
        if !matches!(removed, Ok(Ok(()))) {
            tracing::warn!(?key, "an old object was not removed");
        }
    }
}

/// Gives the job back, so that another worker goes on at once.
async fn release(run: &Run) {
    let mut retry = Retry::new(run.id(), "giving a job back");
    while let Err(error) = run.shared.storage.db.jobs().release(&run.claim).await {
        retry.wait(error).await;
    }
    retry.done();
}

/// Tries of one write: says once that it fails and once that it works again.
pub(super) struct Retry<'a> {
    job: &'a str,
    what: &'static str,
    pause: Duration,
    noted: bool,
}

impl<'a> Retry<'a> {
    pub(super) fn new(job: &'a str, what: &'static str) -> Self {
        Self { job, what, pause: RETRY_FIRST, noted: false }
    }

    pub(super) async fn wait(&mut self, error: storage::Error) {
        if !std::mem::replace(&mut self.noted, true) {
            tracing::warn!(job.id = self.job, %error, "{} failed; trying again", self.what);
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(RETRY_LONGEST);
    }

    pub(super) fn done(&self) {
        if self.noted {
            tracing::info!(job.id = self.job, "{} works again", self.what);
        }
    }
}
