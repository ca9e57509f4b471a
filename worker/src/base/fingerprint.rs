//! The fingerprint of a base: differs where texts or weights differ, however files are split.

use sha2::{Digest, Sha256};

use super::error::BaseError;
use super::files::BaseFiles;

/// Tensors above this sum of bytes are fingerprinted by samples.
const WHOLE_HASH_LIMIT_BYTES: usize = 2 << 30;
/// Bytes of one sample: taken from the start, middle and end of a tensor.
const SAMPLE_BYTES: usize = 64 << 10;

impl BaseFiles {
    /// SHA-256, in hex, of the text files and of every tensor's name, shape, type and content, in
    /// name order: the same for a base however it is split into files. Of tensors that sum to more
    /// than 2 GiB only the first, middle and last 64 KiB of each are read, so that start stays
    /// fast.
    pub fn fingerprint(&self) -> Result<String, BaseError> {
        self.hash(WHOLE_HASH_LIMIT_BYTES, SAMPLE_BYTES)
    }

    /// As [`BaseFiles::fingerprint`], with the limit and the sample given.
    pub(super) fn hash(&self, limit: usize, sample: usize) -> Result<String, BaseError> {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for (name, text) in &self.texts {
            field(name.as_bytes());
            field(text.bytes());
        }
        let sampled = self.tensor_bytes() > limit;
        for (name, tensor) in &self.tensors {
            let (bytes, stored) = self.raw(name)?;
            field(name.as_bytes());
            field(format!("{} {:?}", stored.name(), tensor.entry.shape).as_bytes());
            if sampled && bytes.len() > 3 * sample {
                let middle = (bytes.len() - sample) / 2;
                for start in [0, middle, bytes.len() - sample] {
                    field(&bytes[start..start + sample]);
                }
            } else {
                field(bytes);
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}
