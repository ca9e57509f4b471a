//! Which endings what was done to the service explains.

use super::blows::{Process, Store};
use super::clients::{Asked, Ended, How};
use super::diary::{Entry, Story, Trouble};
use super::operator::Word;
use super::schedule::WORKERS;
use std::time::{Duration, Instant};

/// How long a process that gives no sign of life counts as alive, with the time until others have
/// seen it.
const SEEN_GONE: Duration = Duration::from_secs(5);
/// A process that is kept from giving signs of life for less than this stays alive for others.
const UNNOTICED: Duration = Duration::from_secs(2);
/// A call to Redis is tried for so long.
const QUEUE_CALL: Duration = Duration::from_secs(3);
/// A call to the database waits so long for a connection.
const DATABASE_CALL: Duration = Duration::from_secs(11);
/// A load of an adapter that another request began is tried for so long.
const OBJECT_LOAD: Duration = Duration::from_secs(45);
/// A job goes on elsewhere within its lease, and then has to be prepared.
const JOB_MOVES: Duration = Duration::from_secs(8);
/// Losses at which a gateway gives a request up.
const LOSSES: usize = 4;
/// A gateway that is asked to end closes what has not begun to be answered within this.
const CLOSES: Duration = Duration::from_secs(2);
/// A gateway uses the names that it knows for five minutes while the database is away; an answer
/// that used one can itself have come from the cache, in an outage of some seconds.
const REMEMBERED: Duration = Duration::from_secs(4 * 60);

/// The troubles that one request, or one word of an operator, may have met.
pub struct Explanation<'a> {
    story: &'a Story,
    gateway: Process,
    from: Instant,
    until: Instant,
    /// For a request: what it asks, and whether its reply had begun.
    request: Option<(&'a str, Asked, bool)>,
}

impl<'a> Explanation<'a> {
    /// Of a request's ending.
    pub fn of_request(ended: &'a Ended, model: &'a str, story: &'a Story) -> Self {
        let request = Some((model, ended.asked, ended.admitted.is_some()));
        let (from, until) = (ended.from, ended.until);
        Self { story, gateway: Process::Gateway(ended.gateway), from, until, request }
    }

    /// Of the answer to a word.
    pub fn of_word(word: &Word, story: &'a Story) -> Self {
        let (from, until) = (word.from, word.until);
        Self { story, gateway: Process::Gateway(word.gateway), from, until, request: None }
    }

    /// Why it ended so; none where nothing explains it.
    pub fn of(&self, how: &How) -> Option<&'static str> {
        let (status, message) = match how {
            How::Whole | How::Hung => return None,
            How::Refused(_) => {
                let gone = self.away_itself() || self.any(Duration::ZERO, self.leaving());
                return gone.then_some("its gateway was down");
            }
            How::Broken(_) => return self.of_break(),
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
            let away = self.away(Store::Postgres, DATABASE_CALL) && self.had_to_ask();
            return away.then_some("Postgres was away");
        }
        if starts("No worker serves the base") || starts("All workers are busy") {
            return self.no_worker().then_some("no worker was alive");
        }
        if starts("the weights of ") {
            let away = self.workers_without(Store::Objects, OBJECT_LOAD);
            return away.then_some("the object store was away");
        }
        if starts("The worker running this request was lost") {
            return (self.losses() >= LOSSES).then_some("its workers were lost, four in a row");
        }
        if starts("The reply was read too slowly") {
            let frozen = self.any(Duration::ZERO, |t| t == Trouble::Frozen(self.gateway));
            return frozen.then_some("its gateway was frozen");
        }
        if starts("The version of the job's model") {
            let moved = self.losses() > 0 || self.job_moved();
            return moved.then_some("its version of a job's model died");
        }
        // No blow is needed for it: a job also leaves its worker when it is over.
        if starts("the job is starting") || starts("the job 'ftjob-") {
            return Some("its job was between workers, or just over");
        }
        if starts("the job's state cannot be read") {
            let away = self.workers_without(Store::Postgres, DATABASE_CALL);
            return away.then_some("Postgres was away");
        }
        None
    }

    /// Why an operator or client was refused what a calm service does.
    pub fn of_refusal(&self, how: &How) -> Option<&'static str> {
        let How::Error(status, message) = how else { return None };
        let has = |part: &str| message.contains(part);
        // A job that is over, or waits for a worker.
        if *status == 400 && has(" cannot be ") && has(" its status is '") {
            let otherwise = !has("be moved: its status is 'running'")
                && !has("be paused: its status is 'running'")
                && !has("be resumed: its status is 'paused'");
            return otherwise.then_some("the job was not in that state");
        }
        // With each, the store that the workers need for it.
        let unseen = [
            (400, "no live worker '", Store::Redis),
            (400, "' is draining", Store::Redis),
            (400, "There is no other worker", Store::Redis),
            (400, "No other worker has room", Store::Redis),
            (503, "' is gone; nothing was moved", Store::Redis),
            (503, "The job's worker is gone", Store::Postgres),
            (503, "has not loaded the adapter in time", Store::Objects),
            (503, "No other worker has taken the job in time", Store::Postgres),
        ];
        let told = unseen.iter().find(|(code, part, _)| status == code && has(part));
        told.filter(|(.., store)| self.worker_trouble(*store)).map(|_| "a worker was not there")
    }

    /// Before its head a request can be closed by a gateway that is asked to end just then; what
    /// has begun to be answered comes to its end, unless its gateway is killed.
    fn of_break(&self) -> Option<&'static str> {
        let begun = self.request.is_some_and(|(.., begun)| begun);
        let killed = self.any(Duration::ZERO, |t| t == Trouble::Down(self.gateway));
        let gone = !begun && self.any(Duration::ZERO, |t| t == Trouble::Gone(self.gateway));
        let closed = !begun
            && self.story.entries.iter().any(|entry| {
                let just = entry.from <= self.until && self.until < entry.from + CLOSES;
                entry.trouble == Trouble::Leaving(self.gateway) && just
            });
        (killed || gone || closed).then_some("its gateway was down")
    }

    fn away_itself(&self) -> bool {
        self.any(Duration::ZERO, |trouble| {
            trouble == Trouble::Down(self.gateway) || trouble == Trouble::Gone(self.gateway)
        })
    }

    fn leaving(&self) -> impl Fn(Trouble) -> bool + use<'_, 'a> {
        |trouble| trouble == Trouble::Leaving(self.gateway)
    }

    /// Whether the gateway may have needed the database: whatever name a gateway has been asked for
    /// since its start, it knows for minutes, and with it the key. Words are never in a cache.
    fn had_to_ask(&self) -> bool {
        let Some((model, ..)) = self.request else { return true };
        // An answer after the end of a process is its successor's.
        let ends = self.story.entries.iter().filter(|entry| {
            let ended = [Trouble::Down(self.gateway), Trouble::Gone(self.gateway)];
            ended.contains(&entry.trouble) && entry.from <= self.until
        });
        let started = ends.map(|entry| entry.from).max();
        let known = self.story.known.iter().any(|known| {
            Process::Gateway(known.gateway) == self.gateway
                && known.model == model
                && started.is_none_or(|started| known.from >= started)
                && known.at <= self.from
                && self.until - known.at < REMEMBERED
        });
        !known
    }

    /// Whether the job that is asked may be without a worker, or have none yet that knows its
    /// weights.
    fn job_moved(&self) -> bool {
        self.any(JOB_MOVES, |trouble| match trouble {
            Trouble::Down(Process::Worker(_)) | Trouble::Frozen(Process::Worker(_)) => true,
            Trouble::Away(store) | Trouble::CutOff(_, store) => store == Store::Postgres,
            Trouble::Steered(job) => {
                self.request.is_some_and(|(_, asked, _)| asked == Asked::Live(job))
            }
            _ => false,
        })
    }

    /// Whether a trouble fell into the request's time, or into a time before it.
    fn any(&self, before: Duration, is: impl Fn(Trouble) -> bool) -> bool {
        let mut met =
            self.story.entries.iter().filter(|entry| entry.touches(self.from - before, self.until));
        met.any(|entry| is(entry.trouble))
    }

    /// Whether the gateway could not reach a store, or was frozen while it asked.
    fn away(&self, store: Store, before: Duration) -> bool {
        self.any(before, |trouble| {
            trouble == Trouble::Away(store)
                || trouble == Trouble::CutOff(self.gateway, store)
                || trouble == Trouble::Frozen(self.gateway)
        })
    }

    /// Whether a worker could not reach a store, or was frozen while it asked.
    fn workers_without(&self, store: Store, before: Duration) -> bool {
        self.any(before, |trouble| match trouble {
            Trouble::Away(away) => away == store,
            Trouble::CutOff(Process::Worker(_), away) => away == store,
            Trouble::Frozen(Process::Worker(_)) => true,
            _ => false,
        })
    }

    /// Whether some worker may have been away, or may not have been heard, or could not reach what
    /// it needed to do as it was told.
    fn worker_trouble(&self, needed: Store) -> bool {
        self.any(SEEN_GONE, |trouble| match trouble {
            Trouble::Down(Process::Worker(_)) | Trouble::Frozen(Process::Worker(_)) => true,
            Trouble::CutOff(Process::Worker(_), store) | Trouble::Away(store) => {
                store == needed || store == Store::Redis
            }
            _ => false,
        })
    }

    /// Whether the gateway could see no worker when the request ended.
    fn no_worker(&self) -> bool {
        let just_before = |is: &dyn Fn(Trouble) -> bool| {
            let entries = &self.story.entries;
            let mut met = entries.iter().filter(|e| e.touches(self.until - SEEN_GONE, self.until));
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

    /// How often a worker vanished for the gateways in the request's time. A request loses one each
    /// time that this happens to the worker it is placed on. Where it was placed is told nowhere,
    /// so all workers count; lost messages alone never end a request so soon.
    fn losses(&self) -> usize {
        let vanished = |entry: &&Entry| {
            let over = entry.until.unwrap_or(self.until);
            let unnoticed = over - entry.from < UNNOTICED;
            // From when to when its worker may have been missed.
            let (first, last) = match entry.trouble {
                Trouble::Down(Process::Worker(_)) => (entry.from, entry.from + SEEN_GONE),
                Trouble::Frozen(Process::Worker(_))
                | Trouble::CutOff(Process::Worker(_), Store::Redis)
                    if !unnoticed =>
                {
                    (entry.from + UNNOTICED, over + UNNOTICED)
                }
                // All of them at once, when it is back without their presence.
                Trouble::Away(Store::Redis) => (entry.from, over + SEEN_GONE),
                _ => return false,
            };
            first <= self.until && last >= self.from
        };
        self.story.entries.iter().filter(vanished).count()
    }
}
