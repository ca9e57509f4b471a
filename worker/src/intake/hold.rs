//! An owner's side of a lease, by its own monotonic clock: when to renew it, and when to stop
//! because it may have run out. Plain data; the database alone says whose the lease is.

use std::time::{Duration, Instant};

/// A lease as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    lease: Duration,
    asked: Instant,
}

impl Hold {
    /// A lease of that length, granted in answer to a statement sent at `asked`.
    pub fn new(lease: Duration, asked: Instant) -> Self {
        Self { lease, asked }
    }

    /// It was renewed in answer to a statement sent at `asked`: the database counts from some time
    /// between question and answer, the owner from the question.
    pub fn renewed(&mut self, asked: Instant) {
        self.asked = self.asked.max(asked);
    }

    /// When the next renewal is due: early enough for another try.
    pub fn due(&self) -> Instant {
        self.asked + self.lease / 3
    }

    /// From when on the owner trains and writes nothing, two thirds of the lease: what is under
    /// way then still ends before another may take over.
    pub fn ends(&self) -> Instant {
        self.asked + self.lease * 2 / 3
    }

    /// Whether the owner may train and write at `now`.
    pub fn is_firm(&self, now: Instant) -> bool {
        now < self.ends()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_firm_for_two_thirds_and_counts_from_the_question() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut hold = Hold::new(3 * second, start);
        assert_eq!((hold.due(), hold.ends()), (start + second, start + 2 * second));
        let nearly = second * 2 - Duration::from_nanos(1);
        assert!(hold.is_firm(start) && hold.is_firm(start + nearly));
        assert!(!hold.is_firm(start + 2 * second), "the answer stays away");
        // Asked at second 1, answered at second 9: what it grants may be over already.
        hold.renewed(start + second);
        assert_eq!(hold.ends(), start + 3 * second);
        assert!(!hold.is_firm(start + 9 * second));
        hold.renewed(start + 9 * second);
        assert!(hold.is_firm(start + 10 * second));
        hold.renewed(start);
        assert_eq!(hold.ends(), start + 11 * second, "an older answer takes nothing away");
    }
}
