//! The error table of the contract, row by row.

use axum::body::Body;
use axum::http::header;
use gateway::GatewayConfig;
use serde_json::{Value, json};
use storage::queue::message::{Refusal, RefusalKind};

use crate::site::{BASE, Site, chat_body};
use crate::worker::{self, Script};

fn text(value: Option<&str>) -> Option<String> {
    value.map(str::to_owned)
}

#[tokio::test]
async fn bodies_that_are_no_json_objects() {
    let site = Site::open().await;
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(50_000), "]".repeat(50_000));
    for body in ["", "{", "[]", "\"x\"", "{\"a\":NaN}", "{\"a\":1e999}", "{\"a\":Infinity}", &deep]
    {
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/fine_tuning/jobs"] {
            let reply = site.client().post_text(path, body).await;
            assert_eq!(reply.refusal(), (400, None, None), "{reply}");
            assert_eq!(reply.message(), "We could not parse the JSON body of your request.");
        }
    }
}

type Case = (Value, &'static str, &'static str);

/// Sends a good chat request with each change; all are refused with that code and field.
async fn refused(cases: Vec<Case>) {
    let site = Site::open().await;
    for (extra, code, param) in cases {
        let reply = site.client().chat(extra.clone()).await;
        let expected = (400, text(Some(code)), text(Some(param)));
        assert_eq!(reply.refusal(), expected, "{extra}: {reply}");
    }
}

#[tokio::test]
async fn the_model_and_the_messages() {
    refused(vec![
        (json!({"model": null}), "missing_required_parameter", "model"),
        (json!({"model": 1}), "invalid_type", "model"),
        (json!({"messages": null}), "missing_required_parameter", "messages"),
        (json!({"messages": []}), "empty_array", "messages"),
        (json!({"messages": {}}), "invalid_type", "messages"),
        (json!({"messages": [1]}), "invalid_type", "messages[0]"),
        (json!({"messages": [{"content": "x"}]}), "missing_required_parameter", "messages[0].role"),
        (
            json!({"messages": [{"role": "bot", "content": "x"}]}),
            "invalid_value",
            "messages[0].role",
        ),
        (
            json!({"messages": [{"role": "function", "content": "x"}]}),
            "unsupported_value",
            "messages[0].role",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            json!({"messages": [{"role": "user", "content": null}]}),
            "invalid_type",
            "messages[0].content",
        ),
        (
            json!({"messages": [{"role": "user", "content": 1}]}),
            "invalid_type",
            "messages[0].content",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "unsupported_value",
            "messages[0].content[0]",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "x"}]}]}),
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
    ])
    .await;
}

#[tokio::test]
async fn sampling_and_limits() {
    let many: Vec<Value> = (0..5).map(|i| json!(i.to_string())).collect();
    refused(vec![
        (json!({"temperature": 3}), "decimal_above_max_value", "temperature"),
        (json!({"temperature": -0.1}), "decimal_below_min_value", "temperature"),
        (json!({"temperature": "hot"}), "invalid_type", "temperature"),
        (json!({"top_p": 1.1}), "decimal_above_max_value", "top_p"),
        (json!({"presence_penalty": 2.1}), "decimal_above_max_value", "presence_penalty"),
        (json!({"frequency_penalty": -2.1}), "decimal_below_min_value", "frequency_penalty"),
        (json!({"n": 0}), "integer_below_min_value", "n"),
        (json!({"n": 129}), "integer_above_max_value", "n"),
        (json!({"n": "2"}), "invalid_type", "n"),
        (json!({"n": 1.5}), "invalid_type", "n"),
        (json!({"max_tokens": 0}), "integer_below_min_value", "max_tokens"),
        (
            json!({"max_tokens": 1, "max_completion_tokens": 2}),
            "invalid_parameter_combination",
            "max_tokens",
        ),
        (json!({"min_tokens": 5, "max_tokens": 2}), "invalid_parameter_combination", "min_tokens"),
        (json!({"stop": many}), "array_above_max_length", "stop"),
        (json!({"stop": [1]}), "invalid_type", "stop[0]"),
        (json!({"stop": [""]}), "string_below_min_length", "stop"),
        (json!({"seed": 1e30}), "integer_above_max_value", "seed"),
        (json!({"top_logprobs": 2}), "invalid_value", "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "integer_above_max_value", "top_logprobs"),
        (json!({"logit_bias": {"x": 1}}), "invalid_value", "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "decimal_above_max_value", "logit_bias.1"),
    ])
    .await;
}

#[tokio::test]
async fn what_shapes_the_answer() {
    let long = "x".repeat(513);
    refused(vec![
        (json!({"stream_options": {}}), "invalid_value", "stream_options"),
        (
            json!({"stream": true, "stream_options": {"x": 1}}),
            "unknown_parameter",
            "stream_options.x",
        ),
        (
            json!({"response_format": {"type": "json_object"}}),
            "unsupported_value",
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "unsupported_value",
            "response_format",
        ),
        (json!({"response_format": {"type": "xml"}}), "invalid_value", "response_format.type"),
        (json!({"tools": [{"type": "custom"}]}), "unsupported_value", "tools[0].type"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "invalid_value",
            "tools[0].function.name",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
            "unsupported_parameter",
            "tools",
        ),
        (json!({"tool_choice": "auto"}), "invalid_value", "tool_choice"),
        (json!({"functions": [{}]}), "unsupported_parameter", "functions"),
        (json!({"function_call": "auto"}), "unsupported_parameter", "function_call"),
        (json!({"modalities": ["text", "audio"]}), "unsupported_value", "modalities"),
        (json!({"audio": {}}), "unsupported_parameter", "audio"),
        (json!({"web_search_options": {}}), "unsupported_parameter", "web_search_options"),
        (json!({"service_tier": "gold"}), "invalid_value", "service_tier"),
        (json!({"metadata": {"k": 1}}), "invalid_type", "metadata.k"),
        (json!({"metadata": {"k": long}}), "string_above_max_length", "metadata.k"),
        (json!({"user": 1}), "invalid_type", "user"),
        (json!({"store": "yes"}), "invalid_type", "store"),
        (json!({"max_token": 5}), "unknown_parameter", "max_token"),
    ])
    .await;
}

#[tokio::test]
async fn messages_say_what_was_expected() {
    let site = Site::open().await;
    for (extra, message) in [
        (json!({"messages": null}), "Missing required parameter: 'messages'."),
        (json!({"n": "2"}), "Invalid type for 'n': expected an integer, but got a string instead."),
        (
            json!({"temperature": 3}),
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 \
             instead.",
        ),
    ] {
        assert_eq!(site.client().chat(extra).await.message(), message);
    }
}

#[tokio::test]
async fn what_is_accepted_without_effect_and_what_null_means() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let replayed = json!({
        "role": "assistant", "content": null, "refusal": null, "annotations": [], "audio": null,
        "function_call": null, "tool_calls": [{"id": "call_1", "type": "function",
        "function": {"name": "f", "arguments": "{}"}}], "reasoning_content": "hm"
    });
    for extra in [
        json!({"stop": [], "tools": [], "functions": [], "function_call": "none"}),
        json!({"temperature": null, "n": null, "stop": null, "tools": null, "stream": null}),
        json!({"modalities": ["text"], "response_format": {"type": "text"}, "store": true}),
        json!({"user": "u", "metadata": {"k": "v"}, "reasoning_effort": "low", "verbosity": "low"}),
        json!({"max_tokens": 1_000_000_000_000i64, "prediction": {}, "prompt_cache_key": "k"}),
        json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}),
        json!({"messages": [
            {"role": "system", "content": "s"}, {"role": "developer", "content": "d"},
            {"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
            ]},
            replayed, {"role": "tool", "tool_call_id": "call_1", "content": "r"},
            {"role": "user", "content": ""}, {"role": "assistant"}
        ]}),
        json!({"messages": [{"role": "user", "content": "a\u{0}\u{1}\u{fffd}🦀"}]}),
    ] {
        let reply = site.client().chat(extra.clone()).await;
        assert_eq!(reply.status, 200, "{extra}: {reply}");
    }
    let tier = site.client().chat(json!({"service_tier": "auto"})).await.ok();
    assert_eq!(tier["service_tier"], "default");
}

#[tokio::test]
async fn models_come_before_parameters_and_keys_before_everything() {
    let site = Site::with(GatewayConfig::default()).await;
    let reply = site.client().post_text("/v1/chat/completions", "no json").await;
    assert_eq!(reply.status, 401);
    let member = site.key("org-a", storage::db::Role::Member).await;
    let body = json!({"model": "nope", "messages": 7, "temperature": 9});
    let reply = member.post("/v1/chat/completions", body).await;
    assert_eq!(reply.refusal(), (404, text(Some("model_not_found")), text(Some("model"))));
    assert_eq!(reply.message(), "The model `nope` does not exist or you do not have access to it.");
}

#[tokio::test]
async fn routes_and_methods_that_do_not_exist() {
    let site = Site::open().await;
    let client = site.client();
    for path in ["/v1/foo", "/v1", "/v1/", "/", "/v1/batches", "/v1/embeddings", "/v1/models/"] {
        let reply = client.get(path).await;
        assert_eq!(reply.refusal(), (404, None, None), "{path}");
        assert_eq!(reply.message(), format!("Invalid URL (GET {path})"));
    }
    for (method, path, allow) in [
        ("DELETE", "/v1/chat/completions", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/files", "POST"),
        ("POST", "/v1/models", "GET"),
        ("OPTIONS", "/v1/models", "GET"),
    ] {
        let request = client.request(method, path).body(Body::empty()).unwrap();
        let reply = client.send(request).await;
        assert_eq!(reply.refusal(), (405, text(Some("method_not_supported")), None), "{path}");
        assert!(reply.header("allow").unwrap().contains(allow), "{path}");
    }
    let request = client.request("HEAD", "/v1/models").body(Body::empty()).unwrap();
    assert_eq!(client.send(request).await.status, 200);
}

#[tokio::test]
async fn bodies_over_the_limit() {
    let config =
        GatewayConfig { open_access: true, body_bytes_max: 1000, ..GatewayConfig::default() };
    let site = Site::with(config).await;
    let big = chat_body(json!({"user": "x".repeat(2000)})).to_string();
    let reply = site.client().post_text("/v1/chat/completions", &big).await;
    assert_eq!(reply.refusal(), (413, text(Some("request_too_large")), None));
    // Without an announced length.
    let chunks: Vec<Result<Vec<u8>, std::io::Error>> =
        big.as_bytes().chunks(100).map(|chunk| Ok(chunk.to_vec())).collect();
    let body = Body::from_stream(futures::stream::iter(chunks));
    let request = site.client().request("POST", "/v1/chat/completions").body(body).unwrap();
    assert_eq!(site.client().send(request).await.status, 413);
}

#[tokio::test]
async fn what_a_worker_refuses_is_a_clean_refusal() {
    let site = Site::open().await;
    for (kind, param, expected) in [
        (RefusalKind::Invalid, None, (400, text(Some("invalid_value")), text(Some("messages")))),
        (
            RefusalKind::ContextLength,
            None,
            (400, text(Some("context_length_exceeded")), text(Some("messages"))),
        ),
        (
            RefusalKind::Invalid,
            Some("logit_bias"),
            (400, text(Some("invalid_value")), text(Some("logit_bias"))),
        ),
        (
            RefusalKind::ModelNotFound,
            None,
            (404, text(Some("model_not_found")), text(Some("model"))),
        ),
        (RefusalKind::Overloaded, None, (503, text(Some("server_is_overloaded")), None)),
        (RefusalKind::Internal, None, (500, None, None)),
    ] {
        let refusal =
            Refusal { kind, message: "as the worker says".to_owned(), param: text(param) };
        let script = Script { refusal: Some(refusal), ..Script::default() };
        let _worker = worker::start(&site.storage, "w", script).await;
        for stream in [false, true] {
            let reply = site.client().chat(json!({"stream": stream})).await;
            assert_eq!(reply.refusal(), expected, "{kind:?}");
            assert_eq!(reply.headers[header::CONTENT_TYPE], "application/json");
            let hidden = kind == RefusalKind::Internal || kind == RefusalKind::ModelNotFound;
            assert_eq!(reply.message() == "as the worker says", !hidden, "{reply}");
        }
    }
}

#[tokio::test]
async fn a_base_without_a_worker_is_busy_not_unknown() {
    let site = Site::open().await;
    let reply = site.client().chat(json!({})).await;
    assert_eq!(reply.refusal(), (503, text(Some("server_is_overloaded")), None));
    assert!(reply.message().contains(BASE));
}
