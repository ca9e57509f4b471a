//! Outlet: what leaves the engine, to gateways and to the runners of jobs. One message per step
//! and gateway.

use crate::engine::command::{
    Command, Drawn, Event, Fault, FaultKind, Finish, JobEvent, Output, RequestKey,
};
use crate::intake::{Shared, adapters, lock};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use storage::queue::Delivered;
use storage::queue::message::{
    Finish as WireFinish, Item, Refusal, RefusalKind, Token, TokenLogprob, TokenMessage, Update,
};
use tokio::sync::mpsc::Receiver;

/// What a log-probability that is not finite is written as.
const LEAST_LOGPROB: f32 = -9999.0;

/// Reads the engine's events until it is gone. Returns the device's fault, if that ended it.
pub async fn run(shared: Arc<Shared>, mut events: Receiver<Event>) -> Option<String> {
    let mut sequences = HashMap::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Outputs(outputs) => deliver(&shared, &mut sequences, outputs).await,
            Event::NeedAdapter(key) => {
                tokio::spawn(adapters::serve(shared.clone(), key));
            }
            Event::Job(id, news) => tell_job(&shared, &id, news),
            Event::Broken(fault) => return Some(fault),
        }
    }
    None
}

fn tell_job(shared: &Shared, id: &str, news: JobEvent) {
    let mut running = lock(&shared.running);
    let Some(run) = running.get_mut(id) else { return };
    if news == JobEvent::Started {
        run.live = true;
    }
    if run.news.try_send(news).is_err() {
        // Its runner could not write for far longer than its lease; it will find the lease lost.
        tracing::error!(job.id = id, "a job's news were dropped: its runner does not read them");
    }
}

async fn deliver(
    shared: &Shared,
    sequences: &mut HashMap<String, u64>,
    outputs: Vec<(RequestKey, Output)>,
) {
    let mut by_gateway: BTreeMap<String, Vec<Item>> = BTreeMap::new();
    {
        let mut routes = lock(&shared.routes);
        for (key, output) in outputs {
            let Some(route) = routes.get(key) else { continue };
            let item = Item {
                request_id: route.request_id.clone(),
                attempt: route.attempt,
                update: update(shared, &output),
            };
            by_gateway.entry(route.gateway.clone()).or_default().push(item);
            match output {
                Output::Failed(_) => {
                    routes.remove(key);
                }
                Output::Tokens { finish: Some(_), .. } => routes.choice_ended(key),
                Output::Tokens { .. } | Output::Admitted { .. } => {}
            }
        }
    }
    for (gateway, items) in by_gateway {
        let sequence = sequences.entry(gateway.clone()).or_default();
        let message = TokenMessage {
            worker_incarnation: shared.incarnation.clone(),
            sequence: *sequence,
            items,
        };
        *sequence += 1;
        if !publish(shared, &gateway, message).await {
            sequences.remove(&gateway);
        }
    }
}

/// Sends a message. False: the gateway is gone, and so are its requests.
async fn publish(shared: &Shared, gateway: &str, message: TokenMessage) -> bool {
    match shared.storage.queue.publish(gateway, message).await {
        Ok(Delivered::Delivered) => true,
        Ok(Delivered::Dropped) => {
            tracing::warn!(gateway.id = gateway, "a gateway reads too slowly; a message is lost");
            true
        }
        Ok(Delivered::GatewayGone) => {
            let keys = lock(&shared.routes).drop_gateway(gateway);
            for key in keys {
                shared.command(Command::Cancel(key)).await;
            }
            false
        }
        Err(error) => {
            tracing::warn!(gateway.id = gateway, %error, "a token message could not be sent");
            true
        }
    }
}

/// Refuses a request that never reached the engine.
pub async fn refuse(shared: &Shared, key: RequestKey, fault: Fault) {
    // Through the engine, so that one place numbers the messages of a gateway.
    shared.command(Command::Refuse(key, fault)).await;
}

fn update(shared: &Shared, output: &Output) -> Update {
    match output {
        Output::Admitted { prompt_tokens, version } => Update::Admitted {
            prompt_tokens: *prompt_tokens,
            fingerprint: fingerprint(shared, version),
        },
        Output::Tokens { choice, first, tokens, text, finish } => Update::Tokens {
            choice: *choice,
            first: *first,
            tokens: tokens.iter().map(|token| wire_token(shared, token)).collect(),
            text: text.clone(),
            finish: finish.map(|finish| match finish {
                Finish::Stop => WireFinish::Stop,
                Finish::Length => WireFinish::Length,
            }),
        },
        Output::Failed(fault) => Update::Failed(Refusal {
            kind: match fault.kind {
                FaultKind::Invalid => RefusalKind::Invalid,
                FaultKind::ContextLength => RefusalKind::ContextLength,
                FaultKind::ModelNotFound => RefusalKind::ModelNotFound,
                FaultKind::Overloaded => RefusalKind::Overloaded,
                FaultKind::Internal => RefusalKind::Internal,
            },
            message: fault.message.clone(),
            param: fault.param.clone(),
        }),
    }
}

/// Changes with the base, the device's numerics and the adapter version.
fn fingerprint(shared: &Shared, version: &str) -> String {
    let mut hash = Sha256::new();
    for part in [shared.base_fingerprint.as_str(), &shared.numerics, version] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let digest = hash.finalize();
    digest[..6].iter().fold("fp_".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

fn wire_token(shared: &Shared, token: &Drawn) -> Token {
    let bytes = |id: u32| shared.text.tokenizer.bytes(id).to_vec();
    let finite = |value: f32| if value.is_finite() { value } else { LEAST_LOGPROB };
    let logprob = token.logprob.as_ref().map(|(logprob, top)| TokenLogprob {
        logprob: finite(*logprob),
        bytes: token.bytes.clone(),
        top: top.iter().map(|(id, value)| (bytes(*id), finite(*value))).collect(),
    });
    Token { id: token.id, logprob }
}
