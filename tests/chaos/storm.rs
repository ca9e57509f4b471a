//! Does what a schedule says, and notes what it has done.

use super::blows::{Blow, Planned, Process, Store, Target};
use super::clients::Client;
use super::diary::{Diary, Trouble};
use super::fleet::Fleet;
use super::operator::Operator;
use super::servers::Servers;
use loquetier_tests::proxy::Way;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
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
pub async fn rage(
    world: &Arc<World>,
    client: &Client,
    models: &[String],
    jobs: &[String],
    storm: &[Planned],
) -> Vec<String> {
    let start = Instant::now();
    // A blow can last longer than planned: the next one at the same target waits for its end.
    let mut turns: HashMap<Target, Arc<Mutex<()>>> = HashMap::new();
    let blows = storm.iter().map(|planned| {
        let (world, client, planned) = (Arc::clone(world), client.clone(), planned.clone());
        let (models, jobs) = (models.to_vec(), jobs.to_vec());
        let turn = Arc::clone(turns.entry(planned.target).or_default());
        tokio::spawn(async move {
            sleep_until((start + planned.at).into()).await;
            let _turn = turn.lock().await;
            let (models, jobs) = (&models[..], &jobs[..]);
            let operator = Operator { world: &world, client: &client, models, jobs };
            strike(&operator, &planned).await
        })
    });
    let mut faults = Vec::new();
    for blow in blows.collect::<Vec<_>>() {
        faults.extend(blow.await.unwrap().err());
    }
    faults
}

async fn strike(operator: &Operator<'_>, planned: &Planned) -> Result<(), String> {
    let (world, lasts) = (operator.world, planned.lasts);
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
        (Target::Process(process @ Process::Gateway(_)), Blow::Terminate) => {
            leave(world, process, lasts).await
        }
        (Target::Process(process), blow) => hit(world, process, blow, lasts).await,
        (Target::Store(store), blow) => {
            take_away(world, store, blow, lasts).await;
            Ok(())
        }
        (Target::Adapter(_), _) => operator.act(planned).await,
        (Target::Job(number), _) => {
            let steered = world.diary.begin(Trouble::Steered(number));
            let done = operator.act(planned).await;
            world.diary.end(steered);
            done
        }
    }
}

/// A gateway is asked to end, and comes back so long after it has.
async fn leave(world: &World, process: Process, lasts: Duration) -> Result<(), String> {
    let member = world.fleet.member(process);
    if let Some(status) = member.ended() {
        return Err(format!("{process} had ended by itself: {status}"));
    }
    let leaving = world.diary.begin(Trouble::Leaving(process));
    let ended = member.terminate().await;
    let gone = world.diary.begin(Trouble::Gone(process));
    world.diary.end(leaving);
    sleep(lasts).await;
    member.start().await;
    world.diary.end(gone);
    ended
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
