//! What a job's runner stores: objects first, then one fenced transaction that names them.

use super::requests::unix_time;
use super::{Shared, jobs};
use crate::adapters::layout::module_name;
use crate::adapters::{AdapterLayout, peft};
use crate::engine::command::Snapshot;
use crate::train::metrics::{self, JobNotice};
use crate::train::resume::{self, ResumeState};
use crate::train::{JobSpec, StepMetrics};
use anyhow::bail;
use bytes::Bytes;
use rand::RngExt;
use rand::distr::Alphanumeric;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::db::{
    Claim, EventType, JobWrite, Level, NewAdapter, NewCheckpoint, NewEvent, NewFile, Progress,
    StatusChange, Written,
};
use storage::ids::{IdKind, new_id};
use storage::objects::{ObjectKey, job_adapter_folder};

/// Random characters at the end of a model's name.
const NAME_LENGTH: usize = 8;
/// First pause after a failed write; doubled each time, up to [`RETRY_LONGEST`].
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest pause between tries of a write.
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// The row of a notice.
pub fn event(notice: &JobNotice) -> NewEvent {
    NewEvent {
        kind: notice.kind,
        key: notice.key,
        level: if notice.warn { Level::Warn } else { Level::Info },
        event_type: match notice.data.is_empty() {
            true => EventType::Message,
            false => EventType::Metrics,
        },
        message: notice.message.clone(),
        data: notice.data.clone(),
    }
}

/// A job's written state as its runner keeps it.
pub struct Ledger {
    /// What all tasks share.
    pub shared: Arc<Shared>,
    /// The hold on the job.
    pub claim: Claim,
    /// Its numbers.
    pub spec: JobSpec,
    /// Layout of its adapter.
    pub layout: Arc<AdapterLayout>,
    /// `step_metrics.csv` so far.
    pub csv: String,
    /// Tokens trained so far.
    pub trained_tokens: u64,
    /// Optimizer steps in all.
    pub total_steps: usize,
    /// When this run began, and at which step.
    pub began: (Instant, usize),
    /// The lease was renewed at this time.
    pub renewed: Instant,
    pending: Vec<NewEvent>,
    last: Option<StepMetrics>,
}

impl Ledger {
    /// The ledger of a job that goes on after `step` steps.
    pub fn new(
        shared: Arc<Shared>,
        claim: Claim,
        spec: JobSpec,
        layout: Arc<AdapterLayout>,
        total_steps: usize,
    ) -> Self {
        Self {
            shared,
            claim,
            spec,
            layout,
            csv: metrics::CSV_HEADER.to_owned(),
            trained_tokens: 0,
            total_steps,
            began: (Instant::now(), 0),
            renewed: Instant::now(),
            pending: Vec::new(),
            last: None,
        }
    }

    /// Takes over what an earlier run had written.
    pub fn resume(&mut self, state: &ResumeState) {
        self.csv.clone_from(&state.step_metrics);
        self.trained_tokens = state.trained_tokens;
        self.began.1 = state.step;
    }

    /// Notes a step; written with the next [`Ledger::flush`] or snapshot.
    pub fn note(&mut self, step: StepMetrics) {
        self.trained_tokens += step.tokens;
        self.csv.push_str(&metrics::csv_row(&step));
        if step.skipped {
            self.pending.push(event(&JobNotice::skipped(&step)));
        }
        self.pending.push(event(&JobNotice::step(&step)));
        self.last = Some(step);
    }

    /// Writes the steps noted so far. False: the claim is lost.
    pub async fn flush(&mut self) -> anyhow::Result<bool> {
        if self.pending.is_empty() {
            return Ok(true);
        }
        let write = self.write();
        self.send(write).await
    }

    /// A write with the noted steps.
    fn write(&mut self) -> JobWrite {
        let progress = self.last.as_ref().map(|last| Progress {
            step: last.step as i64,
            total_steps: self.total_steps as i64,
            estimated_finish: self.estimated_finish(last.step),
        });
        JobWrite { progress, events: std::mem::take(&mut self.pending), ..JobWrite::default() }
    }

    fn estimated_finish(&self, step: usize) -> Option<i64> {
        let (began, first) = self.began;
        let done = step.checked_sub(first).filter(|done| *done > 0)?;
        let per_step = began.elapsed().as_secs_f64() / done as f64;
        let left = self.total_steps.saturating_sub(step) as f64 * per_step;
        Some(unix_time() + left.ceil() as i64)
    }

    /// Stores a resume point. False: the claim is lost. With `status`, the job leaves this worker.
    pub async fn keep_resume_point(
        &mut self,
        snapshot: Snapshot,
        status: Option<StatusChange>,
    ) -> anyhow::Result<bool> {
        let step = snapshot.step as i64;
        self.put_resume_point(snapshot).await?;
        let write = JobWrite { resume_point: Some(step), status, ..self.write() };
        self.send(write).await
    }

    /// Stores an epoch's checkpoint and a resume point with it.
    pub async fn keep_checkpoint(&mut self, snapshot: Snapshot) -> anyhow::Result<bool> {
        let step = snapshot.step;
        let name = format!("{}:ckpt-step-{step}", self.draw_name());
        let checkpoint = self.put_adapter(&snapshot, name).await?;
        self.put_resume_point(snapshot).await?;
        let write = JobWrite {
            resume_point: Some(step as i64),
            checkpoint: Some(checkpoint),
            ..self.write()
        };
        self.send(write).await
    }

    /// Stores the result; the job has succeeded with that write.
    pub async fn finish(&mut self, snapshot: &Snapshot) -> anyhow::Result<bool> {
        let name = self.draw_name();
        let checkpoint = Box::new(self.put_adapter(snapshot, name).await?);
        let id = new_id(IdKind::File);
        let csv = Bytes::from(self.csv.clone());
        let result_file = NewFile {
            id: id.clone(),
            filename: "step_metrics.csv".to_owned(),
            purpose: "fine-tune-results".to_owned(),
            bytes: csv.len() as i64,
            expires_after_secs: None,
        };
        self.put(&ObjectKey::File { id }, csv).await?;
        let trained_tokens = self.trained_tokens as i64;
        let status = StatusChange::Succeeded { checkpoint, result_file, trained_tokens };
        let write = JobWrite { status: Some(status), ..self.write() };
        self.send(write).await
    }

    fn draw_name(&self) -> String {
        let job = &self.claim.job;
        let suffix = job.suffix.as_deref().unwrap_or_default();
        let random: String =
            rand::rng().sample_iter(Alphanumeric).take(NAME_LENGTH).map(char::from).collect();
        format!("ft:{}:{}:{suffix}:{random}", job.base, job.org)
    }

    async fn put_adapter(
        &mut self,
        snapshot: &Snapshot,
        model: String,
    ) -> anyhow::Result<NewCheckpoint> {
        let (shape, base) = (self.layout.shape().clone(), self.claim.job.base.clone());
        let step = snapshot.step as i64;
        let object = job_adapter_folder(&self.claim.job.id, self.claim.attempt, step);
        let config = peft::write_config(&shape, self.spec.lora.dropout, &base);
        let weights = peft::write_weights(&self.layout, &snapshot.params);
        let bytes = weights.len() as i64;
        let key = ObjectKey::AdapterWeights { object: object.clone() };
        self.put(&key, weights.into()).await?;
        self.put(&ObjectKey::AdapterConfig { object: object.clone() }, config.into()).await?;
        let adapter = NewAdapter {
            model,
            kind: "lora".to_owned(),
            base,
            base_fingerprint: self.shared.base_fingerprint.clone(),
            rank: shape.rank as i64,
            alpha: shape.alpha,
            use_rslora: shape.use_rslora,
            target_modules: shape.targets.iter().map(|m| module_name(*m).to_owned()).collect(),
            bytes,
            version: step,
            object,
        };
        let metrics = self.last.as_ref().map(metrics::checkpoint_metrics).unwrap_or_default();
        Ok(NewCheckpoint { step, metrics, adapter })
    }

    async fn put_resume_point(&mut self, snapshot: Snapshot) -> anyhow::Result<()> {
        let (job, attempt) = (self.claim.job.id.clone(), self.claim.attempt);
        let step = snapshot.step;
        let state = ResumeState {
            spec: self.spec.clone(),
            step,
            trained_tokens: self.trained_tokens,
            step_metrics: self.csv.clone(),
            sums: Vec::new(),
            params: snapshot.params,
            m: snapshot.m,
            v: snapshot.v,
        };
        let bytes = tokio::task::spawn_blocking(move || resume::encode(&state)).await??;
        self.put(&ObjectKey::ResumePoint { job, attempt, step: step as i64 }, bytes.into()).await
    }

    /// Stores an object, trying again while the lease holds.
    async fn put(&mut self, key: &ObjectKey, bytes: Bytes) -> anyhow::Result<()> {
        let mut pause = RETRY_FIRST;
        loop {
            match self.shared.storage.objects.put(key, bytes.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => self.wait(&mut pause, error).await?,
            }
        }
    }

    /// Writes, trying again while the lease holds; removes what no row names any more. A repeated
    /// write changes nothing. False: the claim is lost.
    async fn send(&mut self, write: JobWrite) -> anyhow::Result<bool> {
        let mut pause = RETRY_FIRST;
        let pruned = loop {
            match self.shared.storage.db.jobs().write(&self.claim, &write).await {
                Ok(Written::Done { pruned }) => break pruned,
                Ok(Written::Lost) => return Ok(false),
                Err(error) => self.wait(&mut pause, error).await?,
            }
        };
        for key in pruned {
            if let Err(error) = self.shared.storage.objects.delete(&key).await {
                tracing::warn!(job.id = self.claim.job.id, %error, "an old object was not removed");
            }
        }
        Ok(true)
    }

    /// Waits before another try; an owner stops trying at two thirds of its lease.
    async fn wait(&mut self, pause: &mut Duration, error: storage::Error) -> anyhow::Result<()> {
        if self.renewed.elapsed() > self.shared.options.lease * 2 / 3 && !self.renew().await {
            bail!("the lease ran out while a write failed: {error}");
        }
        tracing::warn!(job.id = self.claim.job.id, %error, "a write about a job failed");
        tokio::time::sleep(*pause).await;
        *pause = (*pause * 2).min(RETRY_LONGEST);
        Ok(())
    }

    async fn renew(&mut self) -> bool {
        let lease = jobs::lease_ms(&self.shared);
        let renewed = self.shared.storage.db.jobs().renew(&self.claim, lease).await;
        let kept = matches!(renewed, Ok(storage::db::Renewed::Kept { .. }));
        if kept {
            self.renewed = Instant::now();
        }
        kept
    }
}
