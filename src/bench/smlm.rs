//! The SMLM operation alone: checked against the CPU on the same inputs, then timed against the
//! bytes it must move.

use super::args::{GroupName, SmlmArgs};
use super::figures::{READ_BYTES_PER_SEC, Report};
use super::random::Random;
use super::rig::layout;
use anyhow::ensure;
use kernels::tables::{PAGE, SegmentRow, SlotRow};
use kernels::{Cpu, Device, GroupModule, In, Module, Out, SmlmGroup};
use worker::base::BaseConfig;

/// Layers whose adapters take turns, so that no cache holds them all.
const LAYERS: usize = 8;
/// Calls on the clock.
const CALLS: usize = 64;
/// Bytes of a value in compute precision on a GPU, which ceilings are reckoned with.
const BYTES: usize = 2;
/// Largest relative error of a row against the CPU.
const TOLERANCE: f64 = 5e-3;

/// Modules that share an input, and their widths.
struct Group {
    name: &'static str,
    input: usize,
    width: usize,
    modules: Vec<GroupModule>,
}

impl Group {
    fn new(config: &BaseConfig, name: GroupName) -> Self {
        let (name, modules) = match name {
            GroupName::Qkv => ("qkv", vec![Module::Q, Module::K, Module::V]),
            GroupName::O => ("o", vec![Module::O]),
            GroupName::GateUp => ("gate-up", vec![Module::Gate, Module::Up]),
            GroupName::Down => ("down", vec![Module::Down]),
        };
        let dims = config.dims();
        let (input, _) = dims.of(modules[0]);
        let mut width = 0;
        let mut place = |module| {
            let (column, (_, own)) = (width, dims.of(module));
            width += own;
            GroupModule { module, column, width: own }
        };
        let modules = modules.into_iter().map(&mut place).collect();
        Self { name, input, width, modules }
    }
}

/// Host side of a case: tables and random inputs that bf16 holds exactly.
struct Case {
    group: Group,
    rows: usize,
    rank_rows: usize,
    slots: Vec<i32>,
    segments: Vec<i32>,
    pool: Vec<f32>,
    x: Vec<f32>,
    y: Vec<f32>,
    /// Adapter values of one layer and this group that the segments read.
    weights: usize,
}

impl Case {
    fn new(config: &BaseConfig, args: &SmlmArgs, name: GroupName) -> anyhow::Result<Self> {
        let group = Group::new(config, name);
        let mut random = Random::new(3);
        let mut config = config.clone();
        config.layers = config.layers.min(LAYERS);
        let (mut slots, mut segments) = (Vec::new(), Vec::new());
        let (mut page, mut rank_rows, mut weights) = (0, 0, 0);
        for index in 0..args.segments {
            let rank = args.ranks[index % args.ranks.len()];
            let layout = layout(&config, rank, &Module::ALL)?;
            slots.extend(layout.slot_row(page as u32, Some(page as u32)));
            page += layout.pages();
            let first = index * args.rows / args.segments;
            let rows = (index + 1) * args.rows / args.segments - first;
            let mut row = [0; SegmentRow::WIDTH];
            row[SegmentRow::ROW] = first as i32;
            row[SegmentRow::ROWS] = rows as i32;
            row[SegmentRow::SLOT] = index as i32;
            row[SegmentRow::S_START] = rank_rows as i32;
            segments.extend(row);
            rank_rows += rows * rank;
            weights += rank * (group.modules.len() * group.input + group.width);
        }
        let mut floats = |count, bound| -> Vec<f32> {
            random.floats(count, bound).into_iter().map(short).collect()
        };
        Ok(Self {
            rows: args.rows,
            rank_rows,
            slots,
            segments,
            pool: floats(page * PAGE, 0.05),
            x: floats(args.rows * group.input, 1.0),
            y: floats(args.rows * group.width, 1.0),
            weights,
            group,
        })
    }

    fn s_len(&self) -> usize {
        self.rank_rows * self.group.modules.len()
    }

    /// Bytes that forward must move: x in, adapters in, S out, y in and out.
    fn forward_bytes(&self) -> usize {
        (self.x.len() + self.weights + self.s_len() + 2 * self.y.len()) * BYTES
    }

    /// Bytes that backward must move: dy, x, S and adapters in, dx in and out, and gradients of
    /// four bytes in and out.
    fn backward_bytes(&self) -> usize {
        let short = self.y.len() + 3 * self.x.len() + self.s_len() + self.weights;
        short * BYTES + self.weights * 2 * size_of::<f32>()
    }
}

/// The nearest number below that bf16 holds.
fn short(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & 0xFFFF_0000)
}

/// A case on a device.
struct Bench<'a, D: Device> {
    device: &'a D,
    case: &'a Case,
    layers: usize,
    pool: D::Act,
    slots: D::Int,
    segments: D::Int,
    x: D::Act,
    y: D::Act,
    dx: D::Act,
    s: D::Act,
    grads: D::Wide,
}

impl<'a, D: Device> Bench<'a, D> {
    fn new(device: &'a D, case: &'a Case, layers: usize) -> anyhow::Result<Self> {
        let act = |values: &[f32]| {
            let mut buffer = device.alloc_act(values.len())?;
            device.upload_act(Out::all(&mut buffer), values)?;
            Ok::<_, kernels::Error>(buffer)
        };
        let int = |values: &[i32]| {
            let mut buffer = device.alloc_int(values.len())?;
            device.upload_int(Out::all(&mut buffer), values)?;
            Ok::<_, kernels::Error>(buffer)
        };
        debug_assert!(case.slots.len().is_multiple_of(SlotRow::WIDTH));
        Ok(Self {
            layers,
            pool: act(&case.pool)?,
            slots: int(&case.slots)?,
            segments: int(&case.segments)?,
            x: act(&case.x)?,
            y: act(&case.y)?,
            dx: act(&case.x)?,
            s: device.alloc_act(case.s_len())?,
            grads: device.alloc_wide(case.pool.len())?,
            device,
            case,
        })
    }

    fn run(&mut self, layer: usize, backward: bool) -> kernels::Result<()> {
        let group = SmlmGroup {
            layer,
            input: self.case.group.input,
            width: self.case.group.width,
            modules: &self.case.group.modules,
            pool: In::all(&self.pool),
            slots: In::all(&self.slots),
            segments: In::all(&self.segments),
        };
        let (x, device) = (In::all(&self.x), self.device);
        if !backward {
            return device.smlm(Out::all(&mut self.y), Out::all(&mut self.s), x, &group);
        }
        let (dx, grads) = (Some(Out::all(&mut self.dx)), Out::all(&mut self.grads));
        device.smlm_backward(dx, grads, In::all(&self.y), x, In::all(&self.s), &group)
    }

    /// Seconds of one call, the layers in turn.
    fn time(&mut self, backward: bool) -> anyhow::Result<f64> {
        for layer in 0..self.layers {
            self.run(layer, backward)?;
        }
        let start = self.device.mark()?;
        for call in 0..CALLS {
            self.run(call % self.layers, backward)?;
        }
        let end = self.device.mark()?;
        Ok((end.wait()? - start.wait()?) / CALLS as f64)
    }

    /// Forward and then backward of layer 0 from the case's inputs: y, dx and gradients.
    fn results(&mut self, backward: bool) -> anyhow::Result<[Vec<f32>; 3]> {
        self.run(0, false)?;
        let y = self.device.download_act(In::all(&self.y))?.wait()?;
        if backward {
            // The same gradient comes in on every device.
            self.device.upload_act(Out::all(&mut self.y), &self.case.y)?;
            self.run(0, true)?;
        }
        let dx = self.device.download_act(In::all(&self.dx))?.wait()?;
        Ok([y, dx, self.device.download_wide(In::all(&self.grads))?.wait()?])
    }
}

/// Measures the groups that were asked for.
pub fn smlm<D: Device>(
    device: &D,
    config: &BaseConfig,
    args: &SmlmArgs,
    report: &Report,
) -> anyhow::Result<()> {
    ensure!(args.segments > 0 && args.rows >= args.segments, "each segment needs a row");
    ensure!(args.ranks.iter().all(|rank| (1..=256).contains(rank)), "ranks are 1 to 256");
    let cpu = Cpu::<f32>::new(0)?;
    report.head();
    let all = [GroupName::Qkv, GroupName::O, GroupName::GateUp, GroupName::Down];
    for name in all.into_iter().filter(|name| args.group.is_none_or(|wanted| wanted == *name)) {
        let case = Case::new(config, args, name)?;
        let layers = config.layers.min(LAYERS);
        let mut bench = Bench::new(device, &case, layers)?;
        let found = bench.results(args.backward)?;
        let expected = Bench::new(&cpu, &case, layers)?.results(args.backward)?;
        let (y, dx) = (case.group.width, case.group.input);
        let mut errors = vec![error(&found[0], &expected[0], y)];
        if args.backward {
            errors.push(error(&found[1], &expected[1], dx));
            errors.push(error(&found[2], &expected[2], found[2].len()));
        }
        let error = errors.into_iter().fold(0.0, f64::max);
        ensure!(
            error <= TOLERANCE,
            "{}: relative error {error:.1e} against the CPU",
            name_of(&case)
        );
        for backward in [false, true].into_iter().take(1 + usize::from(args.backward)) {
            let secs = bench.time(backward)?;
            let bytes = if backward { case.backward_bytes() } else { case.forward_bytes() };
            let details = format!(
                "{} {}: {:.1} us, {:.1} MB, error {error:.1e}",
                name_of(&case),
                if backward { "backward" } else { "forward" },
                secs * 1e6,
                bytes as f64 / 1e6,
            );
            let ceiling = Some(READ_BYTES_PER_SEC / 1e9);
            report.line("smlm", bytes as f64 / secs / 1e9, "GB/s", ceiling, &details);
        }
    }
    Ok(())
}

fn name_of(case: &Case) -> String {
    let segments = case.segments.len() / SegmentRow::WIDTH;
    format!("{} {} rows, {segments} segments", case.group.name, case.rows)
}

/// Largest relative error of a row; a number that is none counts as infinite.
fn error(found: &[f32], expected: &[f32], width: usize) -> f64 {
    let row = |(found, expected): (&[f32], &[f32])| {
        let (mut off, mut size) = (0.0, 0.0);
        for (a, b) in found.iter().zip(expected) {
            off += f64::from(a - b).powi(2);
            size += f64::from(*b).powi(2);
        }
        let relative = (off / size.max(f64::MIN_POSITIVE)).sqrt();
        if relative.is_nan() { f64::INFINITY } else { relative }
    };
    found.chunks(width).zip(expected.chunks(width)).map(row).fold(0.0, f64::max)
}
