//! The messages of this worker to each gateway as plain data: one a step and gateway, numbered
//! without holes.
//!
//! A gateway sees a lost message by the hole before the next one. So that the last message before
//! a silence is not lost unseen, a few empty ones follow it.

use std::collections::BTreeMap;
use storage::queue::message::{Item, TokenMessage};

/// Empty messages that follow the last one. More than one: they can be lost too.
const ECHOES: u32 = 4;

/// Where this worker stands with each gateway.
#[derive(Debug)]
pub struct Mail {
    incarnation: String,
    gateways: BTreeMap<String, Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// Number of the next message.
    next: u64,
    /// Empty messages still to follow.
    echoes: u32,
    /// Nothing was sent since the last echo was due.
    quiet: bool,
}

impl Mail {
    /// Of a worker that has sent nothing yet.
    pub fn new(incarnation: String) -> Self {
        Self { incarnation, gateways: BTreeMap::new() }
    }

    /// The messages of one step, by gateway. What happened to a request stays in order.
    pub fn post(
        &mut self,
        items: impl IntoIterator<Item = (String, Item)>,
    ) -> Vec<(String, TokenMessage)> {
        let mut by_gateway: BTreeMap<String, Vec<Item>> = BTreeMap::new();
        for (gateway, item) in items {
            by_gateway.entry(gateway).or_default().push(item);
        }
        let numbered = by_gateway.into_iter().map(|(gateway, items)| {
            let line = self.gateways.entry(gateway.clone()).or_default();
            line.echoes = ECHOES;
            (gateway, line.message(&self.incarnation, items))
        });
        numbered.collect()
    }

    /// The empty messages that are due; asked at intervals longer than a step.
    pub fn echo(&mut self) -> Vec<(String, TokenMessage)> {
        let mut due = Vec::new();
        for (gateway, line) in &mut self.gateways {
            if line.quiet && line.echoes > 0 {
                line.echoes -= 1;
                due.push((gateway.clone(), line.message(&self.incarnation, Vec::new())));
            }
            line.quiet = true;
        }
        due
    }

    /// A message was lost on its way: the next must tell.
    pub fn missed(&mut self, gateway: &str) {
        if let Some(line) = self.gateways.get_mut(gateway) {
            line.echoes = ECHOES;
        }
    }

    /// The gateway is gone; one that comes back begins anew.
    pub fn gone(&mut self, gateway: &str) {
        self.gateways.remove(gateway);
    }
}

impl Line {
    fn message(&mut self, incarnation: &str, items: Vec<Item>) -> TokenMessage {
        let sequence = self.next;
        self.next += 1;
        self.quiet = false;
        TokenMessage { worker_incarnation: incarnation.to_owned(), sequence, items }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::queue::message::Update;

    fn item(id: &str) -> Item {
        Item { request_id: id.to_owned(), attempt: 0, update: Update::Moved }
    }

    fn to(gateway: &str, id: &str) -> (String, Item) {
        (gateway.to_owned(), item(id))
    }

    fn shown(messages: &[(String, TokenMessage)]) -> Vec<(&str, u64, usize)> {
        messages.iter().map(|(g, m)| (g.as_str(), m.sequence, m.items.len())).collect()
    }

    #[test]
    fn one_message_a_step_and_gateway_numbered_from_zero() {
        let mut mail = Mail::new("i".to_owned());
        let step = mail.post([to("g", "a"), to("h", "b"), to("g", "c")]);
        assert_eq!(shown(&step), [("g", 0, 2), ("h", 0, 1)]);
        assert_eq!(step[0].1.items, [item("a"), item("c")]);
        assert_eq!(shown(&mail.post([to("g", "a")])), [("g", 1, 1)]);
        mail.gone("g");
        assert_eq!(shown(&mail.post([to("g", "a")])), [("g", 0, 1)]);
    }

    #[test]
    fn a_silence_begins_with_a_few_empty_messages() {
        let mut mail = Mail::new("i".to_owned());
        mail.post([to("g", "a")]);
        assert_eq!(shown(&mail.echo()), [], "sent to a moment ago");
        for number in 1..=u64::from(ECHOES) {
            assert_eq!(shown(&mail.echo()), [("g", number, 0)]);
        }
        assert_eq!(shown(&mail.echo()), []);
        mail.missed("g");
        assert_eq!(shown(&mail.echo()), [("g", 5, 0)]);
    }
}
