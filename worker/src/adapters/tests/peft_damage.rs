//! Thousands of damaged uploads: each is read, or refused in one clear line; none panics.

use super::{dims, golden_files};
use crate::adapters::peft;
use crate::base::tests::{Dice, assert_clear, mutate};

#[test]
fn damaged_uploads() {
    let (config, weights) = golden_files("all-linear");
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let dims = dims("llama3");
    let mut dice = Dice::new(17);
    let mut refused = [0; 2];
    for round in 0..crate::soak(6000) as usize {
        let hit = round % 2;
        let (config, weights) = match hit {
            0 => (mutate(&config, config.len(), &mut dice), weights.clone()),
            _ => (config.clone(), mutate(&weights, header, &mut dice)),
        };
        match peft::read(&config, &weights, &dims, "golden/llama3") {
            Ok(adapter) => {
                assert!(adapter.values.iter().all(|value| value.is_finite()));
                assert!((adapter.shape.scale() as f32).is_finite());
            }
            Err(error) => {
                assert_clear(error);
                refused[hit] += 1;
            }
        }
    }
    assert!(refused.iter().all(|count| *count > 1000), "{refused:?}");
}
