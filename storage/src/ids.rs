//! Names for new rows and processes: a fixed prefix and random alphanumerics.

use rand::RngExt;
use rand::distr::Alphanumeric;

/// Characters after the prefix; 24 of 62 symbols are 142 bits, so ids never meet.
const ID_LENGTH: usize = 24;

/// What an id names; decides its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdKind {
    /// `file-…`
    File,
    /// `ftjob-…`
    Job,
    /// `ftevent-…`
    Event,
    /// `ftckpt_…`
    Checkpoint,
    /// `adp-…`
    Adapter,
    /// `key-…`
    Key,
    /// `chatcmpl-…`
    ChatCompletion,
    /// `cmpl-…`
    Completion,
    /// `call_…`
    ToolCall,
    /// `req_…`
    HttpRequest,
}

impl IdKind {
    /// The prefix, separator included.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::File => "file-",
            Self::Job => "ftjob-",
            Self::Event => "ftevent-",
            Self::Checkpoint => "ftckpt_",
            Self::Adapter => "adp-",
            Self::Key => "key-",
            Self::ChatCompletion => "chatcmpl-",
            Self::Completion => "cmpl-",
            Self::ToolCall => "call_",
            Self::HttpRequest => "req_",
        }
    }
}

/// A fresh id: prefix and 24 random alphanumerics.
pub fn new_id(kind: IdKind) -> String {
    format!("{}{}", kind.prefix(), alphanumerics(ID_LENGTH))
}

/// Names one run of one process.
pub fn incarnation() -> String {
    alphanumerics(ID_LENGTH)
}

/// `length` random characters of `[A-Za-z0-9]`, from the operating system's seeded generator.
pub fn alphanumerics(length: usize) -> String {
    rand::rng().sample_iter(Alphanumeric).take(length).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_carry_their_prefix_and_differ() {
        let one = new_id(IdKind::Job);
        assert!(one.starts_with("ftjob-"));
        assert_eq!(one.len(), "ftjob-".len() + ID_LENGTH);
        assert!(one["ftjob-".len()..].chars().all(|c| c.is_ascii_alphanumeric()));
        assert_ne!(one, new_id(IdKind::Job));
        assert_ne!(incarnation(), incarnation());
    }
}
