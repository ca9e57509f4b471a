//! The sweeper at the end of a storm: told that whatever no row names is old enough, it must leave
//! nothing that nobody needs, and everything that somebody does.

use super::leftovers;
use super::servers::Servers;
use super::storm::World;
use std::collections::BTreeSet;
use std::time::Duration;
use storage::Db;
use storage::sweep::{SweepSettings, Sweeper, Swept};

/// Rounds until nothing is left; each removes far more than a storm leaves.
const ROUNDS_MAX: usize = 10;
/// Times of objects are in whole seconds: after so long, all are of the past.
const SECOND: Duration = Duration::from_millis(1100);

/// Sweeps; what it should have left or taken.
pub async fn sweep(world: &World) -> Vec<String> {
    let servers = &world.servers;
    let before = needed(servers);
    tokio::time::sleep(SECOND).await;
    let mut faults = match swept(servers).await {
        Ok(swept) => {
            world.diary.say(format_args!("{swept:?}"));
            Vec::new()
        }
        Err(fault) => vec![fault],
    };
    let after = leftovers::named(servers);
    let changes = before.symmetric_difference(&after);
    faults.extend(changes.map(|name| format!("the sweeper changed what rows name: {name}")));
    let objects = leftovers::objects(servers).await;
    let missing = objects.missing.iter();
    faults.extend(missing.map(|name| format!("the sweeper took what a row names: {name}")));
    let orphans = objects.orphans.iter();
    faults.extend(orphans.map(|name| format!("the sweeper left what no row names: {name}")));
    let points = leftovers::query(servers, "resume_points.sql");
    faults.extend(points.iter().map(|point| format!("the sweeper left a resume point: {point}")));
    faults
}

/// What rows name and ought to name when all jobs are over: no resume points.
fn needed(servers: &Servers) -> BTreeSet<String> {
    let mut named = leftovers::named(servers);
    named.retain(|name| !name.starts_with("resume-points/"));
    named
}

/// Sweeps until a pass over everything finds nothing; all that was removed.
async fn swept(servers: &Servers) -> Result<Swept, String> {
    let db = Db::open_shared(&servers.database_url).await.unwrap();
    let settings = SweepSettings {
        period: Duration::ZERO,
        age: Duration::ZERO,
        pass_pause: Duration::ZERO,
        ..SweepSettings::default()
    };
    let sweeper = Sweeper::new(db.clone(), leftovers::store(servers), settings);
    let (mut all, mut passes) = (Swept::default(), 0);
    for _ in 0..ROUNDS_MAX {
        // The gateways sweep too, and say when the next pass is due.
        leftovers::query(servers, "sweep_now.sql");
        let swept = sweeper.round().await.map_err(|error| format!("sweeping: {error}"))?;
        all.files += swept.files;
        all.resume_points += swept.resume_points;
        all.idempotency += swept.idempotency;
        all.objects += swept.objects;
        all.uploads += swept.uploads;
        passes += usize::from(swept.pass_ended);
        // Uploads go in the second pass that sees them.
        if passes > 1 && swept == (Swept { pass_ended: true, ..Swept::default() }) {
            db.close().await;
            return Ok(Swept { pass_ended: true, ..all });
        }
    }
    Err(format!("the sweeper does not come to an end: {all:?}"))
}
