//! Copies: embedding, gather, scatter, uploads, moves, fills, conversions, replay.

use half::bf16;
use kernels::{In, Out};

use crate::lab::{Lab, Rng, assert_bits, assert_close};

pub fn rows_are_copied<D: Lab>(lab: &D) {
    let mut rng = Rng(9);
    let (width, rows) = (7, [3, 0, 3, 8]);
    let host = rng.values(9 * width);
    let (x, ids) = (lab.act(&host), lab.ints(&rows));
    let expected: Vec<f64> =
        rows.iter().flat_map(|row| host[*row as usize * width..][..width].to_vec()).collect();
    let embedded =
        lab.written(4 * width, |y| lab.embed(y, In::all(&x), In::all(&ids), width).unwrap());
    assert_bits("embedding", &embedded, &expected);
    let gathered =
        lab.written(4 * width, |y| lab.gather_rows(y, In::all(&x), In::all(&ids), width).unwrap());
    assert_bits("gather", &gathered, &expected);

    let targets = lab.ints(&[5, 0, 2]);
    let scattered = lab.written_partly(6 * width, |y| {
        lab.scatter_rows(y, In::range(&x, 0, 3 * width), In::all(&targets), width).unwrap();
    });
    for (row, source) in [Some(1), None, Some(2), None, None, Some(0)].into_iter().enumerate() {
        let untouched = vec![f64::NAN; width];
        let expected =
            source.map_or(&untouched[..], |source: usize| &host[source * width..][..width]);
        assert_bits("scatter", &scattered[row * width..][..width], expected);
    }
}

pub fn no_rows_are_no_fault<D: Lab>(lab: &D) {
    let (x, none) = (lab.act(&[1.0; 12]), lab.ints(&[]));
    let empty = lab.written(0, |y| lab.gather_rows(y, In::all(&x), In::all(&none), 4).unwrap());
    assert!(empty.is_empty());
    let after = lab.changed(&[2.0; 8], |y| {
        lab.scatter_rows(y, In::range(&x, 0, 0), In::all(&none), 4).unwrap();
    });
    assert_bits("untouched", &after, &[2.0; 8]);
}

pub fn memory_moves<D: Lab>(lab: &D) {
    let zeroed = lab.alloc_act(3).unwrap();
    assert_bits("fresh memory", &lab.read(&zeroed), &[0.0; 3]);
    let host: Vec<f64> = (0..10).map(f64::from).collect();
    for (from, to, len) in [(0, 3, 6), (4, 1, 5), (2, 2, 4), (0, 9, 1), (3, 0, 0)] {
        let mut expected = host.clone();
        expected.copy_within(from..from + len, to);
        let (mut act, mut wide) = (lab.act(&host), lab.wide(&host));
        lab.move_act(&mut act, from, to, len).unwrap();
        lab.move_wide(&mut wide, from, to, len).unwrap();
        assert_bits("moved", &lab.read(&act), &expected);
        assert_bits("moved wide", &lab.read_wide(&wide), &expected);
    }
    let (act, wide) = (lab.act(&host), lab.wide(&host));
    let copied = lab.written(4, |y| lab.copy_act(y, In::range(&act, 2, 4)).unwrap());
    assert_bits("copied", &copied, &host[2..6]);
    let copied = lab.written_wide(4, |y| lab.copy_wide(y, In::range(&wide, 1, 4)).unwrap());
    assert_bits("copied wide", &copied, &host[1..5]);
    let narrow = lab.written(10, |y| lab.narrow(y, In::all(&wide)).unwrap());
    assert_bits("narrow", &narrow, &host);
    let filled = lab.written(4, |y| lab.fill_act(y, 1.5).unwrap());
    assert_bits("filled", &filled, &[1.5; 4]);
    let filled = lab.written_wide(4, |y| lab.fill_wide(y, -2.0).unwrap());
    assert_bits("filled wide", &filled, &[-2.0; 4]);
}

pub fn bf16_is_exact<D: Lab>(lab: &D) {
    let bits: Vec<bf16> = [0.0f32, -1.5, 3.140625, 1e30, -1e-30].map(bf16::from_f32).to_vec();
    let expected: Vec<f64> = bits.iter().map(|value| value.to_f64()).collect();
    let uploaded = lab.written(5, |y| lab.upload_act_bf16(y, &bits).unwrap());
    assert_bits("bf16", &uploaded, &expected);
}

/// Fixed values, so that a random base is the same on every device.
pub fn random_fill_is_a_function_of_the_seed<D: Lab>(lab: &D) {
    let fill = |len, seed| lab.written(len, |y| lab.fill_uniform(y, seed, 2.0).unwrap());
    let values = fill(4000, 1 << 40 | 7);
    assert_close("a prefix", &fill(3, 1 << 40 | 7), &values[..3], 0.0);
    assert_close("known values", &values[..3], &[-0.050888, -0.243922, -1.392247], 4e-3);
    assert!(fill(4000, 8).iter().zip(&values).filter(|(a, b)| a == b).count() < 100);
    assert!(values.iter().all(|value| value.abs() <= 2.0));
    let mean = values.iter().sum::<f64>() / 4000.0;
    let square = values.iter().map(|value| value * value).sum::<f64>() / 4000.0;
    assert!(mean.abs() < 0.1 && (square - 4.0 / 3.0).abs() < 0.1, "{mean} {square}");
}

pub fn marks_follow_each_other<D: Lab>(lab: &D) {
    let mut x = lab.act(&vec![1.0; 100_000]);
    let marks = [0.0f32, 1.0, 2.0].map(|value| {
        lab.fill_act(Out::all(&mut x), value).unwrap();
        lab.mark().unwrap()
    });
    let times = marks.map(|mark| mark.wait().unwrap());
    assert!(times[0] > 0.0 && times.is_sorted(), "{times:?}");
}

pub fn replay_runs_each_time<D: Lab>(lab: &D) {
    let mut x = lab.act(&[1.0, 2.0]);
    let delta = lab.act(&[0.5, -1.0]);
    for _ in 0..3 {
        lab.replay(7, &mut |device| device.add(Out::all(&mut x), In::all(&delta))).unwrap();
    }
    assert_bits("three times", &lab.read(&x), &[2.5, -1.0]);
}
