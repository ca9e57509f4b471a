//! The owner of a job in the simulated world: the product's hold, and the glue around it as
//! `intake/job_run.rs` and `job_write.rs` have it. The engine trains on while writes wait.

use std::collections::VecDeque;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rand::RngExt;
use storage::db::{
    Claim, Intent, JobWrite, NewEvent, Renewed, ResumePointRow, StatusChange, Written, event_kind,
};
use storage::objects::ObjectKey;
use worker::intake::hold::Hold;

use crate::jobs::{EPOCH, SAVE, STEPS, stored, trained};
use crate::world::{Answer, Broken, Op, Party, Tag, Wake, World, note};

pub const LEASE: u64 = 900;
const LOOK: u64 = 120;
const CALL: u64 = 300;
const VALIDATION: u64 = 30;
const TRAIN: u64 = 25;
/// Jobs that a worker trains at once.
const ROOM: usize = 2;

/// The start of virtual time on the clock that the hold reads.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

fn instant(now: u64) -> Instant {
    *START + Duration::from_millis(now)
}

/// Why a state is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Resume,
    Epoch,
    Pause,
    Finish,
}

/// What the engine tells the runner.
#[derive(Clone, Copy, Debug)]
pub enum News {
    Step(i64, u64),
    Snapshot(Purpose, i64, u64),
}

/// A job in the hands of a worker.
pub struct Run {
    pub claim: Box<Claim>,
    hold: Hold,
    /// Counts questions; answers to earlier ones are lost.
    turn: u32,
    doing: Doing,
    /// A write waits for a renewal.
    held: bool,
    /// Where the engine is, while it has the job.
    pub engine: Option<(i64, u64)>,
    pub pausing: bool,
    /// It goes to another worker once it is saved.
    pub leaving: bool,
    pub news: VecDeque<News>,
    pub pending: Vec<NewEvent>,
    pub last: i64,
}

/// What a runner does now.
enum Doing {
    /// Looks at the files; the engine has nothing yet.
    Validating,
    Reading,
    Loading(VecDeque<ResumePointRow>),
    /// Waits for news.
    Following,
    /// Objects to store, one after the other, and the write that names them.
    Storing(VecDeque<(ObjectKey, String)>, Box<JobWrite>),
    Writing(Box<JobWrite>, VecDeque<(ObjectKey, String)>),
    /// Gives the job back, or has given it away.
    Leaving,
}

impl World {
    pub fn nudged(&mut self, index: usize, job: &str) {
        if self.workers[index].runs.contains_key(job) {
            self.renew(index, job);
        } else {
            self.look_for_jobs(index);
        }
    }

    pub fn wake_jobs(&mut self, index: usize, wake: Wake) {
        let party = Party::Worker(index);
        match wake {
            Wake::Look => {
                self.look_for_jobs(index);
                if !self.jobs.is_empty() {
                    self.wake(party, LOOK, Wake::Look);
                }
            }
            Wake::Answer(Tag::Look, answer) => {
                self.workers[index].looking = false;
                if let Answer::Claimed(Some(claim)) = answer {
                    self.begin_run(index, claim);
                }
            }
            Wake::Train(job, attempt) if self.is_running(index, &job, attempt) => {
                self.train(index, &job);
            }
            Wake::Renew(job, attempt) if self.is_running(index, &job, attempt) => {
                self.renew(index, &job);
                self.wake(party, LEASE / 3, Wake::Renew(job, attempt));
            }
            Wake::Answer(Tag::Renewal(job, attempt, asked), Answer::Renewed(renewed))
                if self.is_running(index, &job, attempt) =>
            {
                self.renewed(index, &job, asked, renewed);
            }
            Wake::Answer(Tag::Job(job, turn), answer) => {
                let run = self.workers[index].runs.get_mut(&job);
                if run.is_some_and(|run| run.turn == turn) {
                    self.go_on_with(index, &job, answer);
                }
            }
            _ => {}
        }
    }

    fn is_running(&self, index: usize, job: &str, attempt: i64) -> bool {
        self.workers[index].runs.get(job).is_some_and(|run| run.claim.attempt == attempt)
    }

    fn look_for_jobs(&mut self, index: usize) {
        let validation = self.rng.random();
        let worker = &mut self.workers[index];
        // A job is claimed by workers of its base alone.
        let other = !worker.is_of_first_base();
        if other || worker.looking || worker.draining || worker.runs.len() >= ROOM {
            return;
        }
        worker.looking = true;
        let id = worker.id.clone();
        let op = if validation { Op::ClaimValidation(id) } else { Op::ClaimTraining(id) };
        self.call(Party::Worker(index), CALL, op, Tag::Look);
    }

    fn begin_run(&mut self, index: usize, claim: Box<Claim>) {
        let validating = claim.job.status == storage::db::JobStatus::ValidatingFiles;
        let id = claim.job.id.clone();
        let (party, attempt) = (Party::Worker(index), claim.attempt);
        if self.workers[index].runs.contains_key(&id) {
            // The run from before has lost its lease and ends first.
            self.renew(index, &id);
            return self.call(party, CALL, Op::Release(claim), Tag::Nobody);
        }
        let run = Run {
            claim,
            // Asked a call's patience ago at most.
            hold: Hold::new(Duration::from_millis(LEASE), instant(self.now.saturating_sub(CALL))),
            turn: attempt as u32 * 10_000,
            held: false,
            doing: if validating { Doing::Validating } else { Doing::Reading },
            engine: None,
            pausing: false,
            leaving: false,
            news: VecDeque::new(),
            pending: Vec::new(),
            last: 0,
        };
        self.workers[index].runs.insert(id.clone(), run);
        self.wake(party, 0, Wake::Renew(id.clone(), attempt));
        if validating {
            self.wake(party, VALIDATION, Wake::Train(id, attempt));
        } else {
            self.ask(index, &id, Op::Points(id.clone()));
        }
    }

    /// Asks something whose answer the runner waits for.
    fn ask(&mut self, index: usize, job: &str, op: Op) {
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        run.turn += 1;
        let tag = Tag::Job(job.to_owned(), run.turn);
        self.call(Party::Worker(index), CALL, op, tag);
    }

    fn renew(&mut self, index: usize, job: &str) {
        let Some(run) = self.workers[index].runs.get(job) else { return };
        let (op, attempt) = (Op::Renew(run.claim.clone()), run.claim.attempt);
        let tag = Tag::Renewal(job.to_owned(), attempt, self.now);
        self.call(Party::Worker(index), CALL, op, tag);
    }

    fn renewed(&mut self, index: usize, job: &str, asked: u64, renewed: Renewed) {
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        match renewed {
            Renewed::Lost => {
                note!(self, "w{index} has lost {job}");
                self.workers[index].runs.remove(job);
            }
            Renewed::Kept { intent } => {
                run.hold.renewed(instant(asked));
                run.pausing |= intent == Some(Intent::Pause);
                // What waited for a firm hold goes on.
                if run.held {
                    self.write_when_firm(index, job);
                }
            }
        }
    }

    /// One step of the engine, or the end of a validation.
    fn train(&mut self, index: usize, job: &str) {
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        if matches!(run.doing, Doing::Validating) {
            let status = Some(StatusChange::Queued);
            let write = JobWrite { status, ..JobWrite::default() };
            return self.store(index, job, VecDeque::new(), write);
        }
        let Some((step, state)) = run.engine else { return };
        if run.pausing {
            run.engine = None;
            run.news.push_back(News::Snapshot(Purpose::Pause, step, state));
        } else {
            let state = trained(job, step + 1, state);
            let step = step + 1;
            run.engine = (step < STEPS).then_some((step, state));
            run.news.push_back(News::Step(step, state));
            match step {
                STEPS => run.news.push_back(News::Snapshot(Purpose::Finish, step, state)),
                EPOCH => run.news.push_back(News::Snapshot(Purpose::Epoch, step, state)),
                _ if step % SAVE == 0 => {
                    run.news.push_back(News::Snapshot(Purpose::Resume, step, state));
                }
                _ => {}
            }
            let again = Wake::Train(job.to_owned(), run.claim.attempt);
            self.wake(Party::Worker(index), TRAIN, again);
        }
        self.follow(index, job);
    }

    /// Takes the engine's news, as long as nothing is being written.
    fn follow(&mut self, index: usize, job: &str) {
        loop {
            let renamed = self.broken == Broken::Events;
            let Some(run) = self.workers[index].runs.get_mut(job) else { return };
            if !matches!(run.doing, Doing::Following) {
                return;
            }
            match run.news.pop_front() {
                None if run.pending.is_empty() => return,
                None => {
                    let write = run.noted();
                    return self.store(index, job, VecDeque::new(), write);
                }
                Some(News::Step(step, state)) => {
                    run.last = step;
                    let kind = event_kind::STEP;
                    let key = if renamed { step + 100 * run.claim.attempt } else { step };
                    run.pending.push(NewEvent::info(kind, key, stored(step, state)));
                }
                Some(News::Snapshot(purpose, step, state)) => {
                    let (objects, write) = run.snapshot(purpose, step, state);
                    return self.store(index, job, objects, write);
                }
            }
        }
    }

    fn store(
        &mut self,
        index: usize,
        job: &str,
        mut objects: VecDeque<(ObjectKey, String)>,
        write: JobWrite,
    ) {
        let rows_first = self.broken == Broken::RowsFirst;
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        match objects.front().cloned() {
            Some((key, state)) if !rows_first => {
                run.doing = Doing::Storing(objects, Box::new(write));
                self.ask(index, job, Op::Put(key, state));
            }
            _ => {
                run.doing = Doing::Writing(Box::new(write), std::mem::take(&mut objects));
                self.write_when_firm(index, job);
            }
        }
    }

    /// Writes if the hold is firm; else the next renewal goes on from here.
    fn write_when_firm(&mut self, index: usize, job: &str) {
        let now = instant(self.now);
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        let Doing::Writing(write, _) = &run.doing else { return };
        run.held = !run.hold.is_sure(now);
        if !run.held {
            let op = Op::Write(run.claim.clone(), write.clone());
            self.ask(index, job, op);
        }
    }

    fn go_on_with(&mut self, index: usize, job: &str, answer: Answer) {
        let afresh = self.broken == Broken::Events;
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        match (std::mem::replace(&mut run.doing, Doing::Leaving), answer) {
            (Doing::Reading, Answer::Points(points)) => {
                run.doing = Doing::Loading(if afresh { VecDeque::new() } else { points.into() });
                self.load(index, job);
            }
            (Doing::Loading(points), Answer::Object(found)) => {
                match found.as_deref().and_then(|text| text.split_once(' ')) {
                    None => {
                        run.doing = Doing::Loading(points);
                        self.load(index, job);
                    }
                    Some((step, state)) => {
                        let numbers = (step.parse().ok(), state.parse().ok());
                        if let (Some(step), Some(state)) = numbers {
                            self.start_engine(index, job, step, state);
                        }
                    }
                }
            }
            (Doing::Storing(mut objects, write), Answer::Done) => {
                objects.pop_front();
                self.store(index, job, objects, *write);
            }
            // Tried again: training goes on meanwhile.
            (Doing::Storing(objects, write), _) => self.store(index, job, objects, *write),
            (Doing::Writing(write, late), Answer::Written(Written::Done { pruned })) => {
                let deletes = pruned.into_iter().map(Op::Delete);
                let puts = late.into_iter().map(|(key, state)| Op::Put(key, state));
                let after: Vec<Op> = deletes.chain(puts).collect();
                let left = write.status.is_some();
                let given_back = run.leaving && write.resume_point.is_some() && run.is_saved();
                if !left && !given_back {
                    run.doing = Doing::Following;
                }
                let release = (!left && given_back).then(|| Op::Release(run.claim.clone()));
                for op in after.into_iter().chain(release) {
                    self.call(Party::Worker(index), CALL, op, Tag::Nobody);
                }
                if left || given_back {
                    self.workers[index].runs.remove(job);
                } else {
                    self.follow(index, job);
                }
            }
            (Doing::Writing(write, late), Answer::Failed) => {
                run.doing = Doing::Writing(write, late);
                self.write_when_firm(index, job);
            }
            // The claim is lost, or what it needs cannot be read: another tries later.
            (_, _) => {
                let op = Op::Release(run.claim.clone());
                self.call(Party::Worker(index), CALL, op, Tag::Nobody);
                self.workers[index].runs.remove(job);
            }
        }
    }

    /// Reads the newest state that can be read; without one the job begins.
    fn load(&mut self, index: usize, job: &str) {
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        let Doing::Loading(points) = &mut run.doing else { return };
        match points.pop_front() {
            Some(point) => self.ask(index, job, Op::Get(point.key())),
            None => self.start_engine(index, job, 0, 0),
        }
    }

    fn start_engine(&mut self, index: usize, job: &str, step: i64, state: u64) {
        note!(self, "w{index} trains {job} from step {step}");
        let Some(run) = self.workers[index].runs.get_mut(job) else { return };
        run.doing = Doing::Following;
        run.engine = Some((step, state));
        run.last = step;
        let first = Wake::Train(job.to_owned(), run.claim.attempt);
        self.wake(Party::Worker(index), TRAIN, first);
    }
}
