//! Nothing live is ever swept: random histories of files, adapters, jobs and their ends, with
//! sweepers that work and die between any two steps. At the end, nothing else is left.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use storage::db::{AdapterRef, Claim, Duty, JobCreated, JobError, JobWrite, NewAdapter, NewFile};
use storage::db::{NewJob, StatusChange};
use storage::objects::{ObjectKey, imported_adapter_folder, job_adapter_folder};
use storage::sweep::{SweepSettings, Sweeper};

use crate::object_rig::Store;
use crate::rig::{LONG_MS, ORG, Rig, new_adapter, new_file, new_job, status};

const AGE: u64 = 3600;
const STEPS: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite() {
    for seed in 0..12 {
        History::new(Rig::sqlite().await, seed).run().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres() {
    for seed in 100..104 {
        let Some(rig) = Rig::postgres().await else { return };
        History::new(rig.clone(), seed).run().await;
        rig.remove().await;
    }
}

struct History {
    rig: Rig,
    store: Store,
    random: StdRng,
    seed: u64,
    sweepers: Vec<Sweeper>,
    files: Vec<String>,
    /// Uploaded, but not recorded yet.
    uploads: Vec<NewFile>,
    adapters: Vec<AdapterRef>,
    jobs: Vec<String>,
    claims: Vec<Claim>,
    step: i64,
    /// Stored lately.
    young: BTreeSet<String>,
    /// Files and resume points that have had a row.
    recorded: BTreeSet<String>,
    strange: BTreeSet<String>,
}

impl History {
    fn new(rig: Rig, seed: u64) -> Self {
        let store = Store::disk();
        let settings = SweepSettings {
            period: Duration::ZERO,
            lease: Duration::from_secs(2),
            age: Duration::from_secs(AGE),
            rows: 2,
            objects: 5,
            pass_pause: Duration::ZERO,
        };
        let sweeper = || Sweeper::new(rig.db.clone(), store.objects.clone(), settings.clone());
        let sweepers = vec![sweeper(), sweeper()];
        Self {
            sweepers,
            store,
            rig,
            random: StdRng::seed_from_u64(seed),
            seed,
            files: Vec::new(),
            uploads: Vec::new(),
            adapters: Vec::new(),
            jobs: Vec::new(),
            claims: Vec::new(),
            step: 0,
            young: BTreeSet::new(),
            recorded: BTreeSet::new(),
            strange: BTreeSet::new(),
        }
    }

    async fn run(mut self) {
        for _ in 0..STEPS {
            self.step += 1;
            match self.random.random_range(0..14) {
                0 => self.begin_upload().await,
                1 | 2 => self.end_upload().await,
                3 => self.delete_file().await,
                4 => self.expire_file().await,
                5 => self.import().await,
                6 => self.delete_adapter().await,
                7 => self.begin_job().await,
                8 => self.train().await,
                9 => self.save().await,
                10 => self.end_job().await,
                11 => self.litter().await,
                12 => self.grow_old().await,
                _ => self.sweep().await,
            }
        }
        self.sweep_all().await;
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> Option<T> {
        (!list.is_empty()).then(|| list[self.random.random_range(0..list.len())].clone())
    }

    async fn put(&mut self, key: &ObjectKey) {
        self.store.objects.put(key, Bytes::from_static(b"x")).await.expect("puts");
        self.young.insert(key.to_string());
    }

    async fn begin_upload(&mut self) {
        let expires_after_secs = self.random.random_bool(0.5).then_some(3600);
        let file = NewFile { expires_after_secs, ..new_file() };
        self.put(&ObjectKey::File { id: file.id.clone() }).await;
        self.uploads.push(file);
    }

    async fn end_upload(&mut self) {
        if self.uploads.is_empty() {
            self.begin_upload().await;
        }
        let Some(file) = self.uploads.pop() else { return };
        self.rig.db.files().insert(ORG, &file, None).await.expect("inserts");
        self.recorded.insert(format!("files/{}", file.id));
        self.files.push(file.id);
    }

    async fn delete_file(&mut self) {
        let Some(id) = self.pick(&self.files.clone()) else { return };
        self.rig.db.files().delete(ORG, &id).await.expect("deletes");
    }

    async fn expire_file(&mut self) {
        let Some(id) = self.pick(&self.files.clone()) else { return };
        sqlx::query("UPDATE files SET expires_at = expires_at - 9000 WHERE id = $1")
            .bind(id)
            .execute(&self.rig.raw)
            .await
            .expect("expires");
    }

    async fn put_adapter(&mut self, object: &str) {
        self.put(&ObjectKey::AdapterConfig { object: object.to_owned() }).await;
        self.put(&ObjectKey::AdapterWeights { object: object.to_owned() }).await;
    }

    async fn import(&mut self) {
        let object = imported_adapter_folder(&format!("a{}", self.step));
        self.put_adapter(&object).await;
        let model = format!("ft:{}", self.step);
        let new = NewAdapter { object: object.clone(), ..new_adapter(&model) };
        let id = self.rig.db.adapters().insert(ORG, &new).await.expect("inserts").id;
        self.adapters.push(AdapterRef { id, model, object });
    }

    /// Lately, or long ago.
    async fn delete_adapter(&mut self) {
        let Some(adapter) = self.pick(&self.adapters.clone()) else { return };
        self.rig.db.adapters().delete(ORG, &adapter.id).await.expect("deletes");
        if self.random.random_bool(0.5) {
            let back = "UPDATE adapters SET deleted_at = deleted_at - 9000 WHERE id = $1";
            sqlx::query(back).bind(adapter.id).execute(&self.rig.raw).await.expect("ages");
        }
    }

    async fn begin_job(&mut self) {
        let Some(file) = self.pick(&self.files.clone()) else { return };
        let parent = match self.random.random_bool(0.5) {
            true => self.pick(&self.adapters.clone()),
            false => None,
        };
        if let Some(parent) = &parent
            && self.rig.db.adapters().get(ORG, &parent.id).await.expect("reads").is_none()
        {
            return;
        }
        let job = NewJob { parent, ..new_job(ORG, &file) };
        let JobCreated::New(job) = self.rig.db.jobs().create(&job).await.expect("creates") else {
            return;
        };
        self.jobs.push(job.id);
        let jobs = self.rig.db.jobs();
        let claim = jobs.claim_validation(&crate::rig::claimant("v"), LONG_MS).await;
        let claim = claim.expect("claims").expect("a job to validate");
        self.rig.done(&claim, &status(StatusChange::Queued)).await;
    }

    async fn train(&mut self) {
        self.claims.extend(self.rig.claim("w", LONG_MS).await);
    }

    /// Objects first; the row does not always follow.
    async fn save(&mut self) {
        let Some(claim) = self.pick(&self.claims.clone()) else { return };
        let (job, attempt, step) = (claim.job.id.clone(), claim.attempt, self.step);
        self.put(&ObjectKey::ResumePoint { job: job.clone(), attempt, step }).await;
        let mut checkpoint = None;
        if self.random.random_bool(0.4) {
            let object = job_adapter_folder(&job, attempt, step);
            self.put_adapter(&object).await;
            let mut new = crate::rig::checkpoint(step, &format!("ft:{job}:{step}"));
            new.adapter.object = object;
            checkpoint = Some(new);
        }
        if self.random.random_bool(0.8) {
            let write = JobWrite { resume_point: Some(step), checkpoint, ..JobWrite::default() };
            let written = self.rig.db.jobs().write(&claim, &write).await.expect("writes");
            if let storage::db::Written::Done { pruned } = written {
                let point = ObjectKey::ResumePoint { job: claim.job.id.clone(), attempt, step };
                self.recorded.insert(point.to_string());
                for key in pruned {
                    self.store.objects.delete(&key).await.expect("deletes");
                    self.young.remove(&key.to_string());
                }
            }
        }
    }

    async fn end_job(&mut self) {
        if self.random.random_bool(0.5) {
            let Some(job) = self.pick(&self.jobs.clone()) else { return };
            self.rig.db.jobs().cancel(ORG, &job).await.expect("cancels");
        } else if let Some(claim) = self.claims.pop() {
            let error = JobError { code: "x".to_owned(), message: "x".to_owned(), param: None };
            let ended = match self.random.random_bool(0.5) {
                true => StatusChange::Failed(error),
                false => StatusChange::Paused,
            };
            self.rig.db.jobs().write(&claim, &status(ended)).await.expect("writes");
        }
    }

    /// What crashes and people leave behind.
    async fn litter(&mut self) {
        let number = self.step;
        self.put(&ObjectKey::File { id: format!("file-litter{number}") }).await;
        let object = imported_adapter_folder(&format!("litter{number}"));
        self.put(&ObjectKey::AdapterWeights { object }).await;
        let name = format!("files/notes-{number}.txt");
        self.store.plant(&name);
        self.store.backdate(&name, 99 * AGE);
        self.strange.insert(name);
    }

    /// A day passes: uploads under way have been recorded or given up.
    async fn grow_old(&mut self) {
        self.uploads.clear();
        // Some are gone already, with their rows.
        let there = self.store.names().await;
        for name in std::mem::take(&mut self.young).intersection(&there) {
            self.store.backdate(name, 24 * AGE);
        }
    }

    /// A round, whole or by a sweeper that dies at once.
    async fn sweep(&mut self) {
        if self.random.random_bool(0.2) {
            self.rig.db.duties().take(Duty::Objects, "dead", 1).await.expect("takes");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let sweeper = self.random.random_range(0..self.sweepers.len());
        self.sweepers[sweeper].round().await.expect("sweeps");
        let missing: Vec<_> =
            self.needed().await.difference(&self.store.names().await).cloned().collect();
        assert!(missing.is_empty(), "seed {}, step {}: {missing:?}", self.seed, self.step);
    }

    /// Names of all objects that somebody may still ask for.
    async fn needed(&self) -> BTreeSet<String> {
        let mut needed = self.named().await;
        // What has had a row lives as long as the row, however young it is.
        needed.extend(self.young.difference(&self.recorded).cloned());
        needed.extend(self.strange.iter().cloned());
        needed
    }

    /// Names of all objects that the rows, as replies show them, stand for.
    async fn named(&self) -> BTreeSet<String> {
        let db = &self.rig.db;
        let (mut names, mut folders) = (BTreeSet::new(), BTreeSet::new());
        for id in &self.files {
            if db.files().get(ORG, id).await.expect("reads").is_some() {
                names.insert(format!("files/{id}"));
            }
        }
        for id in &self.jobs {
            let job = db.jobs().get(ORG, id).await.expect("reads").expect("a row");
            if !job.status.is_terminal() {
                names.insert(format!("files/{}", job.training_file));
                folders.extend(job.parent.map(|parent| parent.object));
                for point in db.jobs().resume_points(id).await.expect("reads") {
                    names.insert(point.key().to_string());
                }
            }
        }
        let page = storage::db::Page::first(1000);
        let adapters = db.adapters().list(ORG, &page).await.expect("lists").rows;
        folders.extend(adapters.into_iter().map(|row| row.object));
        for folder in folders {
            names.insert(format!("{folder}/adapter_config.json"));
            names.insert(format!("{folder}/adapter_model.safetensors"));
        }
        names
    }

    /// Everything is old, and passes are made until one finds nothing.
    async fn sweep_all(mut self) {
        self.grow_old().await;
        self.rig.execute("UPDATE adapters SET deleted_at = deleted_at - 99999").await;
        let mut idle = 0;
        for _ in 0..500 {
            let swept = self.sweepers[0].round().await.expect("sweeps");
            let nothing = swept.objects + swept.files + swept.resume_points == 0;
            idle = if !nothing { 0 } else { idle + usize::from(swept.pass_ended) };
            if idle == 2 {
                break;
            }
        }
        assert_eq!(idle, 2, "seed {}: it ends", self.seed);
        let mut expected = self.named().await;
        expected.extend(self.strange);
        assert_eq!(self.store.names().await, expected, "seed {}", self.seed);
    }
}
