//! Looking over what is stored: whole kinds, pages in order of names, and whose the store is.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as StorePath;
use object_store::{ObjectMeta, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::{ObjectEntry, ObjectKind, Objects};
use crate::error::{Error, Result};

/// Says whose the objects are.
const INSTALLATION: &str = "installation";

impl Objects {
    /// Every object of a kind, in no order.
    pub fn list(&self, kind: ObjectKind) -> BoxStream<'static, Result<ObjectEntry>> {
        let prefix = StorePath::from(kind.folder());
        self.store.list(Some(&prefix)).map_ok(entry).map_err(Error::from).boxed()
    }

    /// The first `most` objects of a kind with names beyond `after`, by name.
    pub async fn page(
        &self,
        kind: ObjectKind,
        after: Option<&str>,
        most: usize,
    ) -> Result<Vec<ObjectEntry>> {
        let prefix = StorePath::from(kind.folder());
        let after = after.map(|name| StorePath::parse(name).map_err(object_store::Error::from));
        let found = match after.transpose()? {
            Some(after) => self.store.list_with_offset(Some(&prefix), &after),
            None => self.store.list(Some(&prefix)),
        };
        // A bucket lists in the order of names, a disk in none.
        if self.bucket.is_some() {
            return Ok(found.take(most).map_ok(entry).try_collect().await?);
        }
        let first = found.try_fold(BTreeMap::new(), |mut first, meta| async {
            let entry = entry(meta);
            first.insert(entry.name.clone(), entry);
            if first.len() > most {
                first.pop_last();
            }
            Ok(first)
        });
        Ok(first.await?.into_values().collect())
    }

    /// Whether the objects belong to the installation of this name; the first to ask owns them.
    /// Rows of another installation say nothing about these objects.
    pub async fn belongs_to(&self, installation: &str) -> Result<bool> {
        let path = StorePath::from(INSTALLATION);
        let mine = PutPayload::from(Bytes::from(installation.to_owned()));
        let first = PutOptions::from(PutMode::Create);
        let found = match self.store.get(&path).await {
            Err(object_store::Error::NotFound { .. }) => {
                match self.store.put_opts(&path, mine, first).await {
                    Ok(_) => return Ok(true),
                    Err(object_store::Error::AlreadyExists { .. }) => self.store.get(&path).await?,
                    Err(error) => return Err(error.into()),
                }
            }
            found => found?,
        };
        Ok(found.bytes().await? == installation.as_bytes())
    }
}

fn entry(meta: ObjectMeta) -> ObjectEntry {
    ObjectEntry {
        name: meta.location.to_string(),
        bytes: meta.size,
        modified_at: meta.last_modified.timestamp(),
    }
}
