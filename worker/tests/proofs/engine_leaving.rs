//! Requests that are handed over and go on at another engine as if nothing had been; adapters that
//! come before their requests and go after them.

use crate::common::jobs::Job;
use crate::common::rig::{Answer, Oracle, Rig, choice, options, ready, request};
use crate::common::{Adapter, sizes};
use kernels::Module;
use worker::engine::command::{
    AdapterWeights, Admission, Command, Finish, JobEvent, Leaving, RequestKey, SamplingSpec, Target,
};

const BASE: &str = "llama3";
const TOKENS: u32 = 50;

fn named(key: &str) -> Target {
    Target::Adapter(key.to_owned())
}

fn adapter() -> Adapter {
    Adapter::random(BASE, 3, &Module::ALL, 1)
}

/// Three choices, drawn.
fn drawn() -> Admission {
    let mut admission = request(named("a"), &[5, 6, 7], TOKENS);
    admission.sampling = SamplingSpec { temperature: 1.0, seed: 9, ..admission.sampling };
    admission.choices = (0..3).map(|_| choice(&[])).collect();
    admission
}

fn greedy() -> Admission {
    request(named("a"), &[1, 2, 3], TOKENS)
}

fn preloaded(key: &str, adapter: &Adapter) -> Command {
    let weights = AdapterWeights { layout: adapter.layout.clone(), values: adapter.values.clone() };
    Command::Preload(key.to_owned(), weights)
}

/// Sends what is left of an answer; with it, the answer is whole.
fn go_on(rig: &mut Rig, mut admission: Admission, so_far: Answer) -> RequestKey {
    for (choice, (tokens, finish)) in
        admission.choices.iter_mut().zip(so_far.tokens.iter().zip(&so_far.finish))
    {
        choice.replay = tokens.clone();
        choice.finished = finish.is_some();
        for token in tokens {
            choice.detokenizer.push(*token);
        }
    }
    let key = rig.admit(admission);
    let answer = rig.answers.get_mut(&key).unwrap();
    (answer.tokens, answer.text, answer.finish) = (so_far.tokens, so_far.text, so_far.finish);
    key
}

/// What an undisturbed engine says.
fn undisturbed() -> [Answer; 2] {
    let mut rig = Rig::new(BASE);
    rig.library.insert("a".to_owned(), adapter());
    let keys = [drawn(), greedy()].map(|admission| rig.admit(admission));
    keys.map(|key| rig.answer(key))
}

#[test]
fn what_is_handed_over_goes_on_elsewhere_with_the_same_tokens() {
    let expected = undisturbed();
    for (graphs, polls) in [(false, 0), (true, 0), (true, 3)] {
        let mut options = options();
        options.graphs = graphs;
        let mut rig = Rig::held(BASE, sizes(), options, polls);
        rig.library.insert("a".to_owned(), adapter());
        let keys = [drawn(), greedy()].map(|admission| rig.admit(admission));
        let other = rig.chat(Target::Base, &[1, 2, 3], TOKENS);
        rig.until(|rig| rig.answers[&keys[0]].tokens[0].len() > 5);
        rig.send(Command::HandOver(Leaving::Of("a".to_owned())));
        let left = keys.map(|key| rig.answer(key));
        assert_eq!(rig.tokens(other), Oracle::new(BASE).greedy(None, &[1, 2, 3], TOKENS as usize));
        rig.until_idle();

        let mut next = Rig::new(BASE);
        next.library.insert("a".to_owned(), adapter());
        for ((admission, so_far), expected) in
            [drawn(), greedy()].into_iter().zip(left).zip(&expected)
        {
            assert!(so_far.moved && so_far.finish.iter().all(Option::is_none), "{so_far:?}");
            let key = go_on(&mut next, admission, so_far);
            assert_eq!(next.answer(key), *expected, "graphs {graphs}, late by {polls}");
        }
        next.until_idle();
    }
}

#[test]
fn an_ended_choice_stays_ended_and_one_that_waits_leaves_too() {
    let mut rig = Rig::held(BASE, sizes(), options(), 0);
    rig.library.insert("a".to_owned(), adapter());
    let mut admission = drawn();
    admission.choices[1].finished = true;
    let running = rig.admit(admission);
    rig.answers.get_mut(&running).unwrap().finish[1] = Some(Finish::Stop);
    let parked = rig.chat(named("slow"), &[4], TOKENS);
    rig.until(|rig| !rig.asked.is_empty() && !rig.answers[&running].tokens[0].is_empty());
    rig.send(Command::HandOver(Leaving::All));
    let running = rig.answer(running);
    assert!(running.moved && running.finish == [None, Some(Finish::Stop), None]);
    assert!(rig.answer(parked).tokens[0].is_empty());
    rig.until_idle();
    // Weights that come too late for them are nobody's.
    rig.send(ready("slow", &adapter()));
    let key = rig.chat(named("a"), &[1], 1);
    rig.tokens(key);
    assert!(rig.gauges.residents().iter().all(|resident| resident.key != "slow"));
}

#[test]
fn live_weights_keep_their_readers_until_all_have_to_go() {
    let mut rig = Rig::held(BASE, sizes(), options(), 0);
    let job = Job::new("ftjob-a", BASE, 3, &[Module::Q]);
    rig.start(&job);
    rig.until(|rig| rig.news_of("ftjob-a").contains(&JobEvent::Started));
    let live = || Target::LiveJob("ftjob-a".to_owned());
    let [short, long] = [5, TOKENS].map(|tokens| rig.chat(live(), &[1, 2], tokens));
    let base = rig.chat(Target::Base, &[1, 2], TOKENS);
    rig.until(|rig| [short, long, base].iter().all(|key| rig.answers[key].version.is_some()));
    rig.send(Command::PauseJob("ftjob-a".to_owned()));
    rig.send(Command::StopJob("ftjob-a".to_owned()));
    rig.send(Command::HandOver(Leaving::Movable));
    assert!(rig.answer(base).moved);
    let short = rig.answer(short);
    assert!(!short.moved && short.tokens[0].len() == 5);
    rig.send(Command::HandOver(Leaving::All));
    assert!(rig.answer(long).moved);
    rig.until_idle();
    assert_eq!(rig.gauges.residents(), [], "the job and its readers are gone");
}

#[test]
fn adapters_come_before_their_requests_without_disturbing_others() {
    let mut few = sizes();
    few.slots = 2;
    let mut rig = Rig::held(BASE, few, options(), 0);
    let [a, b] = [1, 2].map(|seed| Adapter::random(BASE, 3, &Module::ALL, seed));
    rig.send(preloaded("a", &a));
    rig.send(preloaded("b", &b));
    rig.send(preloaded("wide", &Adapter::random(BASE, 17, &[Module::K], 1)));
    let key = rig.chat(named("a"), &[1, 2], 5);
    assert_eq!(rig.tokens(key), Oracle::new(BASE).greedy(Some(&a), &[1, 2], 5));
    assert!(rig.asked.is_empty(), "its weights were there");
    let keys = |rig: &Rig| -> Vec<String> {
        rig.gauges.residents().into_iter().map(|resident| resident.key).collect()
    };
    assert_eq!(keys(&rig), ["a", "b"]);

    let [first, second] = ["a", "b"].map(|key| rig.chat(named(key), &[1], TOKENS));
    rig.until(|rig| [first, second].iter().all(|key| !rig.answers[key].tokens[0].is_empty()));
    rig.send(preloaded("c", &adapter()));
    let [first, second] = [first, second].map(|key| rig.answer(key));
    assert!(!first.moved && first.tokens[0].len() == TOKENS as usize && !second.moved);
    assert_eq!(keys(&rig), ["a", "b"], "in use, so the newcomer found no room");
    rig.until_idle();
}

#[test]
fn an_evicted_adapter_serves_its_readers_and_is_loaded_anew_for_others() {
    let (mut rig, mut oracle) = (Rig::held(BASE, sizes(), options(), 0), Oracle::new(BASE));
    rig.library.insert("a".to_owned(), adapter());
    let key = rig.chat(named("a"), &[1, 2], TOKENS);
    rig.until(|rig| !rig.answers[&key].tokens[0].is_empty());
    rig.send(Command::EvictAdapter("a".to_owned()));
    rig.until(|rig| rig.gauges.residents().iter().all(|resident| resident.leaving));
    let next = rig.chat(named("a"), &[1, 2], 5);
    assert_eq!(rig.tokens(next), oracle.greedy(Some(&adapter()), &[1, 2], 5));
    assert_eq!(rig.tokens(key), oracle.greedy(Some(&adapter()), &[1, 2], TOKENS as usize));
    rig.until_idle();
    rig.send(Command::EvictAdapter("a".to_owned()));
    rig.until(|rig| rig.gauges.residents().is_empty());
}
