//! Outlet: what leaves the engine, to gateways and to the runners of jobs. One message per step
//! and gateway; `intake/mail.rs` numbers them.

use crate::engine::command::{
    Command, Drawn, Event, Fault, FaultKind, Finish, JobEvent, Output, RequestKey,
};
use crate::intake::mail::Mail;
use crate::intake::{Shared, adapters, lock};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;
use storage::queue::Delivered;
use storage::queue::message::{
    Finish as WireFinish, Refusal, RefusalKind, Token, TokenLogprob, TokenMessage, Update,
};
use tokio::sync::mpsc::Receiver;
use tokio::time::MissedTickBehavior;

/// What a log-probability that is not finite is written as.
const LEAST_LOGPROB: f32 = -9999.0;

/// How often a silence is looked for; a gateway sees the loss of a last message within two.
const ECHO_PERIOD: Duration = Duration::from_secs(1);

/// Reads the engine's events until it is gone. Returns the device's fault, if that ended it.
pub async fn run(shared: Arc<Shared>, mut events: Receiver<Event>) -> Option<String> {
    let mut mail = Mail::new(shared.incarnation.clone());
    let mut silence = tokio::time::interval(ECHO_PERIOD);
    silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _ = silence.tick() => {
                let echoes = mail.echo();
                publish(&shared, &mut mail, echoes).await;
                continue;
            }
        };
        match event? {
            Event::Outputs(outputs) => deliver(&shared, &mut mail, outputs).await,
            Event::NeedAdapter(key) => {
                tokio::spawn(adapters::serve(shared.clone(), key));
            }
            Event::Job(id, news) => tell_job(&shared, &id, news),
            Event::Broken(fault) => return Some(fault),
        }
    }
}

fn tell_job(shared: &Shared, id: &str, news: JobEvent) {
    let mut runs = lock(&shared.runs);
    if news == JobEvent::Started {
        runs.set_live(id, true);
    }
    let Some(run) = runs.get(id) else { return };
    if run.news.try_send(news).is_err() {
        // Its runner could not write for far longer than its lease; it will find the lease lost.
        tracing::error!(job.id = id, "a job's news were dropped: its runner does not read them");
    }
}

async fn deliver(shared: &Shared, mail: &mut Mail, outputs: Vec<(RequestKey, Output)>) {
    let messages = {
        let mut routes = lock(&shared.routes);
        let mut items = Vec::with_capacity(outputs.len());
        for (key, output) in outputs {
            if routes.get(key).is_some() {
                items.extend(routes.address(key, update(shared, &output)));
            }
        }
        mail.post(items)
    };
    publish(shared, mail, messages).await;
}

/// Sends messages. Of a gateway that is gone the requests are dropped.
async fn publish(shared: &Shared, mail: &mut Mail, messages: Vec<(String, TokenMessage)>) {
    for (gateway, message) in messages {
        let mark = lock(&shared.routes).mark();
        match shared.storage.queue.publish(&gateway, message).await {
            Ok(Delivered::Delivered) => {}
            Ok(Delivered::Dropped) => {
                tracing::warn!(gateway.id = gateway, "a gateway is too slow; a message is lost");
                mail.missed(&gateway);
            }
            Ok(Delivered::GatewayGone) => {
                mail.gone(&gateway);
                let keys = lock(&shared.routes).drop_gateway(&gateway, mark);
                for key in keys {
                    shared.command(Command::Cancel(key)).await;
                }
            }
            Err(error) => {
                tracing::warn!(gateway.id = gateway, %error, "a token message could not be sent");
                mail.missed(&gateway);
            }
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
        Output::Moved => Update::Moved,
        Output::Failed(fault) => Update::Failed(Refusal {
            kind: match fault.kind {
                FaultKind::Invalid => RefusalKind::Invalid,
                FaultKind::ContextLength => RefusalKind::ContextLength,
                FaultKind::ModelNotFound => RefusalKind::ModelNotFound,
                FaultKind::Overloaded => RefusalKind::Overloaded,
                FaultKind::Unavailable => RefusalKind::Unavailable,
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
