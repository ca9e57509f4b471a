//! The stores that all processes share, whose addresses `./dev test` sets.

use super::process::{loquetier, printed};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Tests that run at once must not see each other's workers: each has a database in Redis.
static REDIS_DATABASES: AtomicUsize = AtomicUsize::new(1);

/// Where they are, in places unlike any other test's.
#[derive(Clone, Debug)]
pub struct Stores {
    /// `postgres://…`
    pub database: String,
    /// `redis…://…`
    pub redis: String,
    /// `s3://…`
    pub bucket: String,
    /// `http://…`
    pub endpoint: String,
}

impl Stores {
    /// New places in the stores of the environment; none where it names none, which CI must not.
    pub fn open() -> Option<Self> {
        let stores = Self::find();
        let named = stores.is_some() || std::env::var_os("CI").is_none();
        assert!(named, "CI names Postgres, Redis and an S3 server");
        stores
    }

    fn find() -> Option<Self> {
        let named = |name: &str| std::env::var(name).ok();
        let server = named("LOQUETIER_TEST_POSTGRES_URL")?;
        let redis = named("LOQUETIER_TEST_REDIS_URL")?;
        let bucket = named("LOQUETIER_TEST_S3_URL")?;
        let (endpoint, bucket) = bucket.rsplit_once('/')?;
        let schema = format!("production_{}", storage::ids::alphanumerics(8).to_lowercase());
        printed(Command::new("psql").args([&server, "-qc", &format!("CREATE SCHEMA {schema}")]));
        let joint = if server.contains('?') { '&' } else { '?' };
        let database = format!("{server}{joint}options=-c%20search_path%3D{schema}");
        let joint = if redis.starts_with("redis+unix:") { "?db=" } else { "/" };
        let redis = format!("{redis}{joint}{}", REDIS_DATABASES.fetch_add(1, Relaxed));
        let bucket = format!("s3://{bucket}/{schema}");
        Some(Self { database, redis, bucket, endpoint: endpoint.to_owned() })
    }

    /// Flags that name them.
    pub fn flags(&self) -> Vec<&str> {
        let Self { database, redis, bucket, endpoint } = self;
        let mut flags = vec!["--database-url", database, "--redis-url", redis];
        flags.extend(["--object-store", bucket, "--s3-endpoint", endpoint]);
        flags
    }

    /// Brings the schema up to date; an operator's new key.
    pub fn prepare(&self) -> String {
        let database = ["--database-url", &self.database];
        printed(loquetier().arg("migrate").args(database));
        printed(loquetier().args(["keys", "create", "--operator"]).args(database))
    }
}

/// `host:port` in `scheme://user@host:port/rest`.
pub fn server_of(address: &str) -> &str {
    let rest = address.split_once("://").unwrap().1;
    let rest = rest.split_once('@').map_or(rest, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap()
}

/// The same address by another way.
pub fn through(address: &str, proxy: &str) -> String {
    address.replacen(server_of(address), proxy, 1)
}
