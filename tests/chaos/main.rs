//! The production form in a storm: two gateways and three workers over Postgres, Redis and an
//! object store, forty streams and four jobs, while a seeded schedule kills, freezes, drains and
//! cuts off any of them, and operators and clients move, evict, pause and cancel. Every stream must
//! have the text of a calm day, or end in a clear error that the schedule explains; every job's
//! result must be that of a calm day bit for bit, but for the one that is cancelled; nothing may be
//! left over.
//!
//! `LOQUETIER_CHAOS_SEED` is the first storm's seed, `LOQUETIER_CHAOS_SECS` a storm's length. Two
//! storms of successive seeds follow each other, with `LOQUETIER_CHAOS_STORMS` so many, with
//! `LOQUETIER_CHAOS_MINUTES` as many as begin in so long. Logs of all processes are kept in the
//! folder that is printed first.

#![allow(clippy::unwrap_used)]

mod blows;
mod checkpoints;
mod clients;
#[path = "../system/common/mod.rs"]
mod common;
mod diary;
mod explain;
mod fleet;
mod jobs;
mod judge;
mod leftovers;
mod operator;
mod round;
mod schedule;
mod servers;
mod storm;
mod sweep;

use checkpoints::Sample;
use clients::{Answer, Asked, Case, Client, How, cases};
use diary::Diary;
use fleet::Fleet;
use jobs::Outcome;
use round::{JOBS_WITHIN, round};
use schedule::GATEWAYS;
use servers::Servers;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storm::World;

/// What the object store of the tests is told: it takes anything.
const CREDENTIALS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")];

fn loquetier(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.envs(CREDENTIALS);
    command
}

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}: {text:?}")))
}

/// A service on a calm day.
struct Calm {
    models: Vec<String>,
    cases: Vec<Case>,
    answers: Vec<Answer>,
    jobs: Vec<String>,
    /// By job.
    outcomes: Vec<Outcome>,
    /// By job.
    samples: Vec<Vec<Sample>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_outlives_storms() {
    let Ok(bucket) = std::env::var("LOQUETIER_TEST_S3_URL") else {
        assert!(std::env::var_os("CI").is_none(), "CI names an S3 server");
        return;
    };
    let first = setting("LOQUETIER_CHAOS_SEED", 1);
    let length = Duration::from_secs(setting("LOQUETIER_CHAOS_SECS", 60));
    let minutes = Duration::from_secs(60 * setting("LOQUETIER_CHAOS_MINUTES", 0));
    let least = setting("LOQUETIER_CHAOS_STORMS", if minutes.is_zero() { 2 } else { 1 });
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chaos");
    std::fs::create_dir_all(&logs).unwrap();
    println!("logs are in {}", logs.display());
    // Below the system's folder of temporary files, where the user of Postgres can pass through.
    let scratch = tempfile::tempdir().unwrap();
    let (world, client) = open(scratch.path(), &bucket, &logs).await;
    let calm = measure(&world, &client).await;

    let began = Instant::now();
    let mut summary = Vec::new();
    for seed in first.. {
        let faults = round(&world, &client, &calm, seed, length).await;
        summary.push((seed, faults.len()));
        if began.elapsed() >= minutes && summary.len() as u64 >= least {
            break;
        }
    }
    let at_the_end = end(&world).await;
    at_the_end.iter().for_each(|fault| println!("FAULT: {fault}"));
    println!();
    summary.iter().for_each(|(seed, faults)| println!("seed {seed}: {faults} faults"));
    let faults = summary.iter().map(|(_, faults)| faults).sum::<usize>() + at_the_end.len();
    assert_eq!(faults, 0, "faults are told above; the logs are in {}", logs.display());
}

/// Starts everything.
async fn open(scratch: &Path, bucket: &str, logs: &Path) -> (Arc<World>, Client) {
    let diary = Diary::new();
    // Processes are started for minutes, and somebody may build meanwhile.
    let binary = scratch.join("loquetier");
    std::fs::copy(env!("CARGO_BIN_EXE_loquetier"), &binary).unwrap();
    let servers = Servers::start(&scratch.join("servers"), bucket).await;
    let rows = ["--database-url", &servers.database_url];
    assert!(loquetier(&binary).arg("migrate").args(rows).status().unwrap().success());
    let key =
        loquetier(&binary).args(["keys", "create", "--operator"]).args(rows).output().unwrap();
    let client = Client::new(String::from_utf8(key.stdout).unwrap().trim().to_owned());
    let base: PathBuf = common::tiny_base(scratch);
    let fleet = Fleet::new(&servers, &binary, &base, logs);
    fleet.start().await;
    diary.say("all processes are ready");
    (Arc::new(World { servers, fleet, diary }), client)
}

/// What jobs and requests come to when nothing happens.
async fn measure(world: &World, client: &Client) -> Calm {
    let root = world.fleet.root(0);
    let mut models = Vec::new();
    let (mut outcomes, mut samples) = (Vec::new(), Vec::new());
    let ids = jobs::create(client, &root, jobs::bodies()).await;
    for id in &ids {
        let job = jobs::finish(client, &root, id, JOBS_WITHIN).await.unwrap();
        models.push(job["fine_tuned_model"].as_str().unwrap().to_owned());
        outcomes.push(jobs::outcome(client, &root, &job).await.unwrap());
        samples.push(checkpoints::samples(client, &root, id).await.unwrap());
    }
    world.diary.say("the jobs of a calm day are done");
    let cases = cases(&models);
    let asked = cases.iter().enumerate().map(|(number, case)| async move {
        let gateway = number % GATEWAYS;
        let root = world.fleet.root(gateway);
        let ended = client.ask((gateway, &root), Asked::Case(number), case).await;
        world.diary.answered(case.model(), &ended);
        assert_eq!(ended.how, How::Whole, "{case:?}");
        ended.answer
    });
    let answers = futures::future::join_all(asked).await;
    world.diary.say("the answers of a calm day are known");
    Calm { models, cases, answers, jobs: ids, outcomes, samples }
}

/// Asks all processes to end; what was wrong with that.
async fn end(world: &World) -> Vec<String> {
    let mut faults = Vec::new();
    for member in world.fleet.members() {
        match member.ended() {
            Some(status) => faults.push(format!("{} had ended: {status}", member.process)),
            None => faults.extend(member.terminate().await.err()),
        }
    }
    faults.extend(round::settled(async || leftovers::messages(&world.servers)).await);
    faults
}
