//! Jobs that stop and go on: the end is the same bits as without a stop.

use crate::common::jobs::{Job, validation};
use crate::common::rig::Rig;
use kernels::Module;
use worker::engine::command::{Command, JobEvent, Purpose, Snapshot, Target};
use worker::train::StepMetrics;

const BASE: &str = "qwen3";
const ID: &str = "ftjob-r";

fn job() -> Job {
    let mut job = Job::new(ID, BASE, 5, &[Module::Q, Module::K, Module::O, Module::Down]);
    job.spec.training.n_epochs = 4;
    job.spec.training.checkpoint_every_steps = 2;
    job.validation = validation(3);
    job
}

fn ends(rig: &mut Rig, purpose: Purpose) -> (Vec<StepMetrics>, Snapshot) {
    let is_end = |news: &JobEvent| {
        matches!(news, JobEvent::Snapshot(snapshot)
            if snapshot.purpose == purpose || snapshot.purpose == Purpose::Finish)
    };
    rig.until(|rig| rig.news_of(ID).last().is_some_and(is_end));
    (rig.steps(ID), rig.snapshots(ID).pop().unwrap())
}

fn uninterrupted() -> (Rig, Vec<StepMetrics>, Snapshot) {
    let mut rig = Rig::new(BASE);
    rig.start(&job());
    let (steps, last) = ends(&mut rig, Purpose::Finish);
    (rig, steps, last)
}

#[test]
fn pausing_anywhere_and_going_on_changes_nothing() {
    let (_, steps, last) = uninterrupted();
    for pauses in [vec![0], vec![1, 1, 1], vec![3, 3], vec![2, 0, 5], vec![10]] {
        let mut rig = Rig::new(BASE);
        let (mut found, mut next) = (Vec::new(), job());
        for more in pauses {
            rig.news.clear();
            rig.start(&next);
            rig.until(|rig| rig.steps(ID).len() >= more && !rig.news_of(ID).is_empty());
            rig.send(Command::PauseJob(ID.to_owned()));
            let (steps, state) = ends(&mut rig, Purpose::Pause);
            assert_eq!(state.step, found.len() + steps.len(), "a pause is at a step boundary");
            found.extend(steps);
            rig.send(Command::StopJob(ID.to_owned()));
            rig.until(|rig| rig.news_of(ID).last() == Some(&JobEvent::Stopped));
            next = next.resumed(&state);
        }
        rig.news.clear();
        rig.start(&next);
        let (rest, end) = ends(&mut rig, Purpose::Finish);
        found.extend(rest);
        assert_eq!(found, steps);
        assert!(end.params == last.params && end.m == last.m && end.v == last.v);
    }
}

#[test]
fn every_state_that_was_handed_out_leads_to_the_same_end() {
    let (rig, steps, last) = uninterrupted();
    let states = rig.snapshots(ID);
    assert_eq!(states.len(), 8);
    for state in &states {
        let mut rig = Rig::new(BASE);
        rig.start(&job().resumed(state));
        let (rest, end) = ends(&mut rig, Purpose::Finish);
        assert_eq!(rest, steps[state.step..]);
        assert!(end == last, "from step {}", state.step);
    }
}

#[test]
fn a_paused_job_answers_with_its_last_published_weights() {
    let mut rig = Rig::new(BASE);
    rig.start(&job());
    rig.until(|rig| rig.steps(ID).len() >= 2);
    rig.send(Command::PauseJob(ID.to_owned()));
    let (_, state) = ends(&mut rig, Purpose::Pause);
    let key = rig.chat(Target::LiveJob(ID.to_owned()), &[1, 2, 3], 4);
    assert_eq!(rig.answer(key).version, Some(format!("{ID}@{}", state.step)));
    rig.send(Command::PauseJob(ID.to_owned()));
    let key = rig.chat(Target::Base, &[1], 1);
    rig.tokens(key);
    assert_eq!(rig.snapshots(ID).last().map(|state| state.purpose), Some(Purpose::Pause));
    let pauses = rig.snapshots(ID).iter().filter(|s| s.purpose == Purpose::Pause).count();
    assert_eq!(pauses, 1, "a second pause says nothing new");
}
