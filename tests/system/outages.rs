//! The production form while a part of it is away: an import where no worker is alive, a base of
//! the same name and other weights, Postgres silent and gone. Needs the servers that `./dev test`
//! names.

#![allow(clippy::unwrap_used)]

mod common;

use common::client::{Client, Reply};
use common::cluster::Cluster;
use common::process::{complaint, loquetier};
use common::server::Server;
use common::stores::{Stores, server_of, through};
use common::{chat, tiny_base};
use loquetier_tests::proxy::{Proxy, Way};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use std::path::Path;
use std::time::{Duration, Instant};
use worker::adapters::{AdapterLayout, AdapterShape, peft};
use worker::base::{BaseFiles, ModuleDims};

/// The text of a short answer.
async fn answer(client: &Client, model: &str) -> String {
    client.ask(&chat(model, 20)).await.text().to_owned()
}

/// PEFT's two files for a base with modules of these sizes.
fn adapter(dims: &ModuleDims, value: f32) -> (Vec<u8>, Vec<u8>) {
    let targets = kernels::Module::ALL.to_vec();
    let shape = AdapterShape::new(4, 8.0, false, targets).unwrap();
    let layout = AdapterLayout::new(dims, &shape);
    let values: Vec<f32> =
        (0..layout.len()).map(|n| if n % 3 == 0 { value } else { -value }).collect();
    (peft::write_config(&shape, 0.0, "tiny"), peft::write_weights(&layout, &values))
}

async fn import(client: &Client, files: (Vec<u8>, Vec<u8>)) -> Reply {
    let form = Form::new()
        .text("name", "mine")
        .part("config", Part::bytes(files.0).file_name("adapter_config.json"))
        .part("weights", Part::bytes(files.1).file_name("adapter_model.safetensors"));
    client.reply(client.request(Method::POST, "/adapters").multipart(form)).await
}

fn dims(base: &Path) -> ModuleDims {
    BaseFiles::open(base).unwrap().config().dims()
}

/// A gateway judges adapters by the base's row: no worker need be alive, and none is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_are_imported_without_a_worker() {
    let Some(cluster) = Cluster::open() else { return };
    let (gateway, dims) = (cluster.gateway(), dims(&cluster.base));
    let reply = import(&gateway, adapter(&dims, 0.05)).await;
    assert!(reply.status == 400 && reply.body["error"]["param"] == "base", "no base: {reply:?}");

    let mut first = cluster.worker("first", &[]);
    assert!(answer(&gateway, "tiny").await.len() > 5);
    // The same name for other weights, while a worker serves it.
    let scratch = tempfile::tempdir().unwrap();
    let other = tiny_base(scratch.path());
    let weights = other.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(weights, bytes).unwrap();
    let mut refused = loquetier();
    refused.args(["worker", "--device", "cpu", "--served-model-name", "tiny", "--base-model"]);
    let said = complaint(refused.arg(&other).args(cluster.stores.flags()));
    assert!(said.contains("other weights"), "{said}");

    assert!(first.terminate().await);
    let reply = gateway.ask(&chat("tiny", 20)).await;
    let code = &reply.body["error"]["code"];
    assert!(reply.status == 503 && code == "server_is_overloaded", "{reply:?}");
    assert_eq!(gateway.get("/models").await["data"][0]["id"], "tiny");

    let wide = ModuleDims { hidden: 48, ..dims };
    let reply = import(&gateway, adapter(&wide, 0.05)).await;
    assert!(reply.status == 400 && reply.message().contains("the base needs"), "{reply:?}");
    let reply = import(&gateway, adapter(&dims, 0.05)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let model = reply.body["model"].as_str().unwrap().to_owned();

    let _second = cluster.worker("second", &[]);
    let (plain, adapted) = (answer(&gateway, "tiny").await, answer(&gateway, &model).await);
    assert_ne!(plain, adapted, "the adapter acts");
}

/// While Postgres is silent or refuses, known callers chat with known models at nearly the usual
/// speed, everything else is a quick and clear 503; afterwards all is as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inference_goes_on_without_postgres() {
    let Some(cluster) = Cluster::open() else { return };
    let proxy = Proxy::start(server_of(&cluster.stores.database)).await;
    let database = through(&cluster.stores.database, &proxy.address);
    let stores = Stores { database, ..cluster.stores.clone() };
    let _worker = cluster.worker_by(&stores, "only", &[]);
    let gateway = Server::gateway(&stores, &cluster.key);
    let imported = import(&gateway, adapter(&dims(&cluster.base), 0.05)).await;
    assert_eq!(imported.status, 200, "{imported:?}");
    let model = imported.body["model"].as_str().unwrap().to_owned();
    let (plain, adapted) = (answer(&gateway, "tiny").await, answer(&gateway, &model).await);

    for way in [Way::Silent, Way::Shut] {
        let stream = gateway.stream(&chat(&model, 20), || proxy.set(way)).await;
        assert_eq!(stream, adapted, "{way:?}: a stream under way");
        // Whoever asks first waits a little; the key is fresh, the name is not.
        let reply = gateway.ask(&chat("tiny", 20)).await;
        assert!(reply.status == 200 && reply.took < Duration::from_secs(5), "{way:?}: {reply:?}");
        for _ in 0..5 {
            let began = Instant::now();
            assert_eq!(answer(&gateway, "tiny").await, plain, "{way:?}");
            assert_eq!(answer(&gateway, &model).await, adapted, "{way:?}");
            assert!(began.elapsed() < Duration::from_secs(4), "{way:?}: {:?}", began.elapsed());
        }
        let unknown = gateway.ask(&chat("unknown", 20)).await;
        refuses(way, "a chat", &unknown);
        for path in ["/models", "/files", "/fine_tuning/jobs", "/../readyz"] {
            refuses(way, path, &gateway.try_get(path).await);
        }
        assert_eq!(gateway.try_get("/../healthz").await.status, 200, "{way:?}");

        proxy.set(Way::Open);
        gateway.until_ready().await;
        assert_eq!(answer(&gateway, &model).await, adapted, "{way:?}: afterwards");
        assert_eq!(gateway.get("/models").await["data"][0]["id"], "tiny");
    }
}

/// A quick and clear refusal.
fn refuses(way: Way, what: &str, reply: &Reply) {
    assert_eq!(reply.status, 503, "{way:?}, {what}: {reply:?}");
    assert!(reply.message().contains("database"), "{way:?}, {what}: {reply:?}");
    assert!(reply.took < Duration::from_secs(2), "{way:?}, {what}: {reply:?}");
}
