//! Times of the CPU device's other operations at the demo base's shape (hidden 256, 4 query heads
//! on 2 key/value heads of 64, ffn 768, vocabulary 4096), one layer, for a micro-batch of 512 rows
//! and for one decoded row: `cargo run -p kernels --example op_speed [PART OF A NAME]`.

use std::time::Instant;

use kernels::tables::{SampleArgs, SampleOut, SampleRow, SampleShape, SegmentRow, SlotRow};
use kernels::{
    AdamW, AdamWState, Cpu, Device, GroupModule, HeadShape, In, LossArgs, Module, Out, PagedKv,
    Result, Rope, SmlmGroup,
};

const HIDDEN: usize = 256;
const FFN: usize = 768;
const VOCAB: usize = 4096;
const RANK: usize = 16;
const HEADS: HeadShape = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 64 };

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 100.0).collect()
}

/// Prints the least time of several runs, if the name holds the first argument.
fn time(name: &str, mut run: impl FnMut() -> Result<()>) -> Result<()> {
    if std::env::args().nth(1).is_some_and(|wanted| !name.contains(&wanted)) {
        return Ok(());
    }
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed().as_millis() < 200 {
        let one = Instant::now();
        run()?;
        best = best.min(one.elapsed().as_secs_f64());
    }
    println!("  {name:28} {:9.1} µs", best * 1e6);
    Ok(())
}

fn rows_of_layer(cpu: &Cpu<f32>, rows: usize) -> Result<()> {
    let (mut x, mut y, weight) = (values(rows * HIDDEN), values(rows * HIDDEN), values(HIDDEN));
    let delta = values(rows * HIDDEN);
    time("add_rms_norm", || {
        let (y, x) = (Out::all(&mut y), Out::all(&mut x));
        cpu.add_rms_norm(y, x, In::all(&delta), In::all(&weight), 1e-5)
    })?;
    let (gate_up, mut ffn) = (values(rows * 2 * FFN), values(rows * FFN));
    time("silu_mul", || cpu.silu_mul(Out::all(&mut ffn), In::all(&gate_up), FFN))?;
    let mut d_gate_up = gate_up.clone();
    time("silu_mul_backward", || {
        cpu.silu_mul_backward(Out::all(&mut d_gate_up), In::all(&ffn), In::all(&gate_up), FFN)
    })?;
    let table = values(1024 * HEADS.head_dim / 2);
    let positions: Vec<i32> = (0..rows as i32).collect();
    let mut qkv = values(rows * HEADS.qkv_width());
    time("qk_norm_rope_kv_write", || {
        let (cos, sin) = (In::all(&table), In::all(&table));
        let rope = Rope { cos, sin, positions: In::all(&positions) };
        cpu.qk_norm_rope_kv_write(Out::all(&mut qkv), None, None, &rope, HEADS)
    })
}

fn attention(cpu: &Cpu<f32>, rows: usize) -> Result<()> {
    let qkv = values(rows * HEADS.qkv_width());
    let (mut o, mut lse) = (values(rows * HEADS.q_width()), values(rows * HEADS.q_heads));
    let examples = vec![0; rows];
    time("attention_train", || {
        let (o, lse) = (Out::all(&mut o), Out::all(&mut lse));
        cpu.attention_train(o, lse, In::all(&qkv), In::all(&examples), 0, HEADS)
    })?;
    let (mut d_qkv, d_o) = (qkv.clone(), o.clone());
    time("attention_train_backward", || {
        let (qkv, o, lse, d_o) = (In::all(&qkv), In::all(&o), In::all(&lse), In::all(&d_o));
        cpu.attention_train_backward(
            Out::all(&mut d_qkv),
            d_o,
            qkv,
            o,
            lse,
            In::all(&examples),
            HEADS,
        )
    })?;
    let (cache, blocks): (Vec<f32>, Vec<i32>) = (values(512 * HEADS.kv_width()), (0..32).collect());
    let sequence = vec![0, 1, 511, 0];
    time("attention_paged 1 row of 512", || {
        let kv = PagedKv {
            k: In::all(&cache),
            v: In::all(&cache),
            sequences: In::all(&sequence),
            blocks: In::all(&blocks),
            block_size: 16,
        };
        let row = In::range(&qkv, 0, HEADS.qkv_width());
        cpu.attention_paged(Out::range(&mut o, 0, HEADS.q_width()), row, &kv, HEADS)
    })
}

/// Gate and up, the widest group; examples of 128 rows.
fn smlm(cpu: &Cpu<f32>, rows: usize, dropout: f32) -> Result<()> {
    let modules = [Module::Gate, Module::Up].map(|module| GroupModule {
        module,
        column: if module == Module::Gate { 0 } else { FFN },
        width: FFN,
    });
    let size = RANK * (HIDDEN + FFN);
    let mut slot = vec![-1; SlotRow::WIDTH];
    slot[..5].copy_from_slice(&[0, RANK as i32, 2f32.to_bits() as i32, 2 * size as i32, 0]);
    for (index, module) in modules.iter().enumerate() {
        slot[SlotRow::MODULE_OFFSET + module.module.index()] = (index * size) as i32;
    }
    let mut segments = Vec::new();
    for first in (0..rows).step_by(128) {
        let mut row = [0; SegmentRow::WIDTH];
        row[SegmentRow::ROW] = first as i32;
        row[SegmentRow::ROWS] = 128.min(rows - first) as i32;
        row[SegmentRow::S_START] = (first * RANK) as i32;
        row[SegmentRow::DROPOUT_BITS] = dropout.to_bits() as i32;
        segments.extend(row);
    }
    let (pool, mut grads) = (values(2 * size), values(2 * size));
    let (x, mut y) = (values(rows * HIDDEN), values(rows * 2 * FFN));
    let (mut s, mut dx) = (values(rows * 2 * RANK), values(rows * HIDDEN));
    let group = SmlmGroup {
        layer: 0,
        input: HIDDEN,
        width: 2 * FFN,
        modules: &modules,
        pool: In::all(&pool),
        slots: In::all(&slot),
        segments: In::all(&segments),
    };
    time(&format!("smlm, dropout {dropout}"), || {
        cpu.smlm(Out::all(&mut y), Out::all(&mut s), In::all(&x), &group)
    })?;
    time(&format!("smlm_backward, dropout {dropout}"), || {
        let (dx, grads) = (Some(Out::all(&mut dx)), Out::all(&mut grads));
        cpu.smlm_backward(dx, grads, In::all(&y), In::all(&x), In::all(&s), &group)
    })
}

fn loss(cpu: &Cpu<f32>, rows: usize) -> Result<()> {
    let (hidden, lm_head) = (values(rows * HIDDEN), values(VOCAB * HIDDEN));
    let (labels, scale) = (vec![7; rows], vec![1.0; rows]);
    let (mut loss, mut correct) = (values(rows), labels.clone());
    let (mut d_hidden, mut logits) = (hidden.clone(), values(rows.min(128) * VOCAB));
    time("lm_head_loss", || {
        let args = LossArgs {
            loss: Out::all(&mut loss),
            correct: Out::all(&mut correct),
            d_hidden: Some(Out::all(&mut d_hidden)),
            hidden: In::all(&hidden),
            lm_head: In::all(&lm_head),
            labels: In::all(&labels),
            scale: In::all(&scale),
            logits: Out::all(&mut logits),
        };
        cpu.lm_head_loss(args, HIDDEN, VOCAB)
    })
}

fn sample(cpu: &Cpu<f32>) -> Result<()> {
    let mut logits = values(VOCAB);
    let mut wide = vec![0.0; SampleRow::WIDE];
    (wide[SampleRow::TEMPERATURE], wide[SampleRow::TOP_P]) = (0.8, 0.95);
    wide[SampleRow::REPETITION] = 1.0;
    let int = vec![0; SampleRow::INT];
    let (none, no_bias) = (Vec::new(), Vec::new());
    let (mut tokens, mut top_ids) = (vec![0], Vec::new());
    let (mut logprobs, mut top_logprobs) = (vec![0.0], Vec::new());
    time("sample 1 row", || {
        let out = SampleOut {
            tokens: Out::all(&mut tokens),
            logprobs: Out::all(&mut logprobs),
            top_ids: Out::all(&mut top_ids),
            top_logprobs: Out::all(&mut top_logprobs),
        };
        let args = SampleArgs {
            wide: In::all(&wide),
            int: In::all(&int),
            history: In::all(&none),
            bias_ids: In::all(&none),
            bias: In::all(&no_bias),
        };
        cpu.sample(out, Out::all(&mut logits), &args, SampleShape { rows: 1, vocab: VOCAB, top: 0 })
    })
}

fn adamw(cpu: &Cpu<f32>) -> Result<()> {
    let len = 500_000;
    let grads = values(len);
    let [mut params, mut m, mut v, mut weights] = std::array::from_fn(|_| vec![0.0; len]);
    let mut norm = vec![0.0; 2];
    let step = AdamW {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        step: 1,
    };
    time("grad_norm of 500 000", || cpu.grad_norm(Out::all(&mut norm), In::all(&grads)))?;
    time("adamw of 500 000", || {
        let state = AdamWState {
            params: Out::all(&mut params),
            grads: In::all(&grads),
            m: Out::all(&mut m),
            v: Out::all(&mut v),
            weights: Out::all(&mut weights),
            norm: In::all(&norm),
        };
        cpu.adamw(state, step)
    })
}

fn main() -> Result<()> {
    for threads in [1, 2] {
        let cpu = Cpu::<f32>::new(threads)?;
        println!("{} · {threads} threads", cpu.numerics());
        for rows in [512, 1] {
            println!(" {rows} rows");
            rows_of_layer(&cpu, rows)?;
            attention(&cpu, rows)?;
            smlm(&cpu, rows, 0.0)?;
            smlm(&cpu, rows, 0.1)?;
            loss(&cpu, rows)?;
        }
        println!(" any");
        sample(&cpu)?;
        adamw(&cpu)?;
    }
    Ok(())
}
