//! Micro-batches without the engine: a cursor driven by hand.

use kernels::tables::PAGE;
use kernels::{AdamW, AdamWState, Device, In, Out};
use worker::model::{Batch, Model};
use worker::train::{Cursor, Item, ItemResult, Kind, Sequence, Slice};

/// An item without dropout.
pub fn item(job: u64, slot: usize, rank: usize, scale: f32) -> Item {
    Item { job, slot, rank, dropout_seed: 0, dropout: 0.0, scale }
}

/// Runs a whole micro-batch: forward in chunks of at most `chunk` rows, loss, backward.
pub fn micro_batch<D: Device>(
    model: &mut Model<D>,
    kind: Kind,
    items: Vec<(Item, &Sequence)>,
    chunk: usize,
) -> Vec<ItemResult> {
    micro_batch_beside(model, kind, items, || chunk, |_| {}, |_, _| {})
}

/// The same; `rows` gives each chunk's rows, `beside` adds other rows to a chunk's batch and
/// `seen` looks at the model after its forward.
pub fn micro_batch_beside<D: Device>(
    model: &mut Model<D>,
    kind: Kind,
    items: Vec<(Item, &Sequence)>,
    mut rows: impl FnMut() -> usize,
    mut beside: impl FnMut(&mut Batch),
    mut seen: impl FnMut(&mut Model<D>, &Batch),
) -> Vec<ItemResult> {
    model.poison_arena().unwrap();
    let mut cursor = Cursor::new(kind, model.config.layers, items);
    model.begin_micro(cursor.tables()).unwrap();
    while cursor.forward_left() > 0 {
        let rows = rows().min(cursor.forward_left());
        let mut batch = Batch::default();
        cursor.fill(&mut batch, rows);
        beside(&mut batch);
        model.forward(&batch).unwrap();
        seen(model, &batch);
        cursor.advance(rows);
    }
    loop {
        match cursor.slice(model.sizes.loss_rows).unwrap() {
            Slice::Loss { first, count } => {
                let ticket = model.loss_slice(first, count, kind == Kind::Train).unwrap();
                cursor.loss_enqueued(count, ticket);
            }
            Slice::Layer(layer) => {
                model.backward_layer(layer, cursor.extent()).unwrap();
                cursor.layer_enqueued();
            }
            Slice::Settle => {
                if let Some(results) = cursor.settle().unwrap() {
                    return results;
                }
            }
        }
    }
}

/// One optimizer step of an adapter of `len` values that lies alone in the pools.
pub fn update<D: Device>(model: &mut Model<D>, len: usize, step: AdamW) {
    let (device, train, pool) = (&model.device, &mut model.train, &mut model.pool);
    device.grad_norm(Out::all(&mut train.norm), In::range(&train.grads, PAGE, len)).unwrap();
    let state = AdamWState {
        params: Out::range(&mut train.params, PAGE, len),
        grads: In::range(&train.grads, PAGE, len),
        m: Out::range(&mut train.m, PAGE, len),
        v: Out::range(&mut train.v, PAGE, len),
        weights: Out::range(&mut pool.weights, PAGE, len),
        norm: In::all(&train.norm),
    };
    device.adamw(state, step).unwrap();
    device.fill_wide(Out::range(&mut train.grads, PAGE, len), 0.0).unwrap();
}
