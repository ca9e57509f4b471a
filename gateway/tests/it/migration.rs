//! Moving and evicting adapters and jobs: what workers are told, what streams see, and who may.

use std::time::Duration;

use gateway::GatewayConfig;
use serde_json::{Value, json};
use storage::db::{Claimant, JobWrite, Role, StatusChange};
use storage::queue::message::{ToWorker, WorkerPresence};

use crate::site::{BASE, Client, PRINT, Reply, Site};
use crate::streaming::content;
use crate::worker::{self, Script};

const MODEL: &str = "ft:b:org-a::AbCd1234";
const ANSWER: [&str; 6] = ["Näh", "e", " 🦀", " an", "d", "."];

fn quick() -> GatewayConfig {
    GatewayConfig { move_wait: Duration::from_millis(300), ..GatewayConfig::default() }
}

fn holder(id: &str) -> Script {
    Script { resident: vec![id.to_owned()], ..Script::default() }
}

fn special(presence: fn(&mut WorkerPresence)) -> Script {
    Script { presence, ..Script::default() }
}

async fn migrate(client: &Client<'_>, id: &str, body: Value) -> Reply {
    client.post(&format!("/v1/adapters/{id}/migrate"), body).await
}

fn load(id: &str) -> impl Fn(&ToWorker) -> bool + use<'_> {
    move |word| {
        matches!(word, ToWorker::Load { adapter_id, object }
        if adapter_id == id && object.starts_with("adapters/imported/"))
    }
}

fn evict(id: &str, hand_over: bool) -> ToWorker {
    ToWorker::Evict { adapter_id: id.to_owned(), hand_over }
}

#[tokio::test]
async fn an_adapter_moves_in_the_middle_of_a_stream() {
    let site = Site::with(GatewayConfig::default()).await;
    let id = site.adapter("org-a", MODEL).await;
    let (member, operator) =
        (site.key("org-a", Role::Member).await, site.key("org-b", Role::Operator).await);
    let slow = Script { pause: Duration::from_millis(100), ..Script::saying(&ANSWER) };
    let first = Script { resident: vec![id.clone()], ..slow.clone() };
    let first = worker::start(&site.storage, "w1", first).await;
    let second = worker::start(&site.storage, "w2", slow).await;
    let (text, moved) = tokio::join!(member.chat(json!({"model": MODEL, "stream": true})), async {
        first.wait(|heard| heard.requests.first().cloned()).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
        migrate(&operator, MODEL, json!({})).await.ok()
    });
    assert_eq!(content(&text.text()), ANSWER.concat());
    assert_eq!((&moved["id"], &moved["residency"]), (&json!(id), &json!("device")));
    assert_eq!(moved["workers"], json!([{"worker": "w2", "residency": "device", "requests": 0}]));
    let (before, after) = (first.last_request(), second.last_request());
    assert_eq!((before.attempt, after.attempt), (0, 1));
    assert!(before.replay.is_empty() && !after.replay[0].tokens.is_empty());
    assert_eq!(first.words(), [evict(&id, true)]);
    let words = second.words();
    assert!(words.len() == 1 && load(&id)(&words[0]), "{words:?}");
    // The next request finds it where it is now.
    member.chat(json!({"model": MODEL})).await.ok();
    assert_eq!(second.heard.lock().unwrap().requests.len(), 2);
    assert!(member.get(&format!("/v1/adapters/{id}")).await.ok().get("workers").is_none());
}

#[tokio::test]
async fn whence_and_whither_may_be_named() {
    let site = Site::open().await;
    let id = site.adapter("org-local", MODEL).await;
    let [one, two, three] = ["w1", "w2", "w3"];
    let w1 = worker::start(&site.storage, one, holder(&id)).await;
    let w2 = worker::start(&site.storage, two, holder(&id)).await;
    let w3 = worker::start(&site.storage, three, Script::default()).await;
    let places = |reply: Value| -> Vec<String> {
        let workers = reply["workers"].as_array().unwrap().clone();
        workers.iter().map(|copy| copy["worker"].as_str().unwrap().to_owned()).collect()
    };
    let client = site.client();
    let reply = migrate(&client, &id, json!({"from": one, "to": three})).await.ok();
    assert_eq!(places(reply), [two, three]);
    // Where it lies already, only the others let go.
    let reply = migrate(&client, &id, json!({"to": two})).await.ok();
    assert_eq!(places(reply), [two]);
    assert_eq!((w1.words().len(), w2.words().len(), w3.words().len()), (1, 0, 2));
    let path = format!("/v1/adapters/{id}/evict");
    assert_eq!(places(client.post(&path, json!({"worker": one})).await.ok()), [two]);
    assert_eq!(w1.words().len(), 1, "it held nothing");
    let reply = client.post_empty(&path).await.ok();
    assert_eq!((&reply["residency"], &reply["workers"]), (&json!("object_store"), &json!([])));
    assert_eq!(w2.words(), [evict(&id, false)]);
}

#[tokio::test]
async fn moves_that_cannot_be_are_refused_with_the_reason() {
    let site = Site::with(GatewayConfig { open_access: true, ..quick() }).await;
    let id = site.adapter("org-local", MODEL).await;
    let client = site.client();
    let reply = migrate(&client, &id, json!({})).await;
    assert!(reply.status == 503 && reply.message().contains("No worker"), "{reply}");
    let _w1 = worker::start(&site.storage, "w1", holder(&id)).await;
    let reply = migrate(&client, &id, json!({})).await;
    assert!(reply.status == 400 && reply.message().contains("'w1' is the only one"), "{reply}");
    let draining = special(|presence| presence.draining = true);
    let _draining = worker::start(&site.storage, "draining", draining).await;
    let foreign = special(|presence| presence.base = "other".to_owned());
    let _foreign = worker::start(&site.storage, "foreign", foreign).await;
    let reloaded = special(|presence| presence.base_fingerprint = "changed".to_owned());
    let _reloaded = worker::start(&site.storage, "reloaded", reloaded).await;
    assert_eq!(migrate(&client, &id, json!({})).await.status, 400, "none of them can take it");
    for (body, code, param, part) in [
        (json!({"to": "nobody"}), "invalid_value", "to", "no live worker 'nobody'"),
        (json!({"from": "nobody"}), "invalid_value", "from", "no live worker 'nobody'"),
        (json!({"from": "draining"}), "invalid_value", "from", "does not hold"),
        (json!({"to": "draining"}), "invalid_value", "to", "is draining"),
        (json!({"to": "foreign"}), "invalid_value", "to", "runs the base `other`, not `b`"),
        (json!({"to": "reloaded"}), "invalid_value", "to", "other weights"),
        (json!({"to": "w1", "from": "w1"}), "invalid_value", "to", "same worker"),
        (json!({"to": 1}), "invalid_type", "to", "a string"),
        (json!({"target": "w1"}), "unknown_parameter", "target", "Unknown"),
    ] {
        let reply = migrate(&client, &id, body).await;
        let expected = (400, Some(code.to_owned()), Some(param.to_owned()));
        assert_eq!(reply.refusal(), expected, "{reply}");
        assert!(reply.message().contains(part), "{reply}");
    }
    for path in ["evict", "migrate"] {
        let reply = client.post_empty(&format!("/v1/adapters/adp-x/{path}")).await;
        assert_eq!(reply.refusal().0, 404);
    }
    let evicted = client.post(&format!("/v1/adapters/{id}/evict"), json!({"worker": "x"})).await;
    let expected = (400, Some("invalid_value".to_owned()), Some("worker".to_owned()));
    assert_eq!(evicted.refusal(), expected);

    let cramped = Script { cramped: true, ..Script::default() };
    let _cramped = worker::start(&site.storage, "cramped", cramped).await;
    let reply = migrate(&client, &id, json!({"to": "cramped"})).await;
    assert!(reply.status == 503 && reply.message().contains("Nothing was moved"), "{reply}");
    let shown = client.get(&format!("/v1/adapters/{id}")).await.ok();
    assert_eq!(shown["residency"], "device", "it stays where it was");
}

#[tokio::test]
async fn only_operators_move_and_evict() {
    let site = Site::with(GatewayConfig::default()).await;
    let id = site.adapter("org-a", MODEL).await;
    let worker = worker::start(&site.storage, "w1", holder(&id)).await;
    let member = site.key("org-a", Role::Member).await;
    for action in ["evict", "migrate"] {
        let reply = member.post_empty(&format!("/v1/adapters/{id}/{action}")).await;
        assert_eq!(reply.refusal(), (403, Some("insufficient_permissions".to_owned()), None));
    }
    assert_eq!(worker.words(), []);
    let operator = site.key("org-b", Role::Operator).await;
    operator.post_empty(&format!("/v1/adapters/{id}/evict")).await.ok();
    assert_eq!(worker.words(), [evict(&id, false)]);
}

/// A job that `owner` trains.
async fn running_job(site: &Site, owner: &Claimant) -> storage::db::Claim {
    let body = json!({"model": BASE, "training_file": site.client().training_file().await});
    site.client().post("/v1/fine_tuning/jobs", body).await.ok();
    let jobs = site.storage.db.jobs();
    let claim = jobs.claim_validation(owner, 60_000).await.unwrap().unwrap();
    let resolved = Some(json!({"hyperparameters": {}, "training": {}}));
    let status = Some(StatusChange::Queued);
    jobs.write(&claim, &JobWrite { resolved, status, ..JobWrite::default() }).await.unwrap();
    jobs.claim_training(owner, 60_000).await.unwrap().unwrap()
}

fn claimant(worker: &str) -> Claimant {
    Claimant {
        worker: worker.to_owned(),
        base: BASE.to_owned(),
        base_fingerprint: PRINT.to_owned(),
    }
}

#[tokio::test]
async fn a_running_job_moves_when_its_owner_lets_go() {
    let site = Site::with(GatewayConfig { open_access: true, ..quick() }).await;
    let owner = worker::start(&site.storage, "w1", Script::default()).await;
    let claim = running_job(&site, &claimant("w1")).await;
    let (id, jobs, client) = (claim.job.id.clone(), site.storage.db.jobs(), site.client());
    let reply = migrate(&client, &id, json!({})).await;
    assert!(reply.status == 400 && reply.message().contains("only one"), "{reply}");
    let full = worker::start(&site.storage, "w2", special(|p| p.training_room = 0)).await;
    let reply = migrate(&client, &id, json!({})).await;
    assert!(reply.status == 400 && reply.message().contains("room"), "{reply}");
    let reply = migrate(&client, &id, json!({"to": "w2"})).await;
    assert_eq!(reply.refusal().2.as_deref(), Some("to"), "{reply}");
    assert_eq!((owner.words(), full.words()), (vec![], vec![]));

    let _third = worker::start(&site.storage, "w3", Script::default()).await;
    let reply = migrate(&client, &id, json!({"from": "w2"})).await;
    assert_eq!(reply.refusal().2.as_deref(), Some("from"), "{reply}");
    let reply = migrate(&client, &id, json!({})).await;
    assert!(reply.status == 503 && reply.message().contains("in time"), "{reply}");
    let (reply, ()) = tokio::join!(migrate(&client, &id, json!({"to": "w3"})), async {
        let told = |word: &ToWorker| match word {
            ToWorker::MoveJob { to, .. } => to.clone(),
            _ => None,
        };
        owner.wait(|heard| heard.words.iter().find_map(told)).await;
        jobs.release(&claim).await.unwrap();
        jobs.claim_training(&claimant("w3"), 60_000).await.unwrap().unwrap();
    });
    let moved = reply.ok();
    assert_eq!((&moved["object"], &moved["id"]), (&json!("fine_tuning.job"), &json!(id)));

    client.post_empty(&format!("/v1/fine_tuning/jobs/{id}/cancel")).await.ok();
    let reply = migrate(&client, &id, json!({})).await;
    assert!(reply.status == 400 && reply.message().contains("'cancelled'"), "{reply}");
    assert_eq!(migrate(&client, "ftjob-x", json!({})).await.status, 404);
}
