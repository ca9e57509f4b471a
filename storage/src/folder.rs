//! The data folder of the embedded form and who may use it.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use crate::error::{Error, Result};

/// File whose lock means "a `serve` owns this folder".
const LOCK_FILE: &str = "serve.lock";

/// Sole use of a data folder; ends when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the folder, or says that another process has it. Never waits.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK_FILE);
        let file = open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::FolderInUse(folder.to_owned())),
            Err(TryLockError::Error(source)) => Err(Error::Folder { path, source }),
        }
    }
}

/// Makes the folder and its parents.
pub(crate) fn create(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .map_err(|source| Error::Folder { path: folder.to_owned(), source })
}

/// Waits for the short lock under which a process creates or migrates the rows.
pub(crate) async fn lock_while_opening(path: &Path) -> Result<File> {
    let path = path.to_owned();
    let failed = path.clone();
    let locked = tokio::task::spawn_blocking(move || {
        let file = open(&path)?;
        file.lock().map_err(|source| Error::Folder { path, source })?;
        Ok(file)
    });
    match locked.await {
        Ok(outcome) => outcome,
        Err(stopped) => Err(Error::Folder { path: failed, source: std::io::Error::other(stopped) }),
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|source| Error::Folder { path: path.to_owned(), source })
}
