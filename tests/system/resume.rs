//! A job survives the death of its process: killed many times at random points, some inside the
//! write of a resume point, it ends with the same adapter, bit for bit, as one never disturbed.

#![allow(clippy::unwrap_used)]

mod common;

use common::server::Server;
use common::{PATIENCE, chat_file, tiny_base, until};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const KILLS: usize = 20;
const KILLS_IN_A_WRITE: usize = 3;
const EXAMPLES: usize = 120;
const EPOCHS: usize = 6;

async fn create(server: &Server) -> String {
    let file = server.upload(chat_file(EXAMPLES)).await;
    let job = json!({
        "model": "tiny",
        "training_file": file,
        "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": EPOCHS, "batch_size": 1, "learning_rate_multiplier": 1.0,
        }}},
        "lora": {"rank": 32, "dropout": 0.1},
        "training": {"checkpoint_every_steps": 2},
    });
    server.create(&job).await
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// The final adapter's weights: of the highest step.
fn final_weights(data: &Path, job: &str) -> Vec<u8> {
    let step = |path: &PathBuf| {
        let folder = path.parent()?.file_name()?.to_str()?;
        folder.split_once('-')?.1.parse::<usize>().ok()
    };
    let adapters = files(&data.join("objects/adapters").join(job));
    let weights = adapters.into_iter().filter(|path| path.ends_with("adapter_model.safetensors"));
    let last = weights.max_by_key(step).expect("an adapter is stored");
    std::fs::read(last).unwrap()
}

async fn result_csv(server: &Server, job: &Value) -> Vec<u8> {
    let file = job["result_files"][0].as_str().unwrap();
    server.bytes(&format!("/files/{file}/content")).await
}

async fn newest_step(server: &Server, job: &str) -> u64 {
    let page = server.get(&format!("/fine_tuning/jobs/{job}/events?limit=1000")).await;
    let steps = page["data"].as_array().unwrap().iter();
    steps.filter_map(|event| event["data"]["step"].as_u64()).max().unwrap_or(0)
}

/// Kills the server as soon as a new resume point's file appears, complete or not: its row is
/// written only afterwards. Returns whether the row was indeed still missing.
async fn kill_in_a_write(server: &mut Server, data: &Path, job: &str) -> bool {
    let folder = data.join("objects/resume-points").join(job);
    let names = || files(&folder).into_iter().collect::<HashSet<_>>();
    let (before, start) = (names(), Instant::now());
    let new = loop {
        let now = names();
        if let Some(new) = now.difference(&before).next() {
            break new.clone();
        }
        assert!(start.elapsed() < PATIENCE, "no resume point was written");
    };
    server.process.kill();
    let step = new.file_name().unwrap().to_str().unwrap().split(['-', '#']).nth(1).unwrap();
    let step: i64 = step.parse().unwrap();
    let db = storage::Storage::open_rows(data).await.unwrap();
    let points = db.jobs().resume_points(job).await.unwrap();
    db.close().await;
    points.iter().all(|point| point.step < step)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_job_ends_with_the_same_bits() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let calm = scratch.path().join("calm");
    let server = Server::embedded(&base, &calm, &[]);
    let undisturbed = create(&server).await;
    let row = server.success(&undisturbed).await;
    let expected_csv = result_csv(&server, &row).await;
    let expected = final_weights(&calm, &undisturbed);
    drop(server);

    let data = scratch.path().join("storm");
    let mut server = Server::embedded(&base, &data, &[]);
    let job = create(&server).await;
    let (mut kills, mut in_a_write, mut random) = (0, 0, 12345_u64);
    while kills < KILLS || in_a_write < KILLS_IN_A_WRITE {
        let before = newest_step(&server, &job).await;
        until("another step", async || {
            Some(newest_step(&server, &job).await).filter(|now| *now > before)
        })
        .await;
        let row = server.job(&job).await;
        assert_eq!(row["status"], "running", "the job is too short for {kills} kills");
        if kills % 4 == 3 || kills >= KILLS {
            in_a_write += usize::from(kill_in_a_write(&mut server, &data, &job).await);
        } else {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            tokio::time::sleep(Duration::from_millis(random >> 59)).await;
            server.process.kill();
        }
        kills += 1;
        server = Server::embedded(&base, &data, &[]);
    }

    let row = server.success(&job).await;
    assert_eq!(result_csv(&server, &row).await, expected_csv);
    assert!(final_weights(&data, &job) == expected, "the adapters differ");
    let steps = server.steps(&job).await;
    let all: Vec<u64> = (1..=(EXAMPLES * EPOCHS) as u64).collect();
    assert_eq!(steps, all, "events are lost, doubled or out of order");
    println!("{kills} kills, {in_a_write} of them inside the write of a resume point");
}
