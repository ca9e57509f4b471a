//! Opening of whole bases, and what is said of tensors and files that do not fit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

use super::{BASES, golden};
use crate::base::safetensor::{Entry, read_entries};
use crate::base::{BaseError, BaseFiles};

/// A copy of a golden base that a test may hurt.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(golden(&format!("bases/{name}"))).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "expected.safetensors" {
            fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
    }
    dir
}

fn error_of(dir: &Path) -> String {
    match BaseFiles::open(dir) {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites `model.safetensors` as `change` leaves it.
fn rewrite(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = dir.join("model.safetensors");
    let file = fs::read(&path).unwrap();
    let own = |(name, Entry { stored, shape, bytes }): (String, Entry)| {
        let dtype = match stored.unwrap().name() {
            "bf16" => Dtype::BF16,
            "f16" => Dtype::F16,
            _ => Dtype::F32,
        };
        (name, (dtype, shape, file[bytes].to_vec()))
    };
    let mut tensors: Tensors = read_entries(&file).unwrap().into_iter().map(own).collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

#[test]
fn opens_every_golden_base() {
    for name in BASES {
        let files = BaseFiles::open(copy(name).path()).unwrap();
        assert!(files.tensor_bytes() > 20_000, "{name}");
        assert!(files.text("config.json").is_some());
        assert_eq!(files.text("tokenizer.json"), None);
    }
}

#[test]
fn embedded_bytes_are_the_same_base() {
    for (name, weights) in [
        ("qwen3", &["model.safetensors"][..]),
        (
            "sharded",
            &[
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
        ),
    ] {
        let dir = golden(&format!("bases/{name}"));
        let texts = ["config.json", "generation_config.json"];
        let read = |file: &&'static str| {
            let bytes: &'static [u8] = fs::read(dir.join(file)).unwrap().leak();
            (*file, bytes)
        };
        let files: Vec<_> = texts.iter().chain(weights).map(read).collect();
        let embedded = BaseFiles::from_bytes(&files).unwrap();
        let mapped = BaseFiles::open(copy(name).path()).unwrap();
        assert_eq!(embedded.fingerprint().unwrap(), mapped.fingerprint().unwrap());
    }
    let error = BaseFiles::from_bytes(&[]).err().unwrap().to_string();
    assert_eq!(error, "model.safetensors: is missing");
}

#[test]
fn fingerprint_is_of_content_not_of_files() {
    let dir = copy("sharded");
    let print = |dir: &Path| BaseFiles::open(dir).unwrap().fingerprint().unwrap();
    let sharded = print(dir.path());
    assert_eq!(sharded.len(), 64);
    // One file instead of two.
    let mut all = Tensors::new();
    for shard in 1..=2 {
        let name = format!("model-0000{shard}-of-00002.safetensors");
        fs::rename(dir.path().join(name), dir.path().join("model.safetensors")).unwrap();
        rewrite(dir.path(), |tensors| all.append(tensors));
    }
    rewrite(dir.path(), |tensors| *tensors = all);
    assert_eq!(print(dir.path()), sharded);
    // One bit of one weight.
    rewrite(dir.path(), |tensors| tensors.get_mut("model.norm.weight").unwrap().2[0] ^= 1);
    let hurt = print(dir.path());
    assert_ne!(hurt, sharded);
    // A tokenizer.
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert_ne!(print(dir.path()), hurt);
}

#[test]
fn large_bases_are_fingerprinted_by_samples() {
    let print = |at: usize| {
        let dir = copy("qwen3");
        rewrite(dir.path(), |all| all.get_mut("lm_head.weight").unwrap().2[at] ^= 1);
        BaseFiles::open(dir.path()).unwrap().hash(1000, 64).unwrap()
    };
    // The head has 96 · 32 · 2 bytes: its first, middle and last 64 are read.
    let unhurt = BaseFiles::open(copy("qwen3").path()).unwrap().hash(1000, 64).unwrap();
    for read in [0, 63, 3040, 3103, 6080, 6143] {
        assert_ne!(print(read), unhurt, "{read}");
    }
    for skipped in [64, 3039, 3104, 6079] {
        assert_eq!(print(skipped), unhurt, "{skipped}");
    }
}

#[test]
fn refuses_tensors_that_are_not_as_promised() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let dir = copy("qwen3");
    let check = |change: &dyn Fn(&mut Tensors), message: &str| {
        let dir = copy("qwen3");
        rewrite(dir.path(), change);
        assert_eq!(error_of(dir.path()), message);
    };
    check(&|all| drop(all.remove(Q)), &format!("tensor `{Q}`: is missing"));
    check(
        &|all| all.get_mut(Q).unwrap().1 = vec![32, 64],
        &format!("tensor `{Q}`: has shape [32, 64], config.json promises [64, 32]"),
    );
    check(
        &|all| all.get_mut(Q).unwrap().0 = Dtype::I16,
        &format!("tensor `{Q}`: stored as I16; supported are BF16, F16 and F32"),
    );
    check(
        &|all| drop(all.insert("model.extra".into(), (Dtype::F32, vec![1], vec![0; 4]))),
        "tensor `model.extra`: is none of a Qwen3 base as config.json has it",
    );
    check(&|all| drop(all.remove("lm_head.weight")), "tensor `lm_head.weight`: is missing");
    rewrite(dir.path(), |all| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
        all.insert(name.into(), (Dtype::I64, vec![1], vec![0; 8]));
    });
    assert!(BaseFiles::open(dir.path()).is_ok(), "a constant of old versions is ignored");
}

#[test]
fn an_output_bias_may_only_be_zero() {
    const BIAS: &str = "model.layers.1.self_attn.o_proj.bias";
    let dir = copy("odd");
    rewrite(dir.path(), |all| drop(all.remove(BIAS)));
    assert!(BaseFiles::open(dir.path()).is_ok());
    let dir = copy("odd");
    rewrite(dir.path(), |all| all.get_mut(BIAS).unwrap().2[4..8].fill(1));
    let error = error_of(dir.path());
    assert!(error.starts_with(&format!("tensor `{BIAS}`: is not zero")), "{error}");
}

#[test]
fn refuses_damaged_and_missing_files() {
    let dir = copy("llama2");
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 5, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = error_of(dir.path());
        assert!(error.starts_with("model.safetensors: "), "{error}");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert!(error_of(dir.path()).contains("bytes of tensors are promised"));
    fs::remove_file(&path).unwrap();
    assert_eq!(error_of(dir.path()), "model.safetensors: is missing");
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let missing = dir.path().join("nowhere");
    assert!(matches!(BaseFiles::open(&missing), Err(BaseError::Io { .. })));
}

#[test]
fn refuses_an_index_that_does_not_fit() {
    let dir = copy("sharded");
    let second = dir.path().join("model-00002-of-00002.safetensors");
    let first = dir.path().join("model-00001-of-00002.safetensors");
    let kept = fs::read(&second).unwrap();
    fs::remove_file(&second).unwrap();
    let error = error_of(dir.path());
    assert!(error.starts_with("model-00002-of-00002.safetensors: is missing"), "{error}");
    fs::copy(&first, &second).unwrap();
    let error = error_of(dir.path());
    assert!(error.contains("lies in both model-00001-of-00002.safetensors and"), "{error}");
    fs::write(&second, kept).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, "{\"weight_map\": {\"lm_head.weight\": \"../elsewhere\"}}").unwrap();
    assert!(error_of(dir.path()).starts_with("../elsewhere: is missing"));
    fs::write(&index, "{\"weight_map\": [1]}").unwrap();
    assert!(error_of(dir.path()).contains("weight_map"));
    fs::remove_file(&index).unwrap();
    assert!(BaseFiles::open(dir.path()).is_ok(), "without an index every file counts");
}

#[test]
fn promised_sizes_near_the_end_of_numbers_do_not_wrap() {
    // Sixteen tensors of 2^60 - 1 bytes: their sum and the header's length pass 2^64.
    let each = (1u64 << 60) - 1;
    let part = |at: u64| {
        let (from, to) = (at * each, (at + 1) * each);
        format!("\"t{at}\":{{\"dtype\":\"U8\",\"shape\":[{each}],\"data_offsets\":[{from},{to}]}}")
    };
    let header = format!("{{{}}}", (0..16).map(part).collect::<Vec<_>>().join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    let error = read_entries(&file).unwrap_err();
    assert!(error.contains("bytes of tensors are promised, 0 are there"), "{error}");
}
