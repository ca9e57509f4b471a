//! Jobs in the engine: alone and together, beside chats, their live versions, and their end.

use crate::common::jobs::{Job, validation};
use crate::common::rig::{Oracle, Rig, options};
use crate::common::{Adapter, Random, sizes};
use kernels::Module;
use std::sync::atomic::Ordering::Relaxed;
use worker::engine::command::{Command, JobEvent, Purpose, Snapshot, Target};
use worker::model::Sizes;
use worker::train::StepMetrics;

const BASE: &str = "llama3";

fn two_jobs() -> [Job; 2] {
    let mut second = Job::new("ftjob-b", BASE, 7, &[Module::K, Module::V, Module::Up]);
    second.spec.training.batch_size = 4;
    [Job::new("ftjob-a", BASE, 4, &Module::ALL), second]
}

fn purposes(rig: &Rig, job: &str) -> Vec<(Purpose, usize)> {
    rig.snapshots(job).iter().map(|snapshot| (snapshot.purpose, snapshot.step)).collect()
}

/// Waits for the end of a job; its metrics and last state.
fn finished(rig: &mut Rig, job: &Job) -> (Vec<StepMetrics>, Snapshot) {
    let id = job.spec.job_id.as_str();
    rig.until(|rig| purposes(rig, id).last().is_some_and(|last| last.0 == Purpose::Finish));
    (rig.steps(id), rig.snapshots(id).pop().unwrap())
}

fn alone(job: &Job) -> (Vec<StepMetrics>, Snapshot) {
    let mut rig = Rig::new(BASE);
    rig.start(job);
    finished(&mut rig, job)
}

#[test]
fn a_job_runs_its_steps_and_its_loss_falls() {
    let mut job = Job::new("ftjob-a", BASE, 8, &Module::ALL);
    job.spec.training.n_epochs = 8;
    job.spec.lora.dropout = 0.0;
    let (steps, last) = alone(&job);
    let numbers: Vec<_> = steps.iter().map(|step| step.step).collect();
    assert_eq!(numbers, (1..=24).collect::<Vec<_>>());
    assert_eq!(last.step, 24);
    let epoch = |steps: &[StepMetrics]| steps.iter().map(|step| step.train_loss).sum::<f64>() / 3.0;
    let (first, end) = (epoch(&steps[..3]), epoch(&steps[21..]));
    assert!(end < first * 0.7, "{first} to {end}");
    assert!(steps.iter().all(|step| !step.skipped && step.grad_norm > 0.0 && step.tokens > 0));
    assert!(steps.iter().all(|step| step.total_steps == 24 && step.valid_loss.is_none()));
}

#[test]
fn two_jobs_beside_chats_are_what_they_are_alone() {
    let jobs = two_jobs();
    let expected = jobs.each_ref().map(alone);
    let adapter = Adapter::random(BASE, 3, &[Module::Q, Module::Gate], 5);
    let prompts: Vec<Vec<u32>> =
        (0..12).map(|at| Random::new(at).tokens(3 + at as usize)).collect();
    let target = |at: usize| match at % 2 {
        0 => Target::Base,
        _ => Target::Adapter("a".to_owned()),
    };
    for (target_rows, step_rows) in [(48, 160), (20, 9)] {
        let mut options = options();
        options.target_rows = target_rows;
        let mut rig = Rig::with(BASE, Sizes { step_rows, ..sizes() }, options);
        rig.library.insert("a".to_owned(), adapter.clone());
        jobs.iter().for_each(|job| rig.start(job));
        let chats: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(at, prompt)| rig.chat(target(at), prompt, 20))
            .collect();
        rig.until(|rig| chats.iter().any(|key| !rig.answers[key].tokens[0].is_empty()));
        assert!(jobs.iter().all(|job| rig.snapshots(&job.spec.job_id).is_empty()), "they meet");
        for (job, expected) in jobs.iter().zip(&expected) {
            let (steps, last) = finished(&mut rig, job);
            assert_eq!(steps, expected.0, "{}", job.spec.job_id);
            assert!(last == expected.1, "final weights of {}", job.spec.job_id);
        }
        let mut oracle = Oracle::new(BASE);
        for (at, (key, prompt)) in chats.into_iter().zip(&prompts).enumerate() {
            let through = (at % 2 == 1).then_some(&adapter);
            assert_eq!(rig.tokens(key), oracle.greedy(through, prompt, 20), "chat {at}");
        }
    }
}

#[test]
fn the_live_version_follows_the_steps_and_is_pinned_per_sequence() {
    let mut job = Job::new("ftjob-live", BASE, 6, &Module::ALL);
    job.spec.training.n_epochs = 20;
    job.spec.training.checkpoint_every_steps = 1;
    let id = job.spec.job_id.clone();
    let mut rig = Rig::new(BASE);
    rig.start(&job);
    let mut versions = Vec::new();
    let (mut chats, prompt, mut overtaken) = (Vec::new(), [11, 12, 13], false);
    for step in [0, 4, 9, 15] {
        rig.until(|rig| rig.steps(&id).len() >= step && !rig.news_of(&id).is_empty());
        let key = rig.chat(Target::LiveJob(id.clone()), &prompt, 30);
        rig.until(|rig| rig.answers[&key].version.is_some());
        let version = rig.answers[&key].version.clone().unwrap();
        let step: usize = version.strip_prefix("ftjob-live@").unwrap().parse().unwrap();
        versions.push(step);
        let steps = rig.steps(&id).len();
        chats.push((key, step));
        rig.until(|rig| rig.steps(&id).len() > steps + 1 || rig.answers[&key].finish[0].is_some());
        overtaken |= rig.answers[&key].finish[0].is_none();
    }
    assert!(overtaken, "steps went on beside a chat on older weights");
    assert!(versions.is_sorted() && versions[3] > versions[0], "{versions:?}");
    let keys: Vec<_> = chats.iter().map(|chat| rig.tokens(chat.0)).collect();
    let (_, last) = finished(&mut rig, &job);
    let states = rig.snapshots(&id);
    let mut oracle = Oracle::new(BASE);
    for (tokens, (_, step)) in keys.into_iter().zip(chats) {
        let state = states.iter().find(|state| state.step == step);
        let params = state.map_or(job.adapter.values.as_slice(), |state| state.params.as_slice());
        let expected = oracle.greedy_through(&job.adapter.layout, params, &prompt, 30);
        assert_eq!(tokens, expected, "version {step}");
    }
    let key = rig.chat(Target::LiveJob(id.clone()), &prompt, 3);
    let version = rig.answer(key).version.unwrap();
    assert_eq!(version, format!("{id}@{}", last.step), "a job that ended still answers");
    rig.send(Command::StopJob(id.clone()));
    rig.until(|rig| rig.news_of(&id).last() == Some(&JobEvent::Stopped));
    let key = rig.chat(Target::LiveJob(id.clone()), &prompt, 3);
    assert!(rig.answer(key).failed.is_some(), "one that was stopped does not");
}

#[test]
fn holding_a_job_anywhere_changes_nothing() {
    let jobs = two_jobs();
    let expected = jobs.each_ref().map(alone);
    let hold = |held| Command::HoldJob("ftjob-a".to_owned(), held);
    let mut rig = Rig::new(BASE);
    rig.send(hold(true));
    jobs.iter().for_each(|job| rig.start(job));
    for steps in 0..4 {
        rig.until(|rig| rig.steps("ftjob-a").len() >= steps);
        rig.send(hold(true));
        // An answer shows that the loop goes on; after two the micro-batch in flight is over.
        let tokens: Vec<_> = (0..2)
            .map(|_| {
                let key = rig.chat(Target::LiveJob("ftjob-a".to_owned()), &[1, 2, 3], 40);
                rig.tokens(key)
            })
            .collect();
        let held = rig.steps("ftjob-a").len();
        if steps == 3 {
            let (steps, last) = finished(&mut rig, &jobs[1]);
            assert!((steps, last) == expected[1], "the job beside it goes on");
        }
        let key = rig.chat(Target::LiveJob("ftjob-a".to_owned()), &[1, 2, 3], 40);
        assert_eq!(rig.tokens(key), tokens[1], "its weights stay");
        assert_eq!(rig.steps("ftjob-a").len(), held);
        rig.send(hold(false));
    }
    assert!(finished(&mut rig, &jobs[0]) == expected[0]);
}

#[test]
fn a_held_job_pauses_at_once_and_stops() {
    let mut job = Job::new("ftjob-a", BASE, 4, &Module::ALL);
    job.spec.training.n_epochs = 200;
    job.validation = validation(5);
    let mut rig = Rig::new(BASE);
    for end in [Command::PauseJob as fn(String) -> Command, Command::StopJob] {
        rig.news.clear();
        rig.start(&job);
        rig.until(|rig| rig.steps("ftjob-a").len() >= 2);
        rig.send(Command::HoldJob("ftjob-a".to_owned(), true));
        rig.send(end("ftjob-a".to_owned()));
        let is_end = |news: &JobEvent| match news {
            JobEvent::Snapshot(snapshot) => snapshot.purpose == Purpose::Pause,
            news => *news == JobEvent::Stopped,
        };
        rig.until(|rig| rig.news_of("ftjob-a").last().is_some_and(is_end));
        rig.send(Command::StopJob("ftjob-a".to_owned()));
        rig.until(|rig| rig.news_of("ftjob-a").last() == Some(&JobEvent::Stopped));
        rig.until(|rig| rig.gauges.residents().is_empty());
    }
}

#[test]
fn stopping_frees_everything_in_the_middle_of_a_step() {
    let mut tight = sizes();
    tight.slots = 3;
    let job = Job::new("ftjob-a", BASE, 4, &Module::ALL);
    (tight.train_pages, tight.pool_pages) =
        (job.adapter.layout.pages(), 3 * job.adapter.layout.pages());
    let expected = alone(&job);
    let mut rig = Rig::with(BASE, tight, options());
    for stop_after in 0..6 {
        rig.news.clear();
        rig.start(&job);
        rig.until(|rig| rig.steps("ftjob-a").len() >= stop_after);
        rig.send(Command::StopJob("ftjob-a".to_owned()));
        rig.until(|rig| rig.news_of("ftjob-a").last() == Some(&JobEvent::Stopped));
        assert_eq!(rig.news_of("ftjob-a")[0], JobEvent::Started);
        rig.until(|rig| rig.gauges.training_jobs.load(Relaxed) == 0);
        assert!(rig.gauges.residents().is_empty());
    }
    rig.news.clear();
    rig.start(&job);
    let again = finished(&mut rig, &job);
    assert!(again == expected, "nothing of the stopped runs is left");
    rig.send(Command::StopJob("ftjob-none".to_owned()));
    rig.until(|rig| rig.news_of("ftjob-none") == [JobEvent::Stopped]);
}

#[test]
fn a_job_without_room_is_told_so_and_changes_nothing() {
    let [first, second] = two_jobs();
    let pages = first.adapter.layout.pages();
    let long = |job: &Job| {
        let mut job = job.clone();
        job.spec.training.n_epochs = 200;
        job
    };
    for (slots, pool_pages, train_pages, max_jobs) in
        [(5, 48, 48, 4), (8, 3 * pages + 1, 48, 4), (8, 48, pages, 4), (8, 48, 48, 1)]
    {
        let sizes = Sizes { slots, pool_pages, train_pages, ..sizes() };
        let mut options = options();
        options.max_jobs = max_jobs;
        let mut rig = Rig::with(BASE, sizes, options);
        rig.start(&long(&first));
        rig.start(&second);
        rig.until(|rig| !rig.news_of("ftjob-b").is_empty());
        assert_eq!(rig.news_of("ftjob-b"), [JobEvent::NoRoom]);
        rig.until(|rig| rig.gauges.training_jobs.load(Relaxed) == 1);
        assert_eq!(rig.gauges.residents().len(), 3);
        rig.start(&first);
        rig.until(|rig| rig.news_of("ftjob-a").contains(&JobEvent::NoRoom));
        rig.send(Command::StopJob("ftjob-a".to_owned()));
        rig.start(&second);
        rig.until(|rig| rig.news_of("ftjob-b").len() > 1);
    }
}

#[test]
fn a_job_that_the_arena_cannot_hold_has_no_room() {
    let [first, second] = two_jobs();
    let longest = first.examples.iter().flatten().map(|sequence| sequence.rows()).max().unwrap();
    let small = |change: fn(&mut Sizes, usize)| {
        let mut sizes = sizes();
        change(&mut sizes, longest);
        sizes
    };
    for sizes in [
        small(|sizes, longest| sizes.arena_rows = longest - 1),
        small(|sizes, longest| sizes.arena_rank_rows = 4 * longest - 1),
        small(|sizes, _| sizes.max_rank = 3),
    ] {
        let mut rig = Rig::with(BASE, sizes, options());
        rig.start(&first);
        rig.start(&Job { validation: first.examples.clone(), ..second.clone() });
        rig.until(|rig| rig.news.len() == 2);
        let told = ["ftjob-a", "ftjob-b"].map(|job| rig.news_of(job)[0].clone());
        assert_eq!(told, [JobEvent::NoRoom, JobEvent::NoRoom]);
    }
    let mut exact = Rig::with(BASE, small(|sizes, longest| sizes.arena_rows = longest), options());
    exact.start(&first);
    assert!(finished(&mut exact, &first) == alone(&first));
}

#[test]
fn validation_follows_its_steps_in_order() {
    let mut job = Job::new("ftjob-v", BASE, 4, &[Module::Q, Module::V]);
    job.spec.training.n_epochs = 4;
    job.spec.training.checkpoint_every_steps = 2;
    job.validation = validation(5);
    let mut rig = Rig::new(BASE);
    rig.start(&job);
    let (steps, _) = finished(&mut rig, &job);
    let at = |which: fn(&StepMetrics) -> bool| -> Vec<usize> {
        steps.iter().filter(|step| which(step)).map(|step| step.step).collect()
    };
    assert_eq!(at(|step| step.valid_loss.is_some()), [10, 12]);
    assert_eq!(at(|step| step.full_valid_loss.is_some()), [3, 6, 9, 12]);
    assert_eq!(at(|step| step.full_valid_accuracy.is_some()), [3, 6, 9, 12]);
    let kept = [2, 3, 4, 6, 8, 9, 10, 12].map(|step| match step {
        12 => (Purpose::Finish, 12),
        step if step % 3 == 0 => (Purpose::Epoch, step),
        step => (Purpose::Resume, step),
    });
    assert_eq!(purposes(&rig, "ftjob-v"), kept);
    let mut done = 0;
    for news in rig.news_of("ftjob-v") {
        match news {
            JobEvent::Step(metrics) => done = metrics.step,
            JobEvent::Snapshot(snapshot) => assert_eq!(snapshot.step, done, "after its step"),
            JobEvent::Started => assert_eq!(done, 0),
            other => panic!("{other:?}"),
        }
    }
    let without = Job { validation: validation(0), ..job.clone() };
    let (_, plain) = alone(&without);
    let last = rig.snapshots("ftjob-v").pop().unwrap();
    assert!(plain == last, "validation changes no weight");
    // The second batch of two, which steps 10 to 19 look at, as a validation file of its own.
    let batch = Job { validation: job.validation[2..4].to_vec().into(), ..job.clone() };
    let (whole, _) = alone(&batch);
    assert_eq!(whole[11].full_valid_loss, steps[11].valid_loss);
    assert_eq!(whole[11].full_valid_accuracy, steps[11].valid_accuracy);
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_step() {
    let mut bad = Job::new("ftjob-a", BASE, 4, &Module::ALL);
    let mut values = bad.adapter.values.to_vec();
    values[7] = f32::NAN;
    bad.adapter.values = values.into();
    let good = Job::new("ftjob-b", BASE, 4, &Module::ALL);
    let expected = alone(&good);
    let mut rig = Rig::new(BASE);
    rig.start(&bad);
    rig.start(&good);
    let (steps, last) = finished(&mut rig, &bad);
    assert_eq!(steps.len(), 9);
    assert!(steps.iter().all(|step| step.skipped && !step.grad_norm.is_finite()));
    let same = last.params.iter().zip(bad.adapter.values.iter());
    assert!(same.clone().all(|(a, b)| a.to_bits() == b.to_bits()), "weights stay as they were");
    assert!(last.m.iter().chain(&last.v).all(|moment| *moment == 0.0));
    assert!(finished(&mut rig, &good) == expected, "the job beside it is not touched");
}
