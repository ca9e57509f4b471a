//! Thousands of damaged files: each opens, or says in one clear line why not, and never panics.

use super::{Dice, assert_clear, golden_bytes, mutate};
use crate::base::safetensor::read_entries;
use crate::base::{BaseConfig, BaseFiles};

#[test]
fn damaged_configurations() {
    let mut refused = 0;
    for name in ["llama3", "qwen3", "sharded"] {
        let config = golden_bytes(&format!("bases/{name}/config.json"));
        let generation = golden_bytes(&format!("bases/{name}/generation_config.json"));
        let mut dice = Dice::new(name.len() as u64);
        for _ in 0..crate::soak(2000) as usize {
            let config = mutate(&config, config.len(), &mut dice);
            let generation = mutate(&generation, generation.len(), &mut dice);
            match BaseConfig::parse(&config, Some(&generation)) {
                Ok(config) => {
                    let tables = config.rope.tables(config.heads.head_dim, 2);
                    assert!(tables.cos.iter().chain(&tables.sin).all(|value| value.is_finite()));
                }
                Err(error) => {
                    assert_clear(error);
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn damaged_headers() {
    let file = golden_bytes("bases/qwen2/expected.safetensors");
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut dice = Dice::new(3);
    let mut refused = 0;
    for _ in 0..crate::soak(3000) as usize {
        let damaged = mutate(&file, header, &mut dice);
        match read_entries(&damaged) {
            Ok(entries) => {
                assert!(entries.values().all(|entry| entry.bytes.end <= damaged.len()));
            }
            Err(error) => {
                assert_clear(error);
                refused += 1;
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn damaged_bases() {
    let text = |name: &str| golden_bytes(&format!("bases/sharded/{name}"));
    let names = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let whole = names.map(text);
    let mut dice = Dice::new(5);
    let mut refused = 0;
    for _ in 0..600 {
        let hit = dice.roll(names.len());
        // Leaked: embedded files live as long as the program.
        let files: Vec<(&str, &'static [u8])> = names
            .iter()
            .zip(&whole)
            .enumerate()
            .map(|(at, (name, bytes))| {
                let damaged = (at == hit).then(|| mutate(bytes, 3000, &mut dice));
                (*name, &*damaged.unwrap_or_else(|| bytes.clone()).leak())
            })
            .collect();
        match BaseFiles::from_bytes(&files) {
            Ok(files) => assert_eq!(files.fingerprint().unwrap().len(), 64),
            Err(error) => {
                assert_clear(error);
                refused += 1;
            }
        }
    }
    assert!(refused > 200, "{refused}");
}
