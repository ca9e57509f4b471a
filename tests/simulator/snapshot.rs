//! What an owner in the simulated world writes of a job: noted steps, and states with the objects
//! that hold them.

use std::collections::VecDeque;

use serde_json::Map;
use storage::db::{JobWrite, NewAdapter, NewCheckpoint, NewFile, Progress, StatusChange};
use storage::objects::{ObjectKey, job_adapter_folder};

use crate::jobs::{STEPS, stored};
use crate::owner::{Purpose, Run};

impl Run {
    /// The engine has let go, and nothing is left to write.
    pub fn is_saved(&self) -> bool {
        self.engine.is_none() && self.news.is_empty()
    }

    /// A write with the steps noted so far.
    pub fn noted(&mut self) -> JobWrite {
        let progress =
            Some(Progress { step: self.last, total_steps: STEPS, estimated_finish: None });
        JobWrite { progress, events: std::mem::take(&mut self.pending), ..JobWrite::default() }
    }

    /// What is stored of a state, and the write that names it.
    pub fn snapshot(
        &mut self,
        purpose: Purpose,
        step: i64,
        state: u64,
    ) -> (VecDeque<(ObjectKey, String)>, JobWrite) {
        let (job, attempt) = (self.claim.job.id.clone(), self.claim.attempt);
        let object = job_adapter_folder(&job, attempt, step);
        let weights = (ObjectKey::AdapterWeights { object: object.clone() }, stored(step, state));
        let name = format!("ft:{job}:{attempt}-{step}-{purpose:?}");
        let point = (ObjectKey::ResumePoint { job, attempt, step }, stored(step, state));
        let write = self.noted();
        match purpose {
            Purpose::Resume => {
                (VecDeque::from([point]), JobWrite { resume_point: Some(step), ..write })
            }
            Purpose::Epoch => {
                let checkpoint = Some(checkpoint(step, &name, &object));
                let write = JobWrite { resume_point: Some(step), checkpoint, ..write };
                (VecDeque::from([weights, point]), write)
            }
            Purpose::Pause => {
                // A job that goes to another worker is only given back.
                let status = (!self.leaving).then_some(StatusChange::Paused);
                (VecDeque::from([point]), JobWrite { resume_point: Some(step), status, ..write })
            }
            Purpose::Finish => {
                let status = Some(StatusChange::Succeeded {
                    checkpoint: Box::new(checkpoint(step, &name, &object)),
                    result_file: result_file(&name),
                    trained_tokens: step,
                });
                (VecDeque::from([weights]), JobWrite { status, ..write })
            }
        }
    }
}

/// A checkpoint of a step.
pub fn checkpoint(step: i64, model: &str, object: &str) -> NewCheckpoint {
    let adapter = NewAdapter {
        model: model.to_owned(),
        kind: "lora".to_owned(),
        base: "base".to_owned(),
        base_fingerprint: "print".to_owned(),
        rank: 8,
        alpha: 16.0,
        use_rslora: false,
        target_modules: Vec::new(),
        bytes: 1,
        version: step,
        object: object.to_owned(),
    };
    NewCheckpoint { step, metrics: Map::new(), adapter }
}

pub fn result_file(name: &str) -> NewFile {
    NewFile {
        id: format!("file-{name}"),
        filename: "step_metrics.csv".to_owned(),
        purpose: "fine-tune-results".to_owned(),
        bytes: 1,
        expires_after_secs: None,
    }
}
