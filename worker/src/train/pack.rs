//! Composes a micro-batch from the examples that several jobs have left in their current
//! optimizer steps: whole examples, packed by rows, without padding.
//!
//! Fair by rows: each ready job may first fill an equal share, and what is left goes round. The
//! job that comes first changes from call to call and always gets at least one example, so with
//! J ready jobs none waits longer than J calls. What a job trains does not depend on any of this:
//! its examples keep their order, and its sums are per example. Knows no device and no data.

/// What one micro-batch may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Rows to aim at; only an example longer than this goes beyond, and then alone.
    pub target_rows: usize,
    /// Rows that the training arena holds: never exceeded.
    pub arena_rows: usize,
    /// Sum over examples of rows × rank that the arena holds: never exceeded.
    pub arena_rank_rows: usize,
}

/// An example that waits for its forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Index in the job's training file.
    pub example: u32,
    /// Its rows.
    pub rows: usize,
}

/// A job whose current optimizer step has examples left.
#[derive(Clone, Copy, Debug)]
pub struct ReadyJob<'a> {
    /// A number that stays the job's own between calls.
    pub job: usize,
    /// Rank of its adapter.
    pub rank: usize,
    /// Its remaining examples, in the order of the step.
    pub waiting: &'a [Waiting],
}

/// An example in a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its job.
    pub job: usize,
    /// Index in the job's training file.
    pub example: u32,
    /// Its rows.
    pub rows: usize,
}

/// An example that this arena can never hold, so that its job cannot go on here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("example {example} with {rows} rows of rank {rank} is larger than the training arena")]
pub struct TooLarge {
    /// Its job.
    pub job: usize,
    /// Index in the job's training file.
    pub example: u32,
    /// Its rows.
    pub rows: usize,
    /// Rank of its adapter.
    pub rank: usize,
}

/// Packs micro-batches; remembers only which job came first last time.
#[derive(Clone, Debug, Default)]
pub struct Packer {
    last_first: Option<usize>,
}

impl Packer {
    /// Takes examples from the front of each job's waiting list. A job's examples stay together
    /// and in order, jobs in the order given. Empty only when nothing waits.
    pub fn pack(
        &mut self,
        jobs: &[ReadyJob<'_>],
        budget: &Budget,
    ) -> Result<Vec<Placed>, TooLarge> {
        let ready: Vec<&ReadyJob<'_>> = jobs.iter().filter(|job| !job.waiting.is_empty()).collect();
        for job in &ready {
            let Waiting { example, rows } = job.waiting[0];
            if rows > budget.arena_rows || rows * job.rank > budget.arena_rank_rows {
                return Err(TooLarge { job: job.job, example, rows, rank: job.rank });
            }
        }
        let Some(first) = self.next_first(&ready) else { return Ok(Vec::new()) };
        self.last_first = Some(ready[first].job);

        let mut filling = Filling::new(&ready, budget);
        filling.take(first);
        let rotation = || (first..ready.len()).chain(0..first);
        for job in rotation() {
            while filling.within_share(job) && filling.fits(job) {
                filling.take(job);
            }
        }
        for job in rotation() {
            if filling.taken[job] == 0 && filling.fits(job) {
                filling.take(job);
            }
        }
        for job in rotation() {
            while filling.fits(job) {
                filling.take(job);
            }
        }
        Ok(filling.placed())
    }

    /// Index of the job after the last first one, by number and round again.
    fn next_first(&self, ready: &[&ReadyJob<'_>]) -> Option<usize> {
        let passed = |job: usize| self.last_first.is_some_and(|last| job <= last);
        (0..ready.len()).min_by_key(|&index| (passed(ready[index].job), ready[index].job))
    }
}

/// A micro-batch being filled.
struct Filling<'a> {
    jobs: &'a [&'a ReadyJob<'a>],
    budget: &'a Budget,
    /// Examples taken, per job.
    taken: Vec<usize>,
    /// Rows taken, per job.
    job_rows: Vec<usize>,
    rows: usize,
    rank_rows: usize,
}

impl<'a> Filling<'a> {
    fn new(jobs: &'a [&'a ReadyJob<'a>], budget: &'a Budget) -> Self {
        let (taken, job_rows) = (vec![0; jobs.len()], vec![0; jobs.len()]);
        Self { jobs, budget, taken, job_rows, rows: 0, rank_rows: 0 }
    }

    /// Rows of the job's next example.
    fn next_rows(&self, job: usize) -> Option<usize> {
        self.jobs[job].waiting.get(self.taken[job]).map(|waiting| waiting.rows)
    }

    /// Whether the job's next example stays within its equal share of rows and of rank × rows.
    fn within_share(&self, job: usize) -> bool {
        let Some(next) = self.next_rows(job) else { return false };
        let rows = self.job_rows[job] + next;
        let jobs = self.jobs.len();
        rows * jobs <= self.budget.target_rows
            && rows * self.jobs[job].rank * jobs <= self.budget.arena_rank_rows
    }

    /// Whether the job's next example fits beside all that was taken.
    fn fits(&self, job: usize) -> bool {
        let Some(next) = self.next_rows(job) else { return false };
        self.rows + next <= self.budget.target_rows.min(self.budget.arena_rows)
            && self.rank_rows + next * self.jobs[job].rank <= self.budget.arena_rank_rows
    }

    /// Takes the job's next example, if there is one.
    fn take(&mut self, job: usize) {
        let Some(rows) = self.next_rows(job) else { return };
        self.taken[job] += 1;
        self.job_rows[job] += rows;
        self.rows += rows;
        self.rank_rows += rows * self.jobs[job].rank;
    }

    fn placed(&self) -> Vec<Placed> {
        let of_job = |(job, &taken): (&&ReadyJob<'a>, &usize)| {
            let (number, waiting) = (job.job, &job.waiting[..taken]);
            waiting.iter().map(move |w| Placed { job: number, example: w.example, rows: w.rows })
        };
        self.jobs.iter().zip(&self.taken).flat_map(of_job).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WIDE: Budget =
        Budget { target_rows: 100, arena_rows: 200, arena_rank_rows: usize::MAX / 1024 };

    fn waiting(rows: &[usize]) -> Vec<Waiting> {
        rows.iter().enumerate().map(|(i, &rows)| Waiting { example: i as u32, rows }).collect()
    }

    /// Packs once and gives the number of examples per job.
    fn counts(packer: &mut Packer, rows: &[&[usize]], budget: &Budget) -> Vec<usize> {
        let queues: Vec<Vec<Waiting>> = rows.iter().map(|rows| waiting(rows)).collect();
        let jobs: Vec<ReadyJob<'_>> =
            (0..).zip(&queues).map(|(job, waiting)| ReadyJob { job, rank: 8, waiting }).collect();
        let placed = packer.pack(&jobs, budget).unwrap();
        (0..rows.len()).map(|job| placed.iter().filter(|p| p.job == job).count()).collect()
    }

    #[test]
    fn every_ready_job_gets_its_share_first_and_leftovers_go_round() {
        let many: &[usize] = &[10; 30];
        let mut packer = Packer::default();
        assert_eq!(counts(&mut packer, &[many, many, many], &WIDE), [4, 3, 3]);
        assert_eq!(counts(&mut packer, &[many, many, many], &WIDE), [3, 4, 3]);
        assert_eq!(counts(&mut packer, &[many, many, many], &WIDE), [3, 3, 4]);
        assert_eq!(counts(&mut packer, &[many, many, many], &WIDE), [4, 3, 3]);
    }

    #[test]
    fn a_share_that_one_job_leaves_goes_to_the_others() {
        let mut packer = Packer::default();
        assert_eq!(counts(&mut packer, &[&[10; 30], &[10], &[]], &WIDE), [9, 1, 0]);
        assert_eq!(counts(&mut packer, &[&[10; 3]], &WIDE), [3]);
        assert_eq!(counts(&mut packer, &[], &WIDE), [0; 0]);
        assert_eq!(counts(&mut packer, &[&[], &[]], &WIDE), [0, 0]);
    }

    #[test]
    fn examples_above_a_share_still_reach_every_job_that_fits() {
        let mut packer = Packer::default();
        assert_eq!(
            counts(&mut packer, &[&[30; 9], &[30; 9], &[30; 9], &[30; 9]], &WIDE),
            [1, 1, 1, 0]
        );
        assert_eq!(
            counts(&mut packer, &[&[30; 9], &[30; 9], &[30; 9], &[30; 9]], &WIDE),
            [0, 1, 1, 1]
        );
    }

    #[test]
    fn an_example_longer_than_the_target_goes_alone() {
        let mut packer = Packer::default();
        let mut pack = |rows: &[&[usize]]| counts(&mut packer, rows, &WIDE);
        assert_eq!(pack(&[&[150, 10], &[10, 10]]), [1, 0]);
        assert_eq!(pack(&[&[10, 150, 10], &[10, 10]]), [1, 2]);
        assert_eq!(pack(&[&[150, 10], &[10, 10]]), [1, 0]);
    }

    #[test]
    fn a_large_rank_takes_no_more_than_its_share_of_the_arena() {
        let budget = Budget { target_rows: 100, arena_rows: 100, arena_rank_rows: 5120 };
        let queue = waiting(&[10; 20]);
        let jobs = [
            ReadyJob { job: 0, rank: 256, waiting: &queue },
            ReadyJob { job: 1, rank: 8, waiting: &queue },
        ];
        let placed = Packer::default().pack(&jobs, &budget).unwrap();
        let rows = |job| placed.iter().filter(|p| p.job == job).map(|p| p.rows).sum::<usize>();
        assert_eq!((rows(0), rows(1)), (10, 90));
    }

    #[test]
    fn what_can_never_fit_names_its_job() {
        let (short, long) = (waiting(&[10]), waiting(&[201]));
        let job = |job, rank, waiting| ReadyJob { job, rank, waiting };
        let fault = Packer::default().pack(&[job(0, 8, &short), job(7, 8, &long)], &WIDE);
        assert_eq!(fault, Err(TooLarge { job: 7, example: 0, rows: 201, rank: 8 }));
        let narrow = Budget { arena_rank_rows: 79, ..WIDE };
        let fault = Packer::default().pack(&[job(3, 8, &short)], &narrow).unwrap_err();
        assert_eq!(fault.job, 3);
    }

    fn queues() -> impl Strategy<Value = Vec<(usize, Vec<usize>)>> {
        prop::collection::vec((1usize..=256, prop::collection::vec(1usize..=120, 0..25)), 0..6)
    }

    proptest! {
        #[test]
        fn queues_drain_in_order_within_bounds_and_without_starving(
            queues in queues(),
            target_rows in 0usize..200,
            arena_rows in 120usize..250,
            arena_rank_rows in (256usize * 120)..100_000,
        ) {
            let budget = Budget { target_rows, arena_rows, arena_rank_rows };
            let all: Vec<Vec<Waiting>> = queues.iter().map(|(_, rows)| waiting(rows)).collect();
            let mut at = vec![0; all.len()];
            let mut unserved = vec![0; all.len()];
            let mut packer = Packer::default();
            while at.iter().zip(&all).any(|(&at, queue)| at < queue.len()) {
                let jobs: Vec<ReadyJob<'_>> = (0..all.len())
                    .map(|job| (job, &all[job][at[job]..]))
                    .map(|(job, waiting)| ReadyJob { job, rank: queues[job].0, waiting })
                    .collect();
                let placed = packer.pack(&jobs, &budget).unwrap();
                prop_assert!(!placed.is_empty());
                let rows: usize = placed.iter().map(|p| p.rows).sum();
                let rank_rows: usize = placed.iter().map(|p| p.rows * queues[p.job].0).sum();
                prop_assert!(rows <= target_rows.min(arena_rows) || placed.len() == 1);
                prop_assert!(rows <= arena_rows && rank_rows <= arena_rank_rows);
                for waits in &mut unserved {
                    *waits += 1;
                }
                for p in &placed {
                    let job = p.job;
                    prop_assert_eq!(p.example as usize, at[job]);
                    prop_assert_eq!(p.rows, all[job][at[job]].rows);
                    at[job] += 1;
                    unserved[job] = 0;
                }
                for job in 0..all.len() {
                    let ready = at[job] < all[job].len();
                    prop_assert!(!ready || unserved[job] < all.len(), "job {job} starves");
                }
            }
        }
    }
}
