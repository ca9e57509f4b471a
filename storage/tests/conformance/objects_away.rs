//! Objects in an S3 store that goes away, breaks off, stays silent and comes back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use loquetier_tests::proxy::{Proxy, Way};
use storage::objects::{ObjectKey, Objects, S3Limits};

use crate::object_rig::{Bucket, unfinished};
use crate::s3_faults::{Fault, Faults};

const BYTES: usize = 20 << 20;

/// A store behind a proxy that the test disturbs.
struct Site {
    objects: Objects,
    proxy: Proxy,
    faults: Arc<Faults>,
    bucket: Bucket,
    folder: String,
}

impl Site {
    /// None where no server was given.
    async fn open(patience_ms: u64) -> Option<Self> {
        let bucket = Bucket::given()?;
        let faults = Arc::new(Faults::default());
        let proxy = Proxy::filtered(&*bucket.server, faults.clone()).await;
        let limits = S3Limits {
            connect: Duration::from_secs(2),
            answer: Duration::from_secs(5),
            silence: Duration::from_secs(5),
            patience: Duration::from_millis(patience_ms),
        };
        let (config, folder) = bucket.config(&proxy.address, limits);
        let objects = Objects::open_s3(&config).expect("opens");
        Some(Self { objects, proxy, faults, bucket, folder })
    }
}

fn file(id: &str) -> ObjectKey {
    ObjectKey::File { id: id.to_owned() }
}

fn large() -> Bytes {
    (0..BYTES).map(|n| (n % 251) as u8).collect::<Vec<_>>().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn away_is_a_clear_error_and_back_is_as_before() {
    let Some(site) = Site::open(300).await else { return };
    let objects = &site.objects;
    objects.check().await.expect("answers");
    objects.put(&file("file-a"), Bytes::from_static(b"a")).await.expect("puts");
    site.proxy.set(Way::Shut);
    let began = Instant::now();
    let errors = [
        objects.check().await.expect_err("is away"),
        objects.get(&file("file-a")).await.expect_err("is away"),
        objects.head(&file("file-a")).await.expect_err("is away"),
        objects.put(&file("file-b"), Bytes::from_static(b"b")).await.expect_err("is away"),
        objects.put(&file("file-c"), large()).await.expect_err("is away"),
        objects.delete(&file("file-a")).await.expect_err("is away"),
    ];
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    for error in errors {
        assert!(error.is_unavailable(), "{error}");
        assert!(error.to_string().starts_with("object store unavailable: "), "{error}");
    }
    site.proxy.set(Way::Open);
    assert_eq!(objects.get(&file("file-a")).await.expect("gets"), "a");
    assert_eq!(objects.head(&file("file-b")).await.expect("reads"), None);
    objects.put(&file("file-c"), large()).await.expect("puts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_absence_is_waited_out() {
    let Some(site) = Site::open(20_000).await else { return };
    let mut writer = site.objects.writer(&file("file-a")).await.expect("begins");
    writer.write(large().slice(..9 << 20)).await.expect("writes");
    site.proxy.set(Way::Shut);
    let proxy = site.proxy.clone();
    let coming_back = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(800)).await;
        proxy.set(Way::Open);
    });
    writer.write(large().slice(9 << 20..)).await.expect("writes");
    assert_eq!(writer.finish().await.expect("finishes"), BYTES as u64);
    coming_back.await.expect("came back");
    assert!(site.objects.get(&file("file-a")).await.expect("gets") == large());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_store_is_away() {
    let bucket = Bucket::given();
    let Some(bucket) = bucket else { return };
    let proxy = Proxy::start(&*bucket.server).await;
    let limits = S3Limits {
        answer: Duration::from_millis(400),
        patience: Duration::from_millis(200),
        ..S3Limits::default()
    };
    let (config, _) = bucket.config(&proxy.address, limits);
    let objects = Objects::open_s3(&config).expect("opens");
    proxy.set(Way::Silent);
    let began = Instant::now();
    let error = objects.get(&file("file-a")).await.expect_err("is silent");
    assert!(error.is_unavailable(), "{error}");
    assert!(error.to_string().contains("no answer within"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_cut_in_the_middle_is_read_on() {
    let Some(site) = Site::open(10_000).await else { return };
    site.objects.put(&file("file-a"), large()).await.expect("puts");
    site.faults.set(Fault::CutAnswer { after: 7_000_001 });
    let (bytes, stream) = site.objects.get_stream(&file("file-a")).await.expect("reads");
    let read: Vec<Bytes> = stream.try_collect().await.expect("reads");
    assert_eq!(site.faults.now(), Fault::None, "the body was cut");
    assert_eq!(bytes, BYTES as u64);
    assert!(read.concat() == large());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_last_answer_is_lost_is_stored() {
    let Some(site) = Site::open(10_000).await else { return };
    site.faults.set(Fault::LoseCompletion);
    site.objects.put(&file("file-a"), large()).await.expect("puts");
    assert_eq!(site.faults.now(), Fault::None, "the answer was lost");
    assert!(site.objects.get(&file("file-a")).await.expect("gets") == large());
    assert_eq!(unfinished(&site.bucket, &site.folder).await, 0);
}
