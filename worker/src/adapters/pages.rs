//! Runs of fixed pages in a pool: first fit, merged on release, slid together when scattered.

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page.
    pub page: usize,
    /// Number of pages.
    pub pages: usize,
}

/// Free runs of a pool, ascending, never adjacent.
#[derive(Clone, Debug)]
pub struct PageRuns {
    free: Vec<Run>,
    total: usize,
}

impl PageRuns {
    /// A pool of `total` free pages.
    pub fn new(total: usize) -> Self {
        let free = if total > 0 { vec![Run { page: 0, pages: total }] } else { Vec::new() };
        Self { free, total }
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Free pages, however scattered.
    pub fn free(&self) -> usize {
        self.free.iter().map(|run| run.pages).sum()
    }

    /// Takes the first run that is long enough.
    pub fn take(&mut self, pages: usize) -> Option<Run> {
        let at = self.free.iter().position(|run| run.pages >= pages)?;
        let found = &mut self.free[at];
        let run = Run { page: found.page, pages };
        found.page += pages;
        found.pages -= pages;
        if found.pages == 0 {
            self.free.remove(at);
        }
        Some(run)
    }

    /// Gives a run back. Panics when it overlaps a free one: pages would be handed out twice.
    pub fn give(&mut self, run: Run) {
        if run.pages == 0 {
            return;
        }
        let at = self.free.partition_point(|free| free.page < run.page);
        let end = run.page + run.pages;
        assert!(self.free.get(at).is_none_or(|next| end <= next.page), "run freed twice");
        let before = at.checked_sub(1).map(|i| self.free[i].page + self.free[i].pages);
        assert!(before.is_none_or(|before| before <= run.page), "run freed twice");
        self.free.insert(at, run);
        if self.free.get(at + 1).is_some_and(|next| next.page == end) {
            self.free[at].pages += self.free.remove(at + 1).pages;
        }
        if before == Some(run.page) {
            self.free[at - 1].pages += self.free.remove(at).pages;
        }
    }

    /// Makes everything from `used` pages on one free run: after the runs in use were slid down.
    pub fn compacted(&mut self, used: usize) {
        self.free.clear();
        if used < self.total {
            self.free.push(Run { page: used, pages: self.total - used });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn merges_neighbours() {
        let mut pool = PageRuns::new(10);
        let runs: Vec<Run> = (0..5).map(|_| pool.take(2).unwrap()).collect();
        assert_eq!(pool.take(1), None);
        for at in [1, 3, 2] {
            pool.give(runs[at]);
        }
        assert_eq!(pool.take(6), Some(Run { page: 2, pages: 6 }));
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_second_release() {
        let mut pool = PageRuns::new(4);
        let run = pool.take(2).unwrap();
        pool.give(run);
        pool.give(run);
    }

    proptest! {
        #[test]
        fn never_hands_a_page_out_twice(
            ops in prop::collection::vec((0usize..9, any::<bool>()), 1..80),
        ) {
            let mut pool = PageRuns::new(32);
            let mut held: Vec<Run> = Vec::new();
            for (n, take) in ops {
                if take {
                    if let Some(run) = pool.take(n + 1) {
                        for other in &held {
                            let apart = run.page + run.pages <= other.page
                                || other.page + other.pages <= run.page;
                            prop_assert!(apart);
                        }
                        held.push(run);
                    }
                } else if !held.is_empty() {
                    pool.give(held.swap_remove(n % held.len()));
                }
                let used: usize = held.iter().map(|run| run.pages).sum();
                prop_assert_eq!(pool.free() + used, 32);
            }
        }
    }
}
