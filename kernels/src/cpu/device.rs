//! [`Device`] for the CPU: hands plain slices to the operations.

use half::bf16;

use super::segments::Tables;
use super::{
    Cpu, Float, attention_paged, attention_train, linear, loss, norm, optimizer, rope, rows,
    sample, silu, smlm,
};
use crate::tables::{SampleArgs, SampleOut, SampleShape, SmlmGroup};
use crate::{
    AdamW, AdamWState, Device, Error, HeadShape, In, KvOut, LinearShape, LossArgs, Memory, Out,
    PagedKv, QkNorm, ROW_TILE, Result, Rope, Ticket,
};

type Read<'a, T> = In<'a, Vec<T>>;
type Write<'a, T> = Out<'a, Vec<T>>;

fn zeroed<E: Clone>(zero: E, len: usize) -> Result<Vec<E>> {
    let mut buffer = Vec::new();
    let wanted = (len * size_of::<E>()) as u64;
    buffer.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { wanted, free: 0 })?;
    buffer.resize(len, zero);
    Ok(buffer)
}

/// Copies with a conversion; equal lengths.
fn convert<A: Copy, B>(dst: &mut [B], src: &[A], value: impl Fn(A) -> B) {
    assert_eq!(dst.len(), src.len(), "lengths of a copy");
    for (dst, src) in dst.iter_mut().zip(src) {
        *dst = value(*src);
    }
}

/// The vector units that the matrix product and the system's exponential pick at run time.
fn vector_units() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        return "avx2+fma";
    }
    std::env::consts::ARCH
}

/// Once for each precision rather than generic, so that this crate, which is compiled for speed
/// even in development builds, holds the machine code.
macro_rules! device {
    ($t:ident) => {
        impl Device for Cpu<$t> {
            type Act = Vec<$t>;
            type Wide = Vec<$t>;
            type Int = Vec<i32>;

            fn name(&self) -> String {
                "cpu".to_owned()
            }
            fn numerics(&self) -> String {
                format!("cpu {} tile{ROW_TILE} {}", <$t as Float>::NAME, vector_units())
            }

            fn memory(&self) -> Result<Option<Memory>> {
                Ok(None)
            }

            fn alloc_act(&self, len: usize) -> Result<Vec<$t>> {
                self.count(0, len);
                zeroed(<$t as Float>::ZERO, len)
            }
            fn alloc_wide(&self, len: usize) -> Result<Vec<$t>> {
                self.count(1, len);
                zeroed(<$t as Float>::ZERO, len)
            }
            fn alloc_int(&self, len: usize) -> Result<Vec<i32>> {
                self.count(2, len);
                zeroed(0, len)
            }

            fn upload_act(&self, dst: Write<'_, $t>, src: &[f32]) -> Result<()> {
                convert(dst.slice_mut(), src, <$t as Float>::from_f32);
                Ok(())
            }
            fn upload_act_bf16(&self, dst: Write<'_, $t>, src: &[bf16]) -> Result<()> {
                convert(dst.slice_mut(), src, |value| <$t as Float>::from_f32(value.to_f32()));
                Ok(())
            }
            fn upload_wide(&self, dst: Write<'_, $t>, src: &[f32]) -> Result<()> {
                self.upload_act(dst, src)
            }
            fn upload_int(&self, dst: Write<'_, i32>, src: &[i32]) -> Result<()> {
                dst.slice_mut().copy_from_slice(src);
                Ok(())
            }
            fn download_act(&self, src: Read<'_, $t>) -> Result<Ticket<Vec<f32>>> {
                Ok(self.ticket(src.slice().iter().map(|value| value.to_f32()).collect()))
            }
            fn download_wide(&self, src: Read<'_, $t>) -> Result<Ticket<Vec<f32>>> {
                self.download_act(src)
            }
            fn download_int(&self, src: Read<'_, i32>) -> Result<Ticket<Vec<i32>>> {
                Ok(self.ticket(src.slice().to_vec()))
            }
            fn copy_act(&self, dst: Write<'_, $t>, src: Read<'_, $t>) -> Result<()> {
                dst.slice_mut().copy_from_slice(src.slice());
                Ok(())
            }
            fn move_act(
                &self,
                buffer: &mut Vec<$t>,
                from: usize,
                to: usize,
                len: usize,
            ) -> Result<()> {
                buffer.copy_within(from..from + len, to);
                Ok(())
            }
            fn move_wide(
                &self,
                buffer: &mut Vec<$t>,
                from: usize,
                to: usize,
                len: usize,
            ) -> Result<()> {
                self.move_act(buffer, from, to, len)
            }
            fn copy_wide(&self, dst: Write<'_, $t>, src: Read<'_, $t>) -> Result<()> {
                self.copy_act(dst, src)
            }
            fn narrow(&self, dst: Write<'_, $t>, src: Read<'_, $t>) -> Result<()> {
                self.copy_act(dst, src)
            }
            fn fill_act(&self, dst: Write<'_, $t>, value: f32) -> Result<()> {
                dst.slice_mut().fill(<$t as Float>::from_f32(value));
                Ok(())
            }
            fn fill_wide(&self, dst: Write<'_, $t>, value: f32) -> Result<()> {
                self.fill_act(dst, value)
            }
            fn fill_uniform(&self, dst: Write<'_, $t>, seed: u64, bound: f32) -> Result<()> {
                rows::fill_uniform(dst.slice_mut(), seed, bound);
                Ok(())
            }
            fn mark(&self) -> Result<Ticket<f64>> {
                Ok(self.ticket(self.opened.elapsed().as_secs_f64()))
            }
            fn replay(&self, _key: u64, ops: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
                ops(self)
            }

            fn embed(
                &self,
                x: Write<'_, $t>,
                table: Read<'_, $t>,
                ids: Read<'_, i32>,
                hidden: usize,
            ) -> Result<()> {
                rows::gather(x.slice_mut(), table.slice(), ids.slice(), hidden);
                Ok(())
            }
            fn rms_norm(
                &self,
                y: Write<'_, $t>,
                x: Read<'_, $t>,
                weight: Read<'_, $t>,
                eps: f64,
            ) -> Result<()> {
                norm::rms_norm(&self.threads, y.slice_mut(), x.slice(), weight.slice(), eps);
                Ok(())
            }
            fn add_rms_norm(
                &self,
                y: Write<'_, $t>,
                x: Write<'_, $t>,
                delta: Read<'_, $t>,
                weight: Read<'_, $t>,
                eps: f64,
            ) -> Result<()> {
                let (y, x) = (y.slice_mut(), x.slice_mut());
                norm::add_rms_norm(&self.threads, y, x, delta.slice(), weight.slice(), eps);
                Ok(())
            }
            fn rms_norm_backward(
                &self,
                dx: Write<'_, $t>,
                dy: Read<'_, $t>,
                x: Read<'_, $t>,
                weight: Read<'_, $t>,
                eps: f64,
            ) -> Result<()> {
                let (dx, dy) = (dx.slice_mut(), dy.slice());
                norm::rms_norm_backward(&self.threads, dx, dy, x.slice(), weight.slice(), eps);
                Ok(())
            }
            fn add(&self, x: Write<'_, $t>, delta: Read<'_, $t>) -> Result<()> {
                norm::add(&self.threads, x.slice_mut(), delta.slice());
                Ok(())
            }

            fn linear(
                &self,
                y: Write<'_, $t>,
                x: Read<'_, $t>,
                weight: Read<'_, $t>,
                bias: Option<Read<'_, $t>>,
                shape: LinearShape,
            ) -> Result<()> {
                let bias = bias.map(|bias| bias.slice());
                linear::linear(
                    &self.threads,
                    y.slice_mut(),
                    x.slice(),
                    weight.slice(),
                    bias,
                    shape,
                );
                Ok(())
            }
            fn linear_backward(
                &self,
                dx: Write<'_, $t>,
                dy: Read<'_, $t>,
                weight: Read<'_, $t>,
                shape: LinearShape,
            ) -> Result<()> {
                let (dx, dy) = (dx.slice_mut(), dy.slice());
                linear::linear_backward(&self.threads, dx, dy, weight.slice(), shape);
                Ok(())
            }
            fn smlm(
                &self,
                y: Write<'_, $t>,
                s: Write<'_, $t>,
                x: Read<'_, $t>,
                group: &SmlmGroup<'_, Self>,
            ) -> Result<()> {
                let tables = Tables::read(group);
                smlm::forward(&self.threads, y.slice_mut(), s.slice_mut(), x.slice(), &tables);
                Ok(())
            }
            fn smlm_backward(
                &self,
                dx: Option<Write<'_, $t>>,
                grads: Write<'_, $t>,
                dy: Read<'_, $t>,
                x: Read<'_, $t>,
                s: Read<'_, $t>,
                group: &SmlmGroup<'_, Self>,
            ) -> Result<()> {
                let tables = Tables::read(group);
                let args =
                    smlm::Backward { dy: dy.slice(), x: x.slice(), s: s.slice(), tables: &tables };
                let dx = dx.map(|dx| dx.slice_mut());
                smlm::backward(&self.threads, dx, grads.slice_mut(), &args);
                Ok(())
            }

            fn qk_norm_rope_kv_write(
                &self,
                qkv: Write<'_, $t>,
                kv: Option<KvOut<'_, Self>>,
                norm: Option<&QkNorm<'_, Self>>,
                rope: &Rope<'_, Self>,
                heads: HeadShape,
            ) -> Result<()> {
                rope::forward(&self.threads, qkv.slice_mut(), kv, norm, rope, heads);
                Ok(())
            }
            fn qk_norm_rope_backward(
                &self,
                d_qkv: Write<'_, $t>,
                qkv_raw: Option<Read<'_, $t>>,
                norm: Option<&QkNorm<'_, Self>>,
                rope: &Rope<'_, Self>,
                heads: HeadShape,
            ) -> Result<()> {
                let raw = qkv_raw.map(|raw| raw.slice());
                rope::backward(&self.threads, d_qkv.slice_mut(), raw, norm, rope, heads);
                Ok(())
            }
            fn attention_train(
                &self,
                o: Write<'_, $t>,
                lse: Write<'_, $t>,
                qkv: Read<'_, $t>,
                examples: Read<'_, i32>,
                first: usize,
                heads: HeadShape,
            ) -> Result<()> {
                let out = (o.slice_mut(), lse.slice_mut());
                attention_train::forward(
                    &self.threads,
                    out,
                    qkv.slice(),
                    examples.slice(),
                    first,
                    heads,
                );
                Ok(())
            }
            fn attention_train_backward(
                &self,
                d_qkv: Write<'_, $t>,
                d_o: Read<'_, $t>,
                qkv: Read<'_, $t>,
                o: Read<'_, $t>,
                lse: Read<'_, $t>,
                examples: Read<'_, i32>,
                heads: HeadShape,
            ) -> Result<()> {
                let saved = (d_o.slice(), o.slice(), lse.slice());
                let (qkv, examples) = (qkv.slice(), examples.slice());
                attention_train::backward(
                    &self.threads,
                    d_qkv.slice_mut(),
                    saved,
                    qkv,
                    examples,
                    heads,
                );
                Ok(())
            }
            fn attention_paged(
                &self,
                o: Write<'_, $t>,
                qkv: Read<'_, $t>,
                kv: &PagedKv<'_, Self>,
                heads: HeadShape,
            ) -> Result<()> {
                attention_paged::forward(&self.threads, o.slice_mut(), qkv.slice(), kv, heads);
                Ok(())
            }

            fn silu_mul(&self, y: Write<'_, $t>, gate_up: Read<'_, $t>, ffn: usize) -> Result<()> {
                silu::silu_mul(&self.threads, y.slice_mut(), gate_up.slice(), ffn);
                Ok(())
            }
            fn silu_mul_backward(
                &self,
                d_gate_up: Write<'_, $t>,
                dy: Read<'_, $t>,
                gate_up: Read<'_, $t>,
                ffn: usize,
            ) -> Result<()> {
                let (dy, gate_up) = (dy.slice(), gate_up.slice());
                silu::silu_mul_backward(&self.threads, d_gate_up.slice_mut(), dy, gate_up, ffn);
                Ok(())
            }

            fn gather_rows(
                &self,
                y: Write<'_, $t>,
                x: Read<'_, $t>,
                rows: Read<'_, i32>,
                width: usize,
            ) -> Result<()> {
                rows::gather(y.slice_mut(), x.slice(), rows.slice(), width);
                Ok(())
            }
            fn scatter_rows(
                &self,
                y: Write<'_, $t>,
                x: Read<'_, $t>,
                rows: Read<'_, i32>,
                width: usize,
            ) -> Result<()> {
                rows::scatter(y.slice_mut(), x.slice(), rows.slice(), width);
                Ok(())
            }
            fn lm_head_loss(
                &self,
                args: LossArgs<'_, Self>,
                hidden: usize,
                vocab: usize,
            ) -> Result<()> {
                loss::lm_head_loss(&self.threads, args, hidden, vocab);
                Ok(())
            }
            fn sample(
                &self,
                out: SampleOut<'_, Self>,
                logits: Write<'_, $t>,
                args: &SampleArgs<'_, Self>,
                shape: SampleShape,
            ) -> Result<()> {
                sample::sample(&self.threads, out, logits.slice_mut(), args, shape);
                Ok(())
            }

            fn grad_norm(&self, norm: Write<'_, $t>, grads: Read<'_, $t>) -> Result<()> {
                optimizer::grad_norm(&self.threads, norm.slice_mut(), grads.slice());
                Ok(())
            }
            fn adamw(&self, state: AdamWState<'_, Self>, step: AdamW) -> Result<()> {
                optimizer::adamw(&self.threads, state, step);
                Ok(())
            }
        }
    };
}

device!(f32);
device!(f64);
