//! Immutable objects: files, adapters, resume points, on a local disk or in S3. Keys are an enum;
//! nothing a client wrote ever becomes part of a path. An object is there whole or not at all.

mod http;
mod key;
mod listing;
mod s3;
mod uploads;
mod writer;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path as StorePath;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};

use crate::error::{Error, Result};
pub(crate) use http::is_away;
pub use key::{ObjectKey, ObjectKind, imported_adapter_folder, job_adapter_folder};
pub use s3::{S3Config, S3Limits};
pub use uploads::UnfinishedUpload;
pub use writer::ObjectWriter;

/// Objects above this are stored in parts: one request must end within its time limit.
const WHOLE_BYTES: usize = 2 * writer::PART_BYTES;

/// One object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectEntry {
    /// Its full name in the store.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// Unix seconds by the store's clock.
    pub modified_at: i64,
}

/// The object store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    /// None on a disk.
    bucket: Option<Arc<uploads::Bucket>>,
}

impl Objects {
    /// Objects in a local folder, which is made if need be. Parts of uploads that a killed process
    /// left behind are removed, so only one process may open the folder.
    pub fn open_local(folder: &Path) -> Result<Self> {
        crate::folder::create(folder)?;
        remove_unfinished(folder)?;
        // fsync: a row that names an object must never outlive it in a power cut.
        let store = LocalFileSystem::new_with_prefix(folder)?.with_fsync(true);
        Ok(Self { store: Arc::new(store), bucket: None })
    }

    /// Objects in a bucket. Sends nothing; [`Objects::check`] says whether the store answers.
    pub fn open_s3(config: &S3Config) -> Result<Self> {
        let (store, bucket) = s3::open(config)?;
        Ok(Self { store, bucket: Some(Arc::new(bucket)) })
    }

    /// Whether the store answers and lets its objects be listed.
    pub async fn check(&self) -> Result<()> {
        let folder = StorePath::from(ObjectKind::Files.folder());
        self.store.list(Some(&folder)).try_next().await?;
        Ok(())
    }

    /// Stores an object whole; one already there under the key is replaced whole.
    pub async fn put(&self, key: &ObjectKey, bytes: Bytes) -> Result<()> {
        if bytes.len() > WHOLE_BYTES {
            let mut writer = self.writer(key).await?;
            writer.write(bytes).await?;
            writer.finish().await?;
            return Ok(());
        }
        self.store.put(&key.path()?, PutPayload::from_bytes(bytes)).await?;
        Ok(())
    }

    /// Begins an upload of unknown size. Until [`ObjectWriter::finish`] returns, readers see
    /// nothing of it; dropped before, nothing remains. A process that is killed leaves the parts
    /// behind: on disk until the next start, in S3 until they are swept.
    pub async fn writer(&self, key: &ObjectKey) -> Result<ObjectWriter> {
        ObjectWriter::begin(self.store.clone(), key.path()?).await
    }

    /// The whole object in memory.
    pub async fn get(&self, key: &ObjectKey) -> Result<Bytes> {
        let path = key.path()?;
        let found = self.store.get(&path).await.map_err(|error| missing(error, &path))?;
        found.bytes().await.map_err(|error| missing(error, &path))
    }

    /// Size and bytes in chunks.
    pub async fn get_stream(
        &self,
        key: &ObjectKey,
    ) -> Result<(u64, BoxStream<'static, Result<Bytes>>)> {
        let path = key.path()?;
        let found = self.store.get(&path).await.map_err(|error| missing(error, &path))?;
        let bytes = found.meta.size;
        Ok((bytes, found.into_stream().map_err(Error::from).boxed()))
    }

    /// Size, or None if there is no such object.
    pub async fn head(&self, key: &ObjectKey) -> Result<Option<u64>> {
        match self.store.head(&key.path()?).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes an object; one that is not there is as good as removed.
    pub async fn delete(&self, key: &ObjectKey) -> Result<()> {
        match self.store.delete(&key.path()?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn missing(error: object_store::Error, path: &StorePath) -> Error {
    match error {
        object_store::Error::NotFound { .. } => Error::ObjectMissing(path.to_string()),
        other => other.into(),
    }
}

/// Removes what uploads cut short by a crash have left: the store writes to `name#number` first.
fn remove_unfinished(folder: &Path) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Folder { path, source }
    };
    for entry in std::fs::read_dir(folder).map_err(failed(folder))? {
        let path = entry.map_err(failed(folder))?.path();
        if path.is_dir() {
            remove_unfinished(&path)?;
        } else if path.file_name().is_some_and(|name| name.as_encoded_bytes().contains(&b'#')) {
            std::fs::remove_file(&path).map_err(failed(&path))?;
        }
    }
    Ok(())
}
