//! Jobs of the simulated world: what clients want of them, what rows and objects do when asked,
//! and what must be true of them after every write. Training is a pure function of job and step.

use rand::RngExt;
use storage::db::{By, Claim, JobStatus, JobWrite, Written, event_kind, may_change};
use storage::objects::ObjectKey;

use crate::engine::mix;
use crate::owner::LEASE;
pub use crate::owner::Run;
use crate::plan::{FAULTS_END, Health, Server};
use crate::rows::{Row, new_job};
use crate::world::{Answer, Broken, Event, Op, World, note};

/// Before a client asks again.
const ASK_AGAIN: u64 = 60;

/// What a client wants of its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Create,
    Pause,
    Resume,
    Cancel,
}

pub struct Job {
    pub id: String,
    wishes: Vec<Wish>,
    /// Where the row stood when it was looked at last.
    before: (JobStatus, i64),
    /// Wishes that the rows have heard, in order.
    heard: usize,
}

/// Steps of every job; a checkpoint lies in the middle, resume points at every third.
pub const STEPS: i64 = 8;
pub const EPOCH: i64 = 4;
pub const SAVE: i64 = 3;

/// State after one more step, and after all up to one.
pub fn trained(job: &str, step: i64, before: u64) -> u64 {
    let name = job.bytes().map(u64::from).sum();
    mix(&[name, step as u64, before])
}

pub fn truth(job: &str, step: i64) -> u64 {
    (1..=step).fold(0, |state, step| trained(job, step, state))
}

/// What a state is stored as.
pub fn stored(step: i64, state: u64) -> String {
    format!("{step} {state}")
}

impl World {
    pub fn make_jobs(&mut self) {
        self.rows.unfenced = self.broken == Broken::Fencing;
        for index in 0..self.plan.jobs {
            let mut wishes = vec![(self.rng.random_range(0..1200), Wish::Create)];
            let later = wishes[0].0 + self.rng.random_range(100..FAULTS_END - 1200);
            match self.rng.random_range(0..6) {
                0 => wishes.push((later, Wish::Cancel)),
                1 | 2 => {
                    wishes.push((later, Wish::Pause));
                    wishes.push((later + self.rng.random_range(1..500), Wish::Resume));
                }
                _ => {}
            }
            for (number, (at, _)) in wishes.iter().enumerate() {
                self.at(*at, Event::Steer(index, number));
            }
            self.jobs.push(Job {
                id: format!("ftjob-{index}"),
                wishes: wishes.into_iter().map(|(_, wish)| wish).collect(),
                before: (JobStatus::ValidatingFiles, 0),
                heard: 0,
            });
        }
    }

    /// Every job has ended.
    pub fn jobs_ended(&mut self) -> bool {
        let ended = |row: &Row| row.job.status.is_terminal();
        self.rows.rows.len() == self.jobs.len() && self.rows.rows.iter().all(ended)
    }

    /// Carries a client's wish to the rows, and the nudge to the workers.
    pub fn steer(&mut self, index: usize, number: usize) {
        let wish = self.jobs[index].wishes[number];
        let id = self.jobs[index].id.clone();
        if self.jobs[index].heard < number
            || self.plan.health(Server::Rows, self.now) != Health::Fine
        {
            return self.at(self.now + ASK_AGAIN, Event::Steer(index, number));
        }
        let now = self.now as i64;
        let done = match wish {
            Wish::Create => {
                self.rows.rows.push(Row::new(new_job(&id)));
                true
            }
            Wish::Pause => self.rows.request_pause(&id),
            Wish::Cancel => self.rows.cancel(&id, now),
            Wish::Resume => self.rows.resume(&id),
        };
        note!(self, "{id} {wish:?}: {done}");
        self.jobs[index].heard = number + 1;
        self.look_at(&id);
        let intent = self.rows.get(&id).and_then(|row| row.job.intent);
        if wish == Wish::Resume && !done && intent.is_some() {
            self.at(self.now + ASK_AGAIN, Event::Steer(index, number));
        }
        if self.plan.health(Server::Queue, self.now) == Health::Fine {
            self.queue.nudge(&id);
        }
    }

    /// Rows and objects.
    pub fn perform_job(&mut self, op: &Op) -> Answer {
        let now = self.now as i64;
        match op {
            Op::ClaimValidation(worker) => self.claimed(worker, JobStatus::ValidatingFiles),
            Op::ClaimTraining(worker) => self.claimed(worker, JobStatus::Running),
            Op::Renew(claim) => {
                let renewed = self.rows.renew(claim, LEASE as i64, now);
                Answer::Renewed(renewed)
            }
            Op::Release(claim) => {
                self.rows.release(claim);
                note!(self, "{} gives {} back", claim.owner, claim.job.id);
                self.look_at(&claim.job.id);
                Answer::Done
            }
            Op::Write(claim, write) => self.written(claim, write),
            Op::Points(job) => Answer::Points(self.rows.points(job)),
            Op::Put(key, state) => {
                self.objects.insert(key.clone(), state.clone());
                Answer::Done
            }
            Op::Get(key) => Answer::Object(self.objects.get(key).cloned()),
            Op::Delete(key) => {
                self.objects.remove(key);
                Answer::Done
            }
            _ => Answer::Failed,
        }
    }

    fn claimed(&mut self, worker: &str, to: JobStatus) -> Answer {
        let claim = self.rows.claim(worker, LEASE as i64, to, self.now as i64);
        if let Some(claim) = &claim {
            note!(self, "{worker} claims {} to {to:?} #{}", claim.job.id, claim.attempt);
            self.look_at(&claim.job.id);
        }
        Answer::Claimed(claim.map(Box::new))
    }

    fn written(&mut self, claim: &Claim, write: &JobWrite) -> Answer {
        let id = &claim.job.id;
        let current = self.rows.get(id).map(|row| (row.job.attempt, row.job.owner.clone()));
        let written = self.rows.write(claim, write, self.now as i64);
        let to = write.status.as_ref().map(|change| change.to());
        note!(
            self,
            "{} writes {id} #{}: {} events, point {:?}, {to:?}: {}",
            claim.owner,
            claim.attempt,
            write.events.len(),
            write.resume_point,
            if written == Written::Lost { "lost" } else { "done" }
        );
        let holder = Some((claim.attempt, Some(claim.owner.clone())));
        if written != Written::Lost && current != holder {
            self.violate(format!("{id} took a write of {} #{}", claim.owner, claim.attempt));
        }
        self.look_at(id);
        Answer::Written(written)
    }

    /// What must be true of a job at any time.
    fn look_at(&mut self, id: &str) {
        let index = self.jobs.iter().position(|job| job.id == *id);
        let Some(index) = index else { return };
        let before = self.jobs[index].before;
        let Some(row) = self.rows.get(id) else { return };
        let row = row.clone();
        let after = (row.job.status, row.job.attempt);
        self.jobs[index].before = after;
        if let Some(wrong) = wrong_change(before, after).or_else(|| self.wrong_row(&row)) {
            self.violate(format!("{id}: {wrong}"));
        }
    }

    fn wrong_row(&self, row: &Row) -> Option<String> {
        let id = &row.job.id;
        let steps = row.events.iter().filter(|event| event.kind == event_kind::STEP);
        let mut last = 0;
        for event in steps {
            if event.key != last + 1 {
                return Some(format!("step {} is told after {last}", event.key));
            }
            last = event.key;
            if event.message != stored(last, truth(id, last)) {
                return Some(format!("step {last} is told as {}", event.message));
            }
        }
        if row.points.len() > 2 {
            return Some(format!("{} resume points", row.points.len()));
        }
        let point = |(step, attempt): (&i64, &i64)| {
            let (step, attempt) = (*step, *attempt);
            (step, ObjectKey::ResumePoint { job: id.clone(), attempt, step })
        };
        let checkpoint = |(step, (_, object)): (&i64, &(String, String))| {
            (*step, ObjectKey::AdapterWeights { object: object.clone() })
        };
        let named = row.points.iter().map(point);
        for (step, key) in named.chain(row.checkpoints.iter().map(checkpoint)) {
            match self.objects.get(&key) {
                None => return Some(format!("{key:?} is named and not stored")),
                Some(state) if *state != stored(step, truth(id, step)) => {
                    return Some(format!("{key:?} holds {state}"));
                }
                Some(_) => {}
            }
            if step > last {
                return Some(format!("state of step {step} is kept, and {last} is told"));
            }
        }
        let succeeded = row.job.status == JobStatus::Succeeded;
        if succeeded && (last != STEPS || !row.checkpoints.contains_key(&STEPS)) {
            return Some(format!("succeeded after step {last}"));
        }
        None
    }
}

/// Attempts only grow, and the status goes as the table of the product allows.
fn wrong_change(before: (JobStatus, i64), after: (JobStatus, i64)) -> Option<String> {
    if after.1 < before.1 {
        return Some(format!("attempt {} after {}", after.1, before.1));
    }
    let by = [By::Client, By::Claimant, By::Owner];
    let allowed = before.0 == after.0 || by.iter().any(|by| may_change(before.0, after.0, *by));
    (!allowed).then(|| format!("{:?} after {:?}", after.0, before.0))
}
