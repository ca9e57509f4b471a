//! Which adapter is in which slot, who reads it, and who has to go when room is short.
//!
//! Plain data: it decides, and says what must be copied; the engine moves the bytes. Slot numbers
//! are stable while an adapter is resident. A slot that has readers is never taken.

use super::layout::AdapterLayout;
use super::pages::{PageRuns, Run};
use std::collections::HashMap;
use std::sync::Arc;

/// Number of an entry of the slot table.
pub type Slot = usize;

/// Copy of a run's content within the pool, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The slot that moves.
    pub slot: Slot,
    /// Old first page.
    pub from: usize,
    /// New first page.
    pub to: usize,
    /// Elements to copy.
    pub len: usize,
}

/// A resident adapter.
#[derive(Clone, Debug)]
pub struct Resident {
    /// Unique name: an adapter id, or a job's part.
    pub key: String,
    /// Where its weights lie.
    pub run: Run,
    /// Their layout.
    pub layout: Arc<AdapterLayout>,
    /// First page of its run in the training pool.
    pub grad_page: Option<u32>,
    readers: u32,
    pinned: bool,
    retired: bool,
    last_used: u64,
}

impl Resident {
    /// Whether it goes with its last reader.
    pub fn is_retired(&self) -> bool {
        self.retired
    }
}

/// What an attach did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The slot it got.
    pub slot: Slot,
    /// Moves to make first, in order.
    pub moves: Vec<Move>,
    /// Keys that had to go.
    pub evicted: Vec<String>,
    /// Runs they left.
    pub freed: Vec<Run>,
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    slots: Vec<Option<Resident>>,
    by_key: HashMap<String, Slot>,
    runs: PageRuns,
    clock: u64,
}

impl Registry {
    /// An empty registry over `slots` entries and `pages` pages.
    pub fn new(slots: usize, pages: usize) -> Self {
        Self {
            slots: (0..slots).map(|_| None).collect(),
            by_key: HashMap::new(),
            runs: PageRuns::new(pages),
            clock: 0,
        }
    }

    /// The slot of a resident adapter.
    pub fn find(&self, key: &str) -> Option<Slot> {
        self.by_key.get(key).copied()
    }

    /// A resident by its slot.
    pub fn get(&self, slot: Slot) -> Option<&Resident> {
        self.slots.get(slot)?.as_ref()
    }

    /// All residents with their slots.
    pub fn residents(&self) -> impl Iterator<Item = (Slot, &Resident)> {
        self.slots.iter().enumerate().filter_map(|(i, slot)| Some((i, slot.as_ref()?)))
    }

    /// Whether an adapter of so many pages could ever be attached.
    pub fn fits_empty(&self, pages: usize) -> bool {
        pages <= self.runs.total() && !self.slots.is_empty()
    }

    /// Gives `key` a slot and a run, evicting idle adapters, oldest use first. `None`: everything
    /// in the way is in use; nothing was changed.
    pub fn attach(
        &mut self,
        key: &str,
        layout: Arc<AdapterLayout>,
        grad_page: Option<u32>,
    ) -> Option<Attached> {
        let pages = layout.pages();
        let victims = self.victims(pages)?;
        let mut attached = Attached { slot: 0, moves: vec![], evicted: vec![], freed: vec![] };
        for slot in victims {
            let gone = self.remove(slot);
            attached.evicted.push(gone.key);
            attached.freed.push(gone.run);
        }
        let run = match self.runs.take(pages) {
            Some(run) => run,
            None => {
                attached.moves = self.compact();
                self.runs.take(pages).expect("victims leave enough pages")
            }
        };
        let slot = self.slots.iter().position(Option::is_none).expect("victims leave a slot");
        attached.slot = slot;
        self.clock += 1;
        self.by_key.insert(key.to_owned(), slot);
        self.slots[slot] = Some(Resident {
            key: key.to_owned(),
            run,
            layout,
            grad_page,
            readers: 0,
            pinned: false,
            retired: false,
            last_used: self.clock,
        });
        Some(attached)
    }

    /// The idle slots to empty so that `pages` and a slot are free; `None` if it cannot be.
    fn victims(&self, pages: usize) -> Option<Vec<Slot>> {
        let mut idle: Vec<(u64, Slot)> = self
            .residents()
            .filter(|(_, resident)| resident.readers == 0 && !resident.pinned)
            .map(|(slot, resident)| (resident.last_used, slot))
            .collect();
        idle.sort_unstable();
        let mut free_pages = self.runs.free();
        let mut free_slots = self.slots.iter().filter(|slot| slot.is_none()).count();
        let mut victims = Vec::new();
        let mut idle = idle.into_iter();
        while free_pages < pages || free_slots == 0 {
            let (_, slot) = idle.next()?;
            free_pages += self.slots[slot].as_ref().map_or(0, |resident| resident.run.pages);
            free_slots += 1;
            victims.push(slot);
        }
        Some(victims)
    }

    /// Slides all runs to the front.
    fn compact(&mut self) -> Vec<Move> {
        let mut order: Vec<Slot> = self.residents().map(|(slot, _)| slot).collect();
        order.sort_by_key(|&slot| self.slots[slot].as_ref().map(|resident| resident.run.page));
        let mut next = 0;
        let mut moves = Vec::new();
        for slot in order {
            let Some(resident) = &mut self.slots[slot] else { continue };
            let from = resident.run.page;
            if from != next {
                moves.push(Move { slot, from, to: next, len: resident.layout.len() });
                resident.run.page = next;
            }
            next += resident.run.pages;
        }
        self.runs.compacted(next);
        moves
    }

    fn remove(&mut self, slot: Slot) -> Resident {
        let resident = self.slots[slot].take().expect("only resident slots are removed");
        self.by_key.remove(&resident.key);
        self.runs.give(resident.run);
        resident
    }

    /// Counts a reader: the slot stays until [`Registry::drop_reader`].
    pub fn add_reader(&mut self, slot: Slot) {
        self.clock += 1;
        let clock = self.clock;
        let resident = self.slots[slot].as_mut().expect("readers have a resident slot");
        resident.readers += 1;
        resident.last_used = clock;
    }

    /// Ends a reader. Returns the run of a retired adapter whose last reader this was.
    pub fn drop_reader(&mut self, slot: Slot) -> Option<Run> {
        let resident = self.slots[slot].as_mut().expect("readers have a resident slot");
        resident.readers = resident.readers.checked_sub(1).expect("readers are counted");
        (resident.readers == 0 && resident.retired).then(|| self.remove(slot).run)
    }

    /// Readers of a slot.
    pub fn readers(&self, slot: Slot) -> u32 {
        self.get(slot).map_or(0, |resident| resident.readers)
    }

    /// Keeps a slot from eviction (a job's own slots, pinned adapters).
    pub fn pin(&mut self, slot: Slot, pinned: bool) {
        if let Some(resident) = &mut self.slots[slot] {
            resident.pinned = pinned;
        }
    }

    /// Removes an adapter, now or when its last reader ends. Returns the run if it went now.
    /// Its key is free at once: a newcomer of that name gets another slot.
    pub fn retire(&mut self, slot: Slot) -> Option<Run> {
        let resident = self.slots[slot].as_mut()?;
        if resident.readers == 0 {
            return Some(self.remove(slot).run);
        }
        resident.retired = true;
        resident.pinned = false;
        let key = std::mem::replace(&mut resident.key, format!("retired-{slot}"));
        self.by_key.remove(&key);
        self.by_key.insert(format!("retired-{slot}"), slot);
        None
    }
}
