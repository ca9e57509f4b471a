//! Requests through the engine: what is generated, how it ends, and that all is given back.

use crate::common::rig::{Oracle, Rig, choice, options, request, tokenizer};
use crate::common::{Adapter, Random, sizes};
use kernels::Module;
use std::sync::atomic::Ordering::Relaxed;
use worker::engine::command::{Admission, Command, Finish, SamplingSpec, Target};
use worker::text::TextStart;

const BASE: &str = "llama3";

fn prompts(count: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(31);
    (0..count).map(|at| random.tokens(1 + at * 5 % 23)).collect()
}

fn drawn(seed: i64, choices: usize) -> Admission {
    let mut admission = request(Target::Base, &[5, 6, 7], 12);
    admission.sampling = SamplingSpec { temperature: 1.0, seed, ..admission.sampling };
    admission.choices = (0..choices).map(|_| choice(&[])).collect();
    admission
}

#[test]
fn greedy_tokens_are_those_of_a_full_forward_at_each_step() {
    let (mut rig, mut oracle) = (Rig::new(BASE), Oracle::new(BASE));
    let adapter = Adapter::random(BASE, 5, &[Module::Q, Module::O, Module::Down], 1);
    rig.library.insert("a".to_owned(), adapter.clone());
    let prompts = prompts(8);
    let targets = |at: usize| {
        if at.is_multiple_of(2) { Target::Base } else { Target::Adapter("a".to_owned()) }
    };
    let keys: Vec<_> =
        (0..).zip(&prompts).map(|(at, prompt)| rig.chat(targets(at), prompt, 10)).collect();
    for (at, (key, prompt)) in keys.into_iter().zip(&prompts).enumerate() {
        let through = (at % 2 == 1).then_some(&adapter);
        let expected = oracle.greedy(through, prompt, 10);
        assert_eq!(rig.tokens(key), expected, "request {at}");
        assert_eq!(rig.answers[&key].finish, [Some(Finish::Length)]);
        let text = tokenizer().decode(&expected, TextStart::Continued);
        assert_eq!(rig.answers[&key].text, [text]);
    }
    assert_ne!(
        oracle.greedy(None, &prompts[1], 10),
        oracle.greedy(Some(&adapter), &prompts[1], 10),
        "the adapter changes answers"
    );
    rig.until_idle();
}

#[test]
fn prompts_longer_than_a_step_and_more_sequences_than_samples_take_turns() {
    let mut small = sizes();
    (small.step_rows, small.sample_rows) = (7, 2);
    let mut rig = Rig::with(BASE, small, options());
    let prompt = Random::new(8).tokens(40);
    let lengths = [40, 9, 1, 20, 7, 8];
    let keys = lengths.map(|length| rig.chat(Target::Base, &prompt[..length], 4));
    let mut oracle = Oracle::new(BASE);
    for (key, length) in keys.into_iter().zip(lengths) {
        assert_eq!(rig.tokens(key), oracle.greedy(None, &prompt[..length], 4), "{length}");
    }
    rig.until_idle();
}

#[test]
fn seeds_reproduce_and_choices_differ() {
    let mut rig = Rig::new(BASE);
    let [first, again, other] = [7, 7, 8].map(|seed| rig.admit(drawn(seed, 3)));
    let (first, again) = (rig.answer(first), rig.answer(again));
    assert_eq!(first, again);
    assert_ne!(first.tokens, rig.answer(other).tokens);
    assert!(first.tokens.iter().all(|tokens| tokens.len() == 12));
    assert!(first.tokens[0] != first.tokens[1] && first.tokens[1] != first.tokens[2]);
    let one = rig.admit(drawn(7, 1));
    assert_eq!(rig.answer(one).tokens[0], first.tokens[0], "a choice does not know the others");
    let mut replayed = drawn(7, 3);
    replayed.choices[1].replay = first.tokens[1][..5].to_vec();
    replayed.choices[2].finished = true;
    let key = {
        let key = rig.admit(replayed);
        let answer = rig.answers.get_mut(&key).unwrap();
        answer.tokens[1] = first.tokens[1][..5].to_vec();
        answer.finish[2] = Some(Finish::Stop);
        key
    };
    let replayed = rig.answer(key);
    assert_eq!(replayed.tokens[..2], first.tokens[..2], "goes on where it was");
    rig.until_idle();
}

#[test]
fn ends_at_end_tokens_stop_texts_and_limits() {
    let mut rig = Rig::new(BASE);
    let prompt = [4, 8, 15];
    let whole = Oracle::new(BASE).greedy(None, &prompt, 20);
    let at = (1..20).find(|at| !whole[..*at].contains(&whole[*at])).unwrap();
    let mut admission = request(Target::Base, &prompt, 20);
    admission.end_tokens = vec![95, whole[at]];
    let key = rig.admit(admission);
    let ended = rig.answer(key);
    assert_eq!(ended.tokens[0], whole[..=at]);
    assert_eq!(ended.finish, [Some(Finish::Stop)]);
    let text = |tokens: &[u32]| tokenizer().decode(tokens, TextStart::Continued);
    assert_eq!(ended.text[0], text(&whole[..at]), "an end token is no text");

    let mut admission = request(Target::Base, &prompt, 20);
    (admission.end_tokens, admission.min_tokens) = (vec![whole[at]], at as u32 + 3);
    let key = rig.admit(admission);
    let longer = rig.answer(key).tokens.remove(0);
    assert!(longer.len() > at + 1 && !longer[..at + 3].contains(&whole[at]), "{longer:?}");

    let stop = text(&whole[6..8]);
    let before = text(&whole);
    let before = &before[..before.find(&stop).unwrap()];
    let mut admission = request(Target::Base, &prompt, 20);
    admission.choices = vec![choice(std::slice::from_ref(&stop))];
    let key = rig.admit(admission);
    let stopped = rig.answer(key);
    assert_eq!((stopped.text[0].as_str(), stopped.finish[0]), (before, Some(Finish::Stop)));
    assert!(stopped.tokens[0].len() <= 8);
    let mut admission = request(Target::Base, &prompt, 20);
    (admission.choices, admission.min_tokens) = (vec![choice(&[stop])], 20);
    let key = rig.admit(admission);
    assert_eq!(rig.tokens(key), whole, "stop texts wait for the least number of tokens");

    let key = rig.chat(Target::Base, &Random::new(1).tokens(60), 50);
    let full = rig.answer(key);
    assert_eq!((full.tokens[0].len(), full.finish[0]), (4, Some(Finish::Length)), "the context");
    rig.until_idle();
}

#[test]
fn what_cannot_be_served_is_refused() {
    let mut few = options();
    few.max_queue = 2;
    let mut rig = Rig::with(BASE, sizes(), few);
    for (prompt, part) in [
        (vec![], "no token"),
        (vec![1; 64], "maximum context length is 64 tokens. However, your prompt has 64"),
        (vec![96], "token id 96 is not in the vocabulary"),
    ] {
        let key = rig.chat(Target::Base, &prompt, 1);
        let failed = rig.answer(key).failed.unwrap();
        assert!(failed.contains(part), "{failed}");
    }
    let key = rig.chat(Target::LiveJob("ftjob-none".to_owned()), &[1], 1);
    assert!(rig.answer(key).failed.unwrap().contains("'ftjob-none' has left its worker"));
    let parked = Target::Adapter("slow".to_owned());
    let waiting = [rig.chat(parked.clone(), &[1], 1), rig.chat(parked.clone(), &[2], 1)];
    let key = rig.chat(parked, &[3], 1);
    assert!(rig.answer(key).failed.unwrap().contains("queue is full"), "parked ones count");
    for key in waiting {
        rig.send(Command::Cancel(key));
    }
    rig.until_idle();
}

#[test]
fn cancelling_gives_everything_back() {
    let mut rig = Rig::new(BASE);
    rig.library.insert("a".to_owned(), Adapter::random(BASE, 4, &Module::ALL, 2));
    let adapter = |key: &str| Target::Adapter(key.to_owned());
    let running = rig.chat(adapter("a"), &[1, 2, 3], 60);
    let mut several = request(Target::Base, &[4, 5], 60);
    several.choices = (0..4).map(|_| choice(&[])).collect();
    let several = rig.admit(several);
    let parked = rig.chat(adapter("never"), &[6], 5);
    rig.until(|rig| !rig.asked.is_empty() && rig.answers[&running].version.is_some());
    assert!(rig.gauges.requests.load(Relaxed) > 0);
    for key in [parked, running, several] {
        rig.send(Command::Cancel(key));
    }
    rig.until_idle();
    rig.send(crate::common::rig::ready("never", &Adapter::random(BASE, 4, &Module::ALL, 3)));
    let key = rig.chat(adapter("a"), &[1, 2, 3], 3);
    assert_eq!(rig.tokens(key).len(), 3);
    assert!(rig.gauges.residents().iter().all(|resident| resident.key != "never"));
    rig.until_idle();
}

#[test]
fn displaced_sequences_go_on_with_the_same_tokens() {
    let prompts = prompts(5);
    let run = |blocks: usize| {
        let mut few = sizes();
        few.blocks = blocks;
        let mut rig = Rig::with(BASE, few, options());
        let admissions: Vec<_> = prompts
            .iter()
            .map(|prompt| {
                let admission = request(Target::Base, prompt, 24);
                let sampling = SamplingSpec { temperature: 0.9, ..admission.sampling };
                Admission { sampling, ..admission }
            })
            .collect();
        let keys: Vec<_> = admissions.into_iter().map(|admission| rig.admit(admission)).collect();
        let answers: Vec<_> = keys.into_iter().map(|key| rig.answer(key)).collect();
        rig.until_idle();
        (answers, rig.gauges.displaced.load(Relaxed))
    };
    let (plenty, none) = run(80);
    let (short, some) = run(16);
    assert_eq!(none, 0);
    assert!(some > 0, "blocks ran short");
    assert_eq!(plenty, short);
}

#[test]
fn a_sequence_ends_where_all_blocks_do() {
    let mut few = sizes();
    few.blocks = 5;
    let mut rig = Rig::with(BASE, few, options());
    let key = rig.chat(Target::Base, &[1; 12], 40);
    assert_eq!(rig.tokens(key).len(), 8);
    let key = rig.chat(Target::Base, &[1; 20], 1);
    assert!(rig.answer(key).failed.unwrap().contains("20 tokens"));
    rig.until_idle();
}

#[test]
fn biases_penalties_and_log_probabilities_stay_with_their_request() {
    let mut rig = Rig::new(BASE);
    let prompt = [4, 8, 15];
    let plain = Oracle::new(BASE).greedy(None, &prompt, 6);
    let with = |change: &dyn Fn(&mut SamplingSpec)| {
        let mut admission = request(Target::Base, &prompt, 6);
        change(&mut admission.sampling);
        admission
    };
    let banned = with(&|sampling| sampling.logit_bias = vec![(plain[0], -100.0)]);
    let wanted = with(&|sampling| sampling.logit_bias = vec![(42, 1e4)]);
    let fresh = with(&|sampling| sampling.presence_penalty = 1e4);
    let told = with(&|sampling| sampling.logprobs = Some(3));
    let more = with(&|sampling| sampling.logprobs = Some(5));
    let [banned, wanted, fresh, told, more] =
        [banned, wanted, fresh, told, more].map(|admission| rig.admit(admission));
    let alone = rig.chat(Target::Base, &prompt, 6);
    assert!(!rig.tokens(banned).contains(&plain[0]));
    assert_eq!(rig.tokens(wanted), [42; 6]);
    let mut once = rig.tokens(fresh);
    assert_eq!(once[0], plain[0]);
    once.sort();
    once.dedup();
    assert_eq!(once.len(), 6, "no token comes twice");
    assert_eq!(rig.tokens(alone), plain);
    assert!(rig.answers[&alone].logprobs.is_empty());
    let (told, more) = (rig.answer(told), rig.answer(more));
    assert_eq!((told.tokens[0].as_slice(), more.tokens[0].as_slice()), (&plain[..], &plain[..]));
    for (at, ((logprob, top), (same, longer))) in
        told.logprobs.iter().zip(&more.logprobs).enumerate()
    {
        assert_eq!((top.len(), longer.len(), logprob), (3, 5, same));
        assert_eq!(top[..], longer[..3]);
        assert_eq!(top[0], (plain[at], *logprob));
        assert!(*logprob < 0.0 && longer.iter().map(|one| one.1.exp()).sum::<f32>() <= 1.0);
    }
    rig.until_idle();
}
