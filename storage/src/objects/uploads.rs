//! Uploads in parts that nobody has finished: what a killed process leaves in a bucket, where it
//! takes room and is listed nowhere else. On a disk they go at the next start.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::{Method, Request};
use object_store::aws::AmazonS3;
use object_store::client::{HttpClient, HttpRequestBody};
use object_store::multipart::MultipartStore;
use object_store::path::Path as StorePath;
use object_store::signer::{SignedUrlOptions, Signer};
use serde::Deserialize;

use super::{ObjectKey, Objects};
use crate::error::{Error, Result};

/// Uploads in one listing.
const LISTED: &str = "1000";

/// How long the signature of a listing is good.
const SIGNED: Duration = Duration::from_secs(60);

/// The bucket itself, for what the store's interface lacks.
#[derive(Debug)]
pub(super) struct Bucket {
    pub(super) store: Arc<AmazonS3>,
    pub(super) client: HttpClient,
    /// Folder of our objects.
    pub(super) folder: Option<StorePath>,
}

/// An upload that has begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnfinishedUpload {
    /// What it would become.
    pub key: ObjectKey,
    /// The store's name for it.
    pub id: String,
    /// When it began by the store's clock, as in `2026-11-24T03:31:30`.
    pub begun: String,
    path: StorePath,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listing {
    #[serde(default)]
    upload: Vec<Listed>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    key: String,
    upload_id: String,
    initiated: String,
}

impl Objects {
    /// Our unfinished uploads, the first thousand by name.
    pub async fn unfinished_uploads(&self) -> Result<Vec<UnfinishedUpload>> {
        let Some(bucket) = &self.bucket else { return Ok(Vec::new()) };
        let prefix = bucket.folder.as_ref().map(|folder| format!("{folder}/")).unwrap_or_default();
        let query = [("uploads", ""), ("max-uploads", LISTED), ("prefix", &prefix)];
        let options = SignedUrlOptions::new().with_query(query);
        let root = StorePath::default();
        let url = bucket.store.signed_url_opts(Method::GET, &root, SIGNED, &options).await?;
        let request = Request::get(url.as_str()).body(HttpRequestBody::empty());
        let request = request.map_err(|error| failed(error.into()))?;
        let answer = bucket.client.execute(request).await.map_err(|error| failed(error.into()))?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await.map_err(|error| failed(error.into()))?.to_bytes();
        if !head.status.is_success() {
            return Err(failed(format!("listing uploads: {}", head.status).into()));
        }
        let text = String::from_utf8_lossy(&body);
        let listing = parse(&text).map_err(|error| failed(error.into()))?;
        Ok(listing.upload.into_iter().filter_map(|listed| ours(&prefix, listed)).collect())
    }

    /// Ends an upload; one that has ended meanwhile is as good as ended.
    pub async fn abort_upload(&self, upload: &UnfinishedUpload) -> Result<()> {
        let Some(bucket) = &self.bucket else { return Ok(()) };
        match bucket.store.abort_multipart(&upload.path, &upload.id).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn parse(text: &str) -> std::result::Result<Listing, quick_xml::DeError> {
    quick_xml::de::from_str(text)
}

/// None for uploads of others, and of a time that is not told in UTC.
fn ours(prefix: &str, listed: Listed) -> Option<UnfinishedUpload> {
    let key = ObjectKey::parse(listed.key.strip_prefix(prefix)?)?;
    let begun = listed.initiated.strip_suffix('Z')?.get(..19)?.to_owned();
    let path = StorePath::parse(&listed.key).ok()?;
    Some(UnfinishedUpload { key, id: listed.upload_id, begun, path })
}

fn failed(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    object_store::Error::Generic { store: "S3", source }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
        <ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
          <Bucket>b</Bucket><KeyMarker/><IsTruncated>false</IsTruncated>
          <Upload><Key>a/b/files/file-1</Key><UploadId>one</UploadId>
            <Initiator><ID>x</ID></Initiator>
            <Initiated>2026-11-24T03:31:30.000Z</Initiated></Upload>
          <Upload><Key>a/b/photos/1.png</Key><UploadId>two</UploadId>
            <Initiated>2026-11-24T03:31:30.000Z</Initiated></Upload>
          <Upload><Key>files/file-2</Key><UploadId>three</UploadId>
            <Initiated>2026-11-24T03:31:30.000Z</Initiated></Upload>
          <Upload><Key>a/b/files/file-3</Key><UploadId>four</UploadId>
            <Initiated>2026-11-24T03:31:30+01:00</Initiated></Upload>
        </ListMultipartUploadsResult>"#;

    #[test]
    fn only_our_own_uploads_are_seen() {
        let listing = parse(ANSWER).expect("reads");
        assert_eq!(listing.upload.len(), 4);
        let found: Vec<_> =
            listing.upload.into_iter().filter_map(|listed| ours("a/b/", listed)).collect();
        let [upload] = &found[..] else { panic!("{found:?}") };
        assert_eq!((upload.id.as_str(), upload.begun.as_str()), ("one", "2026-11-24T03:31:30"));
        assert_eq!(upload.key.to_string(), "files/file-1");
        assert_eq!(upload.path.as_ref(), "a/b/files/file-1");
    }

    #[test]
    fn no_upload_is_no_fault() {
        let none = "<ListMultipartUploadsResult><Bucket>b</Bucket></ListMultipartUploadsResult>";
        assert!(parse(none).expect("reads").upload.is_empty());
        assert!(parse("<html>").is_err());
    }
}
