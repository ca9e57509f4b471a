//! [`Device`] for CUDA: transfers, and delegation to the operations.

use cudarc::driver::result;
use half::bf16;

use super::fault::device_fault;
use super::memory::{Address, Buf};
use super::{
    Cuda, attention, linear, loss, norm, optimizer, replay, rope, rows, sample, silu, smlm,
};
use crate::tables::{SampleArgs, SampleOut, SampleShape, SmlmGroup};
use crate::{
    AdamW, AdamWState, Device, HeadShape, In, KvOut, LinearShape, LossArgs, Memory, Out, PagedKv,
    QkNorm, Result, Rope, Ticket,
};

type Act = Buf<bf16>;
type Wide = Buf<f32>;
type Int = Buf<i32>;

impl Cuda {
    fn copy(&self, dst: &impl Address, src: &impl Address) -> Result<()> {
        assert_eq!(dst.bytes(), src.bytes(), "lengths of a copy");
        self.bind()?;
        // SAFETY: two ranges of live buffers, of equal length.
        unsafe {
            result::memcpy_dtod_async(dst.address(), src.address(), src.bytes(), self.stream())
        }
        .map_err(device_fault)
    }
    fn move_within<T>(
        &self,
        buffer: &mut Buf<T>,
        from: usize,
        to: usize,
        len: usize,
    ) -> Result<()> {
        let size = size_of::<T>();
        let (source, target) = (In::range(buffer, from, len), In::range(buffer, to, len));
        let (source, target) = (source.address(), target.address());
        if from.abs_diff(to) < len {
            return rows::move_bytes(self, source, target, len * size);
        }
        self.bind()?;
        // SAFETY: two ranges of one live buffer that do not overlap.
        unsafe { result::memcpy_dtod_async(target, source, len * size, self.stream()) }
            .map_err(device_fault)
    }
}

impl Device for Cuda {
    type Act = Act;
    type Wide = Wide;
    type Int = Int;

    fn name(&self) -> String {
        self.name.clone()
    }
    fn numerics(&self) -> String {
        self.numerics.clone()
    }
    fn memory(&self) -> Result<Option<Memory>> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(device_fault)?;
        Ok(Some(Memory { free: free as u64, total: total as u64 }))
    }

    fn alloc_act(&self, len: usize) -> Result<Act> {
        self.bind()?;
        Buf::zeroed(&self.context, len)
    }
    fn alloc_wide(&self, len: usize) -> Result<Wide> {
        self.bind()?;
        Buf::zeroed(&self.context, len)
    }
    fn alloc_int(&self, len: usize) -> Result<Int> {
        self.bind()?;
        Buf::zeroed(&self.context, len)
    }

    fn upload_act(&self, dst: Out<'_, Act>, src: &[f32]) -> Result<()> {
        self.upload(&dst, src, bf16::from_f32)
    }
    fn upload_act_bf16(&self, dst: Out<'_, Act>, src: &[bf16]) -> Result<()> {
        self.upload(&dst, src, |value| value)
    }
    fn upload_wide(&self, dst: Out<'_, Wide>, src: &[f32]) -> Result<()> {
        self.upload(&dst, src, |value| value)
    }
    fn upload_int(&self, dst: Out<'_, Int>, src: &[i32]) -> Result<()> {
        self.upload(&dst, src, |value| value)
    }
    fn download_act(&self, src: In<'_, Act>) -> Result<Ticket<Vec<f32>>> {
        self.bind()?;
        self.downloads.copy(self.stream(), src.address(), src.len, bf16::to_f32)
    }
    fn download_wide(&self, src: In<'_, Wide>) -> Result<Ticket<Vec<f32>>> {
        self.bind()?;
        self.downloads.copy(self.stream(), src.address(), src.len, |value: f32| value)
    }
    fn download_int(&self, src: In<'_, Int>) -> Result<Ticket<Vec<i32>>> {
        self.bind()?;
        self.downloads.copy(self.stream(), src.address(), src.len, |value: i32| value)
    }
    fn copy_act(&self, dst: Out<'_, Act>, src: In<'_, Act>) -> Result<()> {
        self.copy(&dst, &src)
    }
    fn move_act(&self, buffer: &mut Act, from: usize, to: usize, len: usize) -> Result<()> {
        self.move_within(buffer, from, to, len)
    }
    fn move_wide(&self, buffer: &mut Wide, from: usize, to: usize, len: usize) -> Result<()> {
        self.move_within(buffer, from, to, len)
    }
    fn copy_wide(&self, dst: Out<'_, Wide>, src: In<'_, Wide>) -> Result<()> {
        self.copy(&dst, &src)
    }
    fn narrow(&self, dst: Out<'_, Act>, src: In<'_, Wide>) -> Result<()> {
        rows::narrow(self, dst, src)
    }
    fn fill_act(&self, dst: Out<'_, Act>, value: f32) -> Result<()> {
        rows::fill_act(self, dst, value)
    }
    fn fill_wide(&self, dst: Out<'_, Wide>, value: f32) -> Result<()> {
        rows::fill_wide(self, dst, value)
    }
    fn fill_uniform(&self, dst: Out<'_, Act>, seed: u64, bound: f32) -> Result<()> {
        rows::fill_uniform(self, dst, seed, bound)
    }
    fn mark(&self) -> Result<Ticket<f64>> {
        self.bind()?;
        let mark = self.clock.borrow_mut().mark(&self.context, self.stream())?;
        let mark = std::sync::Arc::new(mark);
        let watched = mark.clone();
        Ok(Ticket::pending(move || mark.wait(), move || watched.is_passed()))
    }
    fn graphs(&self) -> bool {
        true
    }
    fn replay(&self, key: u64, ops: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        self.bind()?;
        replay::replay(self, key, ops)
    }

    fn embed(
        &self,
        x: Out<'_, Act>,
        table: In<'_, Act>,
        ids: In<'_, Int>,
        hidden: usize,
    ) -> Result<()> {
        rows::embed(self, x, table, ids, hidden)
    }
    fn rms_norm(
        &self,
        y: Out<'_, Act>,
        x: In<'_, Act>,
        weight: In<'_, Act>,
        eps: f64,
    ) -> Result<()> {
        norm::rms_norm(self, y, x, weight, eps)
    }
    fn add_rms_norm(
        &self,
        y: Out<'_, Act>,
        x: Out<'_, Act>,
        delta: In<'_, Act>,
        weight: In<'_, Act>,
        eps: f64,
    ) -> Result<()> {
        norm::add_rms_norm(self, y, x, delta, weight, eps)
    }
    fn rms_norm_backward(
        &self,
        dx: Out<'_, Act>,
        dy: In<'_, Act>,
        x: In<'_, Act>,
        weight: In<'_, Act>,
        eps: f64,
    ) -> Result<()> {
        norm::rms_norm_backward(self, dx, dy, x, weight, eps)
    }
    fn add(&self, x: Out<'_, Act>, delta: In<'_, Act>) -> Result<()> {
        norm::add(self, x, delta)
    }
    fn linear(
        &self,
        y: Out<'_, Act>,
        x: In<'_, Act>,
        weight: In<'_, Act>,
        bias: Option<In<'_, Act>>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::linear(self, y, x, weight, bias, shape)
    }
    fn linear_backward(
        &self,
        dx: Out<'_, Act>,
        dy: In<'_, Act>,
        weight: In<'_, Act>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::linear_backward(self, dx, dy, weight, shape)
    }
    fn smlm(
        &self,
        y: Out<'_, Act>,
        s: Out<'_, Act>,
        x: In<'_, Act>,
        group: &SmlmGroup<'_, Self>,
    ) -> Result<()> {
        smlm::smlm(self, y, s, x, group)
    }
    fn smlm_backward(
        &self,
        dx: Option<Out<'_, Act>>,
        grads: Out<'_, Wide>,
        dy: In<'_, Act>,
        x: In<'_, Act>,
        s: In<'_, Act>,
        group: &SmlmGroup<'_, Self>,
    ) -> Result<()> {
        smlm::smlm_backward(self, dx, grads, dy, x, s, group)
    }
    fn qk_norm_rope_kv_write(
        &self,
        qkv: Out<'_, Act>,
        kv: Option<KvOut<'_, Self>>,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Rope<'_, Self>,
        heads: HeadShape,
    ) -> Result<()> {
        rope::qk_norm_rope_kv_write(self, qkv, kv, norm, rope, heads)
    }
    fn qk_norm_rope_backward(
        &self,
        d_qkv: Out<'_, Act>,
        qkv_raw: Option<In<'_, Act>>,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Rope<'_, Self>,
        heads: HeadShape,
    ) -> Result<()> {
        rope::qk_norm_rope_backward(self, d_qkv, qkv_raw, norm, rope, heads)
    }
    fn attention_train(
        &self,
        o: Out<'_, Act>,
        lse: Out<'_, Wide>,
        qkv: In<'_, Act>,
        examples: In<'_, Int>,
        first: usize,
        heads: HeadShape,
    ) -> Result<()> {
        attention::attention_train(self, o, lse, qkv, examples, first, heads)
    }
    fn attention_train_backward(
        &self,
        d_qkv: Out<'_, Act>,
        d_o: In<'_, Act>,
        qkv: In<'_, Act>,
        o: In<'_, Act>,
        lse: In<'_, Wide>,
        examples: In<'_, Int>,
        heads: HeadShape,
    ) -> Result<()> {
        attention::attention_train_backward(self, d_qkv, d_o, qkv, o, lse, examples, heads)
    }
    fn attention_paged(
        &self,
        o: Out<'_, Act>,
        qkv: In<'_, Act>,
        kv: &PagedKv<'_, Self>,
        heads: HeadShape,
    ) -> Result<()> {
        attention::attention_paged(self, o, qkv, kv, heads)
    }
    fn silu_mul(&self, y: Out<'_, Act>, gate_up: In<'_, Act>, ffn: usize) -> Result<()> {
        silu::silu_mul(self, y, gate_up, ffn)
    }
    fn silu_mul_backward(
        &self,
        d_gate_up: Out<'_, Act>,
        dy: In<'_, Act>,
        gate_up: In<'_, Act>,
        ffn: usize,
    ) -> Result<()> {
        silu::silu_mul_backward(self, d_gate_up, dy, gate_up, ffn)
    }
    fn gather_rows(
        &self,
        y: Out<'_, Act>,
        x: In<'_, Act>,
        rows: In<'_, Int>,
        width: usize,
    ) -> Result<()> {
        rows::gather_rows(self, y, x, rows, width)
    }
    fn scatter_rows(
        &self,
        y: Out<'_, Act>,
        x: In<'_, Act>,
        rows: In<'_, Int>,
        width: usize,
    ) -> Result<()> {
        rows::scatter_rows(self, y, x, rows, width)
    }
    fn lm_head_loss(&self, args: LossArgs<'_, Self>, hidden: usize, vocab: usize) -> Result<()> {
        loss::lm_head_loss(self, args, hidden, vocab)
    }
    fn sample(
        &self,
        out: SampleOut<'_, Self>,
        logits: Out<'_, Act>,
        args: &SampleArgs<'_, Self>,
        shape: SampleShape,
    ) -> Result<()> {
        sample::sample(self, out, logits, args, shape)
    }
    fn grad_norm(&self, norm: Out<'_, Wide>, grads: In<'_, Wide>) -> Result<()> {
        optimizer::grad_norm(self, norm, grads)
    }
    fn adamw(&self, state: AdamWState<'_, Self>, step: AdamW) -> Result<()> {
        optimizer::adamw(self, state, step)
    }
}
