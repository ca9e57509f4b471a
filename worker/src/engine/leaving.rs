//! What is given away or brought in on an operator's word, while everything else goes on: requests
//! that go on at another worker, adapters that come before or go after their requests.

use super::Engine;
use super::command::{AdapterWeights, Leaving, Output, Target};
use kernels::{Device, Result};
use std::collections::BTreeSet;

impl Leaving {
    fn takes(&self, target: &Target) -> bool {
        match self {
            Self::Of(key) => *target == Target::Adapter(key.clone()),
            Self::Movable => !matches!(target, Target::LiveJob(_)),
            Self::All => true,
        }
    }
}

impl<D: Device> Engine<D> {
    /// Ends requests here, to go on elsewhere. Commands are taken between steps, when all drawn
    /// tokens are handed out; what a step in flight draws for them is dropped. So nothing is said
    /// of a request after its [`Output::Moved`].
    pub(super) fn hand_over(&mut self, leaving: &Leaving) -> Result<()> {
        // Those that wait come first: room that others leave must not let them begin.
        let mut requests: BTreeSet<_> =
            self.serving.take_parked(|target| leaving.takes(target)).into_iter().collect();
        for id in self.scheduler.select(|sequence| leaving.takes(&sequence.shared.target)) {
            if let Some(sequence) = self.release(id)? {
                requests.insert(sequence.shared.request);
            }
        }
        self.outputs.extend(requests.into_iter().map(|request| (request, Output::Moved)));
        Ok(())
    }

    /// Takes an adapter in before its requests come, if it fits beside what is in use.
    pub(super) fn preload(&mut self, key: String, weights: AdapterWeights) -> Result<()> {
        if self.serving.waits_for(&key) {
            return self.adapter_ready(key, weights);
        }
        if self.registry.find(&key).is_some() {
            return Ok(());
        }
        if let Some(misfit) = self.misfit(&weights.layout) {
            tracing::warn!(adapter.id = key, "not loaded before its requests: {misfit}");
            return Ok(());
        }
        if self.attach(&key, &weights, None)?.is_none() {
            tracing::warn!(adapter.id = key, "not loaded before its requests: no room");
        }
        Ok(())
    }

    /// Lets an adapter go as soon as nobody reads it; whoever asks from now on has it loaded anew.
    pub(super) fn evict_adapter(&mut self, key: &str) -> Result<()> {
        match self.registry.find(key) {
            Some(slot) => self.retire(slot),
            None => Ok(()),
        }
    }
}
