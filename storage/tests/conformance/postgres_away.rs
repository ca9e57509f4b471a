//! Postgres that stays silent, refuses and comes back, seen through a proxy: every call ends within
//! a bound, later ones at once, and all of it works again soon after.

use std::time::{Duration, Instant};

use loquetier_tests::proxy::{Proxy, Way};
use storage::Db;
use storage::db::Role;

use crate::rig::{ORG, Rig};

/// Bound of one call, with some slack for a busy machine.
const BOUND: Duration = Duration::from_secs(7);

struct Site {
    rig: Rig,
    db: Db,
    proxy: Proxy,
}

impl Site {
    async fn open() -> Option<Self> {
        let rig = Rig::postgres().await?;
        let url = rig.url();
        let (head, rest) = url.split_once('@').expect("a password");
        let (server, database) = rest.split_once('/').expect("a database");
        let proxy = Proxy::start(server).await;
        let through = format!("{head}@{}/{database}", proxy.address);
        let db = Db::open_shared(&through).await.expect("opens");
        db.ping().await.expect("answers");
        Some(Self { rig, db, proxy })
    }

    /// Waits until the database answers again; how long that took.
    async fn back(&self) -> Duration {
        let began = Instant::now();
        while self.db.ping().await.is_err() {
            assert!(began.elapsed() < BOUND, "still away");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        began.elapsed()
    }
}

async fn refused(what: &str, outcome: impl Future<Output = storage::Result<()>>) -> Duration {
    let began = Instant::now();
    let error = outcome.await.expect_err(what);
    assert!(error.is_unavailable(), "{what}: {error}");
    began.elapsed()
}

async fn goes_and_comes_back(way: Way) {
    let Some(site) = Site::open().await else { return };
    let db = &site.db;
    let (_, secret) = db.keys().create(ORG, Role::Member).await.expect("creates");
    // More at once than the pool has connections.
    let busy = async || {
        let known = async || db.keys().authenticate(&secret).await.expect("reads").is_some();
        let all = futures::future::join_all((0..20).map(|_| known())).await;
        assert!(all.into_iter().all(|known| known));
    };
    busy().await;

    site.proxy.set(way);
    let first = refused("the first call", db.ping()).await;
    assert!(first < BOUND, "{first:?}");
    let write = async || db.keys().create(ORG, Role::Member).await.map(|_| ());
    let many = futures::future::join_all((0..20).map(|_| refused("a later call", write())));
    let slowest = many.await.into_iter().max().expect("twenty");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    // Long enough for several probes to fail.
    tokio::time::sleep(Duration::from_secs(3)).await;

    site.proxy.set(Way::Open);
    let back = site.back().await;
    assert!(back < Duration::from_secs(3), "{back:?}");
    busy().await;
    write().await.expect("writes");
    assert_eq!(site.rig.count("api_keys").await, 2, "what was refused was not done");
    site.rig.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent() {
    goes_and_comes_back(Way::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusing() {
    goes_and_comes_back(Way::Shut).await;
}

/// A reader with a limit of its own waits no longer, and spares the next one the wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_of_its_own() {
    let Some(site) = Site::open().await else { return };
    let limit = Duration::from_millis(300);
    let reading = async || site.db.within(limit, site.db.keys().any_ever()).await.map(|_| ());
    reading().await.expect("reads");
    site.proxy.set(Way::Silent);
    let first = refused("the first call", reading()).await;
    assert!(first >= limit && first < Duration::from_secs(1), "{first:?}");
    let second = refused("the second call", reading()).await;
    assert!(second < limit, "{second:?}");
    site.proxy.set(Way::Open);
    site.back().await;
    site.rig.remove().await;
}

/// A server that ends all connections, as a restart does, costs a moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ended_connections() {
    let Some(site) = Site::open().await else { return };
    let busy = futures::future::join_all((0..8).map(|_| site.db.ping()));
    busy.await.into_iter().for_each(|ping| ping.expect("answers"));
    site.proxy.cut();
    let back = site.back().await;
    assert!(back < Duration::from_secs(1), "{back:?}");
    site.rig.remove().await;
}
