//! An upload in parts. It bounds its own memory and leaves nothing behind when given up.

use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path as StorePath;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};
use tokio::runtime::Handle;

use crate::error::Result;

/// Bytes buffered before a part of an upload is written; S3 wants at least 5 MiB.
pub(super) const PART_BYTES: usize = 8 << 20;

/// Parts of one upload written at once; with the buffer this bounds its memory to 24 MiB.
const PARTS_IN_FLIGHT: usize = 2;

/// An upload under way.
pub struct ObjectWriter {
    store: Arc<dyn ObjectStore>,
    path: StorePath,
    /// Taken when the upload ends, one way or another.
    parts: Option<WriteMultipart>,
    bytes: u64,
}

impl ObjectWriter {
    pub(super) async fn begin(store: Arc<dyn ObjectStore>, path: StorePath) -> Result<Self> {
        let upload = store.put_multipart(&path).await?;
        let parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        Ok(Self { store, path, parts: Some(parts), bytes: 0 })
    }

    /// Adds bytes; waits while the store is behind.
    pub async fn write(&mut self, mut chunk: Bytes) -> Result<()> {
        let parts = self.parts.as_mut().expect("an upload ends only once, by value");
        // A part at a time: a chunk of many parts must not put them all in flight at once.
        while !chunk.is_empty() {
            let piece = chunk.split_to(chunk.len().min(PART_BYTES));
            parts.wait_for_capacity(PARTS_IN_FLIGHT).await?;
            self.bytes += piece.len() as u64;
            parts.put(piece);
        }
        Ok(())
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes the object visible; returns its size.
    pub async fn finish(mut self) -> Result<u64> {
        let parts = self.parts.take().expect("an upload ends only once, by value");
        match parts.finish().await {
            Ok(_) => Ok(self.bytes),
            // The answer to the request that completed the upload may be lost on its way. Sent
            // again, the store knows of no such upload any more: the object itself decides.
            Err(error @ object_store::Error::NotFound { .. }) => {
                match self.store.head(&self.path).await {
                    Ok(found) if found.size == self.bytes => Ok(self.bytes),
                    _ => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives up and waits until nothing remains; dropping does the same without waiting.
    pub async fn abort(mut self) -> Result<()> {
        let parts = self.parts.take().expect("an upload ends only once, by value");
        parts.abort().await?;
        Ok(())
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        let (Some(parts), Ok(runtime)) = (self.parts.take(), Handle::try_current()) else { return };
        let path = self.path.clone();
        runtime.spawn(async move {
            if let Err(error) = parts.abort().await {
                tracing::warn!(%path, %error, "an upload given up may have left parts behind");
            }
        });
    }
}
