//! One safetensors file: header checked once, tensors as borrowed bytes afterwards.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::json::quoted;

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Stored {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    fn read(dtype: Dtype) -> Result<Self, String> {
        match dtype {
            Dtype::BF16 => Ok(Self::Bf16),
            Dtype::F16 => Ok(Self::F16),
            Dtype::F32 => Ok(Self::F32),
            other => Err(format!("stored as {other:?}; supported are BF16, F16 and F32")),
        }
    }
}

/// Where a tensor lies in its file, or why it cannot be read.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) stored: Result<Stored, String>,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Range<usize>,
}

/// Longest header, in bytes: as the format's own library limits it.
const HEADER_LIMIT: usize = 100_000_000;
/// Longest fault of a header, in characters: it may quote the header.
const FAULT_CHARS: usize = 200;

/// Reads the header of a whole file, or says what is wrong with it. Element types that are not
/// read are an error only of the tensor, so that a tensor which may be ignored does no harm.
///
/// Sizes are compared by subtraction: a hostile header may promise nearly 2^64 bytes.
pub(crate) fn read_entries(file: &[u8]) -> Result<BTreeMap<String, Entry>, String> {
    const LENGTH: usize = size_of::<u64>();
    let Some((length, rest)) = file.split_first_chunk::<LENGTH>() else {
        return Err(format!("{} bytes are too few for a safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().filter(|length| *length <= HEADER_LIMIT);
    let Some((header, data)) = header.and_then(|length| rest.split_at_checked(length)) else {
        return Err(format!("a header of {length} bytes does not fit: truncated or damaged"));
    };
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| quoted(&format!("malformed header: {error}"), FAULT_CHARS))?;
    if data.len() != metadata.data_len() {
        return Err(format!(
            "{} bytes of tensors are promised, {} are there: truncated or damaged",
            metadata.data_len(),
            data.len()
        ));
    }
    let start = file.len() - data.len();
    let entries = metadata.tensors().into_iter().map(|(name, tensor)| {
        let (from, to) = tensor.data_offsets;
        let entry = Entry {
            stored: Stored::read(tensor.dtype),
            shape: tensor.shape.clone(),
            bytes: start + from..start + to,
        };
        (name, entry)
    });
    Ok(entries.collect())
}

/// Elements as f32, exactly.
pub(crate) fn to_f32(bytes: &[u8], stored: Stored) -> Cow<'_, [f32]> {
    match stored {
        Stored::F32 => elements(bytes),
        Stored::F16 => elements::<f16>(bytes).iter().map(|value| value.to_f32()).collect(),
        Stored::Bf16 => elements::<bf16>(bytes).iter().map(|value| value.to_f32()).collect(),
    }
}

/// Elements as they are stored; copied only where the file does not align them.
pub(crate) fn elements<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
    bytes: &[u8],
) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(aligned) => Cow::Borrowed(aligned),
        Err(_) => {
            let values = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned);
            Cow::Owned(values.collect())
        }
    }
}
