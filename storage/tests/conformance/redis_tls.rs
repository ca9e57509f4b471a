//! Redis behind TLS: `rediss://` trusts what the system trusts, and nothing else.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use storage::queue::{Queue, RedisOptions, RedisQueue};

use crate::queue_rig::{fresh, redis_url};

/// A certificate for `localhost`, its key, and who signed it; made for these tests.
const TLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/conformance/tls");

/// Tells the child where the server is.
const ADDRESS: &str = "LOQUETIER_TEST_REDISS_URL";

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already where it could not start.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server on a free port; the port may be taken in between, so a few are tried.
fn start() -> (Server, u16) {
    for _ in 0..5 {
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr();
        let port = port.expect("an address").port();
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.args(["--tls-port", &port.to_string(), "--tls-auth-clients", "no"]);
        for (flag, file) in [
            ("--tls-cert-file", "server.pem"),
            ("--tls-key-file", "server.key"),
            ("--tls-ca-cert-file", "ca.pem"),
        ] {
            command.args([flag, &format!("{TLS}/{file}")]);
        }
        let child = command.stdout(Stdio::null()).spawn().expect("redis-server is installed");
        let mut server = Server(child);
        for _ in 0..200 {
            if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return (server, port);
            }
            if server.0.try_wait().expect("is asked").is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
    }
    panic!("no redis-server with TLS started")
}

/// Runs [`child`] in a process of its own, since what is trusted belongs to the process; what it
/// printed, and whether all went well.
fn connect(address: &str, trusted: &str) -> (bool, String) {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "redis_tls::child", "--nocapture"])
        .env(ADDRESS, address)
        .env("SSL_CERT_FILE", trusted)
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

#[test]
fn encrypted_for_those_who_trust_it() {
    if redis_url().is_none() {
        return;
    }
    let (_server, port) = start();
    let trusted = format!("{TLS}/ca.pem");
    let (went_well, said) = connect(&format!("rediss://localhost:{port}"), &trusted);
    assert!(went_well && said.contains("1 passed"), "{said}");
    let (went_well, said) = connect(&format!("redis://localhost:{port}"), &trusted);
    assert!(!went_well, "in clear: {said}");
    // A certificate, but not who signed the server's.
    let foreign = format!("{TLS}/server.pem");
    let (went_well, said) = connect(&format!("rediss://localhost:{port}"), &foreign);
    assert!(!went_well && said.to_lowercase().contains("certificate"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    // A part of the test above, in a process of its own.
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let options = RedisOptions { call_limit: Duration::from_secs(3), ..fresh() };
    let queue = RedisQueue::connect(&address, options).await.expect("connects");
    // A call on the shared connection, and a reader with one of its own.
    let _messages = queue.gateway_tokens("gateway").await.expect("opens");
    assert_eq!(queue.workers().await.expect("reads"), []);
}
