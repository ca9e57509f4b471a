//! The training arena: what the one micro-batch in flight keeps from its first forward chunk to
//! its last backward slice. Norms and SwiGLU are recomputed in backward, not kept.

use super::buffers::rows_mut;
use super::{Groups, Sizes};
use crate::base::BaseConfig;
use crate::footprint::Footprint;
use kernels::tables::SegmentRow;
use kernels::{Device, Out, Result};

/// What one layer keeps, M = arena rows.
pub struct LayerArena<D: Device> {
    /// Residual entering the layer `(M, H)`.
    pub x_in: D::Act,
    /// Residual between attention and feed-forward `(M, H)`.
    pub x_mid: D::Act,
    /// Fused q, k, v after norm and rotation `(M, (Q+2K)·D)`.
    pub qkv: D::Act,
    /// The same before both, kept only where heads are normed (Qwen3).
    pub qkv_raw: Option<D::Act>,
    /// Attention output `(M, Q·D)`.
    pub o: D::Act,
    /// Log-sum-exp of attention `(M, Q)`.
    pub lse: D::Wide,
    /// Fused gate and up `(M, 2F)`.
    pub gate_up: D::Act,
    /// S of the groups qkv, o, gate-up, down.
    pub s: [D::Act; 4],
}

/// Tables of the micro-batch, whole examples as segments.
pub struct MicroTables<D: Device> {
    /// Position in its example, per row `(M)`.
    pub positions: D::Int,
    /// Arena row where the row's example starts `(M)`.
    pub examples: D::Int,
    /// Segment table over arena rows.
    pub segments: D::Int,
    /// Labelled arena rows, ascending.
    pub labelled: D::Int,
    /// Their labels.
    pub labels: D::Int,
    /// Their gradient factors.
    pub scale: D::Wide,
}

/// Gradients and recomputed activations of the backward slice at work.
pub struct Scratch<D: Device> {
    /// Gradient of the residual stream `(M, H)`.
    pub dx: D::Act,
    /// Normed residual, recomputed `(M, H)`.
    pub h: D::Act,
    /// Its gradient `(M, H)`.
    pub dh: D::Act,
    /// Gradient of fused q, k, v `(M, (Q+2K)·D)`.
    pub d_qkv: D::Act,
    /// Gradient of the attention output `(M, Q·D)`.
    pub d_o: D::Act,
    /// Gradient of fused gate and up `(M, 2F)`.
    pub d_gate_up: D::Act,
    /// Gated activation, recomputed `(M, F)`.
    pub act: D::Act,
    /// Its gradient `(M, F)`.
    pub d_act: D::Act,
    /// Loss slice: gathered residual, normed rows and their gradients `(loss_rows, H)`.
    pub loss: [D::Act; 4],
    /// Logits of a chunk of loss rows.
    pub logits: D::Act,
    /// Loss per row of the slice.
    pub losses: D::Wide,
    /// Correctness per row of the slice.
    pub correct: D::Int,
}

/// See the module.
pub struct Arena<D: Device> {
    /// Kept activations per layer.
    pub layers: Vec<LayerArena<D>>,
    /// Residual after the last layer `(M, H)`.
    pub x_out: D::Act,
    /// Tables of the micro-batch in flight.
    pub tables: MicroTables<D>,
    /// Backward scratch.
    pub scratch: Scratch<D>,
}

impl<D: Device> Arena<D> {
    pub(super) fn new(device: &D, config: &BaseConfig, sizes: &Sizes) -> Result<Self> {
        let m = sizes.arena_rows;
        let layers = (0..config.layers)
            .map(|_| LayerArena::new(device, config, sizes))
            .collect::<Result<_>>()?;
        let int = |len: usize| device.alloc_int(len);
        Ok(Self {
            layers,
            x_out: device.alloc_act(m * config.hidden)?,
            tables: MicroTables {
                positions: int(m)?,
                examples: int(m)?,
                segments: int(m * SegmentRow::WIDTH)?,
                labelled: int(m)?,
                labels: int(m)?,
                scale: device.alloc_wide(m)?,
            },
            scratch: Scratch::new(device, config, sizes)?,
        })
    }

    /// What [`Arena::new`] takes.
    pub(super) fn footprint(config: &BaseConfig, sizes: &Sizes) -> Footprint {
        let m = sizes.arena_rows;
        let tables = Footprint::int((4 + SegmentRow::WIDTH) * m) + Footprint::wide(m);
        LayerArena::<D>::footprint(config, sizes) * config.layers
            + Footprint::act(m * config.hidden)
            + tables
            + Scratch::<D>::footprint(config, sizes)
    }

    pub(super) fn poison(&mut self, device: &D) -> Result<()> {
        let nan = |buffer: &mut D::Act| device.fill_act(Out::all(buffer), f32::NAN);
        for layer in &mut self.layers {
            let LayerArena { x_in, x_mid, qkv, qkv_raw, o, lse, gate_up, s } = layer;
            for buffer in [x_in, x_mid, qkv, o, gate_up].into_iter().chain(qkv_raw).chain(s) {
                nan(buffer)?;
            }
            device.fill_wide(Out::all(lse), f32::NAN)?;
        }
        nan(&mut self.x_out)?;
        let Scratch { dx, h, dh, d_qkv, d_o, d_gate_up, act, d_act, loss, logits, losses, .. } =
            &mut self.scratch;
        let single = [dx, h, dh, d_qkv, d_o, d_gate_up, act, d_act, logits];
        for buffer in single.into_iter().chain(loss) {
            nan(buffer)?;
        }
        device.fill_wide(Out::all(losses), f32::NAN)
    }
}

impl<D: Device> LayerArena<D> {
    fn new(device: &D, config: &BaseConfig, sizes: &Sizes) -> Result<Self> {
        let m = sizes.arena_rows;
        let groups = Groups::new(config);
        let [a, b, c, d] = groups.all().map(|group| sizes.arena_rank_rows * group.modules.len());
        let act = |len: usize| device.alloc_act(len);
        let qkv_len = m * config.heads.qkv_width();
        Ok(Self {
            x_in: act(m * config.hidden)?,
            x_mid: act(m * config.hidden)?,
            qkv: act(qkv_len)?,
            qkv_raw: if config.qk_norm { Some(act(qkv_len)?) } else { None },
            o: act(m * config.heads.q_width())?,
            lse: device.alloc_wide(m * config.heads.q_heads)?,
            gate_up: act(m * 2 * config.ffn)?,
            s: [act(a)?, act(b)?, act(c)?, act(d)?],
        })
    }
}

impl<D: Device> LayerArena<D> {
    fn footprint(config: &BaseConfig, sizes: &Sizes) -> Footprint {
        let heads = config.heads;
        let qkv = heads.qkv_width() * if config.qk_norm { 2 } else { 1 };
        let row = 2 * config.hidden + qkv + heads.q_width() + 2 * config.ffn;
        let modules: usize =
            Groups::new(config).all().map(|group| group.modules.len()).iter().sum();
        Footprint::act(row * sizes.arena_rows + modules * sizes.arena_rank_rows)
            + Footprint::wide(sizes.arena_rows * heads.q_heads)
    }
}

impl<D: Device> Scratch<D> {
    fn new(device: &D, config: &BaseConfig, sizes: &Sizes) -> Result<Self> {
        let (m, hidden) = (sizes.arena_rows, config.hidden);
        let act = |len: usize| device.alloc_act(len);
        let loss = || device.alloc_act(sizes.loss_rows * hidden);
        Ok(Self {
            dx: act(m * hidden)?,
            h: act(m * hidden)?,
            dh: act(m * hidden)?,
            d_qkv: act(m * config.heads.qkv_width())?,
            d_o: act(m * config.heads.q_width())?,
            d_gate_up: act(m * 2 * config.ffn)?,
            act: act(m * config.ffn)?,
            d_act: act(m * config.ffn)?,
            loss: [loss()?, loss()?, loss()?, loss()?],
            logits: act(sizes.loss_chunk_rows * config.vocab)?,
            losses: device.alloc_wide(sizes.loss_rows)?,
            correct: device.alloc_int(sizes.loss_rows)?,
        })
    }

    fn footprint(config: &BaseConfig, sizes: &Sizes) -> Footprint {
        let (hidden, heads) = (config.hidden, config.heads);
        let row = 3 * hidden + heads.qkv_width() + heads.q_width() + 4 * config.ffn;
        let loss = Footprint::act(4 * hidden) + Footprint::wide(1) + Footprint::int(1);
        Footprint::act(row * sizes.arena_rows + sizes.loss_chunk_rows * config.vocab)
            + loss * sizes.loss_rows
    }

    /// Clears the residual gradient of `m` rows: rows without a label start from zero.
    pub(super) fn clear_dx(&mut self, device: &D, m: usize, hidden: usize) -> Result<()> {
        device.fill_act(rows_mut(&mut self.dx, 0, m, hidden), 0.0)
    }
}
