//! The whole API on one page. Each route's handler carries its own OpenAPI description, so the
//! committed document and the router cannot disagree.

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::body::drain_after_refusal;
use crate::border::{authenticate, cors, no_route, panicked, stamp, wrong_method};
use crate::gateway::Gateway;
use crate::routes::{
    adapters, chat, completions, files, health, job_history, jobs, migration, models, workers,
};

/// Every route.
fn routes() -> OpenApiRouter<Arc<Gateway>> {
    OpenApiRouter::with_openapi(document())
        // Inference
        .routes(routes!(chat::create_chat_completion))
        .routes(routes!(completions::create_completion))
        // Models
        .routes(routes!(models::list_models))
        .routes(routes!(models::get_model, models::delete_model))
        // Files
        .routes(routes!(files::upload_file, files::list_files))
        .routes(routes!(files::get_file, files::delete_file))
        .routes(routes!(files::download_file))
        // Fine-tuning
        .routes(routes!(jobs::create_job, jobs::list_jobs))
        .routes(routes!(jobs::get_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(jobs::pause_job))
        .routes(routes!(jobs::resume_job))
        .routes(routes!(job_history::list_events))
        .routes(routes!(job_history::list_checkpoints))
        // Adapters
        .routes(routes!(adapters::import_adapter, adapters::list_adapters))
        .routes(routes!(adapters::get_adapter))
        .routes(routes!(adapters::export_adapter))
        .routes(routes!(adapters::pin_adapter))
        .routes(routes!(adapters::unpin_adapter))
        .routes(routes!(migration::migrate_adapter))
        .routes(routes!(migration::evict_adapter))
        // Operation
        .routes(routes!(workers::list_workers))
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
}

/// The service: the routes and, from the inside out, what every request passes.
pub fn app(gateway: Arc<Gateway>) -> Router {
    let (router, _) = routes().split_for_parts();
    let mut router = router
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&gateway), authenticate))
        .layer(from_fn(drain_after_refusal));
    if let Some(cors) = cors(&gateway.config().cors_origins) {
        router = router.layer(cors);
    }
    router.layer(CatchPanicLayer::custom(panicked)).layer(from_fn(stamp)).with_state(gateway)
}

fn document() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Loquetier")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Serve and fine-tune many LoRA adapters on one frozen base. \
             OpenAI-compatible; extensions are marked.",
        ))
        .build();
    let key = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    let components = ComponentsBuilder::new().security_scheme("api_key", key).build();
    let security = SecurityRequirement::new("api_key", [] as [&str; 0]);
    OpenApiBuilder::new().info(info).components(Some(components)).security(Some([security])).build()
}

/// The OpenAPI document.
pub fn openapi() -> OpenApi {
    let (_, mut document) = routes().split_for_parts();
    // The router's spelling of "the rest of the path" is not OpenAPI's.
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths =
        paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    document
}

/// The document as it is committed.
pub fn openapi_json() -> String {
    // Maps with text keys only: this always serialises.
    let mut text = openapi().to_pretty_json().expect("the document serialises");
    text.push('\n');
    text
}
