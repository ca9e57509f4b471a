//! `loquetier bench`: how fast this build is, measured on the engine itself in this process, each
//! figure beside what the hardware allows and what others reach.

mod args;
mod base;
mod data;
mod decode;
mod figures;
mod finetune;
mod gateway;
mod load;
mod random;
mod rig;
mod smlm;
mod suite;

pub use args::BenchArgs;

use crate::device::{self, Opened};
use args::{CommonArgs, GatewayArgs, Measure};
use base::Base;
use figures::{Origin, Report};
use kernels::Device;
use suite::{Lengths, Suite};

/// Runs what the command line asks for. Blocks; the engine has a thread of its own.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let common = &args.common;
    if let Measure::Gateway(args) = &args.measure {
        return measure_gateway(common, args);
    }
    match device::open(common.device, common.threads, common.batch_invariant)? {
        Opened::Cpu(device) => measure(device, args),
        Opened::Cuda(device) => measure(*device, args),
    }
}

fn measure_gateway(common: &CommonArgs, args: &GatewayArgs) -> anyhow::Result<()> {
    if let Some(folder) = &args.serve_folder {
        return gateway::serve(args, folder);
    }
    let origin = Origin::of_this_run(common.commit.clone());
    let report = Report::new("cpu", "gateway and queue", origin, common.json.as_deref())?;
    gateway::measure(args, common.threads, report)
}

fn measure<D: Device>(device: D, args: &BenchArgs) -> anyhow::Result<()> {
    let common = &args.common;
    let CommonArgs { repeats, quick, json, commit, .. } = common;
    let base = Base::open(common)?;
    let origin = Origin::of_this_run(commit.clone());
    let report = Report::new(&device.name(), &base.name, origin, json.as_deref())?;
    let lengths = if *quick { Lengths::quick() } else { Lengths::full() };
    match &args.measure {
        Measure::Load => load::load(&device, &base, *repeats, &report),
        Measure::Smlm(args) => smlm::smlm(&device, base.config(), args, &report),
        Measure::Finetune(args) => {
            let lengths = lengths.finetune(args);
            Suite::start(device, base, lengths, common, report)?.finetune(args)
        }
        Measure::Decode(args) => {
            let lengths = lengths.decode(args);
            Suite::start(device, base, lengths, common, report)?.decode(args)
        }
        Measure::Prefill(args) => {
            let lengths = lengths.prefill(args);
            Suite::start(device, base, lengths, common, report)?.prefill(args)
        }
        Measure::All(args) => {
            Suite::start(device, base, lengths, common, report)?.all(args).map(drop)
        }
        Measure::Gateway(args) => gateway::measure(args, common.threads, report),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use kernels::Cpu;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArgs,
    }

    /// Every figure of the goals comes out of one short run on the CPU.
    #[test]
    fn all_figures_come_out_of_one_run() {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/data/pirate.jsonl");
        let line = ["bench", "all", "--quick", "--repeats", "1", "--seconds", "0", "--data", data];
        let args = Line::parse_from(line).bench;
        let Measure::All(all) = &args.measure else { panic!("all was asked for") };
        let device = Cpu::<f32>::new(1).expect("a device");
        let base = Base::open(&args.common).expect("the demo base");
        let origin = Origin { command: String::new(), commit: String::new() };
        let report = Report::new("cpu", &base.name, origin, None).expect("a report");
        let suite =
            Suite::start(device, base, Lengths::quick(), &args.common, report).expect("an engine");
        let values = suite.all(all).expect("figures");
        let ids: Vec<&str> = values.iter().map(|(id, _)| *id).collect();
        assert_eq!(
            ids,
            ["D1-base", "D1-adapter", "D2", "D3-1", "D3-32", "D4", "F1", "F4", "F2", "F3"]
        );
        let is_cost = |id: &str| id.starts_with("D3");
        assert!(
            values.iter().all(|(id, value)| value.is_finite() && (is_cost(id) || *value > 0.0))
        );
    }
}
