//! Whether a request ended as it may: with the answer of a calm day, or with a clear error that
//! what was done to the service explains. Everything else is a fault.

use super::clients::{Answer, Ended, How};
use super::diary::Story;
use super::explain::Explanation;
use super::operator::Word;

/// Judgement of one request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The answer of a calm day.
    Equal,
    /// A clear error, for this reason.
    Explained(&'static str),
    /// Neither.
    Fault(String),
}

/// Judges a request of a running job's model: whatever has the fingerprint of a whole answer, in
/// `others`, must have its text.
pub fn judge_live(ended: &Ended, others: &[Ended], model: &str, story: &Story) -> Verdict {
    let whole = |other: &&Ended| {
        other.how == How::Whole && other.answer.fingerprint == ended.answer.fingerprint
    };
    let mut calm = ended.answer.clone();
    if let Some(other) = others.iter().find(whole) {
        calm.clone_from(&other.answer);
    }
    judge(ended, &calm, model, story)
}

/// Judges a request of a model by the answer it should have had and by what happened.
pub fn judge(ended: &Ended, calm: &Answer, model: &str, story: &Story) -> Verdict {
    let fault = |what: &str| {
        let took = ended.until.duration_since(ended.from).as_secs_f64();
        let Ended { asked, gateway, id, .. } = ended;
        Verdict::Fault(format!("{asked:?} at gateway {gateway}, {id}, {took:.1} s: {what}"))
    };
    if ended.how == How::Whole {
        return match &ended.answer {
            answer if answer == calm => Verdict::Equal,
            answer => fault(&difference(answer, calm)),
        };
    }
    if !ended.answer.begins(calm) {
        return fault(&format!("{:?}, after {}", ended.how, difference(&ended.answer, calm)));
    }
    match Explanation::of_request(ended, model, story).of(&ended.how) {
        Some(reason) => Verdict::Explained(reason),
        None => fault(&format!("{:?} without a reason", ended.how)),
    }
}

/// Where two answers part.
fn difference(answer: &Answer, calm: &Answer) -> String {
    for (index, (is, should)) in answer.choices.iter().zip(&calm.choices).enumerate() {
        if should.text.starts_with(&is.text) && is.text.len() < should.text.len() {
            let (got, of) = (is.text.len(), should.text.len());
            return format!("choice {index} has {got} of {of} bytes and ended: {:?}", is.finish);
        }
        if is.text != should.text {
            let pairs = is.text.char_indices().zip(should.text.chars());
            let at = pairs.take_while(|((_, a), b)| a == b).count();
            let tail = |text: &str| text.chars().skip(at).take(40).collect::<String>();
            let (is, should) = (tail(&is.text), tail(&should.text));
            return format!("choice {index} parts after {at} characters: {is:?} not {should:?}");
        }
        if is.finish != should.finish {
            return format!("choice {index} ended with {:?}, not {:?}", is.finish, should.finish);
        }
        if is.logprobs != should.logprobs {
            return format!("choice {index} has other log-probabilities");
        }
    }
    let (is, should) = (answer.choices.len(), calm.choices.len());
    format!("{is} of {should} choices, usage {:?}, not {:?}", answer.usage, calm.usage)
}

/// Judges the answer to what an operator or client told the service in a storm.
pub fn judge_word(word: &Word, story: &Story) -> Verdict {
    if word.how == How::Whole {
        return Verdict::Equal;
    }
    let explanation = Explanation::of_word(word, story);
    match explanation.of(&word.how).or_else(|| explanation.of_refusal(&word.how)) {
        Some(reason) => Verdict::Explained(reason),
        None => {
            let took = word.until.duration_since(word.from).as_secs_f64();
            let Word { what, gateway, how, .. } = word;
            Verdict::Fault(format!("{what} at gateway {gateway}, {took:.1} s: {how:?}"))
        }
    }
}

#[cfg(test)]
mod tests;
