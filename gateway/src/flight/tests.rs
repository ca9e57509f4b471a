//! What a request makes of every order of messages and losses.

use storage::queue::message::{Input, Limits, Sampling};

use super::*;

fn request(choices: u32) -> Request {
    Request {
        request_id: "chatcmpl-1".to_owned(),
        attempt: 0,
        gateway: "g".to_owned(),
        org: "org-local".to_owned(),
        base: "b".to_owned(),
        target: Target::Base,
        input: Input::Text("x".to_owned()),
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 1,
            logprobs: None,
        },
        limits: Limits::default(),
        choices,
        replay: Vec::new(),
    }
}

fn admitted(fingerprint: &str) -> Update {
    Update::Admitted { prompt_tokens: 3, fingerprint: fingerprint.to_owned() }
}

fn tokens(choice: u32, first: u32, ids: &[u32], text: &str, finish: Option<Finish>) -> Update {
    let tokens = ids.iter().map(|&id| Token { id, logprob: None }).collect();
    Update::Tokens { choice, first, tokens, text: text.to_owned(), finish }
}

fn text_of(effect: Effect) -> String {
    match effect {
        Effect::Deliver(delta) => delta.text,
        other => panic!("expected a delta, got {other:?}"),
    }
}

#[test]
fn tokens_in_order_are_delivered_and_repeats_are_not() {
    let mut flight = Flight::new(request(1));
    assert_eq!(flight.receive(0, admitted("fp_1")), Effect::Admitted);
    assert_eq!(text_of(flight.receive(0, tokens(0, 0, &[7], "a", None))), "a");
    assert_eq!(flight.receive(0, tokens(0, 0, &[7], "a", None)), Effect::Ignore);
    assert_eq!(text_of(flight.receive(0, tokens(0, 1, &[8, 9], "bc", None))), "bc");
    assert!(!flight.is_done());
    let last = flight.receive(0, tokens(0, 3, &[2], "", Some(Finish::Stop)));
    assert!(matches!(last, Effect::Deliver(_)));
    assert!(flight.is_done());
    assert_eq!(flight.completion_tokens(), 4);
    assert_eq!(flight.receive(0, tokens(0, 4, &[2], "x", None)), Effect::Ignore);
}

#[test]
fn a_final_message_without_tokens_still_ends_the_choice() {
    let mut flight = Flight::new(request(1));
    flight.receive(0, admitted("fp_1"));
    flight.receive(0, tokens(0, 0, &[7], "", None));
    let last = flight.receive(0, tokens(0, 1, &[], "held", Some(Finish::Length)));
    assert_eq!(text_of(last), "held");
    assert!(flight.is_done());
}

#[test]
fn a_hole_moves_the_request_with_its_tokens() {
    let mut flight = Flight::new(request(2));
    flight.receive(0, admitted("fp_1"));
    flight.receive(0, tokens(0, 0, &[7, 8], "añ", None));
    flight.receive(0, tokens(1, 0, &[5], "z", Some(Finish::Stop)));
    assert_eq!(flight.receive(0, tokens(0, 3, &[9], "c", None)), Effect::PlaceAgain);

    let again = flight.next_attempt().clone();
    assert_eq!(again.attempt, 1);
    assert_eq!(again.replay[0], Replay { tokens: vec![7, 8], text_chars: 2, finish: None });
    assert_eq!(again.replay[1].finish, Some(Finish::Stop));

    // The old worker goes on talking; nothing of it counts, and the fingerprint stays.
    assert_eq!(flight.receive(0, tokens(0, 2, &[9], "old", None)), Effect::Ignore);
    assert_eq!(flight.receive(1, admitted("fp_2")), Effect::Ignore);
    assert_eq!(flight.admission().unwrap().fingerprint, "fp_1");
    let last = flight.receive(1, tokens(0, 2, &[9], "c", Some(Finish::Length)));
    assert_eq!(text_of(last), "c");
    assert!(flight.is_done());
}

#[test]
fn losses_are_bounded_and_hand_overs_are_no_losses() {
    let mut flight = Flight::new(request(1));
    for loss in 0..LOSSES_MAX - 1 {
        assert_eq!(flight.lose(Loss::Worker), Effect::PlaceAgain, "loss {loss}");
        let attempt = flight.next_attempt().attempt;
        assert_eq!(flight.receive(attempt, Update::Moved), Effect::PlaceAgain);
        flight.next_attempt();
    }
    assert!(
        matches!(flight.lose(Loss::Worker), Effect::Fail(r) if r.kind == RefusalKind::Overloaded)
    );
}

#[test]
fn lost_messages_are_borne_longer_than_lost_workers() {
    let mut flight = Flight::new(request(1));
    for _ in 1..HOLES_MAX {
        assert_eq!(flight.lose(Loss::Message), Effect::PlaceAgain);
    }
    for _ in 1..LOSSES_MAX {
        assert_eq!(flight.lose(Loss::Message), Effect::PlaceAgain, "now as lost workers");
    }
    assert!(matches!(flight.lose(Loss::Message), Effect::Fail(_)));
}

#[test]
fn text_of_live_weights_goes_on_with_the_same_version_only() {
    let job = Target::Job { job_id: "ftjob-1".to_owned() };
    let mut flight = Flight::new(Request { target: job, ..request(1) });
    flight.receive(0, admitted("fp_1"));
    flight.next_attempt();
    assert_eq!(flight.receive(1, admitted("fp_1")), Effect::Ignore);
    flight.receive(1, tokens(0, 0, &[7], "a", None));
    flight.next_attempt();
    let ended = flight.receive(2, admitted("fp_2"));
    assert!(matches!(ended, Effect::Fail(r) if r.message.contains("is gone")), "{flight:?}");
}

#[test]
fn a_version_that_was_told_is_the_one_that_answers() {
    let job = Target::Job { job_id: "ftjob-1".to_owned() };
    let mut flight = Flight::new(Request { target: job, ..request(1) });
    flight.receive(0, admitted("fp_1"));
    flight.next_attempt();
    // No text yet, but the head of the stream has named the version.
    let ended = flight.receive(1, admitted("fp_2"));
    assert!(matches!(ended, Effect::Fail(r) if r.message.contains("is gone")), "{flight:?}");
}

#[test]
fn refusals_end_it_and_a_full_worker_does_not() {
    let refusal = |kind| Refusal { kind, message: "no".to_owned(), param: None };
    let mut flight = Flight::new(request(1));
    let full = Update::Failed(refusal(RefusalKind::Overloaded));
    assert_eq!(flight.receive(0, full), Effect::PlaceAgain);
    flight.next_attempt();
    for kind in [RefusalKind::Invalid, RefusalKind::Unavailable] {
        let last = refusal(kind);
        assert_eq!(flight.receive(1, Update::Failed(last.clone())), Effect::Fail(last));
    }
}

#[test]
fn refusals_one_after_the_other_take_longer_and_longer() {
    let full = Refusal { kind: RefusalKind::Overloaded, message: "no".to_owned(), param: None };
    let refuse = |flight: &mut Flight| {
        let effect = flight.receive(flight.request.attempt, Update::Failed(full.clone()));
        let rests = flight.rests();
        flight.next_attempt();
        (effect == Effect::PlaceAgain).then_some(rests)
    };
    let mut flight = Flight::new(request(1));
    assert_eq!([(); 3].map(|()| refuse(&mut flight)), [Some(0), Some(1), Some(2)]);
    assert_eq!(refuse(&mut flight), None, "the last word of the last worker");
    let mut flight = Flight::new(request(1));
    assert_eq!([(); 2].map(|()| refuse(&mut flight)), [Some(0), Some(1)]);
    flight.receive(2, admitted("fp_1"));
    assert_eq!(refuse(&mut flight), Some(0), "it ran meanwhile");
}

#[test]
fn a_job_that_ends_is_its_final_adapter_to_whom_no_version_was_told() {
    let job = || {
        let target = Target::Job { job_id: "ftjob-1".to_owned() };
        Flight::new(Request { target, ..request(1) })
    };
    let adapter = || Target::Adapter {
        adapter_id: "adp-1".to_owned(),
        model: "ft:b".to_owned(),
        object: "o".to_owned(),
    };
    let mut flight = job();
    let same = flight.request().target.clone();
    assert_eq!(flight.retarget(Some(same.clone())), Ok(()));
    assert_eq!(flight.retarget(Some(adapter())), Ok(()));
    assert_eq!(flight.request().target, adapter());
    let gone = job().retarget(None);
    assert!(matches!(gone, Err(refusal) if refusal.kind == RefusalKind::ModelNotFound));
    let mut told = job();
    told.receive(0, admitted("fp_1"));
    assert_eq!(told.retarget(Some(same)), Ok(()));
    assert_eq!(told.retarget(Some(adapter())), Err(version_gone()));
    assert_eq!(told.retarget(None), Err(version_gone()));
}

/// Random drops, repeats, delays and worker changes: what is delivered is always a prefix of
/// the one true token sequence, and what is replayed is exactly what was delivered.
#[test]
fn under_any_disorder_the_client_sees_one_sequence() {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    for seed in 0..2000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut flight = Flight::new(request(1));
        let mut seen: Vec<u32> = Vec::new();
        // Messages of any attempt that may still arrive: (attempt, first, count).
        let mut wire: Vec<(u32, u32, u32)> = Vec::new();
        flight.receive(0, admitted("fp_1"));
        for _ in 0..200 {
            let attempt = flight.request().attempt;
            let start = flight.request().replay.first().map_or(0, |r| r.tokens.len() as u32);
            let first = start + rng.random_range(0..6);
            wire.push((attempt, first, rng.random_range(1..3)));
            let at = rng.random_range(0..wire.len());
            let (attempt, first, count) =
                if rng.random_bool(0.7) { wire.swap_remove(at) } else { wire[at] };
            let ids: Vec<u32> = (first..first + count).collect();
            match flight.receive(attempt, tokens(0, first, &ids, "t", None)) {
                Effect::Deliver(delta) => seen.extend(delta.tokens.iter().map(|t| t.id)),
                Effect::PlaceAgain => {
                    let replay = flight.next_attempt().replay.clone();
                    let told = replay.first().map(|r| r.tokens.clone()).unwrap_or_default();
                    assert_eq!(told, seen, "seed {seed}");
                }
                Effect::Ignore => {}
                Effect::Fail(_) => break,
                Effect::Admitted => panic!("admitted twice"),
            }
            assert!(seen.iter().copied().eq(0..seen.len() as u32), "seed {seed}: {seen:?}");
        }
    }
}
