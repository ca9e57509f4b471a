//! Whether a request ended as it may: with the answer of a calm day, or with a clear error that
//! what was done to the service explains. Everything else is a fault.

use super::clients::{Answer, Ended, How};
use super::diary::{Entry, Trouble};
use super::schedule::{Process, Store, WORKERS};
use std::time::{Duration, Instant};

/// How long a process that gives no sign of life counts as alive, with the time until others have
/// seen it.
const SEEN_GONE: Duration = Duration::from_secs(5);
/// A call to Redis is tried for so long.
const QUEUE_CALL: Duration = Duration::from_secs(3);
/// A call to the database waits so long for a connection.
const DATABASE_CALL: Duration = Duration::from_secs(11);
/// A load of an adapter that another request began is tried for so long.
const OBJECT_LOAD: Duration = Duration::from_secs(45);
/// A job goes on elsewhere within its lease, and then has to be prepared.
const JOB_MOVES: Duration = Duration::from_secs(8);
/// Losses at which a gateway gives a request up.
const LOSSES: u32 = 4;

/// Judgement of one request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The answer of a calm day.
    Equal,
    /// A clear error, for this reason.
    Explained(&'static str),
    /// Neither.
    Fault(String),
}

/// Judges a request of a running job's model: whatever has the fingerprint of a whole answer, in
/// `others`, must have its text.
pub fn judge_live(ended: &Ended, others: &[Ended], entries: &[Entry]) -> Verdict {
    let whole = |other: &&Ended| {
        other.how == How::Whole && other.answer.fingerprint == ended.answer.fingerprint
    };
    let mut calm = ended.answer.clone();
    if let Some(other) = others.iter().find(whole) {
        calm.clone_from(&other.answer);
    }
    judge(ended, &calm, entries)
}

/// Judges a request by the answer it should have had and by what happened.
pub fn judge(ended: &Ended, calm: &Answer, entries: &[Entry]) -> Verdict {
    let fault = |what: &str| {
        let took = ended.until.duration_since(ended.from).as_secs_f64();
        let Ended { case, gateway, id, .. } = ended;
        Verdict::Fault(format!("case {case:?} at gateway {gateway}, {id}, {took:.1} s: {what}"))
    };
    if ended.how == How::Whole {
        return match &ended.answer {
            answer if answer == calm => Verdict::Equal,
            answer => fault(&difference(answer, calm)),
        };
    }
    if !ended.answer.begins(calm) {
        return fault(&format!("{:?}, after {}", ended.how, difference(&ended.answer, calm)));
    }
    match Explanation::new(ended, entries).of(&ended.how) {
        Some(reason) => Verdict::Explained(reason),
        None => fault(&format!("{:?} without a reason", ended.how)),
    }
}

/// Where two answers part.
fn difference(answer: &Answer, calm: &Answer) -> String {
    for (index, (is, should)) in answer.choices.iter().zip(&calm.choices).enumerate() {
        if should.text.starts_with(&is.text) && is.text.len() < should.text.len() {
            let (got, of) = (is.text.len(), should.text.len());
            return format!("choice {index} has {got} of {of} bytes and ended: {:?}", is.finish);
        }
        if is.text != should.text {
            let pairs = is.text.char_indices().zip(should.text.chars());
            let at = pairs.take_while(|((_, a), b)| a == b).count();
            let tail = |text: &str| text.chars().skip(at).take(40).collect::<String>();
            let (is, should) = (tail(&is.text), tail(&should.text));
            return format!("choice {index} parts after {at} characters: {is:?} not {should:?}");
        }
        if is.finish != should.finish {
            return format!("choice {index} ended with {:?}, not {:?}", is.finish, should.finish);
        }
        if is.logprobs != should.logprobs {
            return format!("choice {index} has other log-probabilities");
        }
    }
    let (is, should) = (answer.choices.len(), calm.choices.len());
    format!("{is} of {should} choices, usage {:?}, not {:?}", answer.usage, calm.usage)
}

/// The troubles that one request may have met.
struct Explanation<'a> {
    entries: &'a [Entry],
    gateway: Process,
    from: Instant,
    until: Instant,
}

impl<'a> Explanation<'a> {
    fn new(ended: &Ended, entries: &'a [Entry]) -> Self {
        let gateway = Process::Gateway(ended.gateway);
        Self { entries, gateway, from: ended.from, until: ended.until }
    }

    fn of(&self, how: &How) -> Option<&'static str> {
        let (status, message) = match how {
            How::Whole | How::Hung => return None,
            How::Broken(_) => {
                let down = self.any(Duration::ZERO, |t| t == Trouble::Down(self.gateway));
                return down.then_some("its gateway was down");
            }
            How::Error(status, message) => (*status, message.as_str()),
        };
        // Before the first byte, each of these is a 503; in a stream the head said 200.
        if status != 503 && status != 200 {
            return None;
        }
        let starts = |start: &str| message.starts_with(start);
        if starts("The queue cannot be reached") {
            return self.away(Store::Redis, QUEUE_CALL).then_some("Redis was away");
        }
        if starts("The database cannot be reached") {
            return self.away(Store::Postgres, DATABASE_CALL).then_some("Postgres was away");
        }
        if starts("No worker serves the base") || starts("All workers are busy") {
            return self.no_worker().then_some("no worker was alive");
        }
        if starts("the weights of ") {
            return self.away(Store::Objects, OBJECT_LOAD).then_some("the object store was away");
        }
        if starts("The worker running this request was lost") {
            return (self.losses() >= LOSSES).then_some("its workers were lost, four in a row");
        }
        if starts("The reply was read too slowly") {
            let frozen = self.any(Duration::ZERO, |t| t == Trouble::Frozen(self.gateway));
            return frozen.then_some("its gateway was frozen");
        }
        if starts("The version of the job's model") {
            let moved = self.losses() > 0 || self.owner_lost();
            return moved.then_some("its version of a job's model died");
        }
        // No blow is needed for it: a job also leaves its worker when it is over.
        if starts("the job is starting") || starts("the job 'ftjob-") {
            return Some("its job was between workers, or just over");
        }
        if starts("the job's state cannot be read") {
            return self.away(Store::Postgres, DATABASE_CALL).then_some("Postgres was away");
        }
        None
    }

    /// Whether a job may be without a worker, or have none yet that knows its weights.
    fn owner_lost(&self) -> bool {
        self.any(JOB_MOVES, |trouble| {
            matches!(
                trouble,
                Trouble::Down(Process::Worker(_))
                    | Trouble::Frozen(Process::Worker(_))
                    | Trouble::Away(Store::Postgres)
                    | Trouble::CutOff(_, Store::Postgres)
            )
        })
    }

    /// Whether a trouble fell into the request's time, or into a time before it.
    fn any(&self, before: Duration, is: impl Fn(Trouble) -> bool) -> bool {
        let mut met =
            self.entries.iter().filter(|entry| entry.touches(self.from - before, self.until));
        met.any(|entry| is(entry.trouble))
    }

    /// Whether the gateway or a worker could not reach a store, or was frozen while it asked.
    fn away(&self, store: Store, before: Duration) -> bool {
        self.any(before, |trouble| match trouble {
            Trouble::Away(away) => away == store,
            Trouble::CutOff(process, from) => {
                from == store && (process == self.gateway || store == Store::Objects)
            }
            Trouble::Frozen(process) => process == self.gateway,
            Trouble::Down(_) => false,
        })
    }

    /// Whether the gateway could see no worker when the request ended.
    fn no_worker(&self) -> bool {
        let just_before = |is: &dyn Fn(Trouble) -> bool| {
            let mut met =
                self.entries.iter().filter(|e| e.touches(self.until - SEEN_GONE, self.until));
            met.any(|entry| is(entry.trouble))
        };
        let unseen = |worker: Process| {
            just_before(&|trouble| {
                [
                    Trouble::Down(worker),
                    Trouble::Frozen(worker),
                    Trouble::CutOff(worker, Store::Redis),
                ]
                .contains(&trouble)
            })
        };
        let blind = just_before(&|trouble| {
            [Trouble::Away(Store::Redis), Trouble::CutOff(self.gateway, Store::Redis)]
                .contains(&trouble)
        });
        blind || (0..WORKERS).all(|number| unseen(Process::Worker(number)))
    }

    /// How often at most the request can have lost its worker.
    fn losses(&self) -> u32 {
        let met = self.entries.iter().filter(|entry| entry.touches(self.from, self.until));
        let most = |entry: &Entry| match entry.trouble {
            Trouble::Down(Process::Worker(_)) | Trouble::Frozen(Process::Worker(_)) => 1,
            // Messages are given up, and presence runs out.
            Trouble::CutOff(Process::Worker(_), Store::Redis) => 2,
            // The gateway's own presence runs out, messages are given up, all workers are unseen.
            Trouble::Away(Store::Redis) => 3,
            Trouble::CutOff(process, Store::Redis) if process == self.gateway => 3,
            Trouble::Frozen(process) if process == self.gateway => 2,
            // Each failed load of an adapter counts.
            Trouble::Away(Store::Objects) | Trouble::CutOff(Process::Worker(_), Store::Objects) => {
                LOSSES
            }
            _ => 0,
        };
        met.map(most).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::clients::Choice;
    use super::*;

    fn answer(text: &str, finish: Option<&str>) -> Answer {
        let finish = finish.map(str::to_owned);
        let choice = Choice { text: text.to_owned(), logprobs: Vec::new(), finish };
        Answer { choices: vec![choice], ..Answer::default() }
    }

    fn ended(start: Instant, answer: Answer, how: How) -> Ended {
        let (from, until) = (start + Duration::from_secs(60), start + Duration::from_secs(65));
        Ended { gateway: 0, case: Some(0), from, until, answer, how, id: String::new() }
    }

    fn entry(start: Instant, trouble: Trouble, from: u64, until: u64) -> Entry {
        let at = |second| start + Duration::from_secs(second);
        Entry { trouble, from: at(from), until: Some(at(until)) }
    }

    #[test]
    fn a_whole_answer_must_be_equal_and_a_part_its_beginning() {
        let (start, calm) = (Instant::now(), answer("one two", Some("length")));
        let whole =
            |text| judge(&ended(start, answer(text, Some("length")), How::Whole), &calm, &[]);
        assert_eq!(whole("one two"), Verdict::Equal);
        assert!(matches!(whole("one two two"), Verdict::Fault(_)));
        assert!(matches!(whole("one"), Verdict::Fault(_)));
        let down = [entry(start, Trouble::Down(Process::Gateway(0)), 61, 62)];
        let broken = |text, entries: &[Entry]| {
            let how = How::Broken("reset".to_owned());
            judge(&ended(start, answer(text, None), how), &calm, entries)
        };
        assert_eq!(broken("one", &down), Verdict::Explained("its gateway was down"));
        assert!(matches!(broken("one", &[]), Verdict::Fault(_)));
        assert!(matches!(broken("two", &down), Verdict::Fault(_)));
    }

    #[test]
    fn an_error_needs_its_own_reason_at_its_own_time() {
        let (start, calm) = (Instant::now(), answer("one two", Some("length")));
        let told = |message: &str, status, entries: &[Entry]| {
            let how = How::Error(status, message.to_owned());
            matches!(
                judge(&ended(start, Answer::default(), how), &calm, entries),
                Verdict::Explained(_)
            )
        };
        let redis = |from, until| [entry(start, Trouble::Away(Store::Redis), from, until)];
        let queue = "The queue cannot be reached at the moment.";
        assert!(told(queue, 503, &redis(58, 59)));
        assert!(!told(queue, 503, &redis(40, 50)), "long before");
        assert!(!told(queue, 503, &redis(66, 70)), "after");
        assert!(!told(queue, 500, &redis(58, 59)), "a fault of the service");
        let database = "The database cannot be reached at the moment.";
        assert!(!told(database, 503, &redis(58, 59)), "another store");
        let lost = "The worker running this request was lost.";
        assert!(!told(lost, 200, &redis(61, 62)));
        let down = |number, from| entry(start, Trouble::Down(Process::Worker(number)), from, 63);
        assert!(told(lost, 200, &[redis(61, 62)[0], down(0, 61)]));
        let nobody = "No worker serves the base `tiny` at the moment.";
        assert!(!told(nobody, 503, &[down(0, 61), down(1, 61)]));
        assert!(told(nobody, 503, &[down(0, 61), down(1, 61), down(2, 62)]));
        let hung = judge(&ended(start, Answer::default(), How::Hung), &calm, &redis(58, 65));
        assert!(matches!(hung, Verdict::Fault(_)));
    }
}
