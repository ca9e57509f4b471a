//! One storm and its consequences: streams and jobs under it, compared with those of a calm day,
//! and what is left over.

use super::Calm;
use super::blows::Process;
use super::checkpoints::Sample;
use super::clients::{Asked, Case, Client, Ended, How, live_case};
use super::diary::{Story, Trouble};
use super::judge::{Verdict, judge, judge_live, judge_word};
use super::operator::Word;
use super::schedule::{DOOMED, GATEWAYS, schedule};
use super::storm::{World, rage};
use super::sweep::sweep;
use super::{checkpoints, jobs, leftovers};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Streams open at any time.
const CLIENTS: usize = 40;
/// Of them, so many ask a job that is running; its weights change, so its answers are compared with
/// each other.
const LIVE_CLIENTS: usize = 4;
/// A client whose request failed asks again after this.
const SULK: Duration = Duration::from_millis(300);
/// Jobs are over so long after a storm.
pub const JOBS_WITHIN: Duration = Duration::from_secs(90);
/// Everything is let go of so long after the last request and job.
const QUIET_WITHIN: Duration = Duration::from_secs(20);

/// One storm and its consequences: what was wrong.
pub async fn round(
    world: &Arc<World>,
    client: &Client,
    calm: &Calm,
    seed: u64,
    length: Duration,
) -> Vec<String> {
    let storm = schedule(seed, length);
    println!("\nLOQUETIER_CHAOS_SEED={seed}: {} blows", storm.len());
    storm.iter().for_each(|planned| println!("{planned}"));
    let root = world.fleet.root(0);
    let bodies = jobs::bodies().into_iter().chain([jobs::doomed()]);
    let ids = jobs::create(client, &root, bodies).await;
    let trained = &ids[..DOOMED];
    for id in &ids {
        jobs::published(client, &root, id).await;
    }
    let asking = Arc::new(AtomicBool::new(true));
    let streams: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (world, client, asking) = (Arc::clone(world), client.clone(), Arc::clone(&asking));
            let cases = match number.checked_sub(CLIENTS - LIVE_CLIENTS) {
                Some(live) => {
                    let job = live % trained.len();
                    vec![(Asked::Live(job), live_case(&trained[job]))]
                }
                None => (0..).map(Asked::Case).zip(calm.cases.iter().cloned()).collect::<Vec<_>>(),
            };
            tokio::spawn(async move { keep_asking(&world, &client, number, &cases, &asking).await })
        })
        .collect();
    sleep(Duration::from_secs(2)).await;
    let mut faults = rage(world, client, &calm.models, &ids, &storm).await;
    world.diary.say("the storm is over");
    sleep(Duration::from_secs(2)).await;
    asking.store(false, Relaxed);
    let mut ended = Vec::new();
    for stream in streams {
        ended.extend(stream.await.unwrap());
    }
    world.diary.say("the last stream has ended");
    let story = world.diary.story();
    faults.extend(judged(calm, trained, &ended, &story));
    faults.extend(judged_words(&world.diary.take_words(), &story));
    faults.extend(compare_jobs(world, client, calm, trained).await);
    faults.extend(jobs::cancelled(client, &root, &ids[DOOMED]).await.err());
    faults.extend(left(world, client).await);
    faults.extend(sweep(world).await);
    faults.extend(compare_checkpoints(world, client, calm, trained).await);
    faults.iter().for_each(|fault| println!("FAULT: {fault}"));
    leftovers::attempts(&world.servers, &ids).iter().for_each(|line| println!("{line}"));
    faults
}

/// One client: a request after another, each at the other gateway.
async fn keep_asking(
    world: &World,
    client: &Client,
    number: usize,
    cases: &[(Asked, Case)],
    asking: &AtomicBool,
) -> Vec<Ended> {
    let mut all = Vec::new();
    for turn in 0.. {
        if !asking.load(Relaxed) {
            break;
        }
        let gateway = (number + turn) % GATEWAYS;
        let (asked, case) = &cases[(number * 7 + turn * 3) % cases.len()];
        let root = world.fleet.root(gateway);
        let ended = client.ask((gateway, &root), *asked, case).await;
        world.diary.answered(case.model(), &ended);
        if ended.how != How::Whole {
            sleep(SULK).await;
        }
        all.push(ended);
    }
    all
}

/// Judges all requests and prints how many ended how.
fn judged(calm: &Calm, jobs: &[String], all: &[Ended], story: &Story) -> Vec<String> {
    let (mut counts, mut faults) = (BTreeMap::<&str, usize>::new(), Vec::new());
    let live: Vec<Ended> =
        all.iter().filter(|ended| matches!(ended.asked, Asked::Live(_))).cloned().collect();
    let mut through = 0;
    for ended in all {
        let verdict = match ended.asked {
            Asked::Case(case) => judge(ended, &calm.answers[case], calm.cases[case].model(), story),
            Asked::Live(job) => judge_live(ended, &live, &jobs[job], story),
        };
        match verdict {
            Verdict::Equal => {
                *counts.entry("equal to a calm day's").or_default() += 1;
                let worker_hit = story.entries.iter().any(|entry| {
                    let hit = matches!(
                        entry.trouble,
                        Trouble::Down(Process::Worker(_)) | Trouble::Frozen(Process::Worker(_))
                    );
                    hit && entry.from > ended.from && entry.from < ended.until
                });
                through += usize::from(worker_hit);
            }
            Verdict::Explained(reason) => *counts.entry(reason).or_default() += 1,
            Verdict::Fault(fault) => {
                *counts.entry("FAULT").or_default() += 1;
                faults.push(fault);
            }
        }
    }
    let whole = live.iter().filter(|ended| ended.how == How::Whole);
    let versions: BTreeSet<&str> = whole.map(|e| e.answer.fingerprint.as_str()).collect();
    println!("{} streams of running jobs, of {} versions", live.len(), versions.len());
    println!("{} streams; {through} equal ones were open when a worker was hit", all.len());
    counts.iter().for_each(|(how, count)| println!("{count:7}  {how}"));
    if through < CLIENTS {
        faults.push(format!("only {through} streams went through a blow at a worker"));
    }
    faults
}

/// Judges what operators and clients told the service, and prints how many words ended how.
fn judged_words(words: &[Word], story: &Story) -> Vec<String> {
    let (mut counts, mut faults) = (BTreeMap::<&str, usize>::new(), Vec::new());
    for word in words {
        match judge_word(word, story) {
            Verdict::Equal => *counts.entry("done").or_default() += 1,
            Verdict::Explained(reason) => *counts.entry(reason).or_default() += 1,
            Verdict::Fault(fault) => faults.push(fault),
        }
    }
    println!("{} words of operators and clients", words.len());
    counts.iter().for_each(|(how, count)| println!("{count:7}  {how}"));
    faults
}

async fn compare_jobs(world: &World, client: &Client, calm: &Calm, ids: &[String]) -> Vec<String> {
    let (root, mut faults) = (world.fleet.root(0), Vec::new());
    for (id, should) in ids.iter().zip(&calm.outcomes) {
        let outcome = match jobs::finish(client, &root, id, JOBS_WITHIN).await {
            Ok(job) => jobs::outcome(client, &root, &job).await,
            Err(fault) => Err(fault),
        };
        match outcome.map(|outcome| outcome.difference(should)) {
            Ok(None) => world.diary.say(format_args!("{id} is equal to a calm day's")),
            Ok(Some(difference)) => faults.push(format!("{id} differs: {difference}")),
            Err(fault) => faults.push(fault),
        }
    }
    faults
}

/// What is still left over when all has had the time to end.
async fn left(world: &World, client: &Client) -> Vec<String> {
    settled(async || {
        let mut left = leftovers::held(world, client).await;
        left.extend(leftovers::messages(&world.servers));
        left.extend(leftovers::rows(&world.servers));
        let objects = leftovers::objects(&world.servers).await;
        left.extend(objects.missing.iter().map(|name| format!("a row names no object: {name}")));
        let nobodys = objects.unexplained(&world.servers);
        left.extend(nobodys.iter().map(|name| format!("an object of nobody: {name}")));
        left
    })
    .await
}

/// Asks all checkpoints of the storm's jobs and of the calm day's, read anew: they must answer as
/// on the calm day.
async fn compare_checkpoints(
    world: &World,
    client: &Client,
    calm: &Calm,
    ids: &[String],
) -> Vec<String> {
    let (root, mut faults) = (world.fleet.root(0), Vec::new());
    for (id, should) in ids.iter().chain(&calm.jobs).zip(calm.samples.iter().cycle()) {
        match checkpoints::samples(client, &root, id).await {
            Ok(samples) => {
                let difference = Sample::difference(&samples, should);
                faults.extend(difference.map(|difference| format!("{id}: {difference}")));
            }
            Err(fault) => faults.push(fault),
        }
    }
    world.diary.say("all checkpoints have been asked");
    faults
}

/// Looks until there is nothing; what still is there when the time is up.
pub async fn settled(look: impl AsyncFn() -> Vec<String>) -> Vec<String> {
    let start = Instant::now();
    loop {
        let left = look().await;
        if left.is_empty() || start.elapsed() > QUIET_WITHIN {
            return left;
        }
        sleep(Duration::from_millis(500)).await;
    }
}
