//! Processes of the service.

use super::until;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

/// The binary.
pub fn loquetier() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loquetier"));
    // The test server takes any credentials.
    command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
    command
}

/// What a command says that must fail.
pub fn complaint(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What a command prints that must succeed.
pub fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A process of the service; killed when dropped.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts one and waits until its log says `ready`; the rest of that line.
    pub fn start(command: &mut Command, ready: &str) -> (Self, String) {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let process = Self { child, log: log.clone() };
        let mut note = move |line: String| {
            let mut log = log.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        };
        loop {
            let Some(line) = lines.next() else { panic!("it ended: {}", process.log()) };
            let line = line.unwrap();
            if let Some((_, rest)) = line.split_once(ready) {
                let rest = rest.trim().to_owned();
                // The pipe has to be read, or the process would block on a full one.
                std::thread::spawn(move || lines.map_while(Result::ok).for_each(&mut note));
                return (process, rest);
            }
            note(line);
        }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends a signal, such as `-STOP`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// Kills it as a power cut would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end; whether it ended well.
    pub async fn ended(&mut self) -> bool {
        until("its end", async || self.child.try_wait().unwrap()).await.success()
    }

    /// Asks it to end, and waits; whether it ended well.
    pub async fn terminate(&mut self) -> bool {
        self.signal("-TERM");
        self.ended().await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("{}", self.log());
        }
    }
}
