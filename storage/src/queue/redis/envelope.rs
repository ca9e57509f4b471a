//! What lies in Redis: a message under the version of its form.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::queue::message::PROTOCOL_VERSION;
use crate::{Error, Result};

#[derive(Serialize)]
struct Written<'a, T> {
    v: u32,
    m: &'a T,
}

#[derive(Deserialize)]
struct Read<T> {
    m: T,
}

/// Read first: another version may hold what this one cannot read.
#[derive(Deserialize)]
struct Version {
    v: u32,
}

/// The text of a message; the same message always gives the same text.
pub(super) fn seal<T: Serialize>(message: &T) -> Result<String> {
    serde_json::to_string(&Written { v: PROTOCOL_VERSION, m: message })
        .map_err(|error| Error::QueueMessage(error.to_string()))
}

/// The message in a text.
pub(super) fn open<T: DeserializeOwned>(text: &str) -> Result<T> {
    let unreadable = |error: serde_json::Error| Error::QueueMessage(error.to_string());
    let version: Version = serde_json::from_str(text).map_err(unreadable)?;
    if version.v != PROTOCOL_VERSION {
        let reason = format!("version {} is not {PROTOCOL_VERSION}", version.v);
        return Err(Error::QueueMessage(reason));
    }
    Ok(serde_json::from_str::<Read<T>>(text).map_err(unreadable)?.m)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::message::ToWorker;

    #[test]
    fn a_message_comes_back_and_another_version_is_refused() {
        let nudge = ToWorker::JobNudge { job_id: "j\"\u{0}é".to_owned() };
        let text = seal(&nudge).expect("seals");
        assert_eq!(open::<ToWorker>(&text).expect("opens"), nudge);
        let newer = text.replacen("\"v\":1", "\"v\":2", 1);
        let refused = open::<ToWorker>(&newer).expect_err("is refused").to_string();
        assert!(refused.contains("version 2 is not 1"), "{refused}");
        assert!(open::<ToWorker>("{}").is_err());
        assert!(open::<u32>(&text).is_err());
    }
}
