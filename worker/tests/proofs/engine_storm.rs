//! Random requests, cancellations, jobs and adapters on an engine with too little room: whatever
//! is answered is right, and in the end everything is free.

use crate::common::jobs::Job;
use crate::common::rig::{Oracle, Rig, options};
use crate::common::{Adapter, Random, sizes, soak};
use kernels::Module;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use worker::engine::command::{Command, JobEvent, Leaving, RequestKey, Target};
use worker::model::Sizes;

const BASE: &str = "odd";
const ADAPTERS: usize = 5;
const JOBS: [&str; 3] = ["ftjob-a", "ftjob-b", "ftjob-c"];
const PROMPTS: usize = 4;
const TOKENS: usize = 12;

/// What a run of the storm knows.
struct Storm {
    rig: Rig,
    random: Random,
    jobs: Vec<Job>,
    /// Adapter (none: the base) and prompt of the requests whose tokens are known beforehand.
    known: HashMap<RequestKey, (Option<usize>, usize)>,
    open: Vec<RequestKey>,
    /// Stops and starts that were sent, per job.
    stops: [usize; JOBS.len()],
    starts: [usize; JOBS.len()],
}

fn adapter(at: usize) -> Adapter {
    Adapter::random(BASE, 2 + 3 * at, &Module::ALL[at..], at as u64)
}

fn prompt(at: usize) -> Vec<u32> {
    Random::new(at as u64).tokens(2 + 5 * at)
}

impl Storm {
    fn new(seed: u64) -> Self {
        let tight = Sizes { blocks: 16, slots: 6, pool_pages: 16, step_rows: 30, ..sizes() };
        let mut options = options();
        (options.max_jobs, options.target_rows) = (2, 30);
        options.graphs = seed % 2 == 1;
        let mut rig = Rig::late(BASE, tight, options, seed as usize % 5);
        for at in 0..ADAPTERS {
            rig.library.insert(format!("a{at}"), adapter(at));
        }
        let job = |id: &&str| Job::new(id, BASE, 3, &[Module::Q, Module::Down]);
        let jobs = JOBS.iter().map(job).collect();
        let (known, open) = (HashMap::new(), Vec::new());
        let random = Random::new(seed);
        Self { rig, random, jobs, known, open, stops: [0; 3], starts: [0; 3] }
    }

    fn chat(&mut self) {
        let at = self.random.below(PROMPTS);
        let which = self.random.below(ADAPTERS + 2);
        let (target, known) = match which {
            0 => (Target::Base, Some(None)),
            1 => (Target::LiveJob(JOBS[self.random.below(JOBS.len())].to_owned()), None),
            n => (Target::Adapter(format!("a{}", n - 2)), Some(Some(n - 2))),
        };
        let key = self.rig.chat(target, &prompt(at), TOKENS as u32);
        known.map(|adapter| self.known.insert(key, (adapter, at)));
        self.open.push(key);
    }

    fn cancel(&mut self, at: usize) {
        let key = self.open.swap_remove(at);
        self.known.remove(&key);
        self.rig.send(Command::Cancel(key));
    }

    fn act(&mut self) {
        let job = self.random.below(JOBS.len());
        let name = format!("a{}", self.random.below(ADAPTERS));
        match self.random.below(18) {
            0..6 => self.chat(),
            6 | 7 if !self.open.is_empty() => {
                let at = self.random.below(self.open.len());
                self.cancel(at);
            }
            8 | 9 => {
                self.rig.start(&self.jobs[job]);
                self.starts[job] += 1;
            }
            10 => self.stop(job),
            11 => self.rig.send(Command::PauseJob(JOBS[job].to_owned())),
            12 => self.rig.send(Command::PinAdapter(name, true)),
            13 => self.rig.send(Command::PinAdapter(name, false)),
            14 => self.rig.send(Command::HandOver(match self.random.below(6) {
                0 => Leaving::All,
                1 => Leaving::Movable,
                _ => Leaving::Of(name),
            })),
            15 => self.rig.send(Command::EvictAdapter(name)),
            _ => {
                let steps = self.rig.gauges.steps.load(Relaxed) + 3;
                if !self.open.is_empty() {
                    self.rig.until(|rig| {
                        rig.gauges.steps.load(Relaxed) >= steps
                            || rig.gauges.requests.load(Relaxed) == 0
                            || rig.gauges.free_blocks.load(Relaxed) > 0
                    });
                }
            }
        }
    }

    fn stop(&mut self, job: usize) {
        self.rig.send(Command::StopJob(JOBS[job].to_owned()));
        self.stops[job] += 1;
    }

    /// Lets all requests end, then stops all jobs.
    fn calm(&mut self) {
        for at in 0..ADAPTERS {
            self.rig.send(Command::PinAdapter(format!("a{at}"), false));
        }
        for job in 0..JOBS.len() {
            self.stop(job);
        }
        for key in self.open.clone() {
            self.rig.answer(key);
        }
        self.rig.until_idle();
        self.rig.until(|rig| rig.gauges.training_jobs.load(Relaxed) == 0);
        for (job, starts) in JOBS.iter().zip(self.starts) {
            let count = |rig: &Rig, which: fn(&JobEvent) -> bool| {
                rig.news_of(job).iter().filter(|news| which(news)).count()
            };
            self.rig.until(|rig| {
                let told = |news: &JobEvent| matches!(news, JobEvent::Started | JobEvent::NoRoom);
                count(rig, told) == starts && rig.news_of(job).last() == Some(&JobEvent::Stopped)
            });
        }
        let left = self.rig.gauges.residents();
        assert!(left.iter().all(|resident| resident.key.starts_with('a')), "{left:?}");
    }
}

#[test]
fn all_is_right_and_free_after_a_storm() {
    let mut oracle = Oracle::new(BASE);
    let mut expected = HashMap::new();
    let (mut right, mut moved) = (0, 0);
    for seed in 0..u64::from(soak(24)) {
        let mut storm = Storm::new(seed);
        for _ in 0..50 {
            storm.act();
        }
        storm.calm();
        for (key, (through, at)) in &storm.known {
            let tokens = expected.entry((*through, *at)).or_insert_with(|| {
                oracle.greedy(through.map(adapter).as_ref(), &prompt(*at), TOKENS)
            });
            assert_eq!(storm.rig.answers[key].failed, None);
            let answer = &storm.rig.answers[key];
            let end = if answer.moved { answer.tokens[0].len() } else { tokens.len() };
            assert_eq!(answer.tokens[0], tokens[..end], "storm {seed}, request {key}");
            moved += usize::from(answer.moved);
            right += 1;
        }
    }
    assert!(right > 100 && moved > 10, "{right}, {moved}");
}
