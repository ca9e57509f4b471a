//! The tokens of the requests that answer one call, as one stream.

use futures::stream::{BoxStream, SelectAll};
use futures::{StreamExt, stream};
use storage::queue::message::Refusal;

use crate::flight::{Admission, Delta};
use crate::inference::Running;

/// The tokens of one or several running requests; choices are numbered through, request-major.
pub struct Feed {
    deltas: SelectAll<BoxStream<'static, Result<Delta, Refusal>>>,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Of the first request.
    pub fingerprint: String,
    /// Tokens delivered so far.
    pub completion_tokens: u64,
}

impl Feed {
    /// From admitted requests of `choices` each; there is at least one.
    pub fn new(requests: Vec<Running>, choices: u32) -> Feed {
        let admissions: Vec<Admission> = requests.iter().map(Running::admission).collect();
        let prompt_tokens = admissions.iter().map(|a| u64::from(a.prompt_tokens)).sum();
        let fingerprint = admissions.into_iter().next().map(|a| a.fingerprint).unwrap_or_default();
        let streams = (0..).zip(requests).map(|(p, running): (u32, Running)| {
            stream::unfold(running, move |mut running| async move {
                let mut next = running.next().await?;
                if let Ok(delta) = &mut next {
                    delta.choice += p * choices;
                }
                Some((next, running))
            })
            .boxed()
        });
        let deltas = stream::select_all(streams);
        Feed { deltas, prompt_tokens, fingerprint, completion_tokens: 0 }
    }

    /// The next tokens of any choice; None once all have ended.
    pub async fn next(&mut self) -> Option<Result<Delta, Refusal>> {
        let next = self.deltas.next().await?;
        if let Ok(delta) = &next {
            self.completion_tokens += delta.tokens.len() as u64;
        }
        Some(next)
    }
}
