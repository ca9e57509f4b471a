//! The processes of the service: started, killed, frozen, and started again as an orchestrator
//! would; each writes its log to a file.

use super::blows::Process;
use super::schedule::{GATEWAYS, WORKERS};
use super::servers::Servers;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait until a process is ready, with all its tries.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Longest wait for a process that was asked to end: a gateway's streams may go on for 20 s.
const END_WITHIN: Duration = Duration::from_secs(45);
/// Before another try of a process that did not come up.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// One process that is kept running.
pub struct Member {
    /// Which.
    pub process: Process,
    binary: PathBuf,
    command: Vec<String>,
    log: PathBuf,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    child: Option<Child>,
    /// Part of a worker's id.
    name: usize,
}

impl Member {
    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts it and waits until it is ready; tries again while it ends early, as it does while a
    /// store is away. How many tries it took.
    pub async fn start(&self) -> usize {
        let began = Instant::now();
        for tries in 1.. {
            let before = std::fs::metadata(&self.log).map_or(0, |log| log.len());
            self.lock().child = Some(self.spawn());
            while self.ended().is_none() {
                assert!(began.elapsed() < READY_WITHIN, "{} does not come up", self.process);
                if self.log_since(before).contains(self.ready()) {
                    return tries;
                }
                tokio::time::sleep(LOOK).await;
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
        unreachable!("it tries until the time is up")
    }

    fn spawn(&self) -> Child {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = super::loquetier(&self.binary);
        command.args(&self.command);
        if matches!(self.process, Process::Worker(_)) {
            command.arg("--worker-id").arg(self.worker_id());
        }
        command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    fn ready(&self) -> &'static str {
        match self.process {
            Process::Gateway(_) => "gateway at http",
            Process::Worker(_) => "worker for '",
        }
    }

    fn log_since(&self, position: u64) -> String {
        let mut log = File::open(&self.log).unwrap();
        log.seek(SeekFrom::Start(position)).unwrap();
        let mut bytes = Vec::new();
        log.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How it ended, if it did.
    pub fn ended(&self) -> Option<String> {
        let mut running = self.lock();
        let Some(child) = &mut running.child else { return Some("not started".to_owned()) };
        child.try_wait().unwrap().map(|status| status.to_string())
    }

    /// Kills it.
    pub fn kill(&self) {
        let mut running = self.lock();
        if let Some(mut child) = running.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// A worker's id, now or from its next start on.
    pub fn worker_id(&self) -> String {
        format!("{}-{}", self.process.to_string().replace(' ', "-"), self.lock().name)
    }

    /// The next start is under another id.
    pub fn rename(&self) {
        self.lock().name += 1;
    }

    /// Sends a signal, by its name for `kill`.
    pub fn signal(&self, name: &str) {
        let id = self.lock().child.as_ref().map(Child::id).unwrap();
        assert!(Command::new("kill").args([name, &id.to_string()]).status().unwrap().success());
    }

    /// Asks it to end and waits; what is wrong with how it ended.
    pub async fn terminate(&self) -> Result<(), String> {
        self.signal("-TERM");
        let asked = Instant::now();
        loop {
            match self.ended() {
                Some(status) if status.ends_with(": 0") => return Ok(()),
                Some(status) => return Err(format!("{} ended with {status}", self.process)),
                None if asked.elapsed() > END_WITHIN => {
                    self.kill();
                    return Err(format!("{} did not end when asked", self.process));
                }
                None => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

/// All of them.
pub struct Fleet {
    /// By number.
    pub gateways: Vec<Member>,
    /// By number.
    pub workers: Vec<Member>,
    ports: Vec<u16>,
}

impl Fleet {
    /// Describes the processes; none runs yet. Logs go to a folder.
    pub fn new(servers: &Servers, binary: &Path, base: &Path, logs: &Path) -> Self {
        let member = |process: Process, command: Vec<String>| {
            let log = logs.join(format!("{process}.log").replace(' ', "-"));
            File::create(&log).unwrap();
            let command = command.into_iter().chain(servers.flags(process)).collect();
            let binary = binary.to_owned();
            Member { process, binary, command, log, running: Mutex::default() }
        };
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<String>>();
        // Free now, and in nobody's range of outgoing ports: a gateway comes back under its own.
        let ports = free_ports(GATEWAYS);
        let gateways = ports.iter().enumerate().map(|(number, port)| {
            let command = words(&format!("gateway --listen 127.0.0.1:{port}"));
            member(Process::Gateway(number), command)
        });
        let workers = (0..WORKERS).map(|number| {
            let mut command = words(
                "worker --device cpu --threads 1 --served-model-name tiny --lease-secs 3 \
                 --max-jobs 2 --base-model",
            );
            command.push(base.display().to_string());
            member(Process::Worker(number), command)
        });
        Self { gateways: gateways.collect(), workers: workers.collect(), ports }
    }

    /// One of them.
    pub fn member(&self, process: Process) -> &Member {
        match process {
            Process::Gateway(number) => &self.gateways[number],
            Process::Worker(number) => &self.workers[number],
        }
    }

    /// Every process.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.gateways.iter().chain(&self.workers)
    }

    /// Address of a gateway, up to and including `/v1`.
    pub fn root(&self, gateway: usize) -> String {
        format!("http://127.0.0.1:{}/v1", self.ports[gateway])
    }

    /// Starts all.
    pub async fn start(&self) {
        futures::future::join_all(self.members().map(Member::start)).await;
    }
}

/// Ports below those that systems hand out by themselves.
fn free_ports(count: usize) -> Vec<u16> {
    let mut ports = Vec::new();
    let mut candidates = (0..).map(|turn: u32| {
        let spread = std::process::id().wrapping_mul(31).wrapping_add(turn * 7) % 8000;
        12_000 + u16::try_from(spread).unwrap()
    });
    while ports.len() < count {
        let port = candidates.next().unwrap();
        if !ports.contains(&port) && std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            ports.push(port);
        }
    }
    ports
}
