//! All that outlives a process or crosses one: rows, queue, objects. The only crate that knows
//! SQL, Redis or object keys. It knows no HTTP, no model and no device.

pub mod db;
mod error;
mod folder;
pub mod ids;
pub mod objects;
pub mod queue;
pub mod sweep;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

pub use db::Db;
pub use error::{Error, Result};
use folder::FolderLock;
pub use objects::Objects;
use queue::{LocalQueue, Queue, QueueLimits, RedisOptions, RedisQueue};

/// Folder of the objects inside the data folder.
const OBJECTS_FOLDER: &str = "objects";

/// The three seams of one running process. Cheap to clone.
#[derive(Clone)]
pub struct Storage {
    /// Rows.
    pub db: Db,
    /// Messages between gateways and workers.
    pub queue: Arc<dyn Queue>,
    /// Files, adapters, resume points.
    pub objects: Objects,
    /// Held while any clone lives; the shared form has no folder.
    _folder: Option<Arc<FolderLock>>,
}

impl Storage {
    /// Opens the embedded form in a data folder, which is made if need be: SQLite, local objects,
    /// in-process queue. [`Error::FolderInUse`] while another process has it open this way.
    pub async fn open_embedded(data_dir: &Path) -> Result<Self> {
        Self::open_embedded_with(data_dir, QueueLimits::default()).await
    }

    /// [`Storage::open_embedded`] with other bounds of the queue.
    pub async fn open_embedded_with(data_dir: &Path, limits: QueueLimits) -> Result<Self> {
        folder::create(data_dir)?;
        let lock = FolderLock::take(data_dir)?;
        let db = Db::open_folder(data_dir).await?;
        let objects = Objects::open_local(&data_dir.join(OBJECTS_FOLDER))?;
        let queue = Arc::new(LocalQueue::new(limits));
        Ok(Self { db, queue, objects, _folder: Some(Arc::new(lock)) })
    }

    /// Opens the form that many processes share, its database migrated before: Postgres
    /// (`postgres://…`), Redis (`redis://…`) and the objects given. Fails where one of them does not answer.
    pub async fn open_shared(
        database_url: &str,
        redis_url: &str,
        redis: RedisOptions,
        objects: Objects,
    ) -> Result<Self> {
        let db = Db::open_shared(database_url).await?;
        let queue = Arc::new(RedisQueue::connect(redis_url, redis).await?);
        Ok(Self { db, queue, objects, _folder: None })
    }

    /// A form put together from its parts; nothing keeps other processes out.
    pub fn of_parts(db: Db, queue: Arc<dyn Queue>, objects: Objects) -> Self {
        Self { db, queue, objects, _folder: None }
    }

    /// Only the rows of a data folder, for `keys create|list|revoke`: works beside a running
    /// `serve`, and before the first one.
    pub async fn open_rows(data_dir: &Path) -> Result<Db> {
        folder::create(data_dir)?;
        Db::open_folder(data_dir).await
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Storage").field("db", &self.db).finish_non_exhaustive()
    }
}
