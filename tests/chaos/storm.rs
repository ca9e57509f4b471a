//! Does what a schedule says, and notes what it has done.

use super::diary::{Diary, Trouble};
use super::fleet::Fleet;
use super::proxy::Way;
use super::schedule::{Blow, Planned, Process, Store, Target};
use super::servers::Servers;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, sleep_until};

/// Everything that can be hit, and the diary of it.
pub struct World {
    /// Where rows, messages and objects are.
    pub servers: Servers,
    /// The processes.
    pub fleet: Fleet,
    /// What happened.
    pub diary: Diary,
}

/// Lets a storm pass and repairs everything. What went wrong beside what was done.
pub async fn rage(world: &Arc<World>, storm: &[Planned]) -> Vec<String> {
    let start = Instant::now();
    let blows = storm.iter().map(|planned| {
        let (world, planned) = (Arc::clone(world), planned.clone());
        tokio::spawn(async move {
            sleep_until((start + planned.at).into()).await;
            strike(&world, &planned).await
        })
    });
    let mut faults = Vec::new();
    for blow in blows.collect::<Vec<_>>() {
        faults.extend(blow.await.unwrap().err());
    }
    faults
}

async fn strike(world: &World, planned: &Planned) -> Result<(), String> {
    let lasts = planned.lasts;
    match (planned.target, planned.blow) {
        (Target::Process(process), Blow::CutOff(store)) => {
            let number = world.diary.begin(Trouble::CutOff(process, store));
            // Half of them break, half of them go silent.
            let shut = lasts.as_millis().is_multiple_of(2);
            let way = if shut { Way::Shut } else { Way::Silent };
            world.servers.set_for(process, store, way);
            sleep(lasts).await;
            world.servers.set_for(process, store, Way::Open);
            world.diary.end(number);
            Ok(())
        }
        (Target::Process(process), blow) => hit(world, process, blow, lasts).await,
        (Target::Store(store), blow) => {
            take_away(world, store, blow, lasts).await;
            Ok(())
        }
    }
}

async fn hit(world: &World, process: Process, blow: Blow, lasts: Duration) -> Result<(), String> {
    let member = world.fleet.member(process);
    if let Some(status) = member.ended() {
        return Err(format!("{process} had ended by itself: {status}"));
    }
    if blow == Blow::Freeze {
        let number = world.diary.begin(Trouble::Frozen(process));
        member.signal("-STOP");
        sleep(lasts).await;
        member.signal("-CONT");
        world.diary.end(number);
        return Ok(());
    }
    let number = world.diary.begin(Trouble::Down(process));
    let mut ended = Ok(());
    match blow {
        Blow::Terminate => ended = member.terminate().await,
        _ => member.kill(),
    }
    if blow == Blow::Replace {
        member.rename();
    }
    sleep(lasts).await;
    member.start().await;
    world.diary.end(number);
    ended
}

async fn take_away(world: &World, store: Store, blow: Blow, lasts: Duration) {
    let number = world.diary.begin(Trouble::Away(store));
    match blow {
        Blow::Restart => world.servers.restart(store, lasts).await,
        _ => {
            let way = if blow == Blow::Cut { Way::Shut } else { Way::Silent };
            world.servers.set(store, way);
            sleep(lasts).await;
            world.servers.set(store, Way::Open);
        }
    }
    world.diary.end(number);
}
