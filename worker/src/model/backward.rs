//! Backward of one layer over all rows of the micro-batch: one slice of the training cursor.
//!
//! The base is frozen, so only activations' and adapters' gradients exist. `dx` is the gradient of
//! the residual stream: it accumulates through norms and passes the skip connections unchanged.

use super::arena::{Arena, LayerArena, Scratch};
use super::buffers::{rows, rows_mut};
use super::forward::{qk_norm, rope, smlm_group};
use super::groups::Group;
use super::{AdapterPool, Groups, Model, TrainPool};
use crate::base::{BaseConfig, BaseWeights};
use kernels::{Device, In, LinearShape, Out, Result};

/// How much of the arena is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Rows of the micro-batch.
    pub rows: usize,
    /// Σ rank over its rows.
    pub rank_rows: usize,
    /// i32 values of its segment table; 0: no adapter trains (never so in practice).
    pub segments: usize,
}

struct Pass<'a, D: Device> {
    device: &'a D,
    config: &'a BaseConfig,
    base: &'a BaseWeights<D>,
    adapters: Adapters<'a, D>,
    groups: &'a Groups,
    arena: &'a mut Arena<D>,
    rows: usize,
    layer: usize,
}

impl<D: Device> Model<D> {
    /// Takes `dx` from above `layer` to below it and adds the layer's adapter gradients.
    pub fn backward_layer(&mut self, layer: usize, extent: Extent) -> Result<()> {
        let Self { device, config, base, pool, train, groups, arena, .. } = self;
        let adapters = Adapters { device, pool, train, extent, layer };
        let rows = extent.rows;
        let mut pass = Pass { device, config, base, adapters, groups, arena, rows, layer };
        pass.feed_forward()?;
        pass.attention()
    }
}

impl<D: Device> Pass<'_, D> {
    fn feed_forward(&mut self) -> Result<()> {
        let (m, hidden, ffn) = (self.rows, self.config.hidden, self.config.ffn);
        let weights = &self.base.layers[self.layer];
        let LayerArena { x_mid, gate_up, s, .. } = &self.arena.layers[self.layer];
        let Scratch { dx, h, dh, d_gate_up, act, d_act, .. } = &mut self.arena.scratch;
        let eps = self.config.rms_eps;
        let gate_up = rows(gate_up, 0, m, 2 * ffn);
        let x_mid = rows(x_mid, 0, m, hidden);

        self.device.silu_mul(rows_mut(act, 0, m, ffn), gate_up, ffn)?;
        linear_backward(self.device, &self.groups.down, &weights.down, d_act, dx, m)?;
        self.adapters.backward(
            &self.arena.tables.segments,
            &self.groups.down,
            Tensors { dx: Some(d_act), dy: dx, x: act, s: &s[3] },
        )?;
        self.device.silu_mul_backward(
            rows_mut(d_gate_up, 0, m, 2 * ffn),
            rows(d_act, 0, m, ffn),
            gate_up,
            ffn,
        )?;
        self.device.rms_norm(rows_mut(h, 0, m, hidden), x_mid, In::all(&weights.post_norm), eps)?;
        linear_backward(self.device, &self.groups.gate_up, &weights.gate_up, dh, d_gate_up, m)?;
        self.adapters.backward(
            &self.arena.tables.segments,
            &self.groups.gate_up,
            Tensors { dx: Some(dh), dy: d_gate_up, x: h, s: &s[2] },
        )?;
        self.device.rms_norm_backward(
            rows_mut(dx, 0, m, hidden),
            rows(dh, 0, m, hidden),
            x_mid,
            In::all(&weights.post_norm),
            eps,
        )
    }

    fn attention(&mut self) -> Result<()> {
        self.attention_output()?;
        self.attention_core()?;
        self.attention_input()
    }

    /// Through the output projection: `d_o` from `dx`.
    fn attention_output(&mut self) -> Result<()> {
        let weights = &self.base.layers[self.layer];
        let LayerArena { o, s, .. } = &self.arena.layers[self.layer];
        let Scratch { dx, d_o, .. } = &mut self.arena.scratch;
        linear_backward(self.device, &self.groups.o, &weights.o, d_o, dx, self.rows)?;
        self.adapters.backward(
            &self.arena.tables.segments,
            &self.groups.o,
            Tensors { dx: Some(d_o), dy: dx, x: o, s: &s[1] },
        )
    }

    /// Through attention, rotation and QK norm: `d_qkv` from `d_o`.
    fn attention_core(&mut self) -> Result<()> {
        let (m, heads) = (self.rows, self.config.heads);
        let LayerArena { qkv, qkv_raw, o, lse, .. } = &self.arena.layers[self.layer];
        let Scratch { d_qkv, d_o, .. } = &mut self.arena.scratch;
        let tables = &self.arena.tables;
        self.device.attention_train_backward(
            rows_mut(d_qkv, 0, m, heads.qkv_width()),
            rows(d_o, 0, m, heads.q_width()),
            rows(qkv, 0, m, heads.qkv_width()),
            rows(o, 0, m, heads.q_width()),
            rows(lse, 0, m, heads.q_heads),
            rows(&tables.examples, 0, m, 1),
            heads,
        )?;
        let norm = qk_norm(self.config, &self.base.layers[self.layer]);
        self.device.qk_norm_rope_backward(
            rows_mut(d_qkv, 0, m, heads.qkv_width()),
            qkv_raw.as_ref().map(|raw| rows(raw, 0, m, heads.qkv_width())),
            norm.as_ref(),
            &rope(self.base, rows(&tables.positions, 0, m, 1)),
            heads,
        )
    }

    /// Through the fused q, k, v projection. Below layer 0 lies only the frozen embedding, so
    /// there the gradient of the input is not wanted.
    fn attention_input(&mut self) -> Result<()> {
        let (m, hidden) = (self.rows, self.config.hidden);
        let weights = &self.base.layers[self.layer];
        let LayerArena { x_in, s, .. } = &self.arena.layers[self.layer];
        let Scratch { dx, h, dh, d_qkv, .. } = &mut self.arena.scratch;
        let eps = self.config.rms_eps;
        let (x_in, norm) = (rows(x_in, 0, m, hidden), In::all(&weights.input_norm));
        self.device.rms_norm(rows_mut(h, 0, m, hidden), x_in, norm, eps)?;
        let wanted = self.layer > 0;
        if wanted {
            linear_backward(self.device, &self.groups.qkv, &weights.qkv, dh, d_qkv, m)?;
        }
        self.adapters.backward(
            &self.arena.tables.segments,
            &self.groups.qkv,
            Tensors { dx: wanted.then_some(&mut *dh), dy: d_qkv, x: h, s: &s[0] },
        )?;
        if !wanted {
            return Ok(());
        }
        let dx = rows_mut(dx, 0, m, hidden);
        self.device.rms_norm_backward(dx, rows(dh, 0, m, hidden), x_in, norm, eps)
    }
}

/// The adapters' part of a slice: reads their weights, adds to their gradients.
struct Adapters<'a, D: Device> {
    device: &'a D,
    pool: &'a AdapterPool<D>,
    train: &'a mut TrainPool<D>,
    extent: Extent,
    layer: usize,
}

/// Tensors of one group's adapter backward, arena rows.
struct Tensors<'a, D: Device> {
    /// Added to, where wanted `(M, in)`.
    dx: Option<&'a mut D::Act>,
    dy: &'a D::Act,
    x: &'a D::Act,
    s: &'a D::Act,
}

impl<D: Device> Adapters<'_, D> {
    fn backward(&mut self, segments: &D::Int, group: &Group, t: Tensors<'_, D>) -> Result<()> {
        let Extent { rows: m, rank_rows, segments: count } = self.extent;
        if count == 0 {
            return Ok(());
        }
        self.device.smlm_backward(
            t.dx.map(|dx| rows_mut(dx, 0, m, group.input)),
            Out::all(&mut self.train.grads),
            rows(t.dy, 0, m, group.width),
            rows(t.x, 0, m, group.input),
            rows(t.s, 0, rank_rows, group.modules.len()),
            &smlm_group(self.layer, group, self.pool, rows(segments, 0, count, 1)),
        )
    }
}

fn linear_backward<D: Device>(
    device: &D,
    group: &Group,
    weight: &D::Act,
    dx: &mut D::Act,
    dy: &D::Act,
    m: usize,
) -> Result<()> {
    let shape = LinearShape { rows: m, input: group.input, output: group.width };
    let dx = rows_mut(dx, 0, m, group.input);
    device.linear_backward(dx, rows(dy, 0, m, group.width), In::all(weight), shape)
}
