//! Requests in the engine: admission, waiting for an adapter, the end.

use super::Engine;
use super::backlog::Work;
use super::command::{
    AdapterWeights, Admission, Choice, Event, Fault, FaultKind, Output, RequestKey, Target,
};
use super::gauges::ResidentGauge;
use super::sequence::{Sequence, SequenceId, Shared};
use crate::adapters::AdapterLayout;
use crate::adapters::registry::{Attached, Slot};
use crate::model::MAX_BIAS;
use kernels::tables::SlotRow;
use kernels::{Device, Result};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Room in the bias table that is kept for end tokens banned by `min_tokens`.
const BIAS_RESERVE: usize = 64;

/// Requests and what they wait for.
#[derive(Default)]
pub struct Serving {
    /// Choices that each request still has in the engine.
    open: BTreeMap<RequestKey, usize>,
    /// Requests without their adapter's weights, by its key.
    parked: BTreeMap<String, Vec<Admission>>,
    /// Weights that came while every slot was in use.
    roomless: VecDeque<(String, AdapterWeights)>,
}

impl Serving {
    /// Requests queued or running.
    pub fn requests(&self) -> usize {
        self.open.len() + self.parked.values().map(Vec::len).sum::<usize>()
    }

    /// Whether requests wait for this adapter.
    pub(super) fn waits_for(&self, key: &str) -> bool {
        self.parked.contains_key(key)
    }

    /// Takes out requests that wait for their adapter.
    pub(super) fn take_parked(&mut self, which: impl Fn(&Target) -> bool) -> Vec<RequestKey> {
        let mut taken = Vec::new();
        self.parked.retain(|_, waiting| {
            waiting.retain(|admission| {
                let goes = which(&admission.target);
                taken.extend(goes.then_some(admission.key));
                !goes
            });
            !waiting.is_empty()
        });
        taken
    }

    /// Choices of requests that wait for their adapter.
    fn parked_choices(&self) -> usize {
        self.parked.values().flatten().map(|admission| admission.choices.len()).sum()
    }
}

impl<D: Device> Engine<D> {
    /// Accepts or refuses a request; the answer leaves with this step.
    pub(super) fn admit(&mut self, admission: Admission) -> Result<()> {
        if let Some(fault) = self.refuse(&admission) {
            self.outputs.push((admission.key, Output::Failed(fault)));
            return Ok(());
        }
        let (slot, version) = match &admission.target {
            Target::Base => (None, "base".to_owned()),
            Target::LiveJob(job) => match self.training.published(job) {
                Some((slot, step)) => (Some(slot), format!("{job}@{step}")),
                // Not gone: it has just ended here, or another worker goes on with it.
                None => {
                    let message = format!("the job '{job}' has left its worker");
                    let fault = Fault { kind: FaultKind::Overloaded, message, param: None };
                    self.outputs.push((admission.key, Output::Failed(fault)));
                    return Ok(());
                }
            },
            Target::Adapter(key) => (self.registry.find(key), key.clone()),
        };
        let prompt_tokens = admission.prompt.len() as u32;
        self.outputs.push((admission.key, Output::Admitted { prompt_tokens, version }));
        match (&admission.target, slot) {
            (Target::Adapter(key), None) => self.park(key.clone(), admission),
            _ => self.enqueue(admission, slot),
        }
        Ok(())
    }

    fn refuse(&self, admission: &Admission) -> Option<Fault> {
        let fault = |kind, message: String, param: Option<&str>| {
            Some(Fault { kind, message, param: param.map(str::to_owned) })
        };
        let prompt = admission.prompt.len();
        if prompt == 0 {
            return fault(FaultKind::Invalid, "the prompt has no token".into(), None);
        }
        let limit = self.model.sizes.longest_sequence();
        if prompt >= limit {
            let message = format!(
                "This model's maximum context length is {limit} tokens. However, your prompt has \
                 {prompt} tokens. Please shorten it: at least one token must be left to generate."
            );
            return fault(FaultKind::ContextLength, message, None);
        }
        if let Some(id) = admission.prompt.iter().find(|id| **id as usize >= self.vocab()) {
            let message = format!("token id {id} is not in the vocabulary");
            return fault(FaultKind::Invalid, message, Some("prompt"));
        }
        if admission.end_tokens.len() > BIAS_RESERVE {
            let message = format!("at most {BIAS_RESERVE} end tokens are allowed");
            return fault(FaultKind::Invalid, message, Some("stop_token_ids"));
        }
        let bias = &admission.sampling.logit_bias;
        if bias.len() + BIAS_RESERVE > MAX_BIAS {
            let message = format!("at most {} token biases are allowed", MAX_BIAS - BIAS_RESERVE);
            return fault(FaultKind::Invalid, message, Some("logit_bias"));
        }
        if let Some((id, _)) = bias.iter().find(|(id, _)| *id as usize >= self.vocab()) {
            let message = format!("token id {id} is not in the vocabulary");
            return fault(FaultKind::Invalid, message, Some("logit_bias"));
        }
        let queued = self.scheduler.len() + self.serving.parked_choices();
        if queued + admission.choices.len() > self.options.max_queue {
            return fault(FaultKind::Overloaded, "the worker's queue is full".into(), None);
        }
        None
    }

    fn vocab(&self) -> usize {
        self.model.config.vocab
    }

    /// Lets a request wait for its adapter; the first one asks for the weights.
    fn park(&mut self, key: String, admission: Admission) {
        let waiting = self.serving.parked.entry(key.clone()).or_default();
        waiting.push(admission);
        let first = waiting.len() == 1;
        if first && !self.serving.roomless.iter().any(|(other, _)| *other == key) {
            self.emit(Event::NeedAdapter(key));
        }
    }

    /// Queues all choices of a request.
    fn enqueue(&mut self, admission: Admission, slot: Option<Slot>) {
        let Admission {
            key,
            prompt,
            target,
            sampling,
            max_tokens,
            min_tokens,
            end_tokens,
            choices,
        } = admission;
        let shared = Arc::new(Shared { request: key, target, sampling, end_tokens, min_tokens });
        let limit = max_tokens.map_or(usize::MAX, |max| prompt.len().saturating_add(max as usize));
        let max_len = limit.min(self.model.sizes.longest_sequence());
        let rank = slot
            .and_then(|slot| self.registry.get(slot))
            .map_or(0, |resident| resident.layout.shape().rank);
        for (index, choice) in choices.into_iter().enumerate() {
            let Choice { replay, finished, detokenizer } = choice;
            if finished {
                continue;
            }
            if let Some(slot) = slot {
                self.registry.add_reader(slot);
            }
            let mut tokens = prompt.clone();
            tokens.extend(replay);
            *self.serving.open.entry(key).or_default() += 1;
            self.scheduler.add(Sequence {
                shared: shared.clone(),
                choice: index as u32,
                prompt_len: prompt.len(),
                tokens,
                max_len,
                cached: 0,
                blocks: Vec::new(),
                slot,
                rank,
                detokenizer,
            });
        }
    }

    /// Takes a sequence out of the engine and returns all it held to where it came from. A step in
    /// flight may still read it: whoever gets it next works behind that step.
    pub(super) fn release(&mut self, id: SequenceId) -> Result<Option<Sequence>> {
        let Some(mut sequence) = self.scheduler.remove(id) else { return Ok(None) };
        if self.options.poison {
            self.model.poison_blocks(&sequence.blocks)?;
        }
        self.blocks.give(std::mem::take(&mut sequence.blocks));
        let request = sequence.shared.request;
        if let Some(left) = self.serving.open.get_mut(&request) {
            *left -= 1;
            if *left == 0 {
                self.serving.open.remove(&request);
            }
        }
        let Some(slot) = sequence.slot else { return Ok(Some(sequence)) };
        if let Some(run) = self.registry.drop_reader(slot)
            && self.options.poison
        {
            self.model.pool.poison(&self.model.device, run.page, run.pages)?;
        }
        self.tell_residents();
        self.retry_roomless()?;
        Ok(Some(sequence))
    }

    pub(super) fn cancel(&mut self, request: RequestKey) -> Result<()> {
        for id in self.scheduler.select(|sequence| sequence.shared.request == request) {
            self.release(id)?;
        }
        self.serving.parked.retain(|_, waiting| {
            waiting.retain(|admission| admission.key != request);
            !waiting.is_empty()
        });
        Ok(())
    }

    /// Puts weights into the pool and starts what waited for them. Without room they wait: for a
    /// reader to end, never on the device's time.
    pub(super) fn adapter_ready(&mut self, key: String, weights: AdapterWeights) -> Result<()> {
        if !self.serving.parked.contains_key(&key) {
            return Ok(());
        }
        if let Some(message) = self.misfit(&weights.layout) {
            let fault = Fault { kind: FaultKind::Overloaded, message, param: None };
            self.adapter_failed(&key, &fault);
            return Ok(());
        }
        let Some(slot) = self.attach(&key, &weights, None)? else {
            self.serving.roomless.push_back((key, weights));
            return Ok(());
        };
        for admission in self.serving.parked.remove(&key).unwrap_or_default() {
            self.enqueue(admission, Some(slot));
        }
        Ok(())
    }

    /// Why an adapter can never be on this device.
    pub(super) fn misfit(&self, layout: &AdapterLayout) -> Option<String> {
        let (rank, max_rank) = (layout.shape().rank, self.model.sizes.max_rank);
        if rank > max_rank {
            return Some(format!("the adapter's rank {rank} is above this worker's {max_rank}"));
        }
        let fits = self.registry.fits_empty(layout.pages());
        (!fits).then(|| "the adapter is larger than the adapter pool".to_owned())
    }

    pub(super) fn adapter_failed(&mut self, key: &str, fault: &Fault) {
        for admission in self.serving.parked.remove(key).unwrap_or_default() {
            self.outputs.push((admission.key, Output::Failed(fault.clone())));
        }
    }

    pub(super) fn forget_adapter(&mut self, key: &str) -> Result<()> {
        self.serving.roomless.retain(|(other, _)| other != key);
        self.adapter_failed(key, &model_gone(key));
        match self.registry.find(key) {
            Some(slot) => self.retire(slot),
            None => Ok(()),
        }
    }

    pub(super) fn pin_adapter(&mut self, key: &str, pinned: bool) -> Result<()> {
        if let Some(slot) = self.registry.find(key) {
            self.registry.pin(slot, pinned);
        }
        self.retry_roomless()
    }

    fn retry_roomless(&mut self) -> Result<()> {
        for _ in 0..self.serving.roomless.len() {
            if let Some((key, weights)) = self.serving.roomless.pop_front() {
                self.adapter_ready(key, weights)?;
            }
        }
        Ok(())
    }

    /// Gives an adapter a slot, moves what is in the way, and writes its weights.
    pub(super) fn attach(
        &mut self,
        key: &str,
        weights: &AdapterWeights,
        grad_page: Option<u32>,
    ) -> Result<Option<Slot>> {
        let layout = weights.layout.clone();
        let Some(attached) = self.registry.attach(key, layout, grad_page) else {
            return Ok(None);
        };
        self.apply(&attached)?;
        let slot = attached.slot;
        if let Some(resident) = self.registry.get(slot) {
            let start = self.model.device.mark()?;
            self.model.pool.write(&self.model.device, resident.run.page, &weights.values)?;
            self.enqueued(Work::Copy { bytes: 4 * weights.values.len() }, start)?;
        }
        self.tell_residents();
        Ok(Some(slot))
    }

    /// Makes the pool and the slot table agree with what the registry decided.
    fn apply(&mut self, attached: &Attached) -> Result<()> {
        let model = &mut self.model;
        if self.options.poison {
            for run in &attached.freed {
                model.pool.poison(&model.device, run.page, run.pages)?;
            }
        }
        for step in &attached.moves {
            model.pool.copy(&model.device, step.from, step.to, step.len)?;
        }
        for slot in attached.moves.iter().map(|step| step.slot).chain([attached.slot]) {
            let Some(resident) = self.registry.get(slot) else { continue };
            let page = resident.run.page as u32;
            let row: [i32; SlotRow::WIDTH] = resident.layout.slot_row(page, resident.grad_page);
            model.pool.set_slot(&model.device, slot, &row)?;
        }
        Ok(())
    }

    /// Removes an adapter from the device as soon as nobody reads it.
    pub(super) fn retire(&mut self, slot: Slot) -> Result<()> {
        if let Some(run) = self.registry.retire(slot)
            && self.options.poison
        {
            self.model.pool.poison(&self.model.device, run.page, run.pages)?;
        }
        self.tell_residents();
        self.retry_roomless()
    }

    pub(super) fn tell_residents(&self) {
        let list = self.registry.residents().map(|(slot, resident)| ResidentGauge {
            key: resident.key.clone(),
            readers: self.registry.readers(slot),
            version: self.training.version_in(slot),
            leaving: resident.is_retired(),
        });
        self.gauges.set_residents(list.collect());
    }
}

fn model_gone(model: &str) -> Fault {
    let message = format!("The model `{model}` does not exist or you do not have access to it.");
    Fault { kind: FaultKind::ModelNotFound, message, param: Some("model".to_owned()) }
}
