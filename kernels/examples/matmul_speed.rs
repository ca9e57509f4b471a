//! Speed of the CPU device's matrix product at the demo base's shapes, forward and backward, for
//! one decoded row and for a micro-batch: `cargo run -p kernels --example matmul_speed`.

use std::time::Instant;

use kernels::{Cpu, Device, In, LinearShape, Out};

/// (name, input, output)
const LAYERS: [(&str, usize, usize); 5] = [
    ("q/k/v", 256, 512),
    ("o", 256, 256),
    ("gate/up", 256, 1536),
    ("down", 768, 256),
    ("head", 256, 4096),
];

fn best_seconds(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed().as_millis() < 250 {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

fn main() -> kernels::Result<()> {
    for threads in [1, 2] {
        let cpu = Cpu::<f32>::new(threads)?;
        println!("{} · {threads} threads · best GFLOP/s (µs)", cpu.numerics());
        for rows in [1, 512] {
            for (name, input, output) in LAYERS {
                let shape = LinearShape { rows, input, output };
                let values = |len: usize| (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 100.0);
                let weight: Vec<f32> = values(input * output).collect();
                let (mut x, mut y): (Vec<f32>, Vec<f32>) =
                    (values(rows * input).collect(), values(rows * output).collect());
                let forward = best_seconds(|| {
                    cpu.linear(Out::all(&mut y), In::all(&x), In::all(&weight), None, shape)
                        .expect("cpu");
                });
                let backward = best_seconds(|| {
                    cpu.linear_backward(Out::all(&mut x), In::all(&y), In::all(&weight), shape)
                        .expect("cpu");
                });
                let gflop = 2e-9 * (rows * input * output) as f64;
                println!(
                    "{rows:4} rows {name:8} forward {:6.1} ({:7.1})  backward {:6.1} ({:7.1})",
                    gflop / forward,
                    forward * 1e6,
                    gflop / backward,
                    backward * 1e6
                );
            }
        }
    }
    Ok(())
}
