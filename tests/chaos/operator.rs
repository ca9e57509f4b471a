//! What operators and clients tell the service in a storm: to move and evict adapters, to move,
//! pause, resume and cancel jobs. Every answer is kept, to be judged when the storm is over.

use super::blows::{Blow, Planned, Target};
use super::clients::{Client, How};
use super::schedule::{GATEWAYS, WORKERS};
use super::storm::World;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// A reply takes no longer; the gateway waits for 30 s for what it was asked to do.
const REPLY_WITHIN: Duration = Duration::from_secs(45);
/// Somebody who was refused for an outage asks again after this.
const AGAIN: Duration = Duration::from_millis(500);
/// So long somebody asks again who must be heard; no outage lasts longer.
const HEARD_WITHIN: Duration = Duration::from_secs(40);
/// A job whose pause was accepted is paused, or over, so long after it.
const PAUSED_WITHIN: Duration = Duration::from_secs(40);
/// No worker trains a cancelled job any more so long after it: each obeys within a second of
/// being back.
const LET_GO_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// One word and its answer.
#[derive(Clone, Debug)]
pub struct Word {
    /// Method and path.
    pub what: String,
    /// Who was told.
    pub gateway: usize,
    /// When it was sent.
    pub from: Instant,
    /// When the answer came.
    pub until: Instant,
    /// The answer.
    pub how: How,
}

/// Says what is planned for an adapter or a job, to one gateway after the other while it is not
/// heard.
pub struct Operator<'a> {
    /// Where.
    pub world: &'a World,
    /// With an operator's key.
    pub client: &'a Client,
    /// Names of the calm day's adapters.
    pub models: &'a [String],
    /// The storm's jobs.
    pub jobs: &'a [String],
}

impl Operator<'_> {
    /// Does what is planned; what went wrong beside the answers.
    pub async fn act(&self, planned: &Planned) -> Result<(), String> {
        let pick = planned.pick;
        match (planned.target, planned.blow) {
            (Target::Adapter(number), Blow::Migrate) => {
                let path = format!("adapters/{}/migrate", self.models[number].replace(':', "%3A"));
                let to = self.world.fleet.workers[pick / GATEWAYS % WORKERS].worker_id();
                self.say(pick, &path, &json!({"to": to})).await;
            }
            (Target::Adapter(number), Blow::Evict) => {
                let path = format!("adapters/{}/evict", self.models[number].replace(':', "%3A"));
                self.say(pick, &path, &Value::Null).await;
            }
            (Target::Job(number), Blow::Migrate) => {
                let path = format!("adapters/{}/migrate", self.jobs[number]);
                self.say(pick, &path, &Value::Null).await;
            }
            (Target::Job(number), Blow::Pause) => {
                return self.pause(pick, &self.jobs[number], planned.lasts).await;
            }
            (Target::Job(number), Blow::Cancel) => {
                return self.cancel(pick, &self.jobs[number]).await;
            }
            (target, blow) => panic!("nobody says {blow:?} to {target}"),
        }
        Ok(())
    }

    async fn pause(&self, pick: usize, job: &str, lasts: Duration) -> Result<(), String> {
        let path = |verb: &str| format!("fine_tuning/jobs/{job}/{verb}");
        // Refused: it is not running, as before its first claim and after its end.
        if self.insist(pick, &path("pause")).await?.is_none() {
            return Ok(());
        }
        let accepted = Instant::now();
        loop {
            match self.job(pick, job).await?["status"].as_str() {
                Some("paused") => break,
                Some("succeeded") => return Ok(()),
                Some("running") if accepted.elapsed() < PAUSED_WITHIN => sleep(LOOK).await,
                status => {
                    let after = accepted.elapsed().as_secs_f64();
                    return Err(format!("{job} is {status:?} {after:.1} s after its pause"));
                }
            }
        }
        sleep(lasts).await;
        // A second word, sent because the answer of the first was lost, is refused.
        match self.insist(pick, &path("resume")).await? {
            Some(row) if row["status"] == "queued" => Ok(()),
            Some(row) => Err(format!("{job} was resumed and is {row}")),
            None => match self.job(pick, job).await?["status"].as_str() {
                Some("queued" | "running" | "succeeded") => Ok(()),
                status => Err(format!("{job} cannot be resumed and is {status:?}")),
            },
        }
    }

    async fn cancel(&self, pick: usize, job: &str) -> Result<(), String> {
        let told = self.insist(pick, &format!("fine_tuning/jobs/{job}/cancel")).await?;
        let row = match told {
            Some(row) => row,
            None => self.job(pick, job).await?,
        };
        if row["status"] != "cancelled" || row["finished_at"].is_null() {
            return Err(format!("{job} was cancelled and is {row}"));
        }
        let cancelled = Instant::now();
        loop {
            let list = self.read(pick, "workers").await?;
            let workers = list["data"].as_array().cloned().unwrap_or_default();
            let trains = |worker: &Value| {
                let copies = worker["adapters"].as_array().into_iter().flatten();
                copies.into_iter().any(|copy| copy["id"] == job)
            };
            match workers.iter().find(|worker| trains(worker)) {
                None => return Ok(()),
                Some(worker) if cancelled.elapsed() > LET_GO_WITHIN => {
                    return Err(format!("{job} is cancelled, and a worker has it: {worker}"));
                }
                Some(_) => sleep(LOOK).await,
            }
        }
    }

    async fn job(&self, pick: usize, job: &str) -> Result<Value, String> {
        self.read(pick, &format!("fine_tuning/jobs/{job}")).await
    }

    /// What can be read in the end.
    async fn read(&self, pick: usize, path: &str) -> Result<Value, String> {
        let told = self.until_heard(pick, Method::GET, path).await?;
        told.ok_or_else(|| format!("{path} cannot be read"))
    }

    /// Has a word heard; the reply, none where it was refused.
    async fn insist(&self, pick: usize, path: &str) -> Result<Option<Value>, String> {
        self.until_heard(pick, Method::POST, path).await
    }

    async fn until_heard(
        &self,
        pick: usize,
        method: Method,
        path: &str,
    ) -> Result<Option<Value>, String> {
        let start = Instant::now();
        for turn in 0.. {
            let told = self.tell((pick + turn) % GATEWAYS, &method, path, &Value::Null).await;
            match told {
                Ok(reply) => return Ok(Some(reply)),
                Err(How::Error(400, _)) => return Ok(None),
                Err(how) if start.elapsed() > HEARD_WITHIN => {
                    return Err(format!("{method} {path} is not heard: {how:?}"));
                }
                Err(_) => sleep(AGAIN).await,
            }
        }
        unreachable!("somebody asks until the time is up")
    }

    /// Says something once, to the other gateway too where one is not there.
    async fn say(&self, pick: usize, path: &str, body: &Value) {
        for turn in 0..GATEWAYS {
            let told = self.tell((pick + turn) % GATEWAYS, &Method::POST, path, body).await;
            if !matches!(told, Err(How::Refused(_) | How::Broken(_))) {
                return;
            }
        }
    }

    /// Says something to one gateway and keeps its answer.
    async fn tell(
        &self,
        gateway: usize,
        method: &Method,
        path: &str,
        body: &Value,
    ) -> Result<Value, How> {
        let (diary, from) = (&self.world.diary, Instant::now());
        let url = format!("{}/{path}", self.world.fleet.root(gateway));
        let reply = timeout(REPLY_WITHIN, self.client.reply(method.clone(), &url, body));
        let reply = reply.await.unwrap_or(Err(How::Hung));
        let how = match &reply {
            Ok(_) => How::Whole,
            Err(how) => how.clone(),
        };
        if *method != Method::GET {
            diary.say(format_args!("{method} {path} at gateway {gateway}: {how:?}"));
        }
        let what = format!("{method} {path} {body}");
        diary.word(Word { what, gateway, from, until: Instant::now(), how });
        reply
    }
}
