//! From a model name in a request to exactly what it means, or to nothing; never to something else.

use super::{AdapterRow, BaseRow, Db, JobRow, JobStatus};
use crate::error::Result;
use crate::ids::IdKind;

/// What a model name means for an organization.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one per request, matched at once")]
pub enum Resolved {
    /// A base, shared by all.
    Base(BaseRow),
    /// An adapter of the organization.
    Adapter(AdapterRow),
    /// The live weights of a job of the organization that runs, is paused, or waits to run on.
    Job(JobRow),
}

impl Db {
    /// Resolves a name. None for what is unknown, deleted, foreign, not started, failed or
    /// cancelled; the id of a succeeded job means its final adapter.
    pub async fn resolve(&self, org: &str, model: &str) -> Result<Option<Resolved>> {
        if let Some(adapter) = self.adapters().by_model(org, model).await? {
            return Ok(Some(Resolved::Adapter(adapter)));
        }
        if model.starts_with(IdKind::Job.prefix())
            && let Some(job) = self.jobs().get(org, model).await?
        {
            return self.resolve_job(org, job).await;
        }
        Ok(self.bases().get(model).await?.map(Resolved::Base))
    }

    async fn resolve_job(&self, org: &str, job: JobRow) -> Result<Option<Resolved>> {
        match job.status {
            JobStatus::Running | JobStatus::Paused => Ok(Some(Resolved::Job(job))),
            JobStatus::Queued if job.started_at.is_some() => Ok(Some(Resolved::Job(job))),
            JobStatus::Succeeded => match &job.fine_tuned_model {
                Some(name) => Ok(self.adapters().by_model(org, name).await?.map(Resolved::Adapter)),
                None => Ok(None),
            },
            JobStatus::ValidatingFiles
            | JobStatus::Queued
            | JobStatus::Failed
            | JobStatus::Cancelled => Ok(None),
        }
    }
}
