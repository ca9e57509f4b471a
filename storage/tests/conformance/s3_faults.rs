//! What an S3 server may do to single answers, on the way through a proxy.

use std::sync::{Mutex, PoisonError};

use loquetier_tests::proxy::{Fate, Filter};

const NO_SUCH_UPLOAD: &[u8] = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\
    content-length: 42\r\n\r\n<Error><Code>NoSuchUpload</Code></Error>\r\n";

/// What happens, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The connection breaks after so many bytes of answers.
    CutAnswer { after: usize },
    /// The request that completes an upload is done, its answer is lost, and the next one is told
    /// that there is no such upload, as by a store that has forgotten a completed one.
    LoseCompletion,
    /// The request has been passed on, on this connection.
    LoseAnswer { connection: u64 },
    /// The answer has been lost.
    ForgetUpload,
}

/// Does what it is set to.
#[derive(Default)]
pub struct Faults(Mutex<Fault>);

impl Faults {
    pub fn set(&self, fault: Fault) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// What is still to happen.
    pub fn now(&self) -> Fault {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filter for Faults {
    fn asked(&self, connection: u64, piece: &[u8]) -> Fate {
        match self.now() {
            Fault::LoseCompletion if completes(piece) => {
                self.set(Fault::LoseAnswer { connection });
                Fate::Pass
            }
            Fault::ForgetUpload if completes(piece) => {
                self.set(Fault::None);
                Fate::Answer(NO_SUCH_UPLOAD.to_vec())
            }
            _ => Fate::Pass,
        }
    }

    fn answered(&self, connection: u64, piece: &[u8]) -> Fate {
        match self.now() {
            Fault::CutAnswer { after } if piece.len() > after => {
                self.set(Fault::None);
                Fate::Break
            }
            Fault::CutAnswer { after } => {
                self.set(Fault::CutAnswer { after: after - piece.len() });
                Fate::Pass
            }
            Fault::LoseAnswer { connection: of } if of == connection => {
                self.set(Fault::ForgetUpload);
                Fate::Break
            }
            _ => Fate::Pass,
        }
    }
}

fn completes(request: &[u8]) -> bool {
    let head = &request[..request.len().min(400)];
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    line.starts_with(b"POST ") && String::from_utf8_lossy(line).contains("uploadId=")
}
