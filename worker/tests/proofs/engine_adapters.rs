//! Adapters in the engine: more of them than room, moved while they are read, pinned, forgotten.

use crate::common::rig::{Oracle, Rig, options, ready};
use crate::common::{Adapter, Random, sizes};
use kernels::Module;
use worker::engine::command::{AdapterWeights, Command, Fault, FaultKind, Target};
use worker::model::Sizes;

const BASE: &str = "llama3";

fn named(key: &str) -> Target {
    Target::Adapter(key.to_owned())
}

fn residents(rig: &Rig) -> Vec<String> {
    let mut keys: Vec<_> = rig.gauges.residents().into_iter().map(|r| r.key).collect();
    keys.sort();
    keys
}

#[test]
fn more_adapters_than_slots_all_answer_right() {
    let mut few = sizes();
    few.slots = 2;
    let (mut rig, mut oracle) = (Rig::with(BASE, few, options()), Oracle::new(BASE));
    let mut random = Random::new(4);
    let adapters: Vec<Adapter> =
        (1..=6).map(|n| Adapter::random(BASE, 2 * n, &Module::ALL[n..7], n as u64)).collect();
    for (n, adapter) in adapters.iter().enumerate() {
        rig.library.insert(format!("a{n}"), adapter.clone());
    }
    for _ in 0..2 {
        let chats: Vec<_> = (0..18)
            .map(|at| {
                let (n, prompt) = (at * 5 % 6, random.tokens(2 + at));
                (n, rig.chat(named(&format!("a{n}")), &prompt, 6), prompt)
            })
            .collect();
        for (n, key, prompt) in chats {
            assert_eq!(rig.tokens(key), oracle.greedy(Some(&adapters[n]), &prompt, 6), "a{n}");
        }
    }
    assert!(residents(&rig).len() <= 2);
    rig.until_idle();
}

#[test]
fn an_adapter_moves_while_it_is_read() {
    let pages = |adapter: &Adapter| adapter.layout.pages();
    let small = |seed| Adapter::random(BASE, 5, &Module::ALL, seed);
    let [a, b, c] = [1, 2, 3].map(small);
    let large = Adapter::random(BASE, 10, &Module::ALL, 4);
    let mut tight = sizes();
    tight.pool_pages = 3 * pages(&a);
    assert!(pages(&large) > pages(&a) && pages(&large) <= 2 * pages(&a));
    let (mut rig, mut oracle) = (Rig::with(BASE, tight, options()), Oracle::new(BASE));
    for (key, adapter) in [("a", &a), ("b", &b), ("c", &c), ("large", &large)] {
        rig.library.insert(key.to_owned(), adapter.clone());
    }
    for key in ["a", "b", "c"] {
        let key = rig.chat(named(key), &[1], 1);
        rig.tokens(key);
    }
    assert_eq!(residents(&rig), ["a", "b", "c"]);
    let long = rig.chat(named("b"), &[9, 8, 7], 60);
    rig.until(|rig| !rig.answers[&long].tokens[0].is_empty());
    let key = rig.chat(named("large"), &[9, 8, 7], 12);
    assert_eq!(rig.tokens(key), oracle.greedy(Some(&large), &[9, 8, 7], 12));
    assert_eq!(rig.tokens(long), oracle.greedy(Some(&b), &[9, 8, 7], 60));
    assert_eq!(residents(&rig), ["b", "large"]);
    rig.until_idle();
}

#[test]
fn an_adapter_without_room_waits_for_a_reader_or_a_pin_to_end() {
    let mut one = sizes();
    one.slots = 1;
    let (mut rig, mut oracle) = (Rig::with(BASE, one, options()), Oracle::new(BASE));
    let [a, b] = [1, 2].map(|seed| Adapter::random(BASE, 3, &Module::ALL, seed));
    rig.library.insert("a".to_owned(), a.clone());
    rig.library.insert("b".to_owned(), b.clone());
    let long = rig.chat(named("a"), &[1, 2], 50);
    let waiting = rig.chat(named("b"), &[3, 4], 5);
    assert_eq!(rig.tokens(waiting), oracle.greedy(Some(&b), &[3, 4], 5));
    assert_eq!(rig.tokens(long), oracle.greedy(Some(&a), &[1, 2], 50));
    rig.send(Command::PinAdapter("b".to_owned(), true));
    let waiting = rig.chat(named("a"), &[5], 5);
    let served = rig.chat(named("b"), &[6], 5);
    rig.tokens(served);
    assert!(rig.answers[&waiting].tokens[0].is_empty(), "a pinned adapter stays");
    rig.send(Command::PinAdapter("b".to_owned(), false));
    assert_eq!(rig.tokens(waiting), oracle.greedy(Some(&a), &[5], 5));
    rig.until_idle();
}

#[test]
fn a_forgotten_adapter_serves_its_readers_and_nobody_else() {
    let (mut rig, mut oracle) = (Rig::new(BASE), Oracle::new(BASE));
    let [old, new] = [1, 2].map(|seed| Adapter::random(BASE, 3, &Module::ALL, seed));
    rig.library.insert("a".to_owned(), old.clone());
    let long = rig.chat(named("a"), &[1, 2], 55);
    rig.until(|rig| !rig.answers[&long].tokens[0].is_empty());
    rig.send(Command::ForgetAdapter("a".to_owned()));
    rig.library.insert("a".to_owned(), new.clone());
    let next = rig.chat(named("a"), &[1, 2], 5);
    assert_eq!(rig.tokens(next), oracle.greedy(Some(&new), &[1, 2], 5));
    assert_eq!(rig.tokens(long), oracle.greedy(Some(&old), &[1, 2], 55));
    rig.until_idle();
    assert_eq!(residents(&rig), ["a"]);
}

#[test]
fn weights_that_cannot_be_had_fail_their_requests() {
    let mut rig = Rig::with(BASE, Sizes { pool_pages: 1, ..sizes() }, options());
    let gone = [rig.chat(named("gone"), &[1], 1), rig.chat(named("gone"), &[2], 1)];
    rig.until(|rig| !rig.asked.is_empty());
    assert_eq!(rig.asked, ["gone"], "asked for once");
    let message = "it was deleted".to_owned();
    let fault = Fault { kind: FaultKind::ModelNotFound, message, param: None };
    rig.send(Command::AdapterFailed("gone".to_owned(), fault));
    for key in gone {
        assert_eq!(rig.answer(key).failed.unwrap(), "it was deleted");
    }
    let large = rig.chat(named("large"), &[1], 1);
    rig.until(|rig| rig.asked.len() == 2);
    rig.send(ready("large", &Adapter::random(BASE, 16, &Module::ALL, 1)));
    assert!(rig.answer(large).failed.unwrap().contains("larger than the adapter pool"));
    let wide = rig.chat(named("wide"), &[1], 1);
    rig.until(|rig| rig.asked.len() == 3);
    rig.send(ready("wide", &Adapter::random(BASE, 17, &[Module::K], 1)));
    assert!(rig.answer(wide).failed.unwrap().contains("rank 17 is above this worker's 16"));
    let unasked = Adapter::random(BASE, 1, &[Module::Q], 1);
    let weights = AdapterWeights { layout: unasked.layout, values: unasked.values };
    rig.send(Command::AdapterReady("unasked".to_owned(), weights));
    let key = rig.chat(Target::Base, &[1], 1);
    rig.tokens(key);
    assert_eq!(residents(&rig), Vec::<String>::new());
    rig.until_idle();
}
