//! Objects in a bucket of S3 or of a store that speaks like it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::HttpConnector;
use object_store::path::Path as StorePath;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use super::http::BoundedConnector;
use super::uploads::Bucket;
use crate::error::{Error, Result};

/// Attempts of one request; its patience usually ends first.
const RETRIES_MAX: usize = 20;

/// Where the bucket is and who may use it.
#[derive(Clone)]
pub struct S3Config {
    /// `s3://bucket` or `s3://bucket/prefix`.
    pub url: String,
    /// Another store than Amazon's. One that starts with `http://` is spoken to without
    /// encryption; nothing else allows that.
    pub endpoint: Option<String>,
    /// Overrides `AWS_REGION`; `us-east-1` where neither is given.
    pub region: Option<String>,
    /// The process's `AWS_…` variables, for credentials in all the usual ways: keys, session
    /// token, web identity, container. Others are passed over.
    pub environment: Vec<(String, String)>,
    /// How long to wait for what.
    pub limits: S3Limits,
}

/// Bounds of every request to the store. A store that refuses connections fails a call after
/// `patience`; one that accepts them and says nothing, after `patience` + `answer`.
#[derive(Clone, Debug)]
pub struct S3Limits {
    /// For a connection.
    pub connect: Duration,
    /// From sending a request to the head of its answer; covers the upload of one part.
    pub answer: Duration,
    /// Between two pieces of an answer's body.
    pub silence: Duration,
    /// During which a failed request is sent again.
    pub patience: Duration,
}

impl Default for S3Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(30),
            silence: Duration::from_secs(15),
            patience: Duration::from_secs(15),
        }
    }
}

impl fmt::Debug for S3Config {
    /// Without the variables: they hold secrets.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("S3Config")
            .field("url", &self.url)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

pub(super) fn open(config: &S3Config) -> Result<(Arc<dyn ObjectStore>, Bucket)> {
    let (bucket, folder) = split(&config.url)?;
    let mut builder = AmazonS3Builder::new();
    for (name, value) in &config.environment {
        let lower = name.to_ascii_lowercase();
        if let Ok(key) = lower.parse::<AmazonS3ConfigKey>()
            && lower.starts_with("aws_")
        {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(region) = &config.region {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_endpoint(checked_endpoint(endpoint)?);
    }
    let plain = config.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let connector = BoundedConnector { limits: config.limits.clone() };
    let client = connector.connect(&ClientOptions::new().with_allow_http(plain))?;
    let store = builder
        .with_bucket_name(bucket)
        .with_allow_http(plain)
        .with_retry(retry(&config.limits))
        // One object at a time is deleted; not every store has the call for many.
        .with_disable_bulk_delete(true)
        .with_http_connector(connector)
        .build()?;
    let store = Arc::new(store);
    let bucket = Bucket { store: Arc::clone(&store), client, folder: folder.clone() };
    Ok(match folder {
        Some(folder) => (Arc::new(PrefixStore::new(store, folder)), bucket),
        None => (store, bucket),
    })
}

/// Bucket and folder in it.
fn split(url: &str) -> Result<(&str, Option<StorePath>)> {
    let wrong = || Error::ObjectsAddress(format!("{url:?} is not s3://bucket or s3://bucket/path"));
    let rest = url.strip_prefix("s3://").ok_or_else(wrong)?;
    let (bucket, folder) = rest.split_once('/').unwrap_or((rest, ""));
    let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b);
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(named) {
        return Err(wrong());
    }
    let folder = StorePath::parse(folder.trim_end_matches('/')).map_err(|_| wrong())?;
    Ok((bucket, (!folder.as_ref().is_empty()).then_some(folder)))
}

/// An address of a server, nothing more: keys and passwords have their own places.
fn checked_endpoint(endpoint: &str) -> Result<&str> {
    let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
    let server = rest.map(|rest| rest.trim_end_matches('/'));
    match server {
        Some(server) if !server.is_empty() && !server.contains(['/', '@', '?', '#']) => {
            Ok(endpoint.trim_end_matches('/'))
        }
        // Not repeated in the message: it may hold a password.
        _ => Err(Error::ObjectsAddress(
            "the endpoint must be http://host:port or https://host:port".to_owned(),
        )),
    }
}

fn retry(limits: &S3Limits) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: RETRIES_MAX,
        retry_timeout: limits.patience,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_bucket_and_perhaps_a_folder() {
        let (bucket, folder) = split("s3://my-bucket.eu").expect("reads");
        assert_eq!((bucket, folder), ("my-bucket.eu", None));
        let (bucket, folder) = split("s3://bucket/a/b/").expect("reads");
        assert_eq!((bucket, folder), ("bucket", Some(StorePath::from("a/b"))));
        for wrong in ["", "bucket", "s3://", "s3://a", "s3:///x", "s3://UP/x", "s3://bucket/a//b"] {
            assert!(matches!(split(wrong), Err(Error::ObjectsAddress(_))), "{wrong}");
        }
    }

    #[test]
    fn endpoints_are_servers_and_errors_keep_their_secrets() {
        for fine in ["http://127.0.0.1:9000", "https://s3.example.com/"] {
            assert_eq!(checked_endpoint(fine).expect("reads"), fine.trim_end_matches('/'));
        }
        for wrong in
            ["", "s3.example.com", "ftp://x", "http://", "http://me:secret@host", "http://h/x"]
        {
            let error = checked_endpoint(wrong).expect_err("refuses").to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn plain_http_needs_an_endpoint_that_says_so() {
        let mut config = S3Config {
            url: "s3://bucket".to_owned(),
            endpoint: None,
            region: None,
            environment: vec![
                ("AWS_ACCESS_KEY_ID".to_owned(), "id".to_owned()),
                ("AWS_SECRET_ACCESS_KEY".to_owned(), "topsecret".to_owned()),
                ("AWS_ENDPOINT_URL".to_owned(), "http://127.0.0.1:9".to_owned()),
                ("AWS_ALLOW_HTTP".to_owned(), "true".to_owned()),
            ],
            limits: S3Limits { patience: Duration::from_millis(1), ..S3Limits::default() },
        };
        assert!(!format!("{config:?}").contains("topsecret"));
        let refused = ask(&config).await;
        config.endpoint = Some("http://127.0.0.1:9".to_owned());
        let tried = ask(&config).await;
        assert!(!refused.contains("onnection refused"), "{refused}");
        assert!(tried.contains("onnection refused"), "{tried}");
    }

    async fn ask(config: &S3Config) -> String {
        let objects = crate::Objects::open_s3(config).expect("opens");
        objects.check().await.expect_err("nobody answers").to_string()
    }
}
