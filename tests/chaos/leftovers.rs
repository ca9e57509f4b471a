//! What must not be left over when everything has ended: rows, blocks, slots, entries of inboxes,
//! token messages, objects.

use super::clients::Client;
use super::jobs::{bytes, get};
use super::schedule::{GATEWAYS, WORKERS};
use super::servers::Servers;
use super::storm::World;
use futures::TryStreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use storage::objects::{ObjectKind, Objects, S3Config, S3Limits};

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chaos").join(name)
}

/// Lines that a program prints.
fn lines(command: &mut Command) -> Vec<String> {
    let done = command.output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success() && errors.is_empty(), "{command:?}: {errors}");
    let text = String::from_utf8(done.stdout).unwrap();
    text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Lines of a file of statements.
pub fn query(servers: &Servers, file: &str) -> Vec<String> {
    let mut psql = Command::new("psql");
    psql.args([&servers.database_url, "-XAqt", "-v", "ON_ERROR_STOP=1", "-f"]);
    lines(psql.arg(here(file)))
}

/// Rows that should be otherwise.
pub fn rows(servers: &Servers) -> Vec<String> {
    query(servers, "leftover_rows.sql")
}

/// How often each of some jobs was claimed.
pub fn attempts(servers: &Servers, ids: &[String]) -> Vec<String> {
    let all = query(servers, "attempts.sql");
    all.into_iter().filter(|line| ids.iter().any(|id| line.starts_with(id.as_str()))).collect()
}

/// Keys in Redis that should not be there while the service idles, or for ever.
pub fn messages(servers: &Servers) -> Vec<String> {
    let mut redis = Command::new("redis-cli");
    redis.arg("-s").arg(servers.redis_socket()).arg("--eval").arg(here("leftover_messages.lua"));
    lines(&mut redis)
}

/// What gateways and workers say that they still hold.
pub async fn held(world: &World, client: &Client) -> Vec<String> {
    let mut held = Vec::new();
    for gateway in 0..GATEWAYS {
        let root = world.fleet.root(gateway);
        let metrics = bytes(client, &root.replace("/v1", "/metrics")).await.unwrap_or_default();
        let metrics = String::from_utf8_lossy(&metrics).into_owned();
        let open = metrics.lines().find_map(|line| line.strip_prefix("loquetier_open_requests "));
        if open != Some("0") {
            held.push(format!("gateway {gateway}: open requests {open:?}"));
        }
    }
    let workers = match get(client, &format!("{}/workers", world.fleet.root(0))).await {
        Ok(list) => list["data"].as_array().cloned().unwrap_or_default(),
        Err(error) => return vec![error],
    };
    if workers.len() != WORKERS {
        held.push(format!("{} workers are alive: {workers:?}", workers.len()));
    }
    for worker in workers {
        let read = worker["adapters"].as_array().into_iter().flatten().any(|a| a["requests"] != 0);
        let idle = worker["requests"] == 0
            && worker["free_blocks"] == worker["total_blocks"]
            && worker["training_jobs"] == 0
            && worker["draining"] == false;
        if read || !idle {
            held.push(format!("a worker is not idle: {worker}"));
        }
    }
    held
}

/// Names of all objects that rows name.
pub fn named(servers: &Servers) -> BTreeSet<String> {
    query(servers, "named_objects.sql").into_iter().collect()
}

/// Objects as they are, against those that rows name.
pub struct Objection {
    /// A row names it, and it is not there.
    pub missing: Vec<String>,
    /// It is there, or on its way there in parts, and no row names it.
    pub orphans: Vec<String>,
}

impl Objection {
    /// Orphans that no attempt at a job can have left behind when it was cut short; the others are
    /// for the sweeper.
    pub fn unexplained(&self, servers: &Servers) -> Vec<String> {
        let claims = query(servers, "attempts.sql");
        let claims: BTreeMap<&str, u64> = claims.iter().filter_map(|line| claim(line)).collect();
        // `step_metrics.csv` of attempts that did not come to their last write: one each.
        let mut files = claims.values().sum::<u64>();
        let mut explained = |name: &String| {
            let parts: Vec<&str> = name.split('/').collect();
            let (job, place) = match parts[..] {
                ["files", _] => {
                    let left = files.checked_sub(1);
                    files = left.unwrap_or(0);
                    return left.is_some();
                }
                ["adapters", job, place, _] | ["resume-points", job, place] => (job, place),
                _ => return false,
            };
            let attempt = place.split('-').next().and_then(|number| number.parse::<u64>().ok());
            attempt.zip(claims.get(job)).is_some_and(|(attempt, claims)| attempt <= *claims)
        };
        self.orphans.iter().filter(|name| !explained(name)).cloned().collect()
    }
}

/// Job and number of claims of a line of `attempts.sql`.
fn claim(line: &str) -> Option<(&str, u64)> {
    let (job, rest) = line.split_once(" was claimed ")?;
    Some((job, rest.split(' ').next()?.parse().ok()?))
}

/// The object store itself, with nothing between.
pub fn store(servers: &Servers) -> Objects {
    let config = S3Config {
        url: servers.objects_url.clone(),
        endpoint: Some(servers.objects_endpoint.clone()),
        region: None,
        environment: super::CREDENTIALS.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
        limits: S3Limits::default(),
    };
    Objects::open_s3(&config).unwrap()
}

/// Compares the object store with the rows.
pub async fn objects(servers: &Servers) -> Objection {
    let (named, store) = (named(servers), store(servers));
    let mut there = BTreeSet::new();
    for kind in [ObjectKind::Files, ObjectKind::Adapters, ObjectKind::ResumePoints] {
        let entries: Vec<_> = store.list(kind).try_collect().await.unwrap();
        there.extend(entries.into_iter().map(|entry| entry.name));
    }
    let uploads = store.unfinished_uploads().await.unwrap();
    let uploads = uploads.into_iter().map(|upload| upload.key.to_string());
    Objection {
        missing: named.difference(&there).cloned().collect(),
        orphans: there.difference(&named).cloned().chain(uploads).collect(),
    }
}
