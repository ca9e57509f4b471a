//! What is explained, and what is not.

use super::super::blows::{Process, Store};
use super::super::clients::{Asked, Choice};
use super::super::diary::{Entry, Known, Trouble};
use super::*;
use std::time::{Duration, Instant};

const QUEUE: &str = "The queue cannot be reached at the moment.";
const DATABASE: &str = "The database cannot be reached at the moment.";
const LOST: &str = "The worker running this request was lost.";

fn answer(text: &str, finish: Option<&str>) -> Answer {
    let finish = finish.map(str::to_owned);
    let choice = Choice { text: text.to_owned(), logprobs: Vec::new(), finish };
    Answer { choices: vec![choice], ..Answer::default() }
}

/// From second 60 to second 65; its reply has begun where there is an answer.
fn ended(start: Instant, answer: Answer, how: How) -> Ended {
    let (from, until) = (start + Duration::from_secs(60), start + Duration::from_secs(65));
    let admitted = (!answer.choices.is_empty()).then_some(from);
    let (asked, id) = (Asked::Case(0), String::new());
    Ended { gateway: 0, asked, from, admitted, until, answer, how, id }
}

fn entry(start: Instant, trouble: Trouble, from: u64, until: u64) -> Entry {
    let at = |second| start + Duration::from_secs(second);
    Entry { trouble, from: at(from), until: Some(at(until)) }
}

fn story(entries: &[Entry]) -> Story {
    Story { entries: entries.to_vec(), ..Story::default() }
}

/// Whether a request that got an error for an answer is explained.
fn told(start: Instant, message: &str, status: u16, story: &Story) -> bool {
    let how = How::Error(status, message.to_owned());
    let verdict = judge(&ended(start, Answer::default(), how), &Answer::default(), "m", story);
    matches!(verdict, Verdict::Explained(_))
}

#[test]
fn a_whole_answer_must_be_equal_and_a_part_its_beginning() {
    let (start, calm) = (Instant::now(), answer("one two", Some("length")));
    let whole = |text| {
        let ended = ended(start, answer(text, Some("length")), How::Whole);
        judge(&ended, &calm, "m", &Story::default())
    };
    assert_eq!(whole("one two"), Verdict::Equal);
    assert!(matches!(whole("one two two"), Verdict::Fault(_)));
    assert!(matches!(whole("one"), Verdict::Fault(_)));
    let down = [entry(start, Trouble::Down(Process::Gateway(0)), 61, 62)];
    let broken = |text, entries: &[Entry]| {
        let how = How::Broken("reset".to_owned());
        judge(&ended(start, answer(text, None), how), &calm, "m", &story(entries))
    };
    assert_eq!(broken("one", &down), Verdict::Explained("its gateway was down"));
    assert!(matches!(broken("one", &[]), Verdict::Fault(_)));
    assert!(matches!(broken("two", &down), Verdict::Fault(_)));
}

#[test]
fn a_gateway_that_is_asked_to_end_refuses_and_breaks_no_stream() {
    let (start, gateway) = (Instant::now(), Process::Gateway(0));
    let judged = |answer: Answer, how: How, entries: &[Entry]| {
        let verdict =
            judge(&ended(start, answer, how), &self::answer("one", None), "m", &story(entries));
        matches!(verdict, Verdict::Explained(_))
    };
    let refused = || How::Refused("refused".to_owned());
    let broken = || How::Broken("reset".to_owned());
    let leaving = [entry(start, Trouble::Leaving(gateway), 50, 64)];
    let gone = [leaving[0], entry(start, Trouble::Gone(gateway), 64, 70)];
    assert!(judged(Answer::default(), refused(), &leaving));
    assert!(judged(Answer::default(), refused(), &gone));
    assert!(!judged(Answer::default(), refused(), &[]));
    assert!(!judged(answer("one", None), broken(), &gone), "a stream");
    assert!(!judged(Answer::default(), broken(), &leaving), "long after it was told");
    let just = [entry(start, Trouble::Leaving(gateway), 64, 70)];
    assert!(judged(Answer::default(), broken(), &just), "before it was heard");
}

#[test]
fn an_error_needs_its_own_reason_at_its_own_time() {
    let start = Instant::now();
    let redis = |from, until| story(&[entry(start, Trouble::Away(Store::Redis), from, until)]);
    assert!(told(start, QUEUE, 503, &redis(58, 59)));
    assert!(!told(start, QUEUE, 503, &redis(40, 50)), "long before");
    assert!(!told(start, QUEUE, 503, &redis(66, 70)), "after");
    assert!(!told(start, QUEUE, 500, &redis(58, 59)), "a fault of the service");
    assert!(!told(start, DATABASE, 503, &redis(58, 59)), "another store");
    let down = |number, from| entry(start, Trouble::Down(Process::Worker(number)), from, 63);
    let nobody = "No worker serves the base `tiny` at the moment.";
    assert!(!told(start, nobody, 503, &story(&[down(0, 61), down(1, 61)])));
    assert!(told(start, nobody, 503, &story(&[down(0, 61), down(1, 61), down(2, 62)])));
    let hung = ended(start, Answer::default(), How::Hung);
    let hung = judge(&hung, &Answer::default(), "m", &redis(58, 65));
    assert!(matches!(hung, Verdict::Fault(_)));
}

#[test]
fn a_request_is_given_up_only_after_four_workers() {
    let start = Instant::now();
    let down = |number, from| entry(start, Trouble::Down(Process::Worker(number)), from, from + 1);
    let frozen = |from, until| entry(start, Trouble::Frozen(Process::Worker(0)), from, until);
    let redis = entry(start, Trouble::Away(Store::Redis), 61, 62);
    assert!(told(start, LOST, 200, &story(&[redis, down(0, 60), down(1, 62), down(2, 63)])));
    assert!(!told(start, LOST, 200, &story(&[redis, down(0, 60), down(1, 62)])));
    let three = [down(0, 60), down(1, 62), down(2, 63)];
    let and = |entry: Entry| story(&[three[0], three[1], three[2], entry]);
    assert!(told(start, LOST, 200, &and(frozen(59, 63))));
    assert!(!told(start, LOST, 200, &and(frozen(61, 62))), "nobody noticed");
    assert!(!told(start, LOST, 200, &and(down(0, 50))), "before it was placed");
    let cut_off = entry(start, Trouble::CutOff(Process::Gateway(0), Store::Redis), 60, 64);
    assert!(!told(start, LOST, 200, &and(cut_off)), "that loses no worker");
}

#[test]
fn a_gateway_that_knows_a_name_needs_no_database() {
    let start = Instant::now();
    let at = |second| start + Duration::from_secs(second);
    let known = |gateway, model: &str, second| {
        let model = model.to_owned();
        Known { gateway, model, from: at(second), at: at(second + 1) }
    };
    let away = entry(start, Trouble::Away(Store::Postgres), 59, 64);
    let cold = |entries: &[Entry], known: Known| {
        let story = Story { known: vec![known], ..story(entries) };
        told(start, DATABASE, 503, &story)
    };
    assert!(!cold(&[away], known(0, "m", 40)));
    assert!(cold(&[away], known(1, "m", 40)), "another gateway");
    assert!(cold(&[away], known(0, "n", 40)), "another name");
    assert!(cold(&[away], known(0, "m", 62)), "not before");
    let restarted = entry(start, Trouble::Gone(Process::Gateway(0)), 50, 52);
    assert!(cold(&[restarted, away], known(0, "m", 40)), "by its predecessor");
    assert!(!cold(&[restarted, away], known(0, "m", 53)));
    assert!(!cold(&[], known(1, "m", 40)), "no outage");
}

#[test]
fn an_operator_may_be_refused_for_what_was_done() {
    let start = Instant::now();
    let word = |status, message: &str, entries: &[Entry]| {
        let (from, until) = (start + Duration::from_secs(60), start + Duration::from_secs(65));
        let how = How::Error(status, message.to_owned());
        let word = Word { what: "POST".to_owned(), gateway: 0, from, until, how };
        matches!(judge_word(&word, &story(entries)), Verdict::Explained(_))
    };
    let down = [entry(start, Trouble::Down(Process::Worker(1)), 58, 61)];
    let gone = "Worker 'worker-1-0' is gone; nothing was moved.";
    assert!(word(503, gone, &down));
    assert!(!word(503, gone, &[]));
    assert!(!word(500, gone, &down));
    assert!(word(400, "The job ftjob-1 cannot be moved: its status is 'succeeded'.", &[]));
    assert!(!word(400, "The job ftjob-1 cannot be moved: its status is 'running'.", &down));
    let away = [entry(start, Trouble::Away(Store::Postgres), 58, 61)];
    assert!(word(503, DATABASE, &away));
    assert!(!word(503, DATABASE, &down));
}
