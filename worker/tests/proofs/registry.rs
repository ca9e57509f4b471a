//! The registry of resident adapters against a plain memory: whatever comes and goes, each
//! resident's pages hold its own content, nobody who is read goes, and room is found if there is.

use crate::common::soak;
use kernels::{HeadShape, Module};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use worker::adapters::pages::Run;
use worker::adapters::registry::{Registry, Slot};
use worker::adapters::{AdapterLayout, AdapterShape};
use worker::base::ModuleDims;

const SLOTS: usize = 6;
const PAGES: usize = 16;

/// A layout that takes `pages` pages: rank 4 of one 512 × 512 module fills one.
fn layout(pages: usize) -> Arc<AdapterLayout> {
    let heads = HeadShape { q_heads: 8, kv_heads: 8, head_dim: 64 };
    let dims = ModuleDims { layers: 1, hidden: 512, heads, ffn: 512 };
    let shape = AdapterShape::new(4 * pages, 1.0, false, vec![Module::Q]).unwrap();
    let layout = AdapterLayout::new(&dims, &shape);
    assert_eq!(layout.pages(), pages);
    Arc::new(layout)
}

/// What the registry should hold.
struct Resident {
    pages: usize,
    readers: u32,
    pinned: bool,
    retired: bool,
    content: u32,
}

#[derive(Default)]
struct World {
    memory: Vec<u32>,
    residents: HashMap<Slot, Resident>,
    next: u32,
}

#[derive(Clone, Debug)]
enum Op {
    Attach { pages: usize },
    Read { pick: usize },
    Leave { pick: usize },
    Pin { pick: usize, pinned: bool },
    Retire { pick: usize },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (1usize..=7).prop_map(|pages| Op::Attach { pages }),
        3 => any::<prop::sample::Index>().prop_map(|i| Op::Read { pick: i.index(64) }),
        3 => any::<prop::sample::Index>().prop_map(|i| Op::Leave { pick: i.index(64) }),
        1 => (0usize..64, any::<bool>()).prop_map(|(pick, pinned)| Op::Pin { pick, pinned }),
        1 => (0usize..64).prop_map(|pick| Op::Retire { pick }),
    ];
    prop::collection::vec(op, 1..60)
}

impl World {
    /// The `pick`-th slot, in order, of those that satisfy `which`.
    fn choose(&self, pick: usize, which: impl Fn(&Resident) -> bool) -> Option<Slot> {
        let mut slots: Vec<Slot> =
            self.residents.iter().filter(|(_, r)| which(r)).map(|(slot, _)| *slot).collect();
        slots.sort_unstable();
        slots.get(pick % slots.len().max(1)).copied()
    }

    fn fill(&mut self, run: Run, content: u32) {
        self.memory[run.page..run.page + run.pages].fill(content);
    }

    fn attach(&mut self, registry: &mut Registry, pages: usize) {
        self.next += 1;
        let content = self.next;
        let busy = |r: &&Resident| r.readers > 0 || r.pinned;
        let busy_pages: usize = self.residents.values().filter(busy).map(|r| r.pages).sum();
        let busy_slots = self.residents.values().filter(busy).count();
        let possible = busy_pages + pages <= PAGES && busy_slots < SLOTS;
        let attached = registry.attach(&content.to_string(), layout(pages), None);
        assert_eq!(attached.is_some(), possible);
        let Some(attached) = attached else { return };
        assert_eq!(attached.evicted.len(), attached.freed.len());
        for (key, run) in attached.evicted.iter().zip(&attached.freed) {
            let slot = self.residents.iter().find(|(_, r)| r.content.to_string() == *key);
            let slot = *slot.expect("only residents go").0;
            let gone = self.residents.remove(&slot).unwrap();
            assert!(gone.readers == 0 && !gone.pinned && gone.pages == run.pages);
            self.fill(*run, 0);
        }
        for step in &attached.moves {
            let pages = self.residents[&step.slot].pages;
            self.memory.copy_within(step.from..step.from + pages, step.to);
        }
        let run = registry.get(attached.slot).unwrap().run;
        self.fill(run, content);
        let fresh = Resident { pages, readers: 0, pinned: false, retired: false, content };
        assert!(self.residents.insert(attached.slot, fresh).is_none(), "a slot was taken");
    }

    fn obey(&mut self, registry: &mut Registry, op: Op) {
        match op {
            Op::Attach { pages } => self.attach(registry, pages),
            Op::Read { pick } => {
                let Some(slot) = self.choose(pick, |r| !r.retired) else { return };
                registry.add_reader(slot);
                self.residents.get_mut(&slot).unwrap().readers += 1;
            }
            Op::Leave { pick } => {
                let Some(slot) = self.choose(pick, |r| r.readers > 0) else { return };
                let resident = self.residents.get_mut(&slot).unwrap();
                resident.readers -= 1;
                let goes = resident.readers == 0 && resident.retired;
                let freed = registry.drop_reader(slot);
                assert_eq!(freed.is_some(), goes);
                self.forget(slot, freed);
            }
            Op::Pin { pick, pinned } => {
                let Some(slot) = self.choose(pick, |r| !r.retired) else { return };
                registry.pin(slot, pinned);
                self.residents.get_mut(&slot).unwrap().pinned = pinned;
            }
            Op::Retire { pick } => {
                let Some(slot) = self.choose(pick, |r| !r.retired) else { return };
                let resident = self.residents.get_mut(&slot).unwrap();
                (resident.retired, resident.pinned) = (true, false);
                let (key, readers) = (resident.content.to_string(), resident.readers);
                let freed = registry.retire(slot);
                assert_eq!(freed.is_some(), readers == 0);
                assert_eq!(registry.find(&key), None, "its name is free at once");
                self.forget(slot, freed);
            }
        }
    }

    fn forget(&mut self, slot: Slot, freed: Option<Run>) {
        if let Some(run) = freed {
            self.fill(run, 0);
            self.residents.remove(&slot);
        }
    }

    fn check(&self, registry: &Registry) {
        assert_eq!(registry.residents().count(), self.residents.len());
        for (slot, expected) in &self.residents {
            let found = registry.get(*slot).unwrap();
            let held = &self.memory[found.run.page..found.run.page + found.run.pages];
            assert_eq!(held, vec![expected.content; expected.pages]);
            assert_eq!(registry.readers(*slot), expected.readers);
            if !expected.retired {
                assert_eq!(registry.find(&expected.content.to_string()), Some(*slot));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: soak(400),
        failure_persistence: None,
        ..Default::default()
    })]
    #[test]
    fn residents_keep_their_pages(ops in ops()) {
        let mut registry = Registry::new(SLOTS, PAGES);
        let mut world = World { memory: vec![0; PAGES], ..World::default() };
        for op in ops {
            world.obey(&mut registry, op);
            world.check(&registry);
        }
    }
}
