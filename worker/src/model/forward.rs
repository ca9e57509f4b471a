//! The forward step: training, evaluation, prefill and decode rows in one pass.
//!
//! All rows run through the step buffers; what backward needs of the training rows is copied to
//! the arena as it appears. Decode and prefill rows leave nothing behind but their keys and values.

use super::arena::{Arena, LayerArena};
use super::buffers::{KvCache, StepBuffers, Table, rows, rows_mut};
use super::groups::Group;
use super::sampling::output_head;
use super::{AdapterPool, Batch, Groups, Micro, Model, Sizes, bucket};
use crate::base::{BaseConfig, BaseWeights, LayerWeights};
use kernels::tables::SegmentRow;
use kernels::{Device, In, KvOut, LinearShape, Out, PagedKv, QkNorm, Result, Rope, SmlmGroup};

/// Everything a layer's forward reads and writes beside its own weights.
struct Pass<'a, D: Device> {
    device: &'a D,
    config: &'a BaseConfig,
    sizes: &'a Sizes,
    base: &'a BaseWeights<D>,
    pool: &'a AdapterPool<D>,
    groups: &'a Groups,
    step: &'a mut StepBuffers<D>,
    kv: &'a mut KvCache<D>,
    arena: &'a mut Arena<D>,
    batch: &'a Batch,
}

impl<D: Device> Model<D> {
    /// Runs the batch through all layers. Afterwards the arena holds what backward needs of the
    /// training rows, the cache the new keys and values, and the step buffers the final residual.
    pub fn forward(&mut self, batch: &Batch) -> Result<()> {
        self.step.tables.upload(&self.device, batch, false)?;
        self.pass(batch).all_layers()
    }

    /// Runs a padded batch that only decodes through all layers and the output head, as a graph
    /// recorded once for its number of rows: nothing but the content of tables may differ between
    /// two batches of one key.
    pub fn decode(&mut self, batch: &Batch) -> Result<()> {
        debug_assert!(batch.is_decode());
        self.step.tables.upload(&self.device, batch, true)?;
        let adapters = u64::from(!batch.segments.is_empty());
        let key = (batch.rows() as u64) << 1 | adapters;
        let mut pass = self.pass(batch);
        let device = pass.device;
        device.replay(key, &mut |_| {
            pass.all_layers()?;
            output_head(pass.device, pass.config, pass.base, pass.step, batch.rows())
        })
    }

    /// Runs a decode of nobody for each number of rows, so that none is recorded while a client
    /// waits.
    pub fn record_decodes(&mut self) -> Result<()> {
        let mut nobody = [0; SegmentRow::WIDTH];
        nobody[SegmentRow::SLOT] = -1;
        let (mut rows, cap, max_rank) = (0, self.decode_rows_max(), self.sizes.max_rank);
        while rows < cap {
            rows = bucket(rows + 1, cap);
            for segments in [Vec::new(), nobody.to_vec()] {
                let mut batch = Batch { segments, ..Batch::default() };
                batch.pad(rows, max_rank);
                self.decode(&batch)?;
            }
        }
        Ok(())
    }

    /// Most rows of a step that only decodes.
    pub fn decode_rows_max(&self) -> usize {
        let Sizes { step_rows, sample_rows, sequences, .. } = self.sizes;
        step_rows.min(sample_rows).min(sequences)
    }

    fn pass<'a>(&'a mut self, batch: &'a Batch) -> Pass<'a, D> {
        let Self { device, config, sizes, base, pool, groups, step, kv, arena, .. } = self;
        Pass { device, config, sizes, base, pool, groups, step, kv, arena, batch }
    }
}

impl<D: Device> Pass<'_, D> {
    fn all_layers(&mut self) -> Result<()> {
        let (n, hidden) = (self.batch.rows(), self.config.hidden);
        let ids = self.step.tables.get(Table::Ids);
        let x = rows_mut(&mut self.step.x, 0, n, hidden);
        self.device.embed(x, In::all(&self.base.embed), ids, hidden)?;
        self.first_norm()?;
        for layer in 0..self.config.layers {
            self.attention(layer)?;
            self.feed_forward(layer)?;
        }
        self.keep_output()
    }

    fn first_norm(&mut self) -> Result<()> {
        let (n, hidden) = (self.batch.rows(), self.config.hidden);
        let y = rows_mut(&mut self.step.h, 0, n, hidden);
        let x = rows(&self.step.x, 0, n, hidden);
        let weight = In::all(&self.base.layers[0].input_norm);
        self.device.rms_norm(y, x, weight, self.config.rms_eps)
    }

    /// `delta = attention(h)`; `x += delta`; `h = norm(x)`.
    fn attention(&mut self, layer: usize) -> Result<()> {
        let (n, hidden) = (self.batch.rows(), self.config.hidden);
        let heads = self.config.heads;
        let micro = self.batch.micro;
        let weights = &self.base.layers[layer];
        keep(self.device, &mut self.arena.layers[layer].x_in, &self.step.x, micro, hidden)?;

        let bias = weights.qkv_bias.as_ref().map(In::all);
        let group = &self.groups.qkv;
        self.linear(layer, group, &weights.qkv, bias, Site::Qkv)?;
        if let Some(raw) = &mut self.arena.layers[layer].qkv_raw {
            keep(self.device, raw, &self.step.qkv, micro, heads.qkv_width())?;
        }
        self.rotate_and_cache(layer, weights)?;
        self.attend(layer)?;

        self.linear(layer, &self.groups.o, &weights.o, None, Site::O)?;
        self.device.add_rms_norm(
            rows_mut(&mut self.step.h, 0, n, hidden),
            rows_mut(&mut self.step.x, 0, n, hidden),
            rows(&self.step.delta, 0, n, hidden),
            In::all(&weights.post_norm),
            self.config.rms_eps,
        )?;
        keep(self.device, &mut self.arena.layers[layer].x_mid, &self.step.x, micro, hidden)
    }

    /// QK norm, rotation, and the cache write; training rows keep theirs in the arena instead.
    fn rotate_and_cache(&mut self, layer: usize, weights: &LayerWeights<D>) -> Result<()> {
        let (n, heads) = (self.batch.rows(), self.config.heads);
        let tables = &self.step.tables;
        let kv = KvOut {
            k: Out::all(&mut self.kv.k[layer]),
            v: Out::all(&mut self.kv.v[layer]),
            rows: tables.get(Table::KvRows),
        };
        let norm = qk_norm(self.config, weights);
        let rope = rope(self.base, tables.get(Table::Positions));
        let qkv = rows_mut(&mut self.step.qkv, 0, n, heads.qkv_width());
        self.device.qk_norm_rope_kv_write(qkv, Some(kv), norm.as_ref(), &rope, heads)?;
        let arena = &mut self.arena.layers[layer];
        keep(self.device, &mut arena.qkv, &self.step.qkv, self.batch.micro, heads.qkv_width())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        let (n, heads) = (self.batch.rows(), self.config.heads);
        let micro = self.batch.micro;
        if micro.rows > 0 {
            let LayerArena { qkv, o, lse, .. } = &mut self.arena.layers[layer];
            self.device.attention_train(
                rows_mut(&mut self.step.o, 0, micro.rows, heads.q_width()),
                rows_mut(lse, micro.first, micro.rows, heads.q_heads),
                rows(qkv, 0, micro.first + micro.rows, heads.qkv_width()),
                In::all(&self.arena.tables.examples),
                micro.first,
                heads,
            )?;
            keep(self.device, o, &self.step.o, micro, heads.q_width())?;
        }
        if self.batch.sequences.is_empty() {
            return Ok(());
        }
        let tables = &self.step.tables;
        let paged = PagedKv {
            k: In::all(&self.kv.k[layer]),
            v: In::all(&self.kv.v[layer]),
            sequences: tables.get(Table::Sequences),
            blocks: tables.get(Table::Blocks),
            block_size: self.sizes.block_size,
        };
        let qkv = rows(&self.step.qkv, 0, n, heads.qkv_width());
        let o = rows_mut(&mut self.step.o, 0, n, heads.q_width());
        self.device.attention_paged(o, qkv, &paged, heads)
    }

    /// `delta = ffn(h)`; `x += delta`; `h = norm(x)` with the next layer's weight.
    fn feed_forward(&mut self, layer: usize) -> Result<()> {
        let (n, hidden, ffn) = (self.batch.rows(), self.config.hidden, self.config.ffn);
        let weights = &self.base.layers[layer];
        self.linear(layer, &self.groups.gate_up, &weights.gate_up, None, Site::GateUp)?;
        let arena = &mut self.arena.layers[layer];
        keep(self.device, &mut arena.gate_up, &self.step.gate_up, self.batch.micro, 2 * ffn)?;
        let gate_up = rows(&self.step.gate_up, 0, n, 2 * ffn);
        self.device.silu_mul(rows_mut(&mut self.step.act, 0, n, ffn), gate_up, ffn)?;
        self.linear(layer, &self.groups.down, &weights.down, None, Site::Down)?;

        let x = rows_mut(&mut self.step.x, 0, n, hidden);
        let delta = rows(&self.step.delta, 0, n, hidden);
        match self.base.layers.get(layer + 1) {
            Some(next) => {
                let h = rows_mut(&mut self.step.h, 0, n, hidden);
                let weight = In::all(&next.input_norm);
                self.device.add_rms_norm(h, x, delta, weight, self.config.rms_eps)
            }
            None => self.device.add(x, delta),
        }
    }

    /// A group's base product, then all its adapters; S of training rows goes to the arena.
    fn linear(
        &mut self,
        layer: usize,
        group: &Group,
        weight: &D::Act,
        bias: Option<In<'_, D::Act>>,
        site: Site,
    ) -> Result<()> {
        let n = self.batch.rows();
        let StepBuffers { h, qkv, o, delta, gate_up, act, s, tables, .. } = &mut *self.step;
        let (x, y) = match site {
            Site::Qkv => (h, qkv),
            Site::O => (o, delta),
            Site::GateUp => (h, gate_up),
            Site::Down => (act, delta),
        };
        let shape = LinearShape { rows: n, input: group.input, output: group.width };
        let x = rows(x, 0, n, group.input);
        self.device.linear(rows_mut(y, 0, n, group.width), x, In::all(weight), bias, shape)?;
        if self.batch.segments.is_empty() {
            return Ok(());
        }
        let smlm = smlm_group(layer, group, self.pool, tables.get(Table::Segments));
        let width = group.modules.len();
        let s_out = rows_mut(s, 0, self.batch.rank_rows, width);
        self.device.smlm(rows_mut(y, 0, n, group.width), s_out, x, &smlm)?;
        let micro = self.batch.micro;
        if micro.rank_rows == 0 {
            return Ok(());
        }
        let kept = &mut self.arena.layers[layer].s[site as usize];
        self.device.copy_act(
            rows_mut(kept, micro.rank_rows_before, micro.rank_rows, width),
            rows(s, 0, micro.rank_rows, width),
        )
    }

    fn keep_output(&mut self) -> Result<()> {
        let hidden = self.config.hidden;
        keep(self.device, &mut self.arena.x_out, &self.step.x, self.batch.micro, hidden)
    }
}

/// The four places of a layer where adapters act, in the order of [`Groups::all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Site {
    Qkv = 0,
    O = 1,
    GateUp = 2,
    Down = 3,
}

/// Copies the training rows of a step buffer to their place in the arena.
fn keep<D: Device>(
    device: &D,
    arena: &mut D::Act,
    step: &D::Act,
    micro: Micro,
    width: usize,
) -> Result<()> {
    if micro.rows == 0 {
        return Ok(());
    }
    let dst = rows_mut(arena, micro.first, micro.rows, width);
    device.copy_act(dst, rows(step, 0, micro.rows, width))
}

pub(super) fn smlm_group<'a, D: Device>(
    layer: usize,
    group: &'a Group,
    pool: &'a AdapterPool<D>,
    segments: In<'a, D::Int>,
) -> SmlmGroup<'a, D> {
    SmlmGroup {
        layer,
        input: group.input,
        width: group.width,
        modules: &group.modules,
        pool: In::all(&pool.weights),
        slots: In::all(&pool.table),
        segments,
    }
}

pub(super) fn qk_norm<'a, D: Device>(
    config: &BaseConfig,
    weights: &'a LayerWeights<D>,
) -> Option<QkNorm<'a, D>> {
    let (q, k) = (weights.q_norm.as_ref()?, weights.k_norm.as_ref()?);
    Some(QkNorm { q: In::all(q), k: In::all(k), eps: config.rms_eps })
}

pub(super) fn rope<'a, D: Device>(
    base: &'a BaseWeights<D>,
    positions: In<'a, D::Int>,
) -> Rope<'a, D> {
    Rope { cos: In::all(&base.rope_cos), sin: In::all(&base.rope_sin), positions }
}
