//! What an owner may believe of its lease, as plain data, by its own monotonic clock.
//!
//! The database judges the lease; the owner stops writing at two thirds of it, so that one that was
//! paused or cut off stops before another begins. It goes on once a renewal has shown that nobody
//! took the job meanwhile.

use std::time::{Duration, Instant};

/// An owner's view of its lease.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    lease: Duration,
    renewed: Instant,
}

impl Hold {
    /// Of a lease asked for at `asked`: the answer may have been long on its way.
    pub fn new(lease: Duration, asked: Instant) -> Self {
        Self { lease, renewed: asked }
    }

    /// It was renewed by what was asked at `asked`. Answers may come in any order.
    pub fn renewed(&mut self, asked: Instant) {
        self.renewed = self.renewed.max(asked);
    }

    /// When the next renewal is due: early enough for another try.
    pub fn due(&self) -> Instant {
        self.renewed + self.period()
    }

    /// The last moment at which it is sure.
    pub fn ends(&self) -> Instant {
        self.renewed + self.lease * 2 / 3
    }

    /// Writes may be tried without asking first; otherwise a renewal must succeed before.
    pub fn is_sure(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.renewed) <= self.lease * 2 / 3
    }

    /// How often to renew.
    pub fn period(&self) -> Duration {
        self.lease / 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_at_two_thirds_and_begins_again_when_renewed() {
        let start = Instant::now();
        let at = |secs: u64| start + Duration::from_secs(secs);
        let mut hold = Hold::new(Duration::from_secs(30), start);
        assert!(hold.is_sure(start) && hold.is_sure(at(20)) && !hold.is_sure(at(21)));
        hold.renewed(at(21));
        assert!(hold.is_sure(at(41)) && !hold.is_sure(at(42)));
        hold.renewed(at(10));
        assert!(hold.is_sure(at(41)), "an answer that came late changes nothing");
        assert_eq!(hold.period(), Duration::from_secs(10));
        assert_eq!((hold.due(), hold.ends()), (at(31), at(41)));
    }
}
