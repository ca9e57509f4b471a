//! Prometheus metrics of this process. Labels are bounded: routes as templates, kinds of targets,
//! never a model or an organization.

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use storage::queue::message::Target;

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Bounds of the latency histograms in seconds.
const LATENCY_SECS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Installs the recorder once per process; all crates report to it.
pub fn install() {
    RECORDER.get_or_init(|| {
        let recorder = match PrometheusBuilder::new().set_buckets(&LATENCY_SECS) {
            Ok(builder) => builder.build_recorder(),
            Err(error) => {
                tracing::error!(%error, "latency buckets were refused; summaries instead");
                PrometheusBuilder::new().build_recorder()
            }
        };
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed; /metrics stays empty");
        }
        handle
    });
}

/// The text format; `open_requests` are those of this moment.
pub fn render(open_requests: usize) -> String {
    metrics::gauge!("loquetier_open_requests").set(open_requests as f64);
    RECORDER.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Drains histograms; called every few seconds so that they stay bounded.
pub fn upkeep() {
    if let Some(handle) = RECORDER.get() {
        handle.run_upkeep();
    }
}

/// One HTTP request has been answered (its headers, not yet a streamed body).
pub fn answered(route: &str, method: &str, status: u16, took: Duration) {
    let labels = [
        ("route", route.to_owned()),
        ("method", method.to_owned()),
        ("status", status.to_string()),
    ];
    metrics::counter!("loquetier_http_requests_total", &labels).increment(1);
    let labels = [("route", route.to_owned())];
    metrics::histogram!("loquetier_http_request_seconds", &labels).record(took.as_secs_f64());
}

/// Time from the arrival of an inference request to its first token.
pub fn first_token(target: &Target, took: Duration) {
    let labels = [("target", kind(target))];
    let seconds = took.as_secs_f64();
    metrics::histogram!("loquetier_time_to_first_token_seconds", &labels).record(seconds);
}

/// Tokens of one inference request.
pub fn tokens(target: &Target, prompt_tokens: u64, completion_tokens: u64) {
    let labels = [("target", kind(target))];
    metrics::counter!("loquetier_inference_requests_total", &labels).increment(1);
    metrics::counter!("loquetier_prompt_tokens_total", &labels).increment(prompt_tokens);
    metrics::counter!("loquetier_completion_tokens_total", &labels).increment(completion_tokens);
}

fn kind(target: &Target) -> &'static str {
    match target {
        Target::Base => "base",
        Target::Adapter { .. } => "adapter",
        Target::Job { .. } => "job",
    }
}
