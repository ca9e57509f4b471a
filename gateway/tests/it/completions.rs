//! Text completions.

use serde_json::{Value, json};
use storage::queue::message::Input;

use crate::chat::settled;
use crate::site::Site;
use crate::worker::{self, Script};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_whole_reply() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    let body = json!({"model": "b", "prompt": "say", "logprobs": 1});
    let reply = site.client().post(PATH, body).await;
    insta::assert_json_snapshot!("completion", settled(reply.ok()));
    assert_eq!(worker.last_request().limits.max_tokens, Some(16));
}

#[tokio::test]
async fn prompts_come_in_four_shapes() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    for (prompt, inputs) in [
        (json!("a"), vec![Input::Text("a".to_owned())]),
        (json!(["a", "b"]), vec![Input::Text("a".to_owned()), Input::Text("b".to_owned())]),
        (json!([1, 2]), vec![Input::Tokens(vec![1, 2])]),
        (json!([[1], [2, 3]]), vec![Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])]),
    ] {
        worker.heard.lock().unwrap().requests.clear();
        let reply = site.client().post(PATH, json!({"model": "b", "prompt": prompt})).await.ok();
        assert_eq!(reply["choices"].as_array().unwrap().len(), inputs.len());
        assert_eq!(reply["usage"]["prompt_tokens"], 9 * inputs.len());
        let heard: Vec<Input> =
            worker.heard.lock().unwrap().requests.iter().map(|r| r.input.clone()).collect();
        assert_eq!(heard, inputs);
    }
}

#[tokio::test]
async fn choices_are_prompt_major_and_an_echo_comes_first() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::saying(&["1", "2"])).await;
    let body = json!({"model": "b", "prompt": ["x", "y"], "n": 2, "echo": true});
    let reply = site.client().post(PATH, body.clone()).await.ok();
    let choices = reply["choices"].as_array().unwrap();
    let told: Vec<(u64, &str)> = choices
        .iter()
        .map(|c| (c["index"].as_u64().unwrap(), c["text"].as_str().unwrap()))
        .collect();
    assert_eq!(told, [(0, "x12"), (1, "x12"), (2, "y12"), (3, "y12")]);
    assert_eq!(reply["usage"]["completion_tokens"], 8);

    let mut streamed = body;
    streamed["stream"] = json!(true);
    let text = site.client().post(PATH, streamed).await.text();
    let mut texts = vec![String::new(); 4];
    let mut reasons = 0;
    for data in text.split("\n\n").filter_map(|frame| frame.strip_prefix("data: ")) {
        let Ok(chunk) = serde_json::from_str::<Value>(data) else {
            assert_eq!(data, "[DONE]");
            continue;
        };
        assert_eq!(chunk["object"], "text_completion");
        assert!(chunk.get("usage").is_none());
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        reasons += usize::from(choice["finish_reason"] == "stop");
    }
    assert_eq!(texts, ["x12", "x12", "y12", "y12"]);
    assert_eq!(reasons, 4);
    assert!(text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn best_of_returns_the_likeliest_and_counts_all() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::saying(&["1", "2"])).await;
    let body = json!({"model": "b", "prompt": "x", "n": 1, "best_of": 3});
    let reply = site.client().post(PATH, body).await.ok();
    assert_eq!(reply["choices"].as_array().unwrap().len(), 1);
    assert_eq!(reply["choices"][0]["logprobs"], Value::Null);
    assert_eq!(reply["usage"]["completion_tokens"], 6);
    assert_eq!(worker.last_request().choices, 3);
}

#[tokio::test]
async fn no_tokens_may_be_asked_for() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let body = json!({"model": "b", "prompt": "x", "max_tokens": 0, "echo": true});
    let reply = site.client().post(PATH, body).await.ok();
    assert_eq!(reply["choices"][0]["text"], "x");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(reply["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn faults_name_their_field() {
    let site = Site::open().await;
    let many = json!(vec!["x"; 129]);
    for (extra, code, param) in [
        (json!({"prompt": null}), "missing_required_parameter", "prompt"),
        (json!({"prompt": []}), "empty_array", "prompt"),
        (json!({"prompt": [[]]}), "empty_array", "prompt[0]"),
        (json!({"prompt": [1, "a"]}), "invalid_type", "prompt[1]"),
        (json!({"prompt": ["a", 1]}), "invalid_type", "prompt[1]"),
        (json!({"prompt": [-1]}), "integer_below_min_value", "prompt[0]"),
        (json!({"prompt": many}), "array_above_max_length", "prompt"),
        (json!({"prompt": ["a", "b"], "n": 100}), "invalid_parameter_combination", "n"),
        (json!({"logprobs": 6}), "integer_above_max_value", "logprobs"),
        (json!({"best_of": 21}), "integer_above_max_value", "best_of"),
        (json!({"best_of": 1, "n": 2}), "invalid_parameter_combination", "best_of"),
        (json!({"best_of": 2, "stream": true}), "invalid_parameter_combination", "best_of"),
        (json!({"suffix": "x"}), "unsupported_parameter", "suffix"),
        (json!({"echo": true, "logprobs": 1}), "unsupported_value", "echo"),
        (json!({"messages": []}), "unknown_parameter", "messages"),
    ] {
        let mut body = json!({"model": "b", "prompt": "x"});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let reply = site.client().post(PATH, body).await;
        let expected = (400, Some(code.to_owned()), Some(param.to_owned()));
        assert_eq!(reply.refusal(), expected, "{extra}: {reply}");
    }
}
