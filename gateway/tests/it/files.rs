//! `/v1/files`.

use axum::body::Body;
use axum::http::header;
use gateway::GatewayConfig;
use serde_json::json;
use storage::objects::ObjectKind;

use crate::site::{Client, Site, form};

type Part<'a> = (&'a str, Option<&'a str>, &'a [u8]);

const LINES: &[u8] = b"{\"a\":1}\n{\"b\":2}\n";
const PURPOSE: Part<'static> = ("purpose", None, b"fine-tune");

async fn objects(site: &Site) -> usize {
    use futures::TryStreamExt;
    site.storage.objects.list(ObjectKind::Files).try_collect::<Vec<_>>().await.unwrap().len()
}

#[tokio::test]
async fn up_look_down_and_gone() {
    let site = Site::open().await;
    let client = site.client();
    // The purpose comes after the file; the name is not ASCII and no path.
    let parts: [Part; 2] = [("file", Some("../naïve 数据.jsonl"), LINES), PURPOSE];
    let file = client.upload("/v1/files", &parts).await.ok();
    let id = file["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("file-") && id.len() >= 25);
    let created_at = &file["created_at"];
    assert_eq!(
        file,
        json!({"id": id, "object": "file", "bytes": LINES.len(), "created_at": created_at,
               "filename": "../naïve 数据.jsonl", "purpose": "fine-tune", "status": "processed"})
    );
    assert_eq!(client.get(&format!("/v1/files/{id}")).await.ok(), file);
    let request = client
        .request("GET", &format!("/v1/files/{id}/content"))
        .header(header::ACCEPT, "application/binary");
    let content = client.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(&content.body[..], LINES);
    assert_eq!(content.header("content-type"), Some("application/octet-stream"));
    assert_eq!(content.header("content-length"), Some("16"));
    let deleted = client.delete(&format!("/v1/files/{id}")).await.ok();
    assert_eq!(deleted, json!({"id": id, "object": "file", "deleted": true}));
    for reply in [
        client.get(&format!("/v1/files/{id}")).await,
        client.get(&format!("/v1/files/{id}/content")).await,
        client.delete(&format!("/v1/files/{id}")).await,
    ] {
        assert_eq!(reply.refusal(), (404, None, Some("id".to_owned())));
        assert_eq!(reply.message(), format!("No such File object: {id}"));
    }
    assert_eq!(objects(&site).await, 0);
}

#[tokio::test]
async fn forms_that_are_refused_leave_nothing() {
    let site = Site::open().await;
    let client = site.client();
    let file: Part = ("file", Some("f"), LINES);
    let nul = "a\0b";
    for (parts, code, param) in [
        (vec![PURPOSE], "missing_required_parameter", "file"),
        (vec![file], "missing_required_parameter", "purpose"),
        (vec![file, ("purpose", None, b"x")], "invalid_value", "purpose"),
        (vec![file, ("purpose", None, b"vision")], "unsupported_value", "purpose"),
        (vec![PURPOSE, ("file", Some("f"), b"")], "invalid_value", "file"),
        (vec![PURPOSE, ("file", Some("f"), b"{}\n[]")], "invalid_value", "file"),
        (vec![("file", Some("f"), b"{}\n\xff"), PURPOSE], "invalid_value", "file"),
        (vec![PURPOSE, file, file], "invalid_value", "file"),
        (vec![PURPOSE, file, ("x", None, b"")], "unknown_parameter", "x"),
        (
            vec![PURPOSE, file, ("expires_after[seconds]", None, b"4000")],
            "missing_required_parameter",
            "expires_after[anchor]",
        ),
        (
            vec![PURPOSE, file, ("expires_after[seconds]", None, b"1")],
            "integer_below_min_value",
            "expires_after[seconds]",
        ),
    ] {
        let reply = client.upload("/v1/files", &parts).await;
        let expected = (400, Some(code.to_owned()), Some(param.to_owned()));
        assert_eq!(reply.refusal(), expected, "{reply}");
    }
    let reply = client.upload("/v1/files", &[PURPOSE, ("file", Some("f"), b"{}\n[]")]).await;
    assert!(reply.message().contains("Line 2"), "{reply}");
    // Headers of a part that carry U+0000 are not HTTP.
    assert_eq!(
        client.upload("/v1/files", &[PURPOSE, ("file", Some(nul), LINES)]).await.status,
        400
    );
    for (kind, body) in [
        ("multipart/form-data; boundary=XX", &b"--XX\r\nContent-Disp"[..]),
        ("multipart/form-data; boundary=XX", b"no boundary"),
        ("multipart/form-data", b""),
        ("application/json", b"{}"),
    ] {
        let request = client.request("POST", "/v1/files").header("content-type", kind);
        let reply = client.send(request.body(Body::from(body)).unwrap()).await;
        assert_eq!(reply.status, 400, "{kind}: {reply}");
    }
    let mut cut = form(&[PURPOSE, file]);
    cut.truncate(cut.len() - 20);
    let request = client
        .request("POST", "/v1/files")
        .header("content-type", "multipart/form-data; boundary=XX");
    assert_eq!(client.send(request.body(Body::from(cut)).unwrap()).await.status, 400);
    assert_eq!(client.get("/v1/files").await.ok()["data"], json!([]));
    assert_eq!(objects(&site).await, 0);
}

#[tokio::test]
async fn sizes_are_bounded_and_unchecked_purposes_take_any_bytes() {
    let config = GatewayConfig {
        open_access: true,
        file_bytes_max: 3000,
        batch_file_bytes_max: 1000,
        ..GatewayConfig::default()
    };
    let site = Site::with(config).await;
    let client = site.client();
    let line = format!("{{\"a\":\"{}\"}}", "x".repeat(2000));
    let file: Part = ("file", Some("f"), line.as_bytes());
    assert_eq!(client.upload("/v1/files", &[file, PURPOSE]).await.status, 200);
    let batch = client.upload("/v1/files", &[file, ("purpose", None, b"batch")]).await;
    assert_eq!(batch.refusal(), (413, Some("request_too_large".to_owned()), None));
    let big = vec![b' '; 4000];
    let reply = client.upload("/v1/files", &[PURPOSE, ("file", Some("f"), &big)]).await;
    assert_eq!(reply.status, 413);
    let binary = [0, 255, 13, 10, 45, 45, 88];
    let parts = [("purpose", None, &b"user_data"[..]), ("file", Some("x.bin"), &binary[..])];
    let id = client.upload("/v1/files", &parts).await.ok()["id"].as_str().unwrap().to_owned();
    assert_eq!(client.get(&format!("/v1/files/{id}/content")).await.body, &binary[..]);
    assert_eq!(objects(&site).await, 2);
}

#[tokio::test]
async fn files_may_expire() {
    let site = Site::open().await;
    let parts: [Part; 4] = [
        PURPOSE,
        ("expires_after[anchor]", None, b"created_at"),
        ("expires_after[seconds]", None, b"3600"),
        ("file", Some("f"), LINES),
    ];
    let file = site.client().upload("/v1/files", &parts).await.ok();
    let lives = file["expires_at"].as_i64().unwrap() - file["created_at"].as_i64().unwrap();
    assert_eq!(lives, 3600);
}

async fn ids(client: &Client<'_>, query: &str) -> (Vec<String>, bool) {
    let list = client.get(&format!("/v1/files?{query}")).await.ok();
    let data = list["data"].as_array().unwrap();
    let ids: Vec<String> = data.iter().map(|f| f["id"].as_str().unwrap().to_owned()).collect();
    let end = |id: Option<&String>| json!(id.cloned().unwrap_or_default());
    assert_eq!((&list["first_id"], &list["last_id"]), (&end(ids.first()), &end(ids.last())));
    (ids, list["has_more"].as_bool().unwrap())
}

#[tokio::test]
async fn pages_neither_repeat_nor_skip() {
    let site = Site::open().await;
    let client = site.client();
    assert_eq!(ids(&client, "").await, (vec![], false));
    let mut all = Vec::new();
    for _ in 0..5 {
        all.insert(0, client.training_file().await);
    }
    assert_eq!(ids(&client, "").await, (all.clone(), false));
    assert_eq!(ids(&client, "limit=5").await, (all.clone(), false));
    let mut seen = Vec::new();
    let mut query = "limit=2".to_owned();
    loop {
        let (page, more) = ids(&client, &query).await;
        seen.extend(page);
        if !more {
            break;
        }
        query = format!("limit=2&after={}", seen.last().unwrap());
    }
    assert_eq!(seen, all);
    let (mut ascending, _) = ids(&client, "order=asc").await;
    ascending.reverse();
    assert_eq!(ascending, all);
    assert_eq!(ids(&client, "purpose=batch").await, (vec![], false));
    for bad in ["limit=0", "limit=10001", "after=file-x", "order=x"] {
        assert_eq!(client.get(&format!("/v1/files?{bad}")).await.status, 400, "{bad}");
    }
}

#[tokio::test]
async fn a_repeated_upload_is_made_once() {
    let site = Site::open().await;
    let client = site.client();
    let upload = |content: &'static [u8]| {
        let request = client
            .request("POST", "/v1/files")
            .header("content-type", "multipart/form-data; boundary=XX")
            .header("idempotency-key", "once")
            .body(Body::from(form(&[PURPOSE, ("file", Some("f"), content)])))
            .unwrap();
        client.send(request)
    };
    let first = upload(LINES).await.ok();
    assert_eq!(upload(LINES).await.ok(), first);
    assert_eq!(upload(b"{}").await.status, 400);
    assert_eq!(objects(&site).await, 1);
}
