//! A fresh, empty store of objects per test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use futures::TryStreamExt;
use storage::Objects;
use storage::ids::alphanumerics;
use storage::objects::{ObjectKind, S3Config, S3Limits};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Declares a test that runs on disk and in S3; the body is an `async fn(Store)`.
macro_rules! on_each_store {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn disk() {
                super::$name(crate::object_rig::Store::disk()).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn s3() {
                if let Some(store) = crate::object_rig::Store::s3() {
                    super::$name(store).await;
                }
            }
        }
    )+ };
}
pub(crate) use on_each_store;

/// Objects, and a look behind them.
pub struct Store {
    pub objects: Objects,
    place: Place,
}

enum Place {
    Disk(TempDir),
    Bucket { config: Box<S3Config>, bucket: Bucket, folder: String },
}

/// The test server's bucket.
pub struct Bucket {
    /// `host:port`
    pub server: String,
    pub name: String,
}

impl Bucket {
    /// None where no server was given.
    pub fn given() -> Option<Self> {
        let url = std::env::var("LOQUETIER_TEST_S3_URL").ok()?;
        let (server, name) = url.strip_prefix("http://")?.split_once('/')?;
        Some(Self { server: server.to_owned(), name: name.to_owned() })
    }

    /// A folder of its own in the bucket, reached at `server`; its name needs escaping.
    pub fn config(&self, server: &str, limits: S3Limits) -> (S3Config, String) {
        let folder = alphanumerics(16);
        let variable = |name: &str| (name.to_owned(), "test".to_owned());
        let config = S3Config {
            url: format!("s3://{}/tests ü+=1/{folder}", self.name),
            endpoint: Some(format!("http://{server}")),
            region: None,
            environment: vec![variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")],
            limits,
        };
        (config, folder)
    }
}

impl Store {
    pub fn disk() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let objects = Objects::open_local(&folder.path().join("objects")).expect("opens");
        Self { objects, place: Place::Disk(folder) }
    }

    pub fn s3() -> Option<Self> {
        let bucket = Bucket::given()?;
        let (config, folder) = bucket.config(&bucket.server, S3Limits::default());
        let objects = Objects::open_s3(&config).expect("opens");
        Some(Self { objects, place: Place::Bucket { config: Box::new(config), bucket, folder } })
    }

    /// As another process opens it.
    pub fn open_again(&self) -> Objects {
        match &self.place {
            Place::Disk(folder) => Objects::open_local(&folder.path().join("objects")),
            Place::Bucket { config, .. } => Objects::open_s3(config),
        }
        .expect("opens again")
    }

    /// Makes an object on disk look as if it was stored so long ago.
    pub fn backdate(&self, name: &str, secs: u64) {
        let Place::Disk(folder) = &self.place else { panic!("a bucket has its own clock") };
        let path = folder.path().join("objects").join(name);
        let file = std::fs::File::options().write(true).open(path).expect("opens");
        file.set_modified(SystemTime::now() - Duration::from_secs(secs)).expect("is set");
    }

    /// Puts a file of any name among the objects on disk.
    pub fn plant(&self, name: &str) {
        let Place::Disk(folder) = &self.place else { panic!("a bucket takes keys only") };
        let path = folder.path().join("objects").join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("makes");
        std::fs::write(path, "x").expect("writes");
    }

    /// Names of all objects.
    pub async fn names(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for kind in [ObjectKind::Files, ObjectKind::Adapters, ObjectKind::ResumePoints] {
            let listed: Vec<_> = self.objects.list(kind).try_collect().await.expect("lists");
            names.extend(listed.into_iter().map(|entry| entry.name));
        }
        names
    }

    /// Objects and unfinished uploads.
    pub async fn kept(&self) -> usize {
        match &self.place {
            Place::Disk(folder) => on_disk(folder.path()).len(),
            Place::Bucket { bucket, folder, .. } => {
                self.names().await.len() + unfinished(bucket, folder).await
            }
        }
    }
}

/// Files on disk, unfinished uploads included.
fn on_disk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("reads") {
        let path = entry.expect("reads").path();
        if path.is_dir() {
            found.extend(on_disk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Uploads under way in a folder: the test server tells anyone.
pub async fn unfinished(bucket: &Bucket, folder: &str) -> usize {
    let mut stream = TcpStream::connect(&bucket.server).await.expect("connects");
    let request =
        format!("GET /{}?uploads HTTP/1.0\r\nHost: {}\r\n\r\n", bucket.name, bucket.server);
    stream.write_all(request.as_bytes()).await.expect("asks");
    let mut answer = String::new();
    let reading = stream.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(20), reading).await.expect("in time").expect("reads");
    assert!(answer.contains("ListMultipartUploadsResult"), "{answer}");
    answer.matches(folder).count()
}
