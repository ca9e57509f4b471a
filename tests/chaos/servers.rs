//! Postgres and Redis of this test alone, which it may kill and start again, and the way to the
//! object store; before each stands one proxy for every process.

use super::blows::{Process, Store};
use super::schedule::{GATEWAYS, WORKERS};
use loquetier_tests::proxy::{Proxy, Upstream, Way};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const STORES: [Store; 3] = [Store::Postgres, Store::Redis, Store::Objects];

/// Runs one of the scripts that keep servers; what it prints.
fn script(name: &str, verb: &str, folder: &Path) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name);
    let done = Command::new("bash").arg(&script).arg(verb).arg(folder).output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{name} {verb}: {errors}");
    String::from_utf8(done.stdout).unwrap().trim().to_owned()
}

/// The same, where other tasks go on meanwhile.
async fn script_beside(name: &'static str, verb: &'static str, folder: PathBuf) {
    tokio::task::spawn_blocking(move || script(name, verb, &folder)).await.unwrap();
}

/// See the module.
pub struct Servers {
    folder: PathBuf,
    /// Postgres itself, with nothing between.
    pub database_url: String,
    /// The object store itself: `http://host:port`.
    pub objects_endpoint: String,
    /// Bucket and a folder in it of this test alone.
    pub objects_url: String,
    /// By process, then by store.
    doors: Vec<[Proxy; 3]>,
    ways: Mutex<Ways>,
}

struct Ways {
    for_all: [Way; 3],
    for_one: Vec<[Way; 3]>,
}

fn place(process: Process) -> usize {
    match process {
        Process::Gateway(number) => number,
        Process::Worker(number) => GATEWAYS + number,
    }
}

impl Servers {
    /// Starts them in a folder that is made; the object store is the one of `bucket_url`.
    pub async fn start(folder: &Path, bucket_url: &str) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        // The user that Postgres runs as must be able to pass through.
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o711)).unwrap();
        let database_url = script("postgres.sh", "start", &folder.join("postgres"));
        script("redis.sh", "start", &folder.join("redis"));
        let (objects_endpoint, bucket) = bucket_url.rsplit_once('/').unwrap();
        let (_, postgres) = database_url.rsplit_once('@').unwrap();
        let upstreams = [
            Upstream::from(postgres.split_once('/').unwrap().0),
            Upstream::Unix(folder.join("redis/socket")),
            Upstream::from(objects_endpoint.rsplit_once('/').unwrap().1),
        ];
        let mut doors = Vec::new();
        for _ in 0..GATEWAYS + WORKERS {
            let [rows, messages, objects] = upstreams.clone();
            doors.push([
                Proxy::start(rows).await,
                Proxy::start(messages).await,
                Proxy::start(objects).await,
            ]);
        }
        let private = storage::ids::alphanumerics(10).to_lowercase();
        let for_one = vec![[Way::Open; 3]; doors.len()];
        Self {
            folder: folder.to_owned(),
            database_url: database_url.clone(),
            objects_endpoint: objects_endpoint.to_owned(),
            objects_url: format!("s3://{bucket}/chaos-{private}"),
            doors,
            ways: Mutex::new(Ways { for_all: [Way::Open; 3], for_one }),
        }
    }

    /// The socket of Redis itself.
    pub fn redis_socket(&self) -> PathBuf {
        self.folder.join("redis/socket")
    }

    /// Flags that lead a process to the stores through its own proxies.
    pub fn flags(&self, process: Process) -> Vec<String> {
        let [rows, messages, objects] = &self.doors[place(process)];
        let (user, path) = self.database_url.rsplit_once('@').unwrap();
        let (_, database) = path.split_once('/').unwrap();
        let flags = [
            ("--database-url", format!("{user}@{}/{database}", rows.address)),
            ("--redis-url", format!("redis://{}", messages.address)),
            ("--object-store", self.objects_url.clone()),
            ("--s3-endpoint", format!("http://{}", objects.address)),
        ];
        flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    fn ways(&self) -> MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How all processes reach a store.
    pub fn set(&self, store: Store, way: Way) {
        let mut ways = self.ways();
        ways.for_all[store as usize] = way;
        self.apply(&ways);
    }

    /// How one process reaches a store.
    pub fn set_for(&self, process: Process, store: Store, way: Way) {
        let mut ways = self.ways();
        ways.for_one[place(process)][store as usize] = way;
        self.apply(&ways);
    }

    fn apply(&self, ways: &Ways) {
        for (doors, own) in self.doors.iter().zip(&ways.for_one) {
            for store in STORES {
                let at = store as usize;
                doors[at].set(own[at].max(ways.for_all[at]));
            }
        }
    }

    /// Kills a server and starts it again after `down`: Redis has forgotten everything, Postgres
    /// nothing that was committed.
    pub async fn restart(&self, store: Store, down: Duration) {
        let (name, folder, stop, start) = match store {
            Store::Postgres => ("postgres.sh", "postgres", "kill", "again"),
            Store::Redis => ("redis.sh", "redis", "stop", "start"),
            Store::Objects => panic!("it would forget its objects"),
        };
        let folder = self.folder.join(folder);
        script_beside(name, stop, folder.clone()).await;
        tokio::time::sleep(down).await;
        script_beside(name, start, folder).await;
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for (name, folder) in [("postgres.sh", "postgres"), ("redis.sh", "redis")] {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name);
            let _ =
                Command::new("bash").arg(script).arg("stop").arg(self.folder.join(folder)).output();
        }
    }
}
