//! A job's resume point as bytes: all that a trainer needs to go on as if it had never stopped,
//! to the bit. It is internal, never listed; what clients see is a checkpoint.
//!
//! One safetensors file. Tensors: `params`, `m`, `v` (F32, flat, in the adapter's canonical
//! layout), `sums` (F64) and `step_metrics` (U8, the CSV so far). The one metadata entry
//! `loquetier_resume` is a JSON [`Head`] with a SHA-256 per tensor and one over the head itself,
//! so a torn, mixed or foreign file is refused before anything of it is used. Knows no store.

use super::spec::JobSpec;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// Version of the file's layout; another one is refused.
const VERSION: u32 = 1;
const METADATA_KEY: &str = "loquetier_resume";

const _: () = assert!(cfg!(target_endian = "little"), "tensors are read as they lie in the file");

/// Where a job stands between two optimizer steps.
#[derive(Clone, Debug, PartialEq)]
pub struct ResumeState {
    /// What it trains.
    pub spec: JobSpec,
    /// Completed optimizer steps.
    pub step: usize,
    /// Rows that went through training so far, over all epochs.
    pub trained_tokens: u64,
    /// `step_metrics.csv` so far, header included.
    pub step_metrics: String,
    /// Running sums of the trainer, in an order of its own; kept to the bit.
    pub sums: Vec<f64>,
    /// Master weights, flat.
    pub params: Vec<f32>,
    /// First moments, as long as the weights.
    pub m: Vec<f32>,
    /// Second moments, as long as the weights.
    pub v: Vec<f32>,
}

/// What serving a job needs of its resume point.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedParams {
    /// What the job trains.
    pub spec: JobSpec,
    /// Completed optimizer steps.
    pub step: usize,
    /// Master weights, flat.
    pub params: Vec<f32>,
}

/// Why a resume point cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum ResumeFault {
    /// The bytes are no safetensors file, or a torn one.
    #[error("resume point is not readable: {0}")]
    Unreadable(String),
    /// A safetensors file, but of something else.
    #[error("file is not a resume point: {0}")]
    Foreign(String),
    /// Written by another version of this program.
    #[error("resume point has version {found}, this build reads version {VERSION}")]
    Version {
        /// Version in the file.
        found: u32,
    },
    /// A part's bytes are not those that were written.
    #[error("resume point is damaged: {0} does not match its hash")]
    Damaged(&'static str),
    /// Weights and moments differ in number.
    #[error("resume point has {params} weights, but {m} and {v} moments")]
    Lengths {
        /// Number of weights.
        params: usize,
        /// Number of first moments.
        m: usize,
        /// Number of second moments.
        v: usize,
    },
}

/// The metadata entry. Field order counts: `head_hash` covers the JSON of all others.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u32,
    spec: JobSpec,
    step: usize,
    trained_tokens: u64,
    hashes: Hashes,
    head_hash: String,
}

/// SHA-256 per tensor, in hexadecimal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hashes {
    params: String,
    m: String,
    v: String,
    sums: String,
    step_metrics: String,
}

/// The version alone, readable whatever else a later version's head holds.
#[derive(Deserialize)]
struct HeadVersion {
    version: u32,
}

impl Head {
    fn of(state: &ResumeState) -> Result<Self, ResumeFault> {
        let mut head = Self {
            version: VERSION,
            spec: state.spec.clone(),
            step: state.step,
            trained_tokens: state.trained_tokens,
            hashes: Hashes {
                params: hash(bytemuck::cast_slice(&state.params)),
                m: hash(bytemuck::cast_slice(&state.m)),
                v: hash(bytemuck::cast_slice(&state.v)),
                sums: hash(bytemuck::cast_slice(&state.sums)),
                step_metrics: hash(state.step_metrics.as_bytes()),
            },
            head_hash: String::new(),
        };
        head.head_hash = hash(head.to_json()?.as_bytes());
        Ok(head)
    }

    fn read(bytes: &[u8]) -> Result<Self, ResumeFault> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(unreadable)?;
        let entry = metadata.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY));
        let entry = entry.ok_or_else(|| ResumeFault::Foreign(format!("no {METADATA_KEY}")))?;
        let foreign = |error: serde_json::Error| ResumeFault::Foreign(error.to_string());
        let HeadVersion { version } = serde_json::from_str(entry).map_err(foreign)?;
        if version != VERSION {
            return Err(ResumeFault::Version { found: version });
        }
        let mut head: Self = serde_json::from_str(entry).map_err(foreign)?;
        let written = std::mem::take(&mut head.head_hash);
        if hash(head.to_json()?.as_bytes()) != written {
            return Err(ResumeFault::Damaged("its head"));
        }
        Ok(head)
    }

    fn to_json(&self) -> Result<String, ResumeFault> {
        serde_json::to_string(self).map_err(unreadable)
    }
}

/// The file's bytes; the same state gives the same bytes.
pub fn encode(state: &ResumeState) -> Result<Vec<u8>, ResumeFault> {
    check_lengths(state.params.len(), state.m.len(), state.v.len())?;
    let head = Head::of(state)?.to_json()?;
    let tensors = [
        ("params", view(Dtype::F32, &state.params)?),
        ("m", view(Dtype::F32, &state.m)?),
        ("v", view(Dtype::F32, &state.v)?),
        ("sums", view(Dtype::F64, &state.sums)?),
        ("step_metrics", view(Dtype::U8, state.step_metrics.as_bytes())?),
    ];
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), head)]);
    safetensors::serialize(tensors, Some(metadata)).map_err(unreadable)
}

/// Reads a whole resume point and checks every byte of it.
pub fn decode(bytes: &[u8]) -> Result<ResumeState, ResumeFault> {
    let head = Head::read(bytes)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(unreadable)?;
    let params: Vec<f32> = values(&tensors, "params", Dtype::F32, &head.hashes.params)?;
    let m: Vec<f32> = values(&tensors, "m", Dtype::F32, &head.hashes.m)?;
    let v: Vec<f32> = values(&tensors, "v", Dtype::F32, &head.hashes.v)?;
    check_lengths(params.len(), m.len(), v.len())?;
    let csv: Vec<u8> = values(&tensors, "step_metrics", Dtype::U8, &head.hashes.step_metrics)?;
    Ok(ResumeState {
        spec: head.spec,
        step: head.step,
        trained_tokens: head.trained_tokens,
        step_metrics: String::from_utf8(csv).map_err(unreadable)?,
        sums: values(&tensors, "sums", Dtype::F64, &head.hashes.sums)?,
        params,
        m,
        v,
    })
}

/// Reads only what serving needs: the moments, two thirds of the file, are neither hashed nor
/// copied.
pub fn decode_params(bytes: &[u8]) -> Result<SavedParams, ResumeFault> {
    let head = Head::read(bytes)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(unreadable)?;
    let params = values(&tensors, "params", Dtype::F32, &head.hashes.params)?;
    Ok(SavedParams { spec: head.spec, step: head.step, params })
}

fn check_lengths(params: usize, m: usize, v: usize) -> Result<(), ResumeFault> {
    if params == m && params == v { Ok(()) } else { Err(ResumeFault::Lengths { params, m, v }) }
}

fn view<T: bytemuck::NoUninit>(dtype: Dtype, values: &[T]) -> Result<TensorView<'_>, ResumeFault> {
    TensorView::new(dtype, vec![values.len()], bytemuck::cast_slice(values)).map_err(unreadable)
}

/// A tensor's values, once its type and hash are right.
fn values<T: bytemuck::Pod>(
    tensors: &SafeTensors<'_>,
    name: &'static str,
    dtype: Dtype,
    written: &str,
) -> Result<Vec<T>, ResumeFault> {
    let tensor = tensors.tensor(name).map_err(unreadable)?;
    if tensor.dtype() != dtype {
        return Err(ResumeFault::Foreign(format!("{name} is {:?}", tensor.dtype())));
    }
    if hash(tensor.data()) != written {
        return Err(ResumeFault::Damaged(name));
    }
    let mut values = vec![T::zeroed(); tensor.data().len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(tensor.data());
    Ok(values)
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unreadable(error: impl std::fmt::Display) -> ResumeFault {
    ResumeFault::Unreadable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::spec::tests::awkward_spec;
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    fn state() -> ResumeState {
        let float = |i: u32| f32::from_bits(0x3F80_0000 ^ i.wrapping_mul(0x9E37_79B9) >> 3);
        ResumeState {
            spec: awkward_spec(),
            step: 17,
            trained_tokens: u64::MAX,
            step_metrics: "step,train_loss\n1,0.5\n".to_owned(),
            sums: vec![0.1 + 0.2, -0.0, f64::MIN_POSITIVE / 2.0, 1e300],
            params: (0..40).map(float).collect(),
            m: (40..80).map(float).collect(),
            v: (80..120).map(float).collect(),
        }
    }

    /// Equality to the bit: −0.0 is not 0.0, and a NaN equals itself.
    fn assert_same(a: &ResumeState, b: &ResumeState) {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let wide = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&a.params), bits(&b.params));
        assert_eq!((bits(&a.m), bits(&a.v)), (bits(&b.m), bits(&b.v)));
        assert_eq!(wide(&a.sums), wide(&b.sums));
        assert_eq!((&a.spec, a.step, a.trained_tokens), (&b.spec, b.step, b.trained_tokens));
        assert_eq!(a.step_metrics, b.step_metrics);
    }

    #[test]
    fn a_state_comes_back_to_the_bit() {
        let mut saved = state();
        saved.params[3] = f32::from_bits(0x7FC0_1234);
        saved.sums.push(f64::from_bits(0xFFF8_0000_0000_4321));
        let bytes = encode(&saved).unwrap();
        assert_eq!(bytes, encode(&saved).unwrap());
        assert_same(&decode(&bytes).unwrap(), &saved);
        let served = decode_params(&bytes).unwrap();
        assert_eq!((served.spec, served.step), (saved.spec, saved.step));
        assert_eq!(served.params[3].to_bits(), 0x7FC0_1234);
    }

    #[test]
    fn an_empty_state_comes_back() {
        let empty = ResumeState {
            step_metrics: String::new(),
            sums: Vec::new(),
            params: Vec::new(),
            m: Vec::new(),
            v: Vec::new(),
            ..state()
        };
        assert_same(&decode(&encode(&empty).unwrap()).unwrap(), &empty);
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = encode(&state()).unwrap();
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
            assert!(decode_params(&bytes[..length]).is_err());
        }
    }

    #[test]
    fn any_mutation_is_refused_or_changes_nothing() {
        let saved = state();
        let bytes = encode(&saved).unwrap();
        let edit = (0..bytes.len(), any::<u8>(), 0..4u8, 0..bytes.len());
        let edits = prop::collection::vec(edit, 1..4);
        let config = Config { failure_persistence: None, ..Config::with_cases(crate::soak(4000)) };
        TestRunner::new(config)
            .run(&edits, |edits| {
                let mut bytes = bytes.clone();
                for (at, value, kind, other) in edits {
                    let last = bytes.len() - 1;
                    let (at, other) = (at.min(last), other.min(last));
                    match kind {
                        0 => bytes[at] ^= value.max(1),
                        1 => bytes.insert(at, value),
                        2 => drop(bytes.remove(at)),
                        _ => bytes.swap(at, other),
                    }
                }
                if let Ok(read) = decode(&bytes) {
                    assert_same(&read, &saved);
                }
                if let Ok(read) = decode_params(&bytes) {
                    prop_assert_eq!(read.params, saved.params.clone());
                }
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn every_flipped_bit_of_a_tensor_is_noticed() {
        let bytes = encode(&state()).unwrap();
        let (header, _) = SafeTensors::read_metadata(&bytes).unwrap();
        for at in header + 8..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(matches!(decode(&bytes), Err(ResumeFault::Damaged(_))), "byte {at}");
        }
    }

    #[test]
    fn serving_does_not_read_the_moments() {
        let bytes = encode(&state()).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let m = tensors.tensor("m").unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
        let mut damaged = bytes.clone();
        damaged[m] ^= 1;
        assert!(matches!(decode(&damaged), Err(ResumeFault::Damaged("m"))));
        assert_eq!(decode_params(&damaged).unwrap().params, state().params);
    }

    #[test]
    fn other_files_and_versions_say_what_they_are() {
        let adapter = [("lora_A.weight", view(Dtype::F32, &[1.0f32]).unwrap())];
        let adapter = safetensors::serialize(adapter, None).unwrap();
        assert!(matches!(decode(&adapter), Err(ResumeFault::Foreign(_))));
        assert!(matches!(decode(b"PK\x03\x04 not ours at all"), Err(ResumeFault::Unreadable(_))));
        let head = HashMap::from([(METADATA_KEY.to_owned(), r#"{"version":2}"#.to_owned())]);
        let none: [(&str, TensorView<'_>); 0] = [];
        let later = safetensors::serialize(none, Some(head)).unwrap();
        assert!(matches!(decode(&later), Err(ResumeFault::Version { found: 2 })));
    }

    #[test]
    fn a_tensor_of_another_type_is_refused() {
        let mut bytes = encode(&state()).unwrap();
        let at = bytes.windows(5).position(|window| window == b"\"F32\"").unwrap();
        bytes[at + 1] = b'I';
        let fault = decode(&bytes).unwrap_err();
        assert!(matches!(fault, ResumeFault::Foreign(_)), "{fault}");
    }

    #[test]
    fn moments_must_match_the_weights() {
        let mut torn = state();
        torn.v.pop();
        let fault = encode(&torn).unwrap_err();
        assert_eq!(fault.to_string(), "resume point has 40 weights, but 40 and 39 moments");
    }
}
