//! The second telling of the rows (`rows.rs`) held against the databases: the same operations in
//! the same order have the same outcomes and leave the same rows. Leases are held for an hour or
//! have run out already, since a database's clock is its own.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use storage::Db;
use storage::db::{
    Claim, Claimant, Inserted, JobCreated, JobError, JobRow, JobStatus, JobWrite, NewEvent, NewJob,
    Order, Page, Progress, StatusChange, Transition, Written, event_kind,
};
use storage::ids::alphanumerics;
use storage::objects::ObjectKey;

use crate::rows::{Row, Rows, new_job};
use crate::snapshot::{checkpoint, result_file};

const ORG: &str = "org";
/// Operations of one sequence.
const LENGTH: usize = 30;
/// Any time: the leases of these tests are not near it.
const NOW: i64 = 1_000_000_000;
const HOUR: i64 = 3_600_000;

/// Both tellings of one sequence, which is alone on its base.
struct Pair<'a> {
    db: &'a Db,
    rows: Rows,
    base: String,
    file: String,
    /// Ids in the database, in the order of the rows.
    ids: Vec<String>,
    /// As the database and as the rows gave them.
    claims: Vec<(Claim, Claim)>,
    names: u32,
    rng: StdRng,
}

/// What a change of a client came to.
fn done(transition: &Transition) -> bool {
    matches!(transition, Transition::Done(_))
}

impl Pair<'_> {
    fn worker(&mut self) -> String {
        format!("w{}", self.rng.random_range(0..3))
    }

    fn lease(&mut self) -> i64 {
        [HOUR, HOUR, 0, -1000][self.rng.random_range(0..4)]
    }

    fn any_job(&mut self) -> Option<String> {
        let count = self.ids.len();
        (count > 0).then(|| self.ids[self.rng.random_range(0..count)].clone())
    }

    /// One operation; what the database and the rows say of it.
    async fn step(&mut self) -> (String, String) {
        let jobs = self.db.jobs();
        match self.rng.random_range(0..16) {
            0 if self.ids.len() < 3 => (self.create().await, String::new()),
            1 => self.claim(JobStatus::ValidatingFiles).await,
            2 | 3 => self.claim(JobStatus::Running).await,
            4 => {
                let Some(id) = self.any_job() else { return Default::default() };
                let cancelled = jobs.cancel(ORG, &id).await.expect("cancels");
                (format!("cancel {}", done(&cancelled)), {
                    format!("cancel {}", self.rows.cancel(&id, NOW))
                })
            }
            5 => {
                let Some(id) = self.any_job() else { return Default::default() };
                let asked = jobs.request_pause(ORG, &id).await.expect("asks");
                (format!("pause {}", done(&asked)), {
                    format!("pause {}", self.rows.request_pause(&id))
                })
            }
            6 => {
                let Some(id) = self.any_job() else { return Default::default() };
                let resumed = jobs.resume(ORG, &id).await.expect("resumes");
                (format!("resume {}", done(&resumed)), format!("resume {}", self.rows.resume(&id)))
            }
            choice => self.step_of_owner(choice).await,
        }
    }

    async fn step_of_owner(&mut self, choice: u32) -> (String, String) {
        let jobs = self.db.jobs();
        // The newest claims most often.
        let back = self.rng.random_range(0..4usize).min(self.rng.random_range(0..4));
        let Some(place) = self.claims.len().checked_sub(1 + back) else {
            return Default::default();
        };
        let (theirs, ours) = self.claims[place].clone();
        match choice {
            7 => {
                let lease = self.lease();
                let renewed = jobs.renew(&theirs, lease).await.expect("renews");
                let told = self.rows.renew(&ours, lease, NOW);
                (format!("renew {renewed:?}"), format!("renew {told:?}"))
            }
            8 => {
                jobs.release(&theirs).await.expect("releases");
                self.rows.release(&ours);
                Default::default()
            }
            _ => {
                let write = self.any_write();
                let written = jobs.write(&theirs, &write).await.expect("writes");
                let told = self.rows.write(&ours, &write, NOW);
                (said(&written), said(&told))
            }
        }
    }

    /// Creates a job; nothing to compare yet.
    async fn create(&mut self) -> String {
        let job = NewJob {
            org: ORG.to_owned(),
            model: self.base.clone(),
            base: self.base.clone(),
            base_fingerprint: "print".to_owned(),
            parent: None,
            training_file: self.file.clone(),
            validation_file: None,
            suffix: None,
            seed: 1,
            request: json!({}),
            metadata: None,
            idempotency: None,
        };
        match self.db.jobs().create(&job).await.expect("creates") {
            JobCreated::New(row) => {
                self.rows.rows.push(Row::new(new_job(&row.id)));
                self.ids.push(row.id);
                String::new()
            }
            other => format!("{other:?}"),
        }
    }

    async fn claim(&mut self, to: JobStatus) -> (String, String) {
        let (worker, lease) = (self.worker(), self.lease());
        let claimant = Claimant {
            worker: worker.clone(),
            base: self.base.clone(),
            base_fingerprint: "print".to_owned(),
        };
        let jobs = self.db.jobs();
        let theirs = match to {
            JobStatus::Running => jobs.claim_training(&claimant, lease).await,
            _ => jobs.claim_validation(&claimant, lease).await,
        };
        let theirs = theirs.expect("claims");
        let ours = self.rows.claim(&worker, lease, to, NOW);
        let shown = |claim: &Option<Claim>| {
            let shown = |claim: &Claim| (claim.job.id.clone(), claim.attempt, told(&claim.job));
            format!("claim {:?}", claim.as_ref().map(shown))
        };
        let both = (shown(&theirs), shown(&ours));
        self.claims.extend(theirs.zip(ours));
        both
    }

    fn any_write(&mut self) -> JobWrite {
        let rng = &mut self.rng;
        let mut write = JobWrite::default();
        let step = rng.random_range(0..6);
        if rng.random() {
            let estimated_finish = rng.random::<bool>().then_some(step);
            write.progress = Some(Progress { step, total_steps: 6, estimated_finish });
        }
        for _ in 0..rng.random_range(0..3) {
            let kind = [event_kind::STEP, "skipped"][rng.random_range(0..2)];
            let message = format!("{}", rng.random::<u32>());
            write.events.push(NewEvent::info(kind, rng.random_range(0..6), message));
        }
        write.resume_point = rng.random::<bool>().then_some(step);
        write.resolved = rng.random::<bool>().then(|| json!({ "step": step }));
        self.names += 1;
        let name = format!("ft:{}:{}", self.base, self.names);
        if rng.random_range(0..4) == 0 {
            write.checkpoint = Some(checkpoint(step, &name, &name));
        }
        let last = format!("{name}-last");
        write.status = match rng.random_range(0..12) {
            0..3 => Some(StatusChange::Queued),
            3 => Some(StatusChange::Paused),
            4 => Some(StatusChange::Failed(JobError {
                code: "c".to_owned(),
                message: "m".to_owned(),
                param: None,
            })),
            5 => Some(StatusChange::Succeeded {
                checkpoint: Box::new(checkpoint(step, &last, &last)),
                result_file: result_file(&last),
                trained_tokens: step,
            }),
            _ => None,
        };
        write
    }

    /// The rows of both, as text.
    async fn both_rows(&mut self) -> (Vec<String>, Vec<String>) {
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        let page = Page { order: Order::Ascending, ..Page::first(1000) };
        for id in self.ids.clone() {
            let jobs = self.db.jobs();
            let job = jobs.get(ORG, &id).await.expect("reads").expect("is there");
            let events = self.db.events().list(ORG, &id, &page).await.expect("lists").rows;
            let events: Vec<_> =
                events.into_iter().map(|e| shown(e.sequence, e.kind, e.key, e.message)).collect();
            let listed = self.db.checkpoints().list(ORG, &id, &page).await.expect("lists").rows;
            let checkpoints: BTreeMap<_, _> =
                listed.into_iter().map(|checkpoint| (checkpoint.step, checkpoint.model)).collect();
            let points = jobs.resume_points(&id).await.expect("reads");
            theirs.push(format!("{:?} {events:?} {checkpoints:?} {points:?}", told(&job)));

            let points = self.rows.points(&id);
            let row = self.rows.get(&id).expect("is there");
            let events: Vec<_> = row
                .events
                .iter()
                .map(|e| shown(e.sequence, e.kind.clone(), e.key, e.message.clone()))
                .collect();
            let checkpoints: BTreeMap<_, _> =
                row.checkpoints.iter().map(|(step, (model, _))| (*step, model.clone())).collect();
            ours.push(format!("{:?} {events:?} {checkpoints:?} {points:?}", told(&row.job)));
        }
        (theirs, ours)
    }
}

/// An event; the words of the product's own messages are its own.
fn shown(sequence: i64, kind: String, key: i64, message: String) -> (i64, String, i64, String) {
    let written = kind == event_kind::STEP || kind == "skipped";
    (sequence, kind, key, if written { message } else { String::new() })
}

/// What a job's row tells of its story.
fn told(job: &JobRow) -> String {
    format!(
        "{:?}",
        (
            (job.status, job.intent, &job.owner, job.attempt, job.step, job.total_steps),
            (job.started_at.is_some(), job.finished_at.is_some(), job.estimated_finish),
            (job.trained_tokens, &job.fine_tuned_model, &job.result_files, &job.error),
            &job.resolved,
        )
    )
}

/// What a write came to; the order of deletions does not matter.
fn said(written: &Written) -> String {
    let Written::Done { pruned } = written else { return "lost".to_owned() };
    let mut names: Vec<String> = pruned.iter().map(|key: &ObjectKey| format!("{key:?}")).collect();
    names.sort();
    format!("written, {names:?}")
}

async fn compare(db: &Db, sequences: u64) {
    for seed in 0..sequences {
        let base = format!("base-{}", alphanumerics(12));
        let file = match db.files().insert(ORG, &result_file(&base), None).await {
            Ok(Inserted::New(row)) => row.id,
            other => panic!("{other:?}"),
        };
        let mut pair = Pair {
            db,
            rows: Rows::default(),
            base,
            file,
            ids: Vec::new(),
            claims: Vec::new(),
            names: 0,
            rng: StdRng::seed_from_u64(seed),
        };
        assert_eq!(pair.create().await, "");
        for step in 0..LENGTH {
            let (theirs, ours) = pair.step().await;
            assert_eq!(theirs, ours, "outcome {step} of sequence {seed}");
        }
        let (theirs, ours) = pair.both_rows().await;
        assert_eq!(theirs, ours, "rows of sequence {seed}");
    }
}

#[tokio::test]
async fn rows_mean_what_the_statements_of_sqlite_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let db = Db::open_folder(folder.path()).await.expect("opens");
    compare(&db, 200).await;
}

#[tokio::test]
async fn rows_mean_what_the_statements_of_postgres_do() {
    let Ok(url) = std::env::var("LOQUETIER_TEST_POSTGRES_URL") else {
        assert!(std::env::var_os("CI").is_none(), "CI names a Postgres server");
        return;
    };
    let db = Db::open_url(&url).await.expect("opens");
    compare(&db, 200).await;
    db.close().await;
}
